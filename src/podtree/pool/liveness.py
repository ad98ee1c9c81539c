"""Whether a process noted in the index is still that process: pid numbers are used again, machines reboot."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def boot_id() -> str:
    """Random id of this boot of the machine (random(4), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """Start of process `pid` in clock ticks since boot (proc_pid_stat(5), field 22); None if it's gone.

    A zombie counts as gone, unless it is only the leader that has ended, and other threads live.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            raw = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()
    ended = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1
    return None if ended else int(fields[19])


def is_alive(pid: int | None, started: int | None, boot: str | None) -> bool:
    """Whether the process that had this pid, start time and boot id still runs."""
    return pid is not None and boot == boot_id() and started is not None and start_time(pid) == started
