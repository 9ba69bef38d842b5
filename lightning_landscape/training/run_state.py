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
from lightning_landscape.training.isolation.iterators import Recordings
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
        reserved: estimated seconds of the measurements after the current one in this round.
        clipped_share: share of the clipped steps among the last ones that were seen; None without
            any.
        batch_kind: the structure of the training batches, for messages.
        largest_batch: examples in the largest training batch at the measurements so far.
        recordings: what training has drawn from the module's iterators.
        trains: False if a finished model is measured, without training steps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.processes = Processes(trainer)
        self.costs = Costs()
        self.last_step = LastStep()
        self.recordings = Recordings()
        self.clipped_steps = ClippedSteps()
        self.clipped_share: float | None = None
        self.altered: dict[Hashable, str] = {}  # loss -> why its gradient is another; or empty
        self.series: dict[Hashable, int] = {}  # loss -> 1, and one more each time it proved wrong
        self._rounds = 0
        self.concatenated: dict[Hashable, bool] = {}
        self.deadline = math.inf
        self.reserved = 0.0
        self.batch_kind = ""
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

    @property
    def looks_again(self) -> bool:
        """Whether concatenated losses are compared with their parts in this round.

        In rounds 1, 2, 4, 8 and then in every 8th: by their number, which is the same on all
        processes also after a failure on one of them.
        """
        return self._rounds > 0 and (
            self._rounds & (self._rounds - 1) == 0 or self._rounds % 8 == 0
        )

    def begin_round(self, deadline: float) -> None:
        """Set the deadline and ``clipped_share``; called on all processes."""
        self.deadline = deadline
        self._rounds += 1
        own = torch.tensor(self.clipped_steps.counts(), device=self.processes.device)
        clipped, seen = self.processes.sum(own).tolist()
        self.clipped_share = clipped / seen if seen else None

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
