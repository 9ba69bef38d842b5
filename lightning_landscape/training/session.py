"""One run's measuring: which callback measures when, on which probe, from one budget.

The first of our callbacks in a Trainer's list leads: it opens the session in ``setup`` and its
hooks drive it.  All callbacks that are due at a step measure in one round, inside one isolation,
so that they share what is computed.
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
from lightning_landscape.training.data.batch import batch_size
from lightning_landscape.training.hooks import HOOK_SECONDS
from lightning_landscape.training.losses import takes_iterator
from lightning_landscape.training.measuring import Measuring
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.probes import Probes, is_ready
from lightning_landscape.training.publisher import Publisher
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.run_state import RunState
from lightning_landscape.training.schedule import batches_ahead


class Session:
    """The measuring side of one ``fit``."""

    def __init__(
        self,
        trainer: Trainer,
        quantities: Sequence[Quantity],
        watch_batches: Callable[[bool], None],
    ) -> None:
        """``watch_batches``: whether :meth:`on_train_batch_start` is to be called."""
        # Scalars first, and of them those that need the graphs which others drop.
        self.quantities = sorted(quantities, key=lambda q: (q.draws, q.moves_weights))
        self.run = RunState(trainer)
        self.budget = Budget(self.quantities, self.run.costs)
        self.probes = Probes(self.quantities, self.run)
        self._publisher = Publisher(trainer, self.quantities, self.budget, self.run.costs)
        self._measuring = Measuring(self.run, self.budget, self.probes, self._publisher)
        self._watch_batches = watch_batches
        self._next_step: float = 0.0  # nobody is due before it, see `_idle`
        self._trackers = [q for q in self.quantities if q.tracks_weights]
        self._watches_end = any(q.draws and q.needs_update for q in self.quantities)
        self._hook_seconds = HOOK_SECONDS * len(quantities)
        self._first_batch = 0
        self._stepped = -1  # trainer.global_step at the last batch that stepped
        self._fetches_itself = False  # training_step takes the iterator, not a batch
        self._open = False  # training has begun, and the closing line is not printed yet

    # -- hooks, called by the leading callback -------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; read the probes that were given or, on resuming, stored."""
        self._open = True
        self.run.costs.time.start()
        self._stepped = trainer.global_step
        self._first_batch = trainer.fit_loop.total_batch_idx + 1
        self._fetches_itself = takes_iterator(pl_module)
        # Lightning saves its counter before it moves on, and makes up for that after this hook.
        begins_at = trainer.fit_loop.epoch_loop._batches_that_stepped + bool(trainer.ckpt_path)
        with self._measuring_time(pl_module):
            self._prepare(trainer, pl_module, begins_at)
        # A checkpoint written at the end of an epoch needs no making up for.
        self._show_weights(trainer, pl_module, min(begins_at, trainer.global_step))
        self._plan()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For those that read the weights as an epoch begins."""
        reading = [q for q in self.quantities if q.tracks_epochs and not q.disabled]
        if reading:
            with self._measuring_time(pl_module):
                for quantity in reading:
                    quantity.on_epoch_weights(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, begins_at: int) -> None:
        for quantity in self.quantities:
            schedule = quantity._bookkeeping.schedule
            if (schedule.last_step or 0) > begins_at:
                schedule.last_step = None  # another run, with a callback used before
            quantity.fit_to_budget(None)
            self.probes.load(quantity, trainer, pl_module)
            self.probes.restore(quantity, trainer, self.recorder)
            self._begin(quantity, trainer, pl_module, begins_at)

    def _begin(
        self, quantity: Quantity, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> None:
        """An argument that does not fit the module ends the run on all processes."""
        try:
            self.run.processes.run_on_all_ranks(partial(quantity.prepare, trainer, pl_module, step))
        except OtherRankError as error:
            raise RuntimeError("an argument could not be read on another process") from error

    def _show_weights(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """For those that read the weights along the run."""
        reading = [q for q in self.quantities if not q.disabled and q.wants_weights(step)]
        if reading:
            with self._measuring_time(pl_module):
                for quantity in reading:
                    quantity.on_weights(trainer, pl_module, step)

    def _plan(self) -> None:
        """Find the step at which somebody is due; ends of epochs are seen as they come."""
        active = [q for q in self.quantities if not q.disabled]
        capturing = bool(self.probes.captured())
        due_at = min((q._bookkeeping.schedule.next_step for q in active), default=math.inf)
        self._next_step = 0.0 if capturing else due_at
        self._watch_batches(capturing or any(q.needs_batch or q.needs_update for q in active))

    def _idle(self, trainer: Trainer) -> bool:
        """Whether nobody needs this batch: called at each one, so it must cost next to nothing.

        What it and Lightning's call of the hook cost is counted, see ``_count_batches``.
        """
        loop = trainer.fit_loop.epoch_loop
        step = loop._batches_that_stepped + 1
        return not (
            step >= self._next_step
            or loop.batch_progress.is_last_batch
            or (self._trackers and any(q.wants_weights(step) for q in self._trackers))
            or (self._watches_end and self._ends(trainer))
        )

    def _count_batches(self, trainer: Trainer) -> None:
        """Count the batches since the last time, and the time of the idle hooks at them."""
        batches = trainer.fit_loop.total_batch_idx + 1 - self._first_batch
        self.run.costs.time.add((batches - self.run.costs.batches) * self._hook_seconds)
        self.run.costs.count_batches(batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy what will be needed: a batch before it can be edited, weights before they move."""
        if self._idle(trainer):
            return
        coming = [q for q in self.quantities if not q.disabled and self._due(q, trainer)]
        needing = [*coming, *(q for q in self.quantities if q.draws and self._ends(trainer))]
        last_step = self.run.last_step
        moves = any(q.needs_update for q in needing)
        moves = moves and last_step.copies_weights_at(trainer.global_step)
        with self._measuring_time(pl_module if moves else None):
            last_step.begin_batch()
            if not self._fetches_itself:
                self._copy_batch(batch, batch_idx, coming)
            if moves:
                last_step.copy_weights(trainer)

    def _copy_batch(self, batch: Any, batch_idx: int, coming: Sequence[Quantity]) -> None:
        last_step = self.run.last_step
        self.probes.hold(batch, batch_idx)
        last_step.batches = []  # not an older one, whatever happens
        if any(q.needs_batch for q in coming):
            last_step.attempt(partial(last_step.copy_batch, batch, batch_idx))

    @staticmethod
    def _ends(trainer: Trainer) -> bool:
        """Whether this is the last step of the fit, as far as can be foreseen: pictures follow."""
        epochs, steps = trainer.max_epochs, trainer.max_steps
        last_epoch = epochs is not None and epochs > 0 and trainer.current_epoch + 1 >= epochs
        # A step of every optimizer may count.
        last_step = steps > 0 and trainer.global_step + len(trainer.optimizers) >= steps
        return bool(last_step or (last_epoch and trainer.is_last_batch))

    def _due(self, quantity: Quantity, trainer: Trainer) -> bool:
        """Whether the schedule has it measure at the end of this batch, if that steps."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return quantity._bookkeeping.schedule.due(
            step, trainer.current_epoch, trainer.is_last_batch
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, if the optimizer has stepped and somebody is due."""
        if self._idle(trainer):
            self._stepped = trainer.global_step
            return
        self._count_batches(trainer)
        with self._measuring_time():
            self._capture(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._stepped:
            return  # accumulating, or weight averaging's extra epoch, or a step that was skipped
        self._stepped = trainer.global_step
        # The label under which Lightning logs the training loss of the weights as they are now:
        # its own counter moves on after this hook.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self._show_weights(trainer, pl_module, step)
        due = [q for q in self.quantities if not q.disabled and self._due(q, trainer)]
        self.probes.complete_validation(trainer, due)
        due = [q for q in due if is_ready(q)]
        if due:
            with self._measuring_time(pl_module):
                self.run.costs.batch_size = batch_size(batch)
                self.run.largest_batch = max(self.run.largest_batch, self.run.costs.batch_size)
                self._measure_due(trainer, pl_module, due, step)
            self.run.last_step.batches = []
            if not self._ends(trainer):
                self.run.last_step.forget_weights()
        self._plan()

    def _capture(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch to the probes, if training_step gave a loss for it."""
        if self._fetches_itself:  # at the start of the batch nothing had been fetched yet
            coming = [q for q in self.quantities if not q.disabled and self._due(q, trainer)]
            self._copy_batch(batch, batch_idx, coming)
        if pl_module.automatic_optimization and not outputs:
            self.run.last_step.batches = []  # training_step gave no loss for it
        else:
            self.probes.take(self._measuring.count_failure)
        if trainer.is_last_batch:
            self.probes.complete()
        else:
            self.probes.end_expensive_capture(trainer, self.budget)

    def on_validation_start(self, trainer: Trainer) -> None:
        """The capture ends here at the latest."""
        if not trainer.sanity_checking:
            self.probes.complete()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One picture in any case from those that draw; then the closing line."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._count_batches(trainer)
        with self._measuring_time(pl_module):
            self.probes.complete()
            last = [q for q in self.quantities if q.measures_at_end and not q.disabled]
            self.probes.complete_validation(trainer, last)
            last = [q for q in last if is_ready(q) and q._bookkeeping.last_measured_step != step]
            for number, quantity in enumerate(last if step > 0 and self.run.trains else ()):
                if quantity.draws:  # before the rest is divided among these
                    self._publisher.draw(final=True)
                forwards = self.budget.forwards_at_end(quantity, len(last) - number)
                quantity.fit_to_budget(trainer.strategy.broadcast(forwards))
                self._measuring.measure(trainer, pl_module, [quantity], step, final=True)
            self._publisher.draw(final=True)
            having = [q for q in self.quantities if q._bookkeeping.history]
            self._measuring.summarize(pl_module, having, step)
        self._close()

    def on_exception(self, trainer: Trainer) -> None:
        """Training was interrupted, or has failed: nothing is drawn any more."""
        if self._open:
            self._count_batches(trainer)
            self._close()

    def _close(self) -> None:
        """Print the closing line, once."""
        self._open = False
        rank_zero_info(self.budget.closing_line(self.run.trains))

    # -- without training ----------------------------------------------------------------------

    def stop_training(self) -> None:
        """No step is made in this fit: nothing limits a measurement."""
        self.run.trains = False
        self.budget.limit = None

    @property
    def work(self) -> int:
        """The computations of the round under way, in forwards of the probe."""
        this_round = self._measuring.current
        return 0 if this_round is None else this_round.work

    def measure_now(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        training: Sequence[Any],
        validation: Sequence[Any],
    ) -> None:
        """Measure everything once, at the end of a fit without training.

        Args:
            trainer: whose counters give the step.
            pl_module: in the state that it would be trained on from.
            training: batches for the probes, in place of those that would have passed.
            validation: likewise.
        """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        with self._measuring_time(pl_module):
            self.probes.put(trainer, pl_module, training, validation)
            self.probes.complete()
            self.probes.complete_validation(trainer, self.quantities)
            if training:
                self.run.costs.batch_size = batch_size(training[0])
            able = [q for q in self.quantities if not q.disabled and is_ready(q)]
            if able:
                self._measuring.measure(trainer, pl_module, able, step, final=True)
                self._publisher.draw(final=True)

    # -- a round -------------------------------------------------------------------------------

    def _measure_due(
        self, trainer: Trainer, pl_module: LightningModule, due: list[Quantity], step: int
    ) -> None:
        if all(q.draws for q in due):
            times = self.budget.times_a_forward(due)
            if trainer.strategy.broadcast(times):
                self._measuring.time_forward(trainer, pl_module, due[0], step)
        # Rank zero has the clock; the others follow, or they would wait for one another.
        names = [q.prefix for q in self.budget.affordable(due)]
        seconds = self.budget.seconds_for_values(batches_ahead(trainer))
        names, seconds = trainer.strategy.broadcast((names, seconds))
        self.run.deadline = time.perf_counter() + seconds
        chosen = [q for q in due if q.prefix in names]  # scalars before pictures
        for quantity in due:
            quantity._bookkeeping.schedule.last_step = step
            quantity._bookkeeping.skipped += quantity not in chosen
        if chosen:
            self._measuring.measure(trainer, pl_module, chosen, step)

    # -- small things --------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """Writes beside the logs."""
        return self._publisher.recorder

    def _measuring_time(
        self, pl_module: LightningModule | None = None
    ) -> AbstractContextManager[None]:
        """Count the time inside; with a module, that of its device's work too."""
        clock = time.perf_counter if pl_module is None else partial(self.run.clock, pl_module)
        return self.run.costs.time.measuring(clock)
