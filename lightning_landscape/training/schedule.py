"""When a measurement is due, and how long the run will be."""

from __future__ import annotations

import math
from typing import Literal

from pytorch_lightning import Trainer

EveryNSteps = int | Literal["auto"] | None

# Steps between measurements with "auto" where the length of the run is unknown.
_STEPS_APART = 100
# Lightning's max_epochs where the user sets no limit at all.
_NO_LIMIT = 1000


class Schedule:
    """Due when the probe is complete, and then at multiples of n optimizer steps or of epochs.

    A step is a batch at which an optimizer stepped: neither gradient accumulation nor a second
    optimizer changes the count.

    Attributes:
        n: steps between measurements; None: only at the ends of epochs.
        last_step: the last step at which it was due; None before the first.
        not_before: the budget allows no measurement before this step; the same on all processes.
        last_planned: the last step of the run that is due; infinite if its length is unknown.
    """

    def __init__(self, every_n_train_steps: EveryNSteps, every_n_epochs: int | None) -> None:
        self.n = None if every_n_train_steps == "auto" else every_n_train_steps
        self._auto = every_n_train_steps == "auto"
        self.every_n_epochs = every_n_epochs
        self.last_step: int | None = None
        self.not_before: float = 0.0
        self.last_planned: float = math.inf

    def set_length(self, steps: float, measurements: int, at_end: bool) -> None:
        """Plan for a run of ``steps``; with "auto" about ``measurements`` of them.

        With "auto" and ``every_n_epochs`` only those at ends of epochs.

        ``at_end``: whether the last one is made when training has ended.
        """
        if self._auto and not self.every_n_epochs:
            known = math.isfinite(steps)
            self.n = max(math.ceil(steps / measurements), 1) if known else _STEPS_APART
        self.not_before, self.last_planned = 0.0, steps
        if not at_end and self.every_n_epochs is None and self.n and self.n <= steps < math.inf:
            self.last_planned = steps // self.n * self.n

    def ahead(self, steps: float) -> float:
        """About how many times it is due in the next ``steps``."""
        return steps / self.n if self.n else min(steps, 1.0)

    @property
    def next_step(self) -> float:
        """The first step that may be due, apart from ends of epochs."""
        if self.last_step is None:
            return self.not_before
        if self.n is None:
            return math.inf
        after = max(self.last_step + 1, self.not_before)
        if self.last_step < self.last_planned < after:
            after = self.last_planned
        return self.n * math.ceil(after / self.n) if math.isfinite(after) else math.inf

    def was_due(self, after: int, until: int) -> bool:
        """Whether a multiple lies after the first step, and not after the second."""
        return bool(self.n and until // self.n > after // self.n)

    def advance(self, step: int) -> int:
        """Note that it was due at ``step``; returns how many multiples it has passed before."""
        last, self.last_step = self.last_step, step
        if last is None or self.n is None:
            return 0
        return max((step - 1) // self.n - last // self.n, 0)

    def end(self, step: int, decided: bool) -> int:
        """Note that the fit ends after ``step``; returns how many multiples it has passed.

        ``decided``: without ``step`` itself, because it was measured or counted.
        """
        if self.last_step is None:
            return 0
        passed = self.advance(step if decided else step + 1)
        self.last_step = step
        return passed

    def due(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether to measure after ``step`` steps, in ``epoch`` (from 0)."""
        if step >= self.next_step:
            return True
        if not self.every_n_epochs or step < self.not_before:
            return False
        return epoch_ends and (epoch + 1) % self.every_n_epochs == 0


def batches_ahead(trainer: Trainer) -> float:
    """Remaining training batches by the Trainer's limits; infinite without any or with a time."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    if _has_max_time(trainer) or (epochs == _NO_LIMIT and steps <= 0):
        return math.inf
    by_epochs = by_steps = math.inf
    if epochs > 0:
        by_epochs = epochs * trainer.num_training_batches - trainer.fit_loop.total_batch_idx - 1
    if steps > 0:  # counts the steps of all optimizers
        left = (steps - trainer.global_step) / max(len(trainer.optimizers), 1)
        by_steps = left * trainer.accumulate_grad_batches
    return max(min(by_epochs, by_steps), 0.0)


def steps_ahead(trainer: Trainer) -> float:
    """Remaining optimizer steps by the Trainer's limits; infinite without any."""
    ahead = batches_ahead(trainer)
    return ahead if not math.isfinite(ahead) else ahead // trainer.accumulate_grad_batches


def _has_max_time(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(type(callback).__name__ == "Timer" for callback in callbacks)
