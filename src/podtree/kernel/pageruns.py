"""Runs of pages, as a walk of a page table gives them: (first page, count)."""

from __future__ import annotations

from collections.abc import Iterable

Run = tuple[int, int]  # first page, page count


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Sorted runs with neighbours joined."""
    merged: list[Run] = []
    for first, count in sorted(runs):
        if merged and merged[-1][0] + merged[-1][1] >= first:
            start, length = merged[-1]
            merged[-1] = (start, max(length, first + count - start))
        else:
            merged.append((first, count))
    return merged


def subtract_runs(runs: list[Run], minus: list[Run]) -> list[Run]:
    """The pages of `runs` that aren't in `minus`; both sorted and merged."""
    left: list[Run] = []
    index = 0
    for first, count in runs:
        end = first + count
        while index < len(minus) and minus[index][0] + minus[index][1] <= first:
            index += 1
        at = index
        while first < end and at < len(minus) and minus[at][0] < end:
            gap, length = minus[at]
            if gap > first:
                left.append((first, gap - first))
            first = max(first, gap + length)
            at += 1
        if first < end:
            left.append((first, end - first))
    return left
