"""Disables hooks that would do nothing, so that Lightning does not call them.

At every step Lightning looks up six hooks of every callback and calls each inside a profiler
context, which takes about 2 microseconds, even for the empty hooks of ``Callback``.  With small
batches three callbacks would take 5 % of a run without measuring anything.  Lightning skips hooks
that are not callable.
"""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning import Callback

# Seconds by which a step of 1 to 2 ms is longer between measurements.  The hook takes 12
# microseconds of them.  After the first measurement all parts of a step become slower by 2 to 5 %,
# the data loader and the optimizer too, even where no hook is called any more.  The reason is not
# known: the numbers of imports, page faults and garbage collections are the same.  On a faster
# machine all are shorter, so it is at most this share of a step.
HOOK_SECONDS, HOOK_SHARE = 90e-6, 0.04

BATCH_START, BATCH_END = "on_train_batch_start", "on_train_batch_end"
# Called at a step, before its gradient is clipped.
STEP_HOOKS = ("on_after_backward", "on_before_optimizer_step")
VALIDATION_BATCH_HOOKS = ("on_validation_batch_start", "on_validation_batch_end")

# The hooks that Lightning calls for every batch.
EVERY_BATCH = (
    BATCH_START,
    BATCH_END,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    *VALIDATION_BATCH_HOOKS,
)


def disable_hooks(callback: Callback, hooks: Iterable[str], idle: type[Callback]) -> None:
    """Make Lightning skip those of ``hooks`` that are inherited from the class ``idle``.

    Hooks that a subclass overrides are still called.
    """
    for name in hooks:
        if getattr(type(callback), name) is getattr(idle, name):
            vars(callback)[name] = None


def enable_hooks(callback: Callback, hooks: Iterable[str] = EVERY_BATCH) -> None:
    """Undo :func:`disable_hooks`."""
    for name in hooks:
        if name in vars(callback) and vars(callback)[name] is None:
            del vars(callback)[name]
