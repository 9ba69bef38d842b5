"""When a measurement is due, and whether it can be afforded."""

from __future__ import annotations

import math
import time


class Schedule:
    """Due when the probe is complete, then every so many optimizer steps or epochs.

    Steps count batches that stepped, so accumulation and a second optimizer change nothing.
    """

    def __init__(self, every_n_train_steps: int | None, every_n_epochs: int | None) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.last_step: int | None = None

    def due(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether to measure after ``step`` steps, in ``epoch`` (from 0)."""
        if self.last_step is None:
            return True
        if self.every_n_train_steps and step - self.last_step >= self.every_n_train_steps:
            return True
        return bool(self.every_n_epochs and epoch_ends and (epoch + 1) % self.every_n_epochs == 0)


class Budget:
    """The time a run lends to measuring, as a debt that training pays off.

    ``affords(cost)`` holds when all that was spent, and ``cost`` too, is at most ``max_overhead``
    times the time spent training.  ``None``: everything is affordable.
    """

    def __init__(self, max_overhead: float | None) -> None:
        self.max_overhead = max_overhead
        self.spent = 0.0
        self._started = time.perf_counter()

    def start(self) -> None:
        """Training begins."""
        self.spent = 0.0
        self._started = time.perf_counter()

    def charge(self, seconds: float) -> None:
        """Count ``seconds`` as spent."""
        self.spent += seconds

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

    def affords(self, seconds: float) -> bool:
        """Whether a measurement of ``seconds`` keeps within the limit."""
        return self.spent + seconds <= self.earned
