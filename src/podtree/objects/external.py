"""What a pod shares with the outside of it, and what becomes of that in a branch: `--external`.

No checkpoint can hold the other side of such an object. The pod that runs keeps it in any case; for a branch there
are three answers (docs/design.md, "What is shared with the outside"):

refuse  there is no checkpoint, which is said beforehand by `check`
close   a branch is cut off: it finds the other side gone, or has a copy of its own
keep    a branch gets the same thing again by its name, where it has one; else it is refused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from podtree.errors import UsageError

Policy = Literal["refuse", "keep", "close"]
_POLICIES: tuple[Policy, ...] = ("refuse", "keep", "close")


def policy(text: str | None) -> Policy | None:
    """--external's argument; None if it isn't given. Raises UsageError if it is none of the three."""
    found = next((known for known in _POLICIES if known == text), None)
    if text is not None and found is None:
        raise UsageError(f"--external {text}: not one of {', '.join(_POLICIES)}")
    return found


def settle(
    wanted: Policy, refuse: Callable[[str, str], None], reason: str, *, keep: str = "", close: str = ""
) -> Policy:
    """What is done with one object: `wanted`, if that is possible; else it is refused, for `reason`.

    `keep`, `close`: what a branch would have of it; empty where it isn't possible.
    """
    ways = {"close": close, "keep": keep}
    if wanted != "refuse" and ways[wanted]:
        return wanted
    hints = [f"--external {name}: {what}" for name, what in ways.items() if what]
    refuse(reason, "; ".join(hints))
    return "refuse"
