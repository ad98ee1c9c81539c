"""Names for pods that got none."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

_WITHOUT_NUMBER = 30

_HOW = (
    "amber bold brisk calm clear deep early fair fresh gentle green high keen late light lively mild misty "
    "noble old pale plain quick quiet rare red ripe silver slow small soft still tall warm wide wild young"
)
_TREES = (
    "acacia alder apple ash aspen beech birch cedar cherry cypress elder elm fir hazel hemlock hickory holly "
    "juniper larch laurel lime linden maple medlar myrtle oak olive pear pine plane plum poplar rowan spruce "
    "sumac sycamore tamarack walnut willow yew"
)


def invent() -> str:
    """Such as quiet-alder."""
    how, trees = _HOW.split(), _TREES.split()
    one, other = os.urandom(2)  # `random` and `secrets` take 10 ms to load
    return f"{how[one % len(how)]}-{trees[other % len(trees)]}"


def candidates() -> Iterator[str]:
    """Names to try until one is free: two words, and when many of those are taken, with a number."""
    for attempt in itertools.count():
        yield invent() if attempt < _WITHOUT_NUMBER else f"{invent()}-{attempt}"
