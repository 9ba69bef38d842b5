"""The probes of a run's callbacks: one per source, complete on all processes or on none.

Captured probes are written beside the logs and read again by a resumed run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.geometry.checks import few
from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.bookkeeping import LOSS, VALIDATION
from lightning_landscape.training.data.batch import ProbeBatch, doubtful_sizes
from lightning_landscape.training.data.probe import Probe, probe_of
from lightning_landscape.training.data.stored import StoredProbe
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.isolated import isolated_reading
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.readers import Reader
from lightning_landscape.training.run_state import RunState


class Probes:
    """The probes of a session: given, captured during training, or stored by an earlier run."""

    def __init__(self, quantities: Sequence[Quantity], run: RunState) -> None:
        self._quantities = quantities
        self._run = run
        self._processes = run.processes
        # A copy of the current batch until its loss is known, or the error of copying it.
        self._copied: ProbeBatch | Exception | None = None
        self._assign()

    def _assign(self) -> None:
        """Assign one probe per source; captured ones are shared if their sizes are equal."""
        shared: dict[Any, Probe] = {}
        for quantity in self._quantities:
            probes = quantity._bookkeeping.probes
            if LOSS in probes and probes[LOSS].complete:
                continue  # a second fit continues with the same data
            given = quantity.probe
            key = (None, quantity.probe_samples) if given is None else id(given)
            if key not in shared:
                shared[key] = probe_of(given, quantity.probe_samples)
            probes[LOSS] = shared[key]

    # -- start of the fit -----------------------------------------------------------------------

    def load(self, quantity: Quantity, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the given probes; an error on one process ends the run on all."""
        prepare = partial(_to_device, trainer, pl_module)
        for probe in quantity._bookkeeping.probes.values():
            if probe.captured or probe.complete:
                continue
            try:
                with isolated_reading(pl_module, probe.source):
                    self._processes.run_on_all_ranks(partial(probe.load, prepare))
            except OtherRankError as error:
                raise RuntimeError(
                    "the given probe could not be read on another process, see its error"
                ) from error

    # -- checkpoints ---------------------------------------------------------------------------

    def restore(self, quantity: Quantity, trainer: Trainer, recorder: Recorder) -> None:
        """When resuming, read the probes of the run before; otherwise start a new series."""
        resumed = quantity._bookkeeping.resumed and trainer.ckpt_path and trainer.global_step > 0
        for probe, stored in _captured_probes(quantity):
            if probe.complete:
                continue
            if stored.entry is not None:
                if problem := stored.read(probe, recorder, trainer):
                    _start_new_series(quantity, probe, stored, problem)
            elif resumed and quantity._bookkeeping.measured:
                problem = "it was not saved (save_probe=False, or it could not be written)"
                _start_new_series(quantity, probe, stored, problem)
            elif resumed:
                quantity.warn_once(
                    f"the checkpoint was written before the first measurement and has no "
                    f"{stored.label}; one is taken from the next {stored.source} batches"
                )
            found = self._processes.total(probe.complete)
            if 0 < found < self._processes.count:  # a file is missing on some process
                _start_new_series(quantity, probe, stored, "another process has none")

    def store(self, quantity: Quantity, trainer: Trainer, recorder: Recorder) -> None:
        """Write captured probes beside the logs, once: at their first measurement."""
        if getattr(trainer, "fast_dev_run", False):
            return
        for probe, stored in _captured_probes(quantity):
            users = [q for q in self._quantities if probe in q._bookkeeping.probes.values()]
            if not stored.holds(probe) and all(q.save_probe for q in users):
                stored.write(probe, recorder, trainer)

    # -- captured while training ---------------------------------------------------------------

    def captured(self) -> list[Probe]:
        """Incomplete probes of training batches."""
        probes = {id(q.loss.probe): q.loss.probe for q in self._quantities if not q.disabled}
        return [p for p in probes.values() if p.captured and not p.complete]

    def copy_batch(self, batch: Any, batch_idx: int) -> None:
        """Copy the next training batch, because training_step may modify it.

        No communication; an error is raised by :meth:`add_copied` on all processes.
        """
        self._copied = None
        if self.captured():
            try:
                self._copied = ProbeBatch.copy_of(batch, batch_idx)
            except Exception as error:  # a batch that cannot be copied
                reraise_interrupt(error)
                self._copied = error

    def add_copied(
        self, count_failure: Callable[[Quantity, Exception], None], size: int | None = None
    ) -> None:
        """Add the copied batch to incomplete probes; on all processes or on none.

        ``size``: its number of examples, if the module passed it to ``self.log``.
        """
        copied, self._copied = self._copied, None
        if copied is None:
            return
        if isinstance(copied, ProbeBatch):
            if size is not None:
                copied = replace(copied, size=size)
            elif lengths := doubtful_sizes(copied.batch):
                self._quantities[0].warn_once(
                    f"the tensors of a training batch have lengths of {few(lengths)}: it counts as "
                    f"{copied.size} examples; if that is not their number pass batch_size=... to "
                    f"self.log in training_step"
                )
        for probe in self.captured():
            try:
                self._processes.run_on_all_ranks(partial(self._add, probe, copied))
            except Exception as error:
                reraise_interrupt(error)
                probe.clear()
                for quantity in self._quantities:
                    if quantity.loss.probe is probe:
                        count_failure(quantity, error)

    def _add(self, probe: Probe, copied: ProbeBatch | Exception) -> None:
        probe.add(copied if isinstance(copied, ProbeBatch) else None, self._processes.total)
        if isinstance(copied, Exception):
            raise copied

    def complete(self, *probes: Probe) -> None:
        """End the capture of training batches, for these probes or for all."""
        for probe in probes or self.captured():
            # On all processes or on none: one may have no batch.
            nonempty = self._processes.total(bool(probe.batches))
            probe.complete = nonempty == self._processes.count

    def complete_for(self, readers: Sequence[Reader]) -> None:
        """End the capture of training batches where a value is read before it has ended."""
        for reader in readers:
            probe = reader.quantity.loss.probe
            if probe.complete or not probe.captured or reader.quantity.disabled:
                continue
            self.complete(probe)
            if probe.complete:
                reader.quantity.warn_once(
                    f"the probe holds {self._run.probe_size(probe)} examples instead of "
                    f"{probe.samples}, because {reader.name}(monitor={reader.key!r}) reads a value "
                    f"after {len(probe.batches)} training batches; for more pass probe=..., or let "
                    f"it read later"
                )

    def complete_validation(self, trainer: Trainer, quantities: Sequence[Quantity]) -> None:
        """Complete the validation probes whose capture has ended on all processes.

        Decided here and not during the capture, because processes may have different numbers of
        validation batches.
        """
        for quantity in quantities:
            probe = quantity._bookkeeping.probes.get(VALIDATION)
            if probe is None or probe.complete or not probe.captured or quantity.disabled:
                continue
            closed = probe.closed or sum(trainer.num_val_batches) == 0
            local = torch.tensor([int(closed), probe.size], device=self._processes.device)
            closed_on, size = self._processes.sum(local).tolist()
            probe.complete = closed_on == self._processes.count and size > 0

    # -- without training ----------------------------------------------------------------------

    def missing_examples(self) -> tuple[int, int]:
        """How many training and validation examples are still missing."""
        training = (probe.samples for probe in self.captured())
        validation = (probe.samples for probe in self._incomplete_validation)
        return max(training, default=0), max(validation, default=0)

    def fill(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        training: Sequence[Any],
        validation: Sequence[Any],
    ) -> None:
        """Fill the probes with these batches instead of those of a training."""
        prepare = partial(_to_device, trainer, pl_module)
        for probe in self.captured():
            for index, batch in enumerate(training):
                probe.offer(prepare(batch), index, self._processes.total)
        for validation_probe in self._incomplete_validation:
            for index, batch in enumerate(validation):
                if validation_probe.size < validation_probe.samples:
                    validation_probe.offer(prepare(batch), index, lambda _: 0)
            validation_probe.closed = True

    @property
    def _incomplete_validation(self) -> list[Probe]:
        """Incomplete probes of validation batches."""
        active = [q._bookkeeping.probes for q in self._quantities if not q.disabled]
        probes = [probes[VALIDATION] for probes in active if VALIDATION in probes]
        return [p for p in probes if p.captured and not p.complete]


def is_ready(quantity: Quantity) -> bool:
    """Whether all its probes are complete."""
    return all(probe.complete for probe in quantity._bookkeeping.probes.values())


def _captured_probes(quantity: Quantity) -> list[tuple[Probe, StoredProbe]]:
    """The callback's captured probes and their files."""
    bookkeeping = quantity._bookkeeping
    return [
        (probe, stored)
        for role, probe in bookkeeping.probes.items()
        if probe.captured and isinstance(stored := bookkeeping.stored.get(role), StoredProbe)
    ]


def _start_new_series(quantity: Quantity, probe: Probe, stored: StoredProbe, problem: str) -> None:
    """Drop a probe of the run before that cannot be used."""
    quantity.warn_once(
        f"the {stored.label} of the run before could not be used: {problem}; a new series starts "
        f"on a new probe"
    )
    probe.clear()
    stored.entry = None
    quantity._bookkeeping.schedule.last_step = None


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch of a DataLoader, converted and moved as for ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
