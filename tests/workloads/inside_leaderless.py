"""A program of threads over SQLite whose main thread ends at once. python3 inside_leaderless.py DIRECTORY

Each thread counts, in memory and in a database of its own, and looks that the two agree.
"""

import ctypes
import sqlite3
import sys
import threading
import time

EXIT = 60  # exit(2) of x86_64: ends the calling thread alone


def count(number: int) -> None:
    """Counts for ever; ends with BAD if the database holds something else."""
    database = sqlite3.connect(f"{sys.argv[1]}/{number}.db")
    database.execute("CREATE TABLE counted (value INTEGER PRIMARY KEY)")
    filler = {}
    for value in range(1, sys.maxsize):
        filler[value % 5000] = str(value) * 50
        with database:
            database.execute("INSERT INTO counted VALUES (?)", (value,))
        rows, highest = database.execute("SELECT count(*), max(value) FROM counted").fetchone()
        if not rows == highest == value or filler[value % 5000] != str(value) * 50:
            print(f"BAD thread {number}: {rows} rows up to {highest} instead of {value}", flush=True)
        if value % 20 == 0:
            print(f"thread {number} at {value}", flush=True)
        time.sleep(0.005)


for one in range(3):
    threading.Thread(target=count, args=(one,)).start()
ctypes.CDLL(None).syscall(EXIT, 0)
