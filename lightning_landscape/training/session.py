"""One run's measuring: which callback measures when, on which probe, from one budget.

The first of our callbacks in a Trainer's list leads: it opens the session in ``setup`` and its
hooks drive it.  All callbacks that are due at a step measure in one round, inside one isolation,
so that they share what is computed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.geometry.memory import GraphMemory
from lightning_landscape.training.account import WORTH_A_PICTURE, Account
from lightning_landscape.training.copies import Before, copied
from lightning_landscape.training.faults import count_fault
from lightning_landscape.training.hooks import BATCH_START, seconds_per_batch, wake
from lightning_landscape.training.isolation import isolated
from lightning_landscape.training.losses import takes_iterator
from lightning_landscape.training.probe import Probe, ProbeBatch, batch_size, clone_batch
from lightning_landscape.training.probes import Probes, ready
from lightning_landscape.training.processes import Processes
from lightning_landscape.training.publisher import Publisher
from lightning_landscape.training.random_state import undrawn
from lightning_landscape.training.records import Recorder
from lightning_landscape.training.round import Measured, Round
from lightning_landscape.training.schedule import batches_ahead

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor

_Result = TypeVar("_Result")


class Session:
    """The measuring side of one ``fit``."""

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self._callbacks = monitors  # in the Trainer's order; the first one leads
        # Scalars first, and of them those that need the graphs which others drop.
        self.monitors = sorted(monitors, key=lambda monitor: (monitor.draws, monitor.displaces))
        self.account = Account(self.monitors)
        self.joined: dict[Any, bool] = {}  # whether a loss is taken on all of a probe as one batch
        self._largest_batch = 1  # of training, in examples, of those that were looked at
        self._graph_memory: dict[Any, GraphMemory] = {}
        self.last_batch = Probe()
        self.processes = Processes(trainer)
        self.probes = Probes(self.monitors, self.processes)
        self._before = Before()
        self._before_at = -1  # trainer.global_step when it was copied
        self._publisher = Publisher(trainer, self.monitors, self.account)
        self._wanted_at: float = 0.0  # the step before which nobody wants anything, see `_idle`
        self._followers = [m for m in self.monitors if m.follows_weights]
        self._watches_end = any(m.draws and m.needs_update for m in self.monitors)
        self._hook_seconds = 0.0  # what an idle hook costs
        self._first_batch = 0
        self._stepped = -1  # trainer.global_step at the last batch that stepped
        self._fetches_itself = False  # training_step takes the iterator, not a batch
        self.values_until = math.inf  # on this process's clock; infinite on all or on none
        self._open = False  # training has begun, and what was done is not said yet
        self.trains = True  # else there is no step: a finished model is measured
        self.under_way: Round | None = None

    # -- hooks, called by the leading callback -------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; read the probes that were given or, on resuming, kept."""
        self._open = True
        self.account.budget.start()
        self._stepped = trainer.global_step
        self._first_batch = trainer.fit_loop.total_batch_idx + 1
        self._fetches_itself = takes_iterator(pl_module)
        # Lightning saves its counter before it moves on, and makes up for that after this hook.
        begins_at = trainer.fit_loop.epoch_loop._batches_that_stepped + bool(trainer.ckpt_path)
        with self._paying(pl_module):
            self._prepare(trainer, pl_module, begins_at)
            self._hook_seconds = seconds_per_batch(self._callbacks, lambda: self._idle(trainer))
        # A checkpoint written at the end of an epoch needs no making up for.
        self._follow(trainer, pl_module, min(begins_at, trainer.global_step))
        self._plan()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights to those that want them as an epoch begins."""
        wanting = [m for m in self.monitors if m.follows_epochs and not m.disabled]
        if wanting:
            with self._paying(pl_module):
                for monitor in wanting:
                    monitor.epoch_begins(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, begins_at: int) -> None:
        for monitor in self.monitors:
            if (monitor.schedule.last_step or 0) > begins_at:
                monitor.schedule.last_step = None  # another run, with a callback used before
            monitor.settle_for(None)
            self.probes.load(monitor, trainer, pl_module)
            self.probes.restore(monitor, trainer, self.recorder)
            self._begin(monitor, trainer, pl_module, begins_at)

    def _begin(
        self, monitor: Monitor, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> None:
        """An argument that does not fit the module ends the run on all processes."""
        try:
            self.processes.together(partial(monitor.begin, trainer, pl_module, step))
        except OtherRankError as error:
            raise RuntimeError("what was given could not be read on another process") from error

    def _follow(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Show the weights to those that follow them."""
        following = [m for m in self.monitors if not m.disabled and m.follows(step)]
        if following:
            with self._paying(pl_module):
                for monitor in following:
                    monitor.follow(trainer, pl_module, step)

    def _plan(self) -> None:
        """Find the step at which somebody is due; ends of epochs are seen as they come."""
        active = [m for m in self.monitors if not m.disabled]
        capturing = bool(self.probes.captured())
        due_at = min((m.schedule.next_step for m in active), default=math.inf)
        self._wanted_at = 0.0 if capturing else due_at
        if capturing or any(m.needs_batch or m.needs_update for m in active):
            wake(self._callbacks[0], [BATCH_START])
        else:
            self._callbacks[0].pass_over([BATCH_START])

    def _idle(self, trainer: Trainer) -> bool:
        """Whether nobody wants anything of this batch: asked at each, so it costs next to nothing.

        What it and Lightning's call of the hook do cost is charged, see ``_count_batches``.
        """
        loop = trainer.fit_loop.epoch_loop
        step = loop._batches_that_stepped + 1
        return not (
            step >= self._wanted_at
            or loop.batch_progress.is_last_batch
            or (self._followers and any(m.follows(step) for m in self._followers))
            or (self._watches_end and self._ends(trainer))
        )

    def _count_batches(self, trainer: Trainer) -> None:
        """Count the batches since the last time, and charge for the idle hooks at them."""
        batches = trainer.fit_loop.total_batch_idx + 1 - self._first_batch
        self.account.budget.charge((batches - self.account.batches) * self._hook_seconds)
        self.account.passed(batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what will be wanted: a batch before it can be edited, weights before they move."""
        if self._idle(trainer):
            return
        coming = [m for m in self.monitors if not m.disabled and self._due(m, trainer)]
        wanting = [*coming, *(m for m in self.monitors if m.draws and self._ends(trainer))]
        moves = any(m.needs_update for m in wanting) and self._before_at != trainer.global_step
        with self._paying(pl_module if moves else None):
            if self._before.fault is not None:
                self._before, self._before_at = Before(), -1
            if not self._fetches_itself:
                self._try_to(partial(self._keep_batch, batch, batch_idx, coming))
            if moves:
                self._before_at = trainer.global_step
                self._try_to(partial(self._keep_weights, trainer))

    def _try_to(self, keep: Callable[[], None]) -> None:
        """Keep a copy; a fault (no room, say) is told when the copies are wanted."""
        try:
            keep()
        except Exception as error:
            self.last_batch.batches, self._before = [], Before(fault=error)

    def _keep_weights(self, trainer: Trainer) -> None:
        if self._before.fault is None:
            self._before = copied(trainer)

    def _keep_batch(self, batch: Any, batch_idx: int, coming: Sequence[Monitor]) -> None:
        self.probes.hold(batch, batch_idx)
        self.last_batch.batches = []  # not an older one, whatever happens
        if any(m.needs_batch for m in coming):
            self.last_batch.batches = [ProbeBatch(clone_batch(batch), batch_idx, batch_size(batch))]

    def kept_before(self) -> Before:
        """The weights before the last step.

        Raises:
            RuntimeError: they, or the batch of that step, could not be kept.
        """
        if self._before.fault is not None:
            fault = self._before.fault
            raise RuntimeError(
                f"what was there before the step could not be kept ({fault})"
            ) from fault
        return self._before

    @staticmethod
    def _ends(trainer: Trainer) -> bool:
        """Whether this is the last step of the fit, as far as can be foreseen: pictures follow."""
        epochs, steps = trainer.max_epochs, trainer.max_steps
        last_epoch = epochs is not None and epochs > 0 and trainer.current_epoch + 1 >= epochs
        # A step of every optimizer may count.
        last_step = steps > 0 and trainer.global_step + len(trainer.optimizers) >= steps
        return bool(last_step or (last_epoch and trainer.is_last_batch))

    def _due(self, monitor: Monitor, trainer: Trainer) -> bool:
        """Whether the schedule has it measure at the end of this batch, if that steps."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return monitor.schedule.due(step, trainer.current_epoch, trainer.is_last_batch)

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
        with self._paying():
            self._capture(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._stepped:
            return  # accumulating, or weight averaging's extra epoch, or a step that was skipped
        self._stepped = trainer.global_step
        # The label under which Lightning logs the training loss of the weights as they are now:
        # its own counter moves on after this hook.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self._follow(trainer, pl_module, step)
        due = [m for m in self.monitors if not m.disabled and self._due(m, trainer)]
        self.probes.complete_further(trainer, due)
        due = [monitor for monitor in due if ready(monitor)]
        if due:
            with self._paying(pl_module):
                self.account.batch_size = batch_size(batch)
                self._largest_batch = max(self._largest_batch, self.account.batch_size)
                self._run(trainer, pl_module, due, step)
            self.last_batch.batches = []
            if not self._ends(trainer):
                self._before, self._before_at = Before(), -1
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
            coming = [m for m in self.monitors if not m.disabled and self._due(m, trainer)]
            self._try_to(partial(self._keep_batch, batch, batch_idx, coming))
        if pl_module.automatic_optimization and not outputs:
            self.last_batch.batches = []  # training_step gave no loss for it
        else:
            self.probes.take(self._count)
        if trainer.is_last_batch:
            self.probes.complete()
        else:
            self.probes.end_dear_capture(trainer, self.account)

    def on_validation_start(self, trainer: Trainer) -> None:
        """The capture ends here at the latest."""
        if not trainer.sanity_checking:
            self.probes.complete()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One picture in any case from those that draw; then say what was done."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._count_batches(trainer)
        with self._paying(pl_module):
            self.probes.complete()
            owing = [m for m in self.monitors if m.owes and not m.disabled]
            self.probes.complete_further(trainer, owing)
            last = [m for m in owing if ready(m) and m.last_measured_step != step]
            for number, monitor in enumerate(last if step > 0 and self.trains else ()):
                if monitor.draws:  # before what is left is shared out
                    self._publisher.draw(final=True)
                allowance = self.account.allowance(monitor, len(last) - number)
                monitor.settle_for(trainer.strategy.broadcast(allowance))
                self._measure(trainer, pl_module, [monitor], step, final=True)
            self._publisher.draw(final=True)
            self._look_back(pl_module, [m for m in self.monitors if m.measurements], step)
        self._close()

    def on_exception(self, trainer: Trainer) -> None:
        """Training was interrupted, or has failed: nothing is drawn any more."""
        if self._open:
            self._count_batches(trainer)
            self._close()

    def _close(self) -> None:
        """Say what was done, once."""
        self._open = False
        rank_zero_info(self.account.closing_line())

    # -- without training ----------------------------------------------------------------------

    def stop_training(self) -> None:
        """No step is made in this fit: nothing pays for a measurement, and nothing limits it."""
        self.trains = self.account.trains = False
        self.account.budget.max_overhead = None

    @property
    def work(self) -> int:
        """What the measurements under way have computed, in forwards of the probe."""
        this_round = self.under_way
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
            trainer: whose counters tell the step.
            pl_module: in the state that it would be trained on from.
            training: what is kept in place of the training batches that would have passed.
            validation: likewise.
        """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        with self._paying(pl_module):
            self.probes.put(trainer, pl_module, training, validation)
            self.probes.complete()
            self.probes.complete_further(trainer, self.monitors)
            if training:
                self.account.batch_size = batch_size(training[0])
            able = [m for m in self.monitors if not m.disabled and ready(m)]
            if able:
                self._measure(trainer, pl_module, able, step, final=True)
                self._publisher.draw(final=True)

    # -- a round -------------------------------------------------------------------------------

    def _run(
        self, trainer: Trainer, pl_module: LightningModule, due: list[Monitor], step: int
    ) -> None:
        if all(m.draws for m in due):
            worth = self.account.worth_timing_a_forward(due)
            if trainer.strategy.broadcast(worth):
                self._time_a_forward(trainer, pl_module, due[0], step)
        # Rank zero holds the clock; the others follow, or they would wait for one another.
        names = [m.prefix for m in self.account.affordable(due)]
        seconds = self.account.seconds_for_values(batches_ahead(trainer))
        names, seconds = trainer.strategy.broadcast((names, seconds))
        self.values_until = time.perf_counter() + seconds
        chosen = [m for m in due if m.prefix in names]  # scalars before pictures
        for monitor in due:
            monitor.schedule.last_step = step
            monitor.skipped += monitor not in chosen
        if chosen:
            self._measure(trainer, pl_module, chosen, step)

    def _time_a_forward(
        self, trainer: Trainer, pl_module: LightningModule, monitor: Monitor, step: int
    ) -> None:
        with self._isolated(trainer, pl_module, [monitor], step) as this_round:
            if this_round is not None:
                self._attempt(monitor, partial(this_round.objective, monitor))

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        monitors: Sequence[Monitor],
        step: int,
        final: bool = False,
    ) -> None:
        """Measure inside an isolation; write and draw after it, with the run's own loggers."""
        clock = partial(self.clock, pl_module)
        begun = clock()
        first = any(not m.measured and not m.draws for m in monitors)
        found: list[tuple[Monitor, Measured, float]] = []
        with self._isolated(trainer, pl_module, monitors, step) as this_round:
            if this_round is None:
                return
            for monitor in monitors:
                started, work = clock(), this_round.work
                measured = self._attempt(monitor, partial(monitor.measure, this_round))
                if measured is None:
                    this_round.release()
                    continue
                measured.facts |= this_round.engine(monitor)
                seconds, work = clock() - started, this_round.work - work
                if monitor.draws and work:
                    self.account.forward = seconds / work
                found.append((monitor, measured, seconds))
        for monitor, measured, seconds in found:
            started = clock()
            samples = self.probes.size(monitor.probe_in_use)
            self._publisher.publish(pl_module, monitor, measured, step, samples, final)
            monitor.last_seconds = seconds + clock() - started
            monitor.seconds_spent += monitor.last_seconds
        what = "last pictures" if final else "first values" if first else "later measurements"
        self.account.note(what, clock() - begun)
        if not final:
            self._publisher.draw()
            self._look_back(pl_module, [m for m, _, _ in found if _worth_a_picture(m)], step, False)

    @undrawn()
    def _look_back(
        self,
        pl_module: LightningModule,
        monitors: Sequence[Monitor],
        step: int,
        final: bool = True,
    ) -> None:
        """Draw all that was measured so far, on rank zero alone: the cheapest first.

        No part of what the next measurement is predicted to take.
        """
        clock = partial(self.clock, pl_module)
        begun = clock()
        pieces = []
        for monitor in monitors if self.processes.rank == 0 else ():
            started = clock()
            pieces += self._publisher.in_retrospect(monitor, step, final)
            monitor.seconds_spent += clock() - started
        for piece in sorted(pieces, key=lambda piece: piece.drawings):
            if piece.monitor.max_overhead is None or self.account.affords(piece.drawings):
                started = clock()
                piece.make()
                piece.monitor.seconds_spent += clock() - started
            elif final:
                self.account.left_out.append(piece.name)
        if monitors:
            self.account.note("pictures of the whole run", clock() - begun)

    @contextlib.contextmanager
    def _isolated(
        self, trainer: Trainer, pl_module: LightningModule, monitors: Sequence[Monitor], step: int
    ) -> Iterator[Round | None]:
        """A round inside an isolation; None where not even that could be set up."""
        with contextlib.ExitStack() as stack:
            isolation = isolated(trainer, pl_module, agree=self.processes.meet)
            try:
                entered = self.processes.together(partial(stack.enter_context, isolation))
            except Exception as error:  # here or on another process; the run goes on
                for monitor in monitors:
                    self._count(monitor, error)
                yield None
                return
            self.under_way = Round(trainer, pl_module, entered, self, step)
            try:
                yield self.under_way
            finally:
                self.under_way = None

    def _attempt(self, monitor: Monitor, compute: Callable[[], _Result]) -> _Result | None:
        """``compute()``, or None after a fault here or on another process."""
        try:
            result = self.processes.together(compute)
        except Exception as error:  # any fault of the user's loss, of a solver or of a device
            self._count(monitor, error)
            return None
        monitor.faults = 0
        return result

    def _count(self, monitor: Monitor, error: Exception) -> None:
        count_fault(monitor, error, self.processes.rank)

    # -- small things --------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """What writes beside the logs."""
        return self._publisher.recorder

    @property
    def reducer(self) -> Callable[[Tensor], Tensor] | None:
        """Sums over processes; None with one process."""
        return None if self.processes.count == 1 else self.processes.sum

    def graph_memory(self, loss_key: Any, monitor: Monitor) -> GraphMemory:
        """What the run knows about the graphs of one loss; those of a training batch have room."""
        memory = self._graph_memory.setdefault(loss_key, GraphMemory(tell=monitor.say_once))
        probe = monitor.probe_in_use  # a captured one holds training batches
        sizes = [held.size for held in probe.batches] if probe.captured else []
        memory.examples = max([self._largest_batch, *sizes])
        return memory

    def _paying(self, pl_module: LightningModule | None = None) -> Any:
        """Count the time inside; with a module, that of its device's work too."""
        if pl_module is None:
            return self.account.budget.paying(time.perf_counter)
        return self.account.budget.paying(partial(self.clock, pl_module))

    @staticmethod
    def clock(pl_module: LightningModule) -> float:
        """The time when all work given to the device is done."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()


def _worth_a_picture(monitor: Monitor) -> bool:
    cheap = monitor.max_overhead is None or monitor.seconds_spent > WORTH_A_PICTURE
    return cheap and _is_milestone(monitor.measured)


def _is_milestone(count: int) -> bool:
    """10, 20, 40, 80, ..."""
    tens, rest = divmod(count, 10)
    return rest == 0 and tens > 0 and tens & (tens - 1) == 0
