"""The state of one fit: written by the session, read by its rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.geometry.memory import GraphMemory
from lightning_landscape.training.clipping import ClippedSteps
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.last_step import LastStep
from lightning_landscape.training.processes import Processes


class RunState:
    """The state of one fit.

    Attributes:
        processes: those of the run.
        costs: seconds of forwards, pictures and training batches.
        last_step: copies of the last batch and of the weights before the last step.
        concatenated: loss -> whether the whole probe is evaluated as one batch.
        deadline: when a limited callback should have its values, by this process's clock; infinite
            on all processes or on none.
        largest_batch: examples in the largest training batch at the measurements so far.
        trains: False if a finished model is measured, without training steps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.processes = Processes(trainer)
        self.costs = Costs()
        self.last_step = LastStep()
        self.clipped_steps = ClippedSteps()
        self.altered: dict[Hashable, str] = {}  # loss -> why its gradient is another; or empty
        self.series: dict[Hashable, int] = {}  # loss -> 1, and one more each time it proved wrong
        self._builds: dict[Hashable, int] = {}
        self.concatenated: dict[Hashable, bool] = {}
        self.deadline = math.inf
        self.largest_batch = 1
        self.trains = True
        self._sizes: dict[int, int] = {}
        self._graph_memory: dict[Hashable, GraphMemory] = {}

    def probe_size(self, probe: Probe) -> int:
        """Examples in a complete probe, over all processes."""
        if id(probe) not in self._sizes:
            self._sizes[id(probe)] = self.processes.total(probe.size)
        return self._sizes[id(probe)]

    def forget_size(self, probe: Probe) -> None:
        """The sizes of its batches were corrected."""
        self._sizes.pop(id(probe), None)

    def looks_again(self, spec: Hashable) -> bool:
        """Whether a concatenated loss is compared with its parts: the 1st, 2nd, 4th, 8th time.

        After that every 8th time.
        """
        count = self._builds[spec] = self._builds.get(spec, 0) + 1
        return count & (count - 1) == 0 or count % 8 == 0

    @property
    def reducer(self) -> Callable[[Tensor], Tensor] | None:
        """Sums a tensor over processes; None with one process."""
        return None if self.processes.count == 1 else self.processes.sum

    def graph_memory(self, key: Hashable, probe: Probe, warn: Callable[[str], None]) -> GraphMemory:
        """The memory of the graphs of one loss; a graph of a training batch is known to fit."""
        memory = self._graph_memory.setdefault(key, GraphMemory(tell=warn))
        # The batches of a captured probe are training batches.
        sizes = [batch.size for batch in probe.batches] if probe.captured else []
        memory.examples = max([self.largest_batch, *sizes])
        return memory

    @staticmethod
    def clock(pl_module: LightningModule) -> float:
        """The time in seconds, after all work submitted to the device has finished."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()
