"""Decides which callback measures when, on which probe, within one budget for the run.

The first of our callbacks in a Trainer's list leads: it opens the session in ``setup``, and its
hooks drive it.  All callbacks that are due at a step measure in one round, in one isolation, and
share their computations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.budget import Budget
from lightning_landscape.training.closing import (
    as_lines,
    as_markdown,
    closing_line,
    judgement,
    summary,
    warn_of_missing,
)
from lightning_landscape.training.data.batch import batch_size
from lightning_landscape.training.failures import kind_of
from lightning_landscape.training.hooks import BATCH_START, STEP_HOOKS
from lightning_landscape.training.isolation.module_state import record_iterators
from lightning_landscape.training.logged_size import LoggedSize
from lightning_landscape.training.losses import takes_iterator
from lightning_landscape.training.measuring import Measuring
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.probes import Probes, is_ready
from lightning_landscape.training.publisher import Publisher
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.readers import Reader, find_readers
from lightning_landscape.training.rounds import Rounds
from lightning_landscape.training.run_state import RunState


class Session:
    """All measuring of one ``fit``."""

    def __init__(
        self,
        trainer: Trainer,
        quantities: Sequence[Quantity],
        watch: Callable[[Sequence[str], bool], None],
    ) -> None:
        """``watch(hooks, enabled)``: enable or disable calls of these hooks."""
        # Scalars first, and among them those that do not move the weights, which drops the graphs.
        self.quantities = sorted(quantities, key=lambda q: (q.draws, q.moves_weights))
        self.run = RunState(trainer)
        self.budget = Budget(self.quantities, self.run.costs)
        self.probes = Probes(self.quantities, self.run)
        self._publisher = Publisher(trainer, self.quantities, self.budget, self.run.costs)
        self._measuring = Measuring(self.run, self.budget, self.probes, self._publisher)
        self._rounds = Rounds(
            self.quantities, self.run, self.budget, self._measuring, self._publisher
        )
        self._readers: list[Reader] = []
        self._watch = watch
        self._logged_size = LoggedSize()
        self._sees_clipping = any(q.needs_clipping for q in quantities)
        self._next_step: float = 0.0  # no callback is due before it, see `_idle`
        self._trackers = [q for q in self.quantities if q.tracks_weights]
        self._copies_at_ends = False  # batches for callbacks that measure by epochs
        self._watches_end = any(q.draws and q.needs_update for q in self.quantities)
        self._first_batch = 0
        self._last_global_step = -1  # trainer.global_step after the last batch
        self._takes_iterator = False  # training_step takes an iterator instead of a batch
        self._open = False  # training has begun, and the closing line has not been printed

    # -- hooks, called by the leading callback -------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; read the given probes and, when resuming, the stored ones."""
        self._open = True
        self.run.costs.time.start()
        self._last_global_step = trainer.global_step
        self._first_batch = trainer.fit_loop.total_batch_idx + 1
        self._takes_iterator = takes_iterator(pl_module)
        # Lightning saves its counter before incrementing it, and corrects that after this hook.
        begins_at = trainer.fit_loop.epoch_loop._batches_that_stepped + bool(trainer.ckpt_path)
        with self.measuring_time(pl_module):
            self._prepare(trainer, pl_module, begins_at)
        # A checkpoint written at the end of an epoch needs no correction.
        self._track_weights(trainer, pl_module, min(begins_at, trainer.global_step))
        self._readers = find_readers(trainer, self.quantities)
        self._rounds.plan(trainer, begins_at)
        self._find_next_step()
        if self._sees_clipping:
            self.run.clipped_steps.start(partial(self._watch, STEP_HOOKS))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the callbacks that read the weights at the start of an epoch."""
        reading = [q for q in self.quantities if q.tracks_epochs and not q.disabled]
        if reading:
            with self.measuring_time(pl_module):
                for quantity in reading:
                    quantity.on_epoch_weights(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, begins_at: int) -> None:
        record_iterators(pl_module, self.run.recordings)
        for quantity in self.quantities:
            schedule = quantity._bookkeeping.schedule
            if (schedule.last_step or 0) > begins_at:
                schedule.last_step = None  # the callback was used in another run before
            quantity.fit_to_budget(None)
            self.probes.load(quantity, trainer, pl_module)
            self.probes.restore(quantity, trainer, self.recorder)
            self._prepare_quantity(quantity, trainer, pl_module, begins_at)

    def _prepare_quantity(
        self, quantity: Quantity, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> None:
        """Prepare one callback; an error on one process ends the run on all."""
        try:
            self.run.processes.run_on_all_ranks(partial(quantity.prepare, trainer, pl_module, step))
        except OtherRankError as error:
            raise RuntimeError(
                "an argument could not be read on another process, see its error"
            ) from error

    def _track_weights(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Call the callbacks that read the weights along the run."""
        reading = [q for q in self.quantities if not q.disabled and q.wants_weights(step)]
        if reading:
            with self.measuring_time(pl_module):
                for quantity in reading:
                    quantity.on_weights(trainer, pl_module, step)

    def _find_next_step(self) -> None:
        """Find the next step at which a callback is due, apart from ends of epochs."""
        active = [q for q in self.quantities if not q.disabled]
        capturing = bool(self.probes.captured())
        due_at = min((q._bookkeeping.schedule.next_step for q in active), default=math.inf)
        self._next_step = 0.0 if capturing else due_at
        copies = any(q.needs_batch or q.needs_update for q in active)
        self._copies_at_ends = any(
            q.needs_batch and q._bookkeeping.schedule.every_n_epochs for q in active
        )
        self._watch([BATCH_START], capturing or copies)

    def _idle(self, trainer: Trainer) -> bool:
        """Whether no callback needs this batch.  Called at every batch, so it must be fast.

        Its time and that of Lightning's call of the hook are counted, see ``_count_batches``.
        """
        loop = trainer.fit_loop.epoch_loop
        step = loop._batches_that_stepped + 1
        return not (
            step >= self._next_step
            or loop.batch_progress.is_last_batch
            or (self._copies_at_ends and self._makes_last_step(trainer))
            or (self._readers and self._reading(trainer))
            or (self._trackers and any(q.wants_weights(step) for q in self._trackers))
            or (self._watches_end and self._is_last_step(trainer))
        )

    def _count_batches(self, trainer: Trainer) -> None:
        """Count the batches since the last call."""
        self.run.costs.count_batches(trainer.fit_loop.total_batch_idx + 1 - self._first_batch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the batch before it can be modified, and the weights before the step, if needed."""
        if self._idle(trainer):
            return
        due = self._due(trainer, self._reading(trainer))
        measuring = [*due, *(q for q in self.quantities if q.draws and self._is_last_step(trainer))]
        last_step, copies = self.run.last_step, any(q.needs_update for q in measuring)
        copies = copies and last_step.needs_weights_at(trainer.global_step)
        with self.measuring_time(pl_module if copies else None):
            last_step.begin_batch()
            self._logged_size.watch(trainer)
            if not self._takes_iterator:
                self._copy_batch(trainer, batch, batch_idx, due)
            if copies:
                last_step.copy_weights(trainer)

    def _copy_batch(
        self, trainer: Trainer, batch: Any, batch_idx: int, due: Sequence[Quantity]
    ) -> None:
        self.probes.copy_batch(batch, batch_idx)
        last_step = self.run.last_step
        ending = self._copies_at_ends and self._makes_last_step(trainer)
        if ending or any(q.needs_batch for q in due):
            last_step.begin_copy(self._last_global_step)
            last_step.attempt(partial(last_step.copy_batch, batch, batch_idx))

    @staticmethod
    def _makes_last_step(trainer: Trainer) -> bool:
        """Whether this batch's gradient goes into the last step of the epoch; False if unknown."""
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        return bool(trainer.fit_loop.batch_idx >= (batches - 1) // accumulated * accumulated)

    @staticmethod
    def _is_last_step(trainer: Trainer) -> bool:
        """Whether this is the last step of the fit, by the Trainer's limits."""
        epochs, steps = trainer.max_epochs, trainer.max_steps
        last_epoch = epochs is not None and epochs > 0 and trainer.current_epoch + 1 >= epochs
        # global_step may count the steps of every optimizer.
        last_step = steps > 0 and trainer.global_step + len(trainer.optimizers) >= steps
        return bool(last_step or (last_epoch and trainer.is_last_batch))

    def _due(self, trainer: Trainer, reading: Sequence[Reader]) -> list[Quantity]:
        """The callbacks that are due at the end of this batch, if an optimizer steps."""
        return [q for q in self.quantities if not q.disabled and self._is_due(q, trainer, reading)]

    def _is_due(self, quantity: Quantity, trainer: Trainer, reading: Sequence[Reader]) -> bool:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        schedule = quantity._bookkeeping.schedule
        if schedule.due(step, trainer.current_epoch, trainer.is_last_batch):
            return True
        allowed = step >= schedule.not_before or quantity.must_measure
        return allowed and any(r.quantity is quantity for r in reading)

    def _reading(self, trainer: Trainer) -> list[Reader]:
        """What reads a value after this batch, if an optimizer steps."""
        if not self._readers:
            return []
        steps = trainer.global_step
        if steps == self._last_global_step:  # not yet
            steps += len(trainer.optimizers)
        return [reader for reader in self._readers if reader.reads(trainer, steps)]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, if an optimizer has stepped and a callback is due."""
        # The label under which Lightning logs the training loss of the current weights; its own
        # counter is incremented after this hook.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        automatic = pl_module.automatic_optimization
        self.run.clipped_steps.end_batch(step, self._next_step, automatic)
        if self._idle(trainer):
            self._last_global_step = trainer.global_step
            return
        self._count_batches(trainer)
        with self.measuring_time():
            size = self._capture(trainer, pl_module, outputs, batch, batch_idx)
        reading = self._reading(trainer)
        if trainer.global_step == self._last_global_step:
            return  # gradient accumulation, the extra epoch of weight averaging, or a skipped step
        before, self._last_global_step = self._last_global_step, trainer.global_step
        batches = trainer.accumulate_grad_batches if automatic else 1
        self.run.last_step.end_step(before, batch_idx, batches)
        self._track_weights(trainer, pl_module, step)
        due = self._due(trainer, reading)
        self.probes.complete_validation(trainer, due)
        self.probes.complete_for([r for r in reading if r.quantity.must_measure])
        due = [q for q in due if is_ready(q)]
        if due:
            with self.measuring_time(pl_module):
                self.run.costs.batch_size = size or batch_size(batch)
                self.run.batch_kind = kind_of(batch)
                self.run.largest_batch = max(self.run.largest_batch, self.run.costs.batch_size)
                self._rounds.measure_due(trainer, pl_module, due, step)
            self.run.last_step.batches = []
            if not self._is_last_step(trainer):
                self.run.last_step.clear_weights()
        for reader in reading:
            reader.warn_if_stale(step)
        self._find_next_step()
        self.run.clipped_steps.plan(step, self._next_step)

    def _capture(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> int | None:
        """Add the batch to the probes, if training_step returned a loss for it.

        Its number of examples, if the module passed it to ``self.log``.
        """
        size = self._logged_size.stop()
        if self._takes_iterator:  # not available at the start of the batch
            due = self._due(trainer, self._reading(trainer))
            self._copy_batch(trainer, batch, batch_idx, due)
        if pl_module.automatic_optimization and not outputs:
            self.run.last_step.drop_batch()  # training_step returned no loss
        else:
            self.probes.add_copied(self._measuring.count_failure, size)
        if trainer.is_last_batch:
            self.probes.complete()
        return size

    def on_validation_start(self, trainer: Trainer) -> None:
        """End the capture of training batches."""
        if not trainer.sanity_checking:
            self.probes.complete()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the last measurements and pictures, and print the closing line."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._count_batches(trainer)
        with self.measuring_time(pl_module):
            self.probes.complete()
            self.probes.complete_validation(trainer, self.quantities)
            if step > 0 and self.run.trains:
                self._rounds.measure_at_end(trainer, pl_module, step)
            self._rounds.count_passed(step)
            self._publisher.draw(final=True)
            measured = [q for q in self.quantities if q._bookkeeping.history]
            self._measuring.summarize(pl_module, measured, step)
            self._summarize(step)
        self._print_closing_line()
        if step > 0 and self.run.trains:
            warn_of_missing(self.quantities, self.budget, step)

    def on_exception(self, trainer: Trainer) -> None:
        """Training was interrupted or has failed: print the closing line, draw nothing."""
        if self._open:
            self._count_batches(trainer)
            self._rounds.count_passed(trainer.fit_loop.epoch_loop._batches_that_stepped)
            self._print_closing_line()

    def _summarize(self, step: int) -> None:
        """Log the summary as text."""
        rows, sentence = summary(self.quantities), judgement(self.quantities)
        if rows and self.run.trains:
            line = closing_line(self.quantities, self.budget, self.run.costs, trains=True)
            text = as_markdown(rows, sentence, line)
            self.recorder.text("landscape/summary", text, step)

    def _print_closing_line(self) -> None:
        """Print the closing line and the summary, once."""
        self._open = False
        self.run.recordings.remove()
        self.recorder.release()
        line = closing_line(self.quantities, self.budget, self.run.costs, self.run.trains)
        rows = as_lines(summary(self.quantities), judgement(self.quantities))
        rank_zero_info("\n".join([line, *(rows if self.run.trains else [])]))

    # -- without training ----------------------------------------------------------------------

    def stop_training(self) -> None:
        """Measure without training steps, and so without a limit."""
        self.run.trains = False
        self.budget.limit = None

    @property
    def work(self) -> int:
        """The computations of the current round, in forwards of the probe."""
        this_round = self._measuring.current
        return 0 if this_round is None else this_round.work

    def measure_now(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        training: Sequence[Any],
        validation: Sequence[Any],
    ) -> None:
        """Measure everything once without training, on these batches where probes are captured."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        with self.measuring_time(pl_module):
            self.probes.fill(trainer, pl_module, training, validation)
            self.probes.complete()
            self.probes.complete_validation(trainer, self.quantities)
            if training:
                self.run.costs.batch_size = batch_size(training[0])
            ready = [q for q in self.quantities if not q.disabled and is_ready(q)]
            if ready:
                self._measuring.measure(trainer, pl_module, ready, step, final=True)
                self._publisher.draw(final=True)

    # -- helpers -------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """Writes to the loggers and beside the logs."""
        return self._publisher.recorder

    def measuring_time(
        self, pl_module: LightningModule | None = None
    ) -> AbstractContextManager[None]:
        """Count the time inside as measuring; with a module, including work on its device."""
        clock = time.perf_counter if pl_module is None else partial(self.run.clock, pl_module)
        return self.run.costs.time.measuring(clock)
