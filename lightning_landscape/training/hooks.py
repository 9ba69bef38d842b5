"""Lightning's own price for calling hooks, and how not to pay it for those that do nothing.

At every step Lightning looks up six hooks of every callback and calls each one that is callable
inside a context of its profiler, some 2 microseconds a call, also where the hook is the empty one
of ``Callback``.  With small batches three callbacks would so take 5 % of a run and never measure
anything.  What is not callable it passes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from pytorch_lightning import Callback
from pytorch_lightning.profilers import PassThroughProfiler

BATCH_START, BATCH_END = "on_train_batch_start", "on_train_batch_end"
VALIDATION_BATCH_START = "on_validation_batch_start"

# The hooks that Lightning calls for every batch.
OF_EVERY_BATCH = (
    BATCH_START,
    BATCH_END,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    VALIDATION_BATCH_START,
    "on_validation_batch_end",
)


def rest(callback: Callback, hooks: Iterable[str], idle: type[Callback]) -> None:
    """Have Lightning pass over ``hooks``, as far as they are those of the class ``idle``.

    A hook that a subclass made its own goes on being called.
    """
    for name in hooks:
        if getattr(type(callback), name) is getattr(idle, name):
            vars(callback)[name] = None


def wake(callback: Callback, hooks: Iterable[str] = OF_EVERY_BATCH) -> None:
    """Undo :func:`rest`."""
    for name in hooks:
        if name in vars(callback) and vars(callback)[name] is None:
            del vars(callback)[name]


def seconds_per_batch(callbacks: Sequence[Callback], hook: Callable[[], object]) -> float:
    """What Lightning needs at each batch to pass ``callbacks`` over and to call one ``hook``.

    The fastest of five tries: what it can do, not what else the machine does.
    """
    profiler = PassThroughProfiler()
    names = [name for name in OF_EVERY_BATCH if "validation" not in name]

    def once(calls: int = 100) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            for callback in callbacks:
                for name in names:
                    callable(getattr(callback, name))
            with profiler.profile(f"[Callback]{callbacks[0].state_key}.{BATCH_END}"):
                hook()
        return (time.perf_counter() - started) / calls

    return min(once() for _ in range(5))
