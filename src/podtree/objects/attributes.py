"""What a thread has set for itself by prctl(2): reading the time stamp counter, machine checks, speculation.

Sources: prctl(2), include/uapi/linux/prctl.h (Linux 6.18).
"""

from __future__ import annotations

import msgspec

from podtree.kernel.sys import NR
from podtree.script.task import Results, Script

PR_GET_TSC, PR_SET_TSC, PR_TSC_SIGSEGV = 25, 26, 2
PR_MCE_KILL, PR_MCE_KILL_GET, PR_MCE_KILL_SET, PR_MCE_KILL_DEFAULT = 33, 34, 1, 2
PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL = 52, 53
PR_SPEC_PRCTL, PR_SPEC_ENABLE = 1, 2
SPECULATION = (0, 1, 2)  # PR_SPEC_STORE_BYPASS, _INDIRECT_BRANCH, _L1D_FLUSH


class Attributes(msgspec.Struct, frozen=True, kw_only=True):
    """`speculation`: by number of SPECULATION, what was set where the CPU's default is another."""

    tsc_faults: bool = False  # PR_TSC_SIGSEGV
    machine_checks: int = PR_MCE_KILL_DEFAULT  # PR_MCE_KILL_LATE, _EARLY, _DEFAULT
    speculation: dict[int, int] = {}


class Asked(msgspec.Struct):
    """Where a thread's script leaves them."""

    tsc: int
    machine_checks: int
    speculation: list[int]


def ask(script: Script) -> Asked:
    """Add the calls that tell them."""
    tsc = script.space(8)
    script.add(NR.prctl, PR_GET_TSC, tsc, 0, 0, 0)
    return Asked(
        tsc,
        script.add(NR.prctl, PR_MCE_KILL_GET, 0, 0, 0, 0),
        [script.add(NR.prctl, PR_GET_SPECULATION_CTRL, which, 0, 0, 0) for which in SPECULATION],
    )


def collect(asked: Asked, results: Results) -> Attributes:
    """From the finished script."""
    values = {which: results.values[at] for which, at in zip(SPECULATION, asked.speculation, strict=True)}
    return Attributes(
        tsc_faults=results.i32(asked.tsc) == PR_TSC_SIGSEGV,
        machine_checks=results.values[asked.machine_checks],
        speculation={
            which: value & ~PR_SPEC_PRCTL
            for (which, value), at in zip(values.items(), asked.speculation, strict=True)
            if results.ok(at) and value & PR_SPEC_PRCTL and not value & PR_SPEC_ENABLE
        },
    )


def restore(state: Attributes, script: Script) -> None:
    """Add the calls that set them. Speculation: as far as this CPU lets it be told."""
    if state.tsc_faults:
        script.add(NR.prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0, name="PR_SET_TSC")
    if state.machine_checks != PR_MCE_KILL_DEFAULT:
        script.add(NR.prctl, PR_MCE_KILL, PR_MCE_KILL_SET, state.machine_checks, 0, 0, name="PR_MCE_KILL")
    for which, value in state.speculation.items():
        script.add(NR.prctl, PR_SET_SPECULATION_CTRL, which, value, 0, 0)
