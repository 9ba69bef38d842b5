"""Copies of the batch and the weights before a step, for callbacks that measure the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_landscape.training.data.batch import ProbeBatch
from lightning_landscape.training.interrupts import reraise_interrupt


@dataclass
class WeightsBefore:
    """The weights before a step as the optimizers hold them; empty if none were copied."""

    weights: dict[int, Tensor] = field(default_factory=dict)  # id of a parameter -> its copy
    rates: dict[int, float] = field(default_factory=dict)  # and its learning rate


class LastStep:
    """The batch of the last step and the weights before it.

    If copying fails, for example out of memory, the error is raised when a copy is read.

    Attributes:
        batches: the training batch of the last step, if a callback needs it and it gave a loss.
    """

    def __init__(self) -> None:
        self.batches: list[ProbeBatch] = []
        self._before = WeightsBefore()
        self._copied_at = -1  # trainer.global_step
        self._error: Exception | None = None

    def check(self) -> None:
        """Raise if copying failed.

        Raises:
            RuntimeError: with the reason.
        """
        if self._error is not None:
            raise RuntimeError(
                f"the batch and the weights before the step could not be copied ({self._error})"
            ) from self._error

    @property
    def before(self) -> WeightsBefore:
        """The weights before the step; raises as :meth:`check` does."""
        self.check()
        return self._before

    def begin_batch(self) -> None:
        """Clear an error of the batch before."""
        if self._error is not None:
            self.clear_weights()

    def needs_weights_at(self, step: int) -> bool:
        """Whether the weights before this step have not been copied yet."""
        return self._copied_at != step

    def copy_weights(self, trainer: Trainer) -> None:
        """Copy the weights that the optimizers step; of shards only this process's own."""
        self._copied_at = trainer.global_step
        self.attempt(lambda: self._copy_weights(trainer))

    def _copy_weights(self, trainer: Trainer) -> None:
        if self._error is not None:
            return
        pairs = [(p, g) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        weights = {id(p): p for p, _ in pairs}
        self._before = WeightsBefore(
            {key: p.detach().clone() for key, p in weights.items()},
            # Read now: a scheduler may change them before the batch ends.
            {id(p): float(g["lr"]) for p, g in pairs},
        )

    def copy_batch(self, batch: Any, batch_idx: int) -> None:
        """Copy the batch, because training_step may modify it."""
        self.batches = [ProbeBatch.copy_of(batch, batch_idx)]

    def attempt(self, copy: Callable[[], None]) -> None:
        """Call ``copy``; if it fails, drop both copies and store the error."""
        try:
            copy()
        except Exception as error:
            reraise_interrupt(error)
            self.batches, self._before, self._error = [], WeightsBefore(), error

    def clear_weights(self) -> None:
        """Drop the copy of the weights."""
        self._before, self._copied_at, self._error = WeightsBefore(), -1, None
