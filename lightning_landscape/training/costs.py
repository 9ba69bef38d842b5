"""What measuring takes: the time that passed, and what forwards and pictures cost.

A forward is timed in the first measurement of all.  Before that the run's own steps give an
estimate: a step is about a forward and a gradient, three forwards of its batch.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lightning_landscape.training.data.probe import Probe

# Seconds for a picture, and for the import of the plotting library, until they were measured; on a
# slow machine.
_DRAWING, _IMPORT = 0.1, 0.6


class Stopwatch:
    """The time since training began, divided into measuring and training."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Training begins."""
        self._measured = 0.0
        self._measuring_since: float | None = None
        self._started = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Count ``seconds`` as measuring."""
        self._measured += seconds

    @contextlib.contextmanager
    def measuring(self, clock: Callable[[], float]) -> Iterator[None]:
        """All the time inside counts as measuring, already while it passes.

        ``clock`` may wait for a device, so that work submitted before is not counted, and work
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
            return self._measured
        return self._measured + time.perf_counter() - self._measuring_since

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
        forward: seconds of a forward of the probe; None until one was timed.
        drawing: seconds of a picture; None until one was drawn.
        batches: of training, that have passed.
        batch_size: examples in the last training batch that was looked at.
    """

    def __init__(self) -> None:
        self.time = Stopwatch()
        self.forward: float | None = None
        self.drawing: float | None = None
        self.batches = 0
        self.batch_size = 1
        self._after_first = 0, 0.0  # batches, and the seconds of training that they took

    def count_batches(self, batches: int) -> None:
        """So many training batches have passed since training began."""
        if batches > 0 and self._after_first[0] == 0:
            self._after_first = batches, self.time.trained
        self.batches = batches

    @property
    def seconds_per_batch(self) -> float:
        """Of training, without the first batch, at which much is done once."""
        first, seconds = self._after_first if self.batches > self._after_first[0] else (0, 0.0)
        return (self.time.trained - seconds) / max(self.batches - first, 1)

    def forward_seconds(self, probe: Probe) -> float:
        """Seconds of a forward of the probe."""
        if self.forward is not None:
            return self.forward
        return self.seconds_per_batch * probe.size / self.batch_size / 3

    def drawing_seconds(self, pictures: float) -> float:
        """Seconds of so many pictures."""
        if self.drawing is not None or not pictures:
            return pictures * (self.drawing or 0.0)
        return pictures * _DRAWING + (0.0 if "matplotlib.figure" in sys.modules else _IMPORT)

    def note_forward(self, seconds: float) -> None:
        """The duration of a first forward; a picture, of many, gives a better estimate."""
        if self.forward is None:
            self.forward = seconds
