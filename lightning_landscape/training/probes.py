"""The data of one run's callbacks: one probe per source, complete on all processes or on none.

Captured probes are written beside the logs and read again by a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.bookkeeping import LOSS, VALIDATION
from lightning_landscape.training.budget import Budget
from lightning_landscape.training.data.batch import ProbeBatch
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.data.stored import StoredProbe
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.run_state import RunState
from lightning_landscape.training.schedule import batches_ahead


class Probes:
    """Those of all callbacks of a session: given, captured as training goes, or stored by a run."""

    def __init__(self, quantities: Sequence[Quantity], run: RunState) -> None:
        self._quantities = quantities
        self._run = run
        self._processes = run.processes
        # A copy of this step's batch until the step has given a loss; or why there is none.
        self._held: ProbeBatch | Exception | None = None
        self._assign()

    def _assign(self) -> None:
        """One probe per source: captured ones are shared by the number of samples wanted."""
        shared: dict[Any, Probe] = {}
        for quantity in self._quantities:
            probes = quantity._bookkeeping.probes
            if LOSS in probes and probes[LOSS].complete:
                continue  # a second fit goes on with the same data
            given = quantity.probe
            if isinstance(given, Probe):
                probes[LOSS] = given
                continue
            key = (None, quantity.probe_samples) if given is None else id(given)
            if key not in shared:
                shared[key] = Probe(given, quantity.probe_samples)
            probes[LOSS] = shared[key]

    # -- as a fit begins -----------------------------------------------------------------------

    def load(self, quantity: Quantity, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the given probes.

        A process that cannot read its share ends the run on all, or they would wait for it.
        """
        prepare = partial(_to_device, trainer, pl_module)
        for probe in quantity._bookkeeping.probes.values():
            if probe.captured or probe.complete:
                continue
            try:
                self._processes.run_on_all_ranks(partial(probe.load, prepare))
            except OtherRankError as error:
                raise RuntimeError(
                    "the given probe could not be read on another process"
                ) from error

    # -- over checkpoints ----------------------------------------------------------------------

    def restore(self, quantity: Quantity, trainer: Trainer, recorder: Recorder) -> None:
        """On resuming, read the probes that the run before captured; else start a new series."""
        resumed = quantity._bookkeeping.resumed and trainer.ckpt_path and trainer.global_step > 0
        for probe, stored in _captured(quantity):
            if probe.complete:
                continue
            if stored.entry is not None:
                if problem := stored.read(probe, recorder, trainer):
                    _start_new_series(quantity, probe, stored, problem)
            elif resumed:
                quantity.warn_once(
                    f"the checkpoint was written before the first measurement and names no "
                    f"{stored.label}; one is taken from the next {stored.source} batches"
                )
            found = self._processes.total(probe.complete)
            if 0 < found < self._processes.count:  # a file is missing for one process only
                _start_new_series(quantity, probe, stored, "another process has none")

    def store(self, quantity: Quantity, trainer: Trainer, recorder: Recorder) -> None:
        """Write captured probes beside the logs, once.

        At the first measurement; in a resumed run with a new probe, at the first on that.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        for probe, stored in _captured(quantity):
            if not stored.holds(probe):
                stored.write(probe, recorder, trainer)

    # -- captured while training ---------------------------------------------------------------

    def captured(self) -> list[Probe]:
        """Those that still take training batches."""
        probes = {id(q.loss.probe): q.loss.probe for q in self._quantities if not q.disabled}
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

    def take(self, count_failure: Callable[[Quantity, Exception], None]) -> None:
        """Add the held batch to the probes that still take some; on all processes, or on none."""
        held, self._held = self._held, None
        if held is None:
            return
        for probe in self.captured():
            try:
                self._processes.run_on_all_ranks(partial(self._add, probe, held))
            except Exception as error:
                probe.clear()
                for quantity in self._quantities:
                    if quantity.loss.probe is probe:
                        count_failure(quantity, error)

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

    def end_expensive_capture(self, trainer: Trainer, budget: Budget) -> None:
        """A probe is complete before it has all its examples, where the run cannot afford more."""
        ahead, costs = batches_ahead(trainer), self._run.costs
        if costs.batches < 2 or not math.isfinite(ahead):
            return
        for probe in self.captured():
            users = [q for q in self._quantities if q.loss.probe is probe and not q.disabled]
            if any(q.max_overhead is None for q in users):
                continue
            expensive = not budget.affords_probe(len(probe.batches) + 1, ahead)
            if not trainer.strategy.broadcast(expensive):  # by rank zero's clock
                continue
            self.complete(probe)
            if not probe.complete:  # a process has dropped all it had
                continue
            users[0].warn_once(
                f"the probe holds {self._run.probe_size(probe)} examples, {len(probe.batches)} "
                f"training batches, instead of {probe.samples}: a gradient of one takes "
                f"{costs.seconds_per_batch:.2g} s, and a run as short as this cannot afford more; "
                f"for more pass a larger max_overhead than {budget.limit}, or a probe of your own"
            )

    def complete_validation(self, trainer: Trainer, quantities: Sequence[Quantity]) -> None:
        """Whether the validation probes are all there: for all processes alike.

        Asked for here and not where it is captured: processes may have different numbers of
        validation batches.
        """
        for quantity in quantities:
            probe = quantity._bookkeeping.probes.get(VALIDATION)
            if probe is None or probe.complete or not probe.captured or quantity.disabled:
                continue
            closed = probe.closed or sum(trainer.num_val_batches) == 0
            own = torch.tensor([int(closed), probe.size], device=self._processes.device)
            closed_on, size = self._processes.sum(own).tolist()
            probe.complete = closed_on == self._processes.count and size > 0

    # -- without training ----------------------------------------------------------------------

    def wanted_examples(self) -> tuple[int, int]:
        """How many training and validation examples are still to be captured."""
        training = (probe.samples for probe in self.captured())
        validation = (probe.samples for probe in self._validation)
        return max(training, default=0), max(validation, default=0)

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
        for captured in self._validation:
            for index, batch in enumerate(validation):
                if captured.size < captured.samples:
                    captured.offer(prepare(batch), index, lambda _: 0)
            captured.closed = True

    @property
    def _validation(self) -> list[Probe]:
        """Those that still take validation batches."""
        active = [q._bookkeeping.probes for q in self._quantities if not q.disabled]
        probes = [probes[VALIDATION] for probes in active if VALIDATION in probes]
        return [p for p in probes if p.captured and not p.complete]


def is_ready(quantity: Quantity) -> bool:
    """Whether its data are there."""
    return all(probe.complete for probe in quantity._bookkeeping.probes.values())


def _captured(quantity: Quantity) -> list[tuple[Probe, StoredProbe]]:
    """Its captured probes and their files."""
    noted = quantity._bookkeeping
    return [
        (probe, stored)
        for role, probe in noted.probes.items()
        if probe.captured and isinstance(stored := noted.stored.get(role), StoredProbe)
    ]


def _start_new_series(quantity: Quantity, probe: Probe, stored: StoredProbe, problem: str) -> None:
    """The probe of the run before cannot be used."""
    quantity.warn_once(
        f"the {stored.label} of the run before could not be used: {problem}; a new series starts "
        f"on a new probe"
    )
    probe.clear()
    stored.entry = None
    quantity._bookkeeping.schedule.last_step = None


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as a loader gave it, made what ``training_step`` gets."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
