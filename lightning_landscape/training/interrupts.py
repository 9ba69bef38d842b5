"""Exceptions that end a run although they were raised during a measurement."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType
from typing import Any


def is_interrupt(error: BaseException) -> bool:
    """Whether it asks the run to end: a Ctrl+C, an exit, or raised by a signal handler.

    A scheduler's time limit, say, arrives as a signal, and a handler may raise an exception of any
    class wherever the program is at that moment.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        return True
    traceback, handlers = error.__traceback__, set(_handlers())
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _handlers() -> Iterator[CodeType]:
    """The code of the installed signal handlers."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if not hasattr(handler, "__code__"):
            handler = vars(type(handler)).get("__call__")
        code = getattr(handler, "__code__", None)  # of a bound method too
        if isinstance(code, CodeType):
            yield code
