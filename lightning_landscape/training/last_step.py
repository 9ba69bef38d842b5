"""Copies of what a step is about to change, for the callbacks that measure the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_landscape.training.data.batch import ProbeBatch


@dataclass
class WeightsBefore:
    """The weights before a step as the optimizers hold them; empty where none were copied."""

    weights: dict[int, Tensor] = field(default_factory=dict)  # id of a parameter -> its copy
    rates: dict[int, float] = field(default_factory=dict)  # and its learning rate


class LastStep:
    """The batch of the last step and the weights before it.

    A fault while copying, for want of memory say, is raised when a copy is asked for.

    Attributes:
        batches: the training batch of the last step if it was asked for and gave a loss.
    """

    def __init__(self) -> None:
        self.batches: list[ProbeBatch] = []
        self._before = WeightsBefore()
        self._copied_at = -1  # trainer.global_step
        self._fault: Exception | None = None

    def check(self) -> None:
        """Raise where a copy failed.

        Raises:
            RuntimeError: with the reason.
        """
        if self._fault is not None:
            raise RuntimeError(
                f"what was there before the step could not be copied ({self._fault})"
            ) from self._fault

    @property
    def before(self) -> WeightsBefore:
        """The weights before it, see :meth:`check`."""
        self.check()
        return self._before

    def begin_batch(self) -> None:
        """A fault concerns one batch only."""
        if self._fault is not None:
            self.forget_weights()

    def copies_weights_at(self, step: int) -> bool:
        """Whether the weights before this step are yet to be copied."""
        return self._copied_at != step

    def copy_weights(self, trainer: Trainer) -> None:
        """Of shards only the own ones: nothing is sent."""
        self._copied_at = trainer.global_step
        self.attempt(lambda: self._copy_weights(trainer))

    def _copy_weights(self, trainer: Trainer) -> None:
        if self._fault is not None:
            return
        held = [(p, g) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        weights = {id(p): p for p, _ in held}
        self._before = WeightsBefore(
            {key: p.detach().clone() for key, p in weights.items()},
            # Read here: a scheduler may change them before the batch ends.
            {id(p): float(g["lr"]) for p, g in held},
        )

    def copy_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch: training_step may edit it."""
        self.batches = [ProbeBatch.copy_of(batch, batch_idx)]

    def attempt(self, copy: Callable[[], None]) -> None:
        """``copy()``; where it fails there is neither batch nor weights."""
        try:
            copy()
        except Exception as error:
            self.batches, self._before, self._fault = [], WeightsBefore(), error

    def forget_weights(self) -> None:
        """Drop the copy."""
        self._before, self._copied_at, self._fault = WeightsBefore(), -1, None
