"""System V IPC as programs see it: what the end of a process undoes."""

from __future__ import annotations

import ctypes
import os
import struct
import threading

from inpod import case, child, equal, frozen, main, reap, true, within

libc = ctypes.CDLL(None, use_errno=True)
IPC_PRIVATE, IPC_CREAT, IPC_NOWAIT, IPC_RMID, SEM_UNDO = 0, 0o1000, 0o4000, 0, 0x1000
GETVAL, SETALL, GETALL, GETPID = 12, 17, 13, 11


def checked(result: int, what: str) -> int:
    """The result of a C call, or OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def semaphores(*values: int) -> int:
    """A new set."""
    number = checked(libc.semget(IPC_PRIVATE, len(values), IPC_CREAT | 0o600), "semget")
    checked(libc.semctl(number, 0, SETALL, struct.pack(f"{len(values)}H", *values)), "SETALL")
    return number


def operate(number: int, *ops: tuple[int, int, int]) -> None:
    """semop(2): (index, step, flags)."""
    raw = b"".join(struct.pack("=Hhh", *op) for op in ops)
    checked(libc.semop(number, raw, len(ops)), "semop")


def values(number: int, count: int) -> list[int]:
    """All of a set."""
    raw = ctypes.create_string_buffer(2 * count)
    checked(libc.semctl(number, 0, GETALL, raw), "GETALL")
    return list(struct.unpack(f"{count}H", raw.raw))


@case
def semaphore_undo() -> None:
    """Two processes with adjustments, one of them a user without privileges; their ends undo them, and only them."""
    first, second = semaphores(5, 0, 32767, 7), semaphores(1, 1)
    ends = [os.pipe() for _ in range(2)]

    def one() -> None:
        operate(first, (0, -2, SEM_UNDO), (1, 3, SEM_UNDO), (2, -32767, SEM_UNDO))
        operate(second, (1, -1, SEM_UNDO))
        operate(second, (0, -1, SEM_UNDO), (0, 1, SEM_UNDO))  # nothing in the end
        os.read(ends[0][0], 1)

    def other() -> None:
        operate(first, (0, -1, SEM_UNDO), (3, 4, 0))
        operate(first, (2, 5, SEM_UNDO))
        os.setresuid(65534, 65534, 65534)
        os.read(ends[1][0], 1)

    pids = [child(one)]
    true("set-up: the first has operated", within(60, lambda: values(second, 2) == [1, 0]))
    pids.append(child(other))
    wanted = [2, 3, 5, 11]
    true("set-up: both have operated", within(60, lambda: values(first, 4) == wanted))
    reap(child(lambda: operate(first, (3, 1, 0), (3, -1, 0))))
    who = [libc.semctl(first, index, GETPID) for index in range(4)]
    frozen()
    equal("values", values(first, 4) + values(second, 2), [*wanted, 1, 0])
    equal("who changed them last, one of them gone", [libc.semctl(first, index, GETPID) for index in range(4)], who)
    os.write(ends[0][1], b"x")
    reap(pids[0])
    equal("after the first", values(first, 4) + values(second, 2), [4, 0, 32767, 11, 1, 1])
    os.write(ends[1][1], b"x")
    reap(pids[1])
    equal("after both", values(first, 4), [5, 0, 32762, 11])
    for number in (first, second):
        checked(libc.semctl(number, 0, IPC_RMID, 0), "IPC_RMID")


@case
def semaphore_undo_of_threads() -> None:
    """Threads share what is to be undone, also by one that has ended; a set that is gone has nothing to undo."""
    kept, gone = semaphores(4), semaphores(4)
    reading, writing = os.pipe()

    def body() -> None:
        def take() -> None:
            operate(kept, (0, -1, SEM_UNDO))
            operate(gone, (0, -1, SEM_UNDO))

        threads = [threading.Thread(target=take) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        checked(libc.semctl(gone, 0, IPC_RMID, 0), "IPC_RMID")
        staying = threading.Thread(target=lambda: os.read(reading, 1))
        staying.start()
        staying.join()

    pid = child(body)
    true("set-up: taken", within(60, lambda: values(kept, 1) == [1] and libc.semctl(gone, 0, GETVAL) < 0))
    frozen()
    equal("value", values(kept, 1), [1])
    os.write(writing, b"x")
    reap(pid)
    equal("undone", values(kept, 1), [4])


if __name__ == "__main__":
    main()
