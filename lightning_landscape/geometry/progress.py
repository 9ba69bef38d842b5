"""A progress bar for computations, which tell how far they are only when asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch.distributed as dist

_EVERY = 0.5  # seconds
_LONG = 1.0  # seconds; what takes less shows no bar


@contextlib.contextmanager
def progress_bar(total: int, done: Callable[[], int], *, show: bool) -> Iterator[None]:
    """Show ``done()`` of about ``total`` while what is inside runs, with the time left.

    Both in forwards.  Only on a terminal, in the first process, and once it has taken a second.
    """
    if not show or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        yield
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    # disable=None: where standard error is no terminal.
    bar = tqdm(total=total, desc="measuring", unit="forward", disable=None, delay=_LONG)
    over = threading.Event()

    def show_done() -> None:
        reached = done()
        bar.total = max(bar.total, reached)  # the prediction was a rough one
        bar.update(max(reached - bar.n, 0))  # it asks once more when nothing is under way

    def watch() -> None:
        while not over.wait(_EVERY):
            show_done()

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
