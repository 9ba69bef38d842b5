"""When a measurement is due."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer


class Schedule:
    """Due when the probe is complete, and then every n optimizer steps or epochs.

    A step is a batch at which an optimizer stepped: neither gradient accumulation nor a second
    optimizer changes the count.
    """

    def __init__(self, every_n_train_steps: int | None, every_n_epochs: int | None) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.last_step: int | None = None

    @property
    def next_step(self) -> float:
        """The first step that may be due, apart from ends of epochs."""
        if self.last_step is None:
            return 0
        return self.last_step + (self.every_n_train_steps or math.inf)

    def due(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether to measure after ``step`` steps, in ``epoch`` (from 0)."""
        if step >= self.next_step:
            return True
        return bool(self.every_n_epochs and epoch_ends and (epoch + 1) % self.every_n_epochs == 0)


def batches_ahead(trainer: Trainer) -> float:
    """Remaining training batches by the Trainer's limits; infinite without any."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    by_epochs = by_steps = math.inf
    if epochs > 0:
        by_epochs = epochs * trainer.num_training_batches - trainer.fit_loop.total_batch_idx - 1
    if steps > 0:  # counts the steps of all optimizers
        left = (steps - trainer.global_step) / max(len(trainer.optimizers), 1)
        by_steps = left * trainer.accumulate_grad_batches
    return min(by_epochs, by_steps)
