"""Copies of the batches and the weights before a step, for callbacks that measure the step."""

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
    """The batches of the last step and the weights before it.

    If copying fails, for example out of memory, the error is raised when a copy is read.

    Attributes:
        batches: the training batches whose gradients made the last step, if a callback needs them:
            several with gradient accumulation, without those that gave no loss.
        share: their number relative to that of ``accumulate_grad_batches``, by which Lightning
            divides: less than 1 where an epoch ends within an accumulation.
    """

    def __init__(self) -> None:
        self.batches: list[ProbeBatch] = []
        self.share = 1.0
        self._batches_of = -1  # steps of optimizers before them
        self._seen = 0  # batches since those
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

    def begin_copy(self, steps: int) -> None:
        """A batch after so many steps of optimizers will be copied; no older ones are kept."""
        if self._batches_of != steps:
            self.batches, self._batches_of, self._seen = [], steps, 0
        self._seen += 1

    def copy_batch(self, batch: Any, batch_idx: int) -> None:
        """Copy the batch, because training_step may modify it."""
        self.batches.append(ProbeBatch.copy_of(batch, batch_idx))

    def drop_batch(self) -> None:
        """Drop the copy of the last batch, which gave no loss."""
        if self.batches:
            self.batches.pop()

    def end_step(self, steps: int, batch_idx: int, accumulated: int) -> None:
        """An optimizer has stepped after this batch: drop the copies if they are not all of it.

        Args:
            steps: steps of optimizers before it.
            batch_idx: of the batch.
            accumulated: batches from one step to the next; 1 if any batch may step.
        """
        expected = batch_idx % accumulated + 1
        whole = self._seen >= expected and self._batches_of == steps
        if not whole:
            self.batches = []
        self.share = min(len(self.batches) / accumulated, 1.0)

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
