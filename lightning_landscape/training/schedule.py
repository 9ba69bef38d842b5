"""When a measurement is due, and whether it can be afforded."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from pytorch_lightning import Trainer


class Schedule:
    """Due when the probe is complete, then every so many optimizer steps or epochs.

    Steps count batches that stepped, so accumulation and a second optimizer change nothing.
    """

    def __init__(self, every_n_train_steps: int | None, every_n_epochs: int | None) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.last_step: int | None = None

    @property
    def next_step(self) -> float:
        """The first step that may be due, apart from those that end an epoch."""
        if self.last_step is None:
            return 0
        return self.last_step + (self.every_n_train_steps or math.inf)

    def due(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether to measure after ``step`` steps, in ``epoch`` (from 0)."""
        if step >= self.next_step:
            return True
        return bool(self.every_n_epochs and epoch_ends and (epoch + 1) % self.every_n_epochs == 0)


def batches_ahead(trainer: Trainer) -> float:
    """Training batches still to come, as far as the Trainer's limits tell."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    by_epochs = by_steps = math.inf
    if epochs > 0:
        by_epochs = epochs * trainer.num_training_batches - trainer.fit_loop.total_batch_idx - 1
    if steps > 0:  # the step of every optimizer counts
        left = (steps - trainer.global_step) / max(len(trainer.optimizers), 1)
        by_steps = left * trainer.accumulate_grad_batches
    return min(by_epochs, by_steps)


class Budget:
    """The time a run lends to measuring, as a debt that training pays off.

    ``affords(cost)`` holds when all that was spent, and ``cost`` too, is at most ``max_overhead``
    times the time spent training.  ``None``: everything is affordable.
    """

    def __init__(self, max_overhead: float | None) -> None:
        self.max_overhead = max_overhead
        self.start()

    def start(self) -> None:
        """Training begins."""
        self._paid = 0.0
        self._paying_since: float | None = None
        self._started = time.perf_counter()

    def charge(self, seconds: float) -> None:
        """Count ``seconds`` as spent."""
        self._paid += seconds

    @contextlib.contextmanager
    def paying(self, clock: Callable[[], float]) -> Iterator[None]:
        """All the time inside counts as spent, already while it passes.

        ``clock`` may wait for a device, so that work given to it before is not counted, and work
        given to it inside is.
        """
        self._paying_since = clock()
        try:
            yield
        finally:
            seconds, self._paying_since = clock() - self._paying_since, None
            self.charge(seconds)

    @property
    def spent(self) -> float:
        """Seconds since the start that went into measuring."""
        if self._paying_since is None:
            return self._paid
        return self._paid + time.perf_counter() - self._paying_since

    @property
    def trained(self) -> float:
        """Seconds since the start that went into training."""
        return max(time.perf_counter() - self._started - self.spent, 0.0)

    @property
    def share(self) -> float:
        """Seconds spent per second of training."""
        return self.spent / self.trained if self.trained > 0 else 0.0

    @property
    def earned(self) -> float:
        """Seconds that training has paid for so far; infinite without a limit."""
        return math.inf if self.max_overhead is None else self.max_overhead * self.trained

    @property
    def left(self) -> float:
        """Seconds that may still be spent, below zero in debt."""
        return self.earned - self.spent

    def affords(self, seconds: float) -> bool:
        """Whether a measurement of ``seconds`` keeps within the limit."""
        return self.spent + seconds <= self.earned
