"""The data of one run's callbacks: one probe per source, complete on all processes or on none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.probe import Probe, ProbeBatch
from lightning_landscape.training.processes import Processes
from lightning_landscape.training.records import Recorder
from lightning_landscape.training.schedule import batches_ahead

if TYPE_CHECKING:
    from lightning_landscape.training.account import Account
    from lightning_landscape.training.monitor import Monitor


class Probes:
    """Those of all callbacks of a session: given, captured as training goes, or kept by a run."""

    def __init__(self, monitors: Sequence[Monitor], processes: Processes) -> None:
        self._monitors = monitors
        self._processes = processes
        self._sizes: dict[int, int] = {}
        # A copy of this step's batch until the step has given a loss; or why there is none.
        self._held: ProbeBatch | Exception | None = None
        self._assign()

    def _assign(self) -> None:
        """One probe per source: captured ones are shared by the number of samples wanted."""
        shared: dict[Any, Probe] = {}
        for monitor in self._monitors:
            if monitor.probe_in_use is not None and monitor.probe_in_use.complete:
                continue  # a second fit goes on with the same data
            if isinstance(monitor.probe, Probe):
                monitor.probe_in_use = monitor.probe
                continue
            key = (None, monitor.probe_samples) if monitor.probe is None else id(monitor.probe)
            if key not in shared:
                shared[key] = Probe(monitor.probe, monitor.probe_samples)
            monitor.probe_in_use = shared[key]

    def size(self, probe: Probe) -> int:
        """Examples of a complete probe, over all processes."""
        if id(probe) not in self._sizes:
            self._sizes[id(probe)] = self._processes.total(probe.size)
        return self._sizes[id(probe)]

    # -- as a fit begins -----------------------------------------------------------------------

    def load(self, monitor: Monitor, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what was given.

        A process that cannot read its share ends the run on all, or they would wait for it.
        """
        prepare = partial(_to_device, trainer, pl_module)
        for probe in (monitor.further_probe, monitor.probe_in_use, *monitor.given_probes):
            if probe is None or probe.captured or probe.complete:
                continue
            try:
                self._processes.together(partial(probe.load, prepare))
            except OtherRankError as error:
                raise RuntimeError(
                    "the given probe could not be read on another process"
                ) from error

    def restore(self, monitor: Monitor, trainer: Trainer, recorder: Recorder) -> None:
        """On resuming, read what the run before had captured."""
        for probe, kept in monitor.kept_probes:
            if not probe.captured or probe.complete:
                continue
            monitor.restore_probe(probe, kept, recorder, trainer)
            found = self._processes.total(probe.complete)
            if 0 < found < self._processes.count:  # a file is missing for one process only
                monitor.give_up_probe(probe, kept, "another process has none")

    # -- captured while training ---------------------------------------------------------------

    def captured(self) -> list[Probe]:
        """Those that still take training batches."""
        probes = {id(m.probe_in_use): m.probe_in_use for m in self._monitors if not m.disabled}
        return [p for p in probes.values() if p.captured and not p.complete]

    def hold(self, batch: Any, batch_idx: int) -> None:
        """Copy the batch that is about to be trained on: training_step may edit it.  Sends nothing.

        A fault is raised by :meth:`take`.
        """
        self._held = None
        if self.captured():
            try:
                self._held = ProbeBatch.copy_of(batch, batch_idx)
            except Exception as error:  # a batch that cannot be copied
                self._held = error

    def take(self, count_fault: Callable[[Monitor, Exception], None]) -> None:
        """Add the held batch to the probes that still take some; on all processes, or on none."""
        held, self._held = self._held, None
        if held is None:
            return
        for probe in self.captured():
            try:
                self._processes.together(partial(self._add, probe, held))
            except Exception as error:
                probe.forget()
                for monitor in self._monitors:
                    if monitor.probe_in_use is probe:
                        count_fault(monitor, error)

    def _add(self, probe: Probe, held: ProbeBatch | Exception) -> None:
        fault = held if isinstance(held, Exception) else None
        probe.add(held if isinstance(held, ProbeBatch) else None, self._processes.total)
        if fault is not None:
            raise fault

    def complete(self, *probes: Probe) -> None:
        """The capture of training batches ends here: of these probes, or of all."""
        for probe in probes or self.captured():
            # Complete everywhere or nowhere: a process may have dropped all it had.
            having = self._processes.total(bool(probe.batches))
            probe.complete = having == self._processes.count

    def end_dear_capture(self, trainer: Trainer, account: Account) -> None:
        """A probe is complete before it has all its examples, where the run cannot pay for more."""
        ahead = batches_ahead(trainer)
        if account.batches < 2 or not math.isfinite(ahead):
            return
        for probe in self.captured():
            monitors = [m for m in self._monitors if m.probe_in_use is probe and not m.disabled]
            if any(m.max_overhead is None for m in monitors):
                continue
            dear = not account.pays_for(len(probe.batches) + 1, ahead)
            if not trainer.strategy.broadcast(dear):  # by rank zero's clock
                continue
            self.complete(probe)
            if not probe.complete:  # a process has dropped all it had
                continue
            monitors[0].say_once(
                f"the probe holds {self.size(probe)} examples, {len(probe.batches)} training "
                f"batches, instead of {probe.samples}: a gradient of one takes "
                f"{account.pace:.2g} s, and a run as short as this could not pay for more; for "
                f"more pass a larger max_overhead than {account.budget.max_overhead}, or a probe "
                f"of your own"
            )

    def complete_further(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        """Whether what callbacks captured themselves is all there: for all processes alike.

        Asked for here and not where it is captured: processes may have different numbers of
        validation batches.
        """
        for monitor in monitors:
            probe = monitor.further_probe
            if probe is None or probe.complete or not probe.captured or monitor.disabled:
                continue
            closed = probe.closed or sum(trainer.num_val_batches) == 0
            told = torch.tensor([int(closed), probe.size], device=self._processes.device)
            closed_on, size = self._processes.sum(told).tolist()
            probe.complete = closed_on == self._processes.count and size > 0

    # -- without training ----------------------------------------------------------------------

    def wanted_examples(self) -> tuple[int, int]:
        """How many training and validation examples are still to be captured."""
        training = (probe.samples for probe in self.captured())
        further = (probe.samples for probe in self._further)
        return max(training, default=0), max(further, default=0)

    def put(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        training: Sequence[Any],
        validation: Sequence[Any],
    ) -> None:
        """Keep these batches in place of those that would have passed."""
        prepare = partial(_to_device, trainer, pl_module)
        for probe in self.captured():
            for index, batch in enumerate(training):
                probe.offer(prepare(batch), index, self._processes.total)
        for further in self._further:
            for index, batch in enumerate(validation):
                if further.size < further.samples:
                    further.offer(prepare(batch), index, lambda _: 0)
            further.closed = True

    @property
    def _further(self) -> list[Probe]:
        """Those that still take validation batches."""
        probes = [m.further_probe for m in self._monitors if not m.disabled]
        return [p for p in probes if p is not None and p.captured and not p.complete]


def ready(monitor: Monitor) -> bool:
    """Whether its data are there."""
    further = monitor.further_probe
    return monitor.probe_in_use.complete and (further is None or further.complete)


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as a loader gave it, made what ``training_step`` gets."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
