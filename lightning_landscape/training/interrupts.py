"""Exceptions that must end the run even when they are raised during a measurement."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType
from typing import Any


def is_interrupt(error: BaseException) -> bool:
    """Whether ``error`` must end the run: Ctrl+C, an exit, or raised by a signal handler.

    For example, a scheduler announces its time limit by a signal, and the handler may raise an
    exception of any class at any point of the program.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        return True
    traceback, handlers = error.__traceback__, set(_handlers())
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def reraise_interrupt(error: BaseException) -> None:
    """Where any error is caught: those that ask the run to end go on.

    Raises:
        BaseException: ``error``, if it is an interrupt.
    """
    if is_interrupt(error):
        raise error


def _handlers() -> Iterator[CodeType]:
    """The code objects of the installed signal handlers."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if not hasattr(handler, "__code__"):
            methods = (vars(kind).get("__call__") for kind in type(handler).__mro__)
            handler = next(filter(None, methods), None)
        code = getattr(handler, "__code__", None)  # of a bound method too
        if isinstance(code, CodeType):
            yield code
