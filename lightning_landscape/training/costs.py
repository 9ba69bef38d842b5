"""Time spent on measuring, and the cost of forwards and pictures.

A forward is timed in the first measurement.  Until then it is estimated from the training steps,
each of which costs about three forwards of its batch.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.hooks import HOOK_SECONDS, HOOK_SHARE

# Estimates on a slow machine, until they are timed: a picture, the import of the plotting library.
_DRAWING_SECONDS, _IMPORT_SECONDS = 0.1, 0.6


class Stopwatch:
    """The time since training began, divided into measuring and training."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Training begins."""
        self._measuring_seconds = 0.0
        self._measuring_since: float | None = None
        self._started = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Count ``seconds`` as measuring."""
        self._measuring_seconds += seconds

    @contextlib.contextmanager
    def measuring(self, clock: Callable[[], float]) -> Iterator[None]:
        """Count the time inside as measuring; :attr:`spent` includes it before the exit.

        ``clock`` may synchronize a device, so that work submitted before is not counted and work
        submitted inside is.
        """
        self._measuring_since = clock()
        try:
            yield
        finally:
            seconds, self._measuring_since = clock() - self._measuring_since, None
            self.add(seconds)

    @property
    def spent(self) -> float:
        """Seconds of measuring."""
        if self._measuring_since is None:
            return self._measuring_seconds
        return self._measuring_seconds + time.perf_counter() - self._measuring_since

    @property
    def trained(self) -> float:
        """Seconds of training."""
        return max(time.perf_counter() - self._started - self.spent, 0.0)

    @property
    def share(self) -> float:
        """Seconds of measuring per second of training."""
        return self.spent / self.trained if self.trained > 0 else 0.0


class Costs:
    """Seconds of a training batch, of a forward of the probe and of a picture.

    Attributes:
        time: the run's stopwatch.
        forward: seconds of a forward of the probe; None until one is timed.
        drawing: seconds of a picture; None until one is drawn.
        batches: training batches so far.
        idle: seconds of idle hooks so far, a part of ``time.spent``.
        batch_size: examples in the training batch before the last measurement.
    """

    def __init__(self) -> None:
        self.time = Stopwatch()
        self.forward: float | None = None
        self.drawing: float | None = None
        self.batches = 0
        self.batch_size = 1
        self.idle = 0.0
        self._first_count = 0, 0.0  # batches, and the seconds of training that they took

    def count_batches(self, batches: int) -> None:
        """Set the number of training batches since training began, and count their idle hooks."""
        if batches > 0 and self._first_count[0] == 0:
            self._first_count = batches, self.time.trained
        since, self.batches = batches - self.batches, batches
        idle = since * self.hook_seconds
        self.idle += idle
        self.time.add(idle)

    @property
    def seconds_per_batch(self) -> float:
        """Seconds of training per batch, without the first batch, which includes one-time work."""
        first, seconds = self._first_count if self.batches > self._first_count[0] else (0, 0.0)
        return (self.time.trained - seconds) / max(self.batches - first, 1)

    @property
    def hook_seconds(self) -> float:
        """Seconds by which a step without a measurement is longer."""
        return min(HOOK_SECONDS, HOOK_SHARE * self.seconds_per_batch)

    def forward_seconds(self, probe: Probe) -> float:
        """Seconds of a forward of the probe."""
        if self.forward is not None:
            return self.forward
        return self.seconds_per_batch * probe.size / self.batch_size / 3

    def drawing_seconds(self, pictures: float) -> float:
        """Seconds of drawing ``pictures`` pictures."""
        if self.drawing is not None or not pictures:
            return pictures * (self.drawing or 0.0)
        return pictures * _DRAWING_SECONDS + (
            0.0 if "matplotlib.figure" in sys.modules else _IMPORT_SECONDS
        )

    def record_forward(self, seconds: float) -> None:
        """Store the duration of a forward, if it is the shortest: load only makes it longer."""
        self.forward = seconds if self.forward is None else min(self.forward, seconds)
