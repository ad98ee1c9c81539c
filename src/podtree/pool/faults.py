"""Fault points: places where a test may end the process, to prove that any instant is a safe one to die."""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def point(name: str) -> None:
    """A step named `name` is about to happen, or has just been done. Does nothing outside of tests."""
    if hook is not None:
        hook(name)
