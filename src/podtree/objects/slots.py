"""Numbers for descriptors: where the slots of a restore begin, and whether a process may have that many.

Source: getrlimit(2), RLIMIT_NOFILE.
"""

from __future__ import annotations

import contextlib
import resource

SLOT_BASE = 1000
SPARE_NUMBERS = 64  # what builder and stem have open besides
RAISE_LIMIT = "give podtree a higher hard limit on open files (ulimit -Hn)"


def slot_base(highest: int) -> int:
    """The first slot: above all the numbers that processes use, out of the way of builder and stem.

    The number below it nobody has: it is the pager's (podtree.restore.pager).
    """
    return max(SLOT_BASE, highest + 2)


def raise_descriptor_limit(needed: int = 0) -> int:
    """Allow this process as many descriptors as it may have, `needed` if possible; returns how many that is.

    Going beyond the hard limit takes CAP_SYS_RESOURCE, which the root of many a container lacks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard:
        with contextlib.suppress(ValueError):  # how Python says EPERM
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
            return needed
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def too_many(numbers: int) -> str:
    """Why a process can't have so many descriptors besides its own; "" when it can, and then it may."""
    needed = numbers + SPARE_NUMBERS
    allowed = raise_descriptor_limit(needed)
    if allowed >= needed:
        return ""
    return f"a restore holds {needed} at once, and the limit (RLIMIT_NOFILE) is {allowed}"
