"""A process tree from a plan: each node holds objects (the cases of the other programs), in a directory of its own.

    random_tree.py PLAN     PLAN: JSON of a node {"cases": ["program.case", ...], "children": [node, ...],
                            "session": bool, "group": bool, "threads": n, "pages": n, "niceness": n}

Each case says READY on its own, and each node too. The top waits for the go-file and for all.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import inpod
from inpod import DIR, bad, child, equal, frozen, reap, run_and_exit, wait_go


def run_case(name: str, place: Path) -> None:
    """Runs `program.case` in its own directory; the go-file is the tree's."""
    program, _, case = name.partition(".")
    place.mkdir()
    place.chmod(0o777)  # some cases become another user
    os.chdir(place)
    (place / "go").symlink_to(DIR / "go")
    importlib.import_module(program)
    inpod.CASES[case]()


def hold(node: dict[str, Any], place: Path) -> None:
    """A node: its own properties, its cases each in a process, its children; verifies after the freeze."""
    place.mkdir(exist_ok=True)
    os.chdir(place)
    if node["session"] and os.getpgrp() != os.getpid():  # the pod's first process leads one
        os.setsid()
    elif node["group"] and os.getsid(0) != os.getpid():
        os.setpgid(0, 0)
    os.nice(node["niceness"])
    memory = [os.urandom(4096) * 16 for _ in range(node["pages"])]
    copies = [bytes(reversed(page)) for page in memory]
    workers = [threading.Thread(target=wait_go) for _ in range(node["threads"])]
    pids = []
    for number, case in enumerate(node["cases"]):
        pids.append((child(lambda case=case, number=number: run_case(case, place / f"case{number}")), case))  # type: ignore[misc]
    for number, below in enumerate(node["children"]):
        pids.append((child(lambda below=below, number=number: hold(below, place / f"node{number}")), "node"))  # type: ignore[misc]
    for worker in workers:
        worker.start()
    before = os.getpid(), os.getppid(), os.getsid(0), os.getpgrp(), os.getpriority(os.PRIO_PROCESS, 0)
    frozen()
    now = os.getpid(), os.getppid(), os.getsid(0), os.getpgrp(), os.getpriority(os.PRIO_PROCESS, 0)
    equal("pid, ppid, sid, pgrp, nice", now, before)
    if [bytes(reversed(page)) for page in memory] != copies:
        bad("memory differs")
    for worker in workers:
        worker.join()
    for pid, what in pids:
        reap(pid, what)


def main() -> None:
    """Grows the tree of the plan on the command line."""
    plan = json.loads(sys.argv[1])
    DIR.mkdir(parents=True, exist_ok=True)
    DIR.chmod(0o777)

    def whole() -> None:
        hold(plan, DIR)
        if not inpod._bad:
            print("OK", flush=True)

    run_and_exit(whole)


if __name__ == "__main__":
    main()
