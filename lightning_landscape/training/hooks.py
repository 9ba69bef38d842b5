"""Which hooks Lightning calls: not those that do nothing.

At every step Lightning looks up six hooks of every callback and calls each one that is callable
inside a context of its profiler, some 2 microseconds a call, also where the hook is the empty one
of ``Callback``.  With small batches three callbacks would take 5 % of a run without measuring
anything.  It skips what is not callable.
"""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning import Callback

# Seconds that Lightning takes at each batch for one callback, one of whose hooks is called.
HOOK_SECONDS = 3e-6

BATCH_START, BATCH_END = "on_train_batch_start", "on_train_batch_end"
VALIDATION_BATCH_START = "on_validation_batch_start"

# The hooks that Lightning calls for every batch.
EVERY_BATCH = (
    BATCH_START,
    BATCH_END,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    VALIDATION_BATCH_START,
    "on_validation_batch_end",
)


def disable_hooks(callback: Callback, hooks: Iterable[str], idle: type[Callback]) -> None:
    """Have Lightning skip ``hooks``, as far as they are those of the class ``idle``.

    A hook that a subclass made its own goes on being called.
    """
    for name in hooks:
        if getattr(type(callback), name) is getattr(idle, name):
            vars(callback)[name] = None


def enable_hooks(callback: Callback, hooks: Iterable[str] = EVERY_BATCH) -> None:
    """Undo :func:`disable_hooks`."""
    for name in hooks:
        if name in vars(callback) and vars(callback)[name] is None:
            del vars(callback)[name]
