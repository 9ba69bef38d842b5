"""A progress bar for long computations.

Not Lightning's tqdm bar, because this folder imports torch and numpy only.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

_EVERY = 0.5  # seconds
_LONG = 1.0  # seconds; shorter computations show no bar
_CELLS = 20


@contextlib.contextmanager
def progress_bar(total: int, done: Callable[[], int], *, show: bool) -> Iterator[None]:
    """Show ``done()`` of about ``total`` forwards, and the time left, while the context runs.

    Only if standard error is a terminal, on rank 0, and after one second; erased at the end.
    """
    if not show or not _on_terminal() or _in_another_process():
        yield
        return
    begun = time.monotonic()
    over = threading.Event()
    screen = sys.stderr

    def watch() -> None:
        width = 0
        while not over.wait(_EVERY):
            taken, reached = time.monotonic() - begun, done()
            if taken >= _LONG and reached > 0:
                line = _line(reached, max(total, reached), taken)  # the total is an estimate
                width = max(width, len(line))
                screen.write(f"\r{line:<{width}}")
                screen.flush()
        screen.write(f"\r{'':{width}}\r" if width else "")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _line(done: int, total: int, seconds: float) -> str:
    """The text of the bar.

    Example:
        >>> _line(45, 180, seconds=20.0)
        'measuring |#####               | 25 %, 45 of 180 forwards, 0:01:00 left'
    """
    left = datetime.timedelta(seconds=round(seconds * (total - done) / done))
    bar = "#" * (_CELLS * done // total)
    share = 100 * done // total
    return f"measuring |{bar:<{_CELLS}}| {share} %, {done} of {total} forwards, {left} left"


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_another_process() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
