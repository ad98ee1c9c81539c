"""Two things at once: for what is the kernel's work, or the disk's, while this thread has something else to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(call: Callable[[], object]) -> Iterator[None]:
    """Scope beside which `call` is made, by a thread. It ends when both have, and raises what `call` does."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="beside")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]
