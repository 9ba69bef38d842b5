"""Callbacks and schedulers of Lightning that act on our values, and when they read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pytorch_lightning import Trainer

from lightning_landscape.training.lightning_packages import misconfiguration
from lightning_landscape.training.quantity import Quantity


class Reader(NamedTuple):
    """A callback or scheduler with ``monitor`` set to one of our keys.

    ``reads(trainer, global_step)``: whether it reads the value after the current batch, at whose
    end the Trainer's ``global_step`` is this.  ``by_time``: it reads by the clock.
    """

    name: str
    key: str
    quantity: Quantity
    reads: Callable[[Trainer, int], bool]
    by_time: bool = False

    def warn_if_stale(self, step: int) -> None:
        """Warn if the value that it reads at ``step`` belongs to other weights."""
        last = self.quantity._bookkeeping.published.get(self.key)
        if last == step:
            return
        belongs = f"belongs to step {last}" if last is not None else "is missing"
        limited = self.quantity.max_overhead is not None
        remedy = "pass max_overhead=None, or a larger grace_seconds, " if limited else ""
        self.quantity.warn_once(
            f"{self.name}(monitor={self.key!r}) reads a value at step {step} that {belongs}, "
            f"because none could be measured at its own step; for one at each reading {remedy}"
            f"or let it read less often; to stop on sharpness use SharpnessEarlyStopping, which "
            f"sees new values only"
        )


def find_readers(trainer: Trainer, quantities: Sequence[Quantity]) -> list[Reader]:
    """All that read one of our keys, in the order of the Trainer's callbacks."""
    found = []
    for quantity in quantities:  # of a fit before, with the same callbacks
        quantity._bookkeeping.read.clear()
        quantity._bookkeeping.published.clear()
        quantity._bookkeeping.heard.clear()
    others = [c for c in trainer.callbacks if not isinstance(c, Quantity)]  # type: ignore[attr-defined]
    for callback in others:
        if hasattr(callback, "on_record"):
            continue  # it is called with each new value
        found += _readers(callback, getattr(callback, "monitor", None), quantities)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "epoch":
            found += [
                reader._replace(reads=partial(_at_epochs, config.frequency))
                for reader in _readers(config.scheduler, config.monitor, quantities)
            ]
    for reader in found:
        reader.quantity._bookkeeping.read.add(reader.key)
        if reader.by_time:
            reader.quantity.warn_once(
                f"{reader.name}(monitor={reader.key!r}) reads values by the clock: each belongs to "
                f"the last measurement, not to the step at which it is read; pass "
                f"every_n_train_steps or every_n_epochs instead of train_time_interval"
            )
    return found


def refuse_step_schedulers(trainer: Trainer, quantities: Sequence[Quantity]) -> None:
    """Raise if a scheduler reads one of our keys at every step, before it is measured."""
    for config in trainer.lr_scheduler_configs:
        by_step = config.reduce_on_plateau and config.interval == "step" and config.strict
        if by_step and any(q.owns(config.monitor or "") for q in quantities):
            raise misconfiguration(
                trainer,
                f"{type(config.scheduler).__name__} with monitor={config.monitor!r} and "
                f"interval='step': Lightning reads the value before it is measured at that step, "
                f"and ends the fit where there is none yet; pass interval='epoch', or "
                f"strict=False for the value of the last measurement",
            )


def _readers(owner: Any, key: Any, quantities: Sequence[Quantity]) -> list[Reader]:
    if not isinstance(key, str):
        return []
    reads = partial(_reads, owner)
    by_time = getattr(owner, "_train_time_interval", None) is not None
    name = type(owner).__name__
    return [Reader(name, key, q, reads, by_time) for q in quantities if q.owns(key)]


def _reads(callback: Any, trainer: Trainer, global_step: int) -> bool:
    """Whether the callback reads after this batch, by the attributes of Lightning's own ones."""
    if steps := getattr(callback, "_every_n_train_steps", 0):
        return global_step % steps == 0
    epochs = getattr(callback, "_every_n_epochs", 1)
    if epochs < 1 or (trainer.current_epoch + 1) % epochs:
        return False
    if hasattr(callback, "_should_save_on_train_epoch_end"):
        at_epoch_end = callback._should_save_on_train_epoch_end(trainer)
    else:
        at_epoch_end = getattr(callback, "_check_on_train_epoch_end", None)
    if at_epoch_end is None:
        return bool(trainer.is_last_batch or _validates(trainer))
    return bool(trainer.is_last_batch if at_epoch_end else _validates(trainer))


def _at_epochs(frequency: int, trainer: Trainer, global_step: int) -> bool:
    return bool(trainer.is_last_batch and (trainer.current_epoch + 1) % frequency == 0)


def _validates(trainer: Trainer) -> bool:
    """Whether a validation follows this batch."""
    loop = trainer.fit_loop.epoch_loop
    if not trainer.enable_validation or not loop._should_check_val_epoch():
        return False
    every = trainer.val_check_batch
    if every is None or every == float("inf"):
        return bool(trainer.is_last_batch)
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return bool((done + 1) % every == 0)
