"""A progress bar for measurements, which tell how far they are only when asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm  # type: ignore[import-untyped]

_EVERY = 0.5  # seconds


@contextlib.contextmanager
def progress_bar(total: int, done: Callable[[], int], *, show: bool) -> Iterator[None]:
    """Show ``done()`` of about ``total`` while what is inside runs, with the time left.

    Both in forwards of the probe.  Only on a terminal.
    """
    bar = tqdm(total=total, desc="measuring", unit="forward", disable=None if show else True)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            _show(bar, done())

    thread = threading.Thread(target=watch, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
        bar.close()


def _show(bar: tqdm, done: int) -> None:
    bar.total = max(bar.total, done)  # the prediction was a rough one
    bar.update(max(done - bar.n, 0))  # it asks once more when nothing is under way
