"""Runs one round at one step: isolates it, measures each callback and publishes the results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.budget import ESTIMATES, Budget
from lightning_landscape.training.failures import OverBudgetError, count_failure, stop_measuring
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.errors import (
    NotYetError,
    TouchedError,
    TrainingChangedError,
)
from lightning_landscape.training.isolation.isolated import isolated
from lightning_landscape.training.isolation.random_state import preserve_rng_state
from lightning_landscape.training.output.measured import Measured, validated
from lightning_landscape.training.probes import Probes
from lightning_landscape.training.publisher import Output, Publisher
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.round import Round
from lightning_landscape.training.run_state import RunState

_Result = TypeVar("_Result")
# The callback stops measuring, because training would change or has changed.
_REFUSED = (TouchedError, TrainingChangedError)

# Seconds that a callback must have spent before pictures of the run so far are drawn.
_MIN_SECONDS = 2.0


class Measuring:
    """Rounds of measurements in one fit.

    Attributes:
        current: the current round; None between rounds.
    """

    def __init__(self, run: RunState, budget: Budget, probes: Probes, publisher: Publisher) -> None:
        self._run = run
        self._budget = budget
        self._probes = probes
        self._publisher = publisher
        self.current: Round | None = None

    def measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        quantities: Sequence[Quantity],
        step: int,
        final: bool = False,
    ) -> None:
        """Measure in isolation; then write and draw, with the run's own loggers."""
        clock = partial(self._run.clock, pl_module)
        started_at = clock()
        first = any(not q.measured and not q.draws for q in quantities)
        results: list[tuple[Quantity, Measured, float]] = []
        with self._isolated(trainer, pl_module, quantities, step) as this_round:
            if this_round is None:
                return
            for number, quantity in enumerate(quantities):
                self._run.reserved = sum(map(self._budget.seconds_of, quantities[number + 1 :]))
                started, work = clock(), this_round.work
                measured = self._attempt(
                    quantity, partial(_measure_validated, quantity, this_round)
                )
                if measured is None:
                    this_round.release()
                    continue
                measured.facts |= this_round.engine(quantity)
                seconds, work = clock() - started, this_round.work - work
                if quantity.draws and work:
                    self._run.costs.forward = seconds / work
                results.append((quantity, measured, seconds))
        results = [result for result in results if not result[0].disabled]
        for quantity, measured, seconds in results:
            started = clock()
            store = partial(self._probes.store, quantity, trainer, self._publisher.recorder)
            self._publisher.recorder.guarded("the probe", store)
            samples = self._run.probe_size(quantity.loss.probe)
            self._publisher.publish(pl_module, quantity, measured, step, samples, final)
            bookkeeping = quantity._bookkeeping
            bookkeeping.last_seconds = seconds + clock() - started
            bookkeeping.seconds_spent += bookkeeping.last_seconds
        purpose = "last pictures" if final else "first values" if first else "later measurements"
        self._budget.record(purpose, clock() - started_at)
        if not final:
            self._publisher.draw()
            self.summarize(pl_module, [q for q, _, _ in results if _at_milestone(q)], step, False)

    def time_forward(
        self, trainer: Trainer, pl_module: LightningModule, quantity: Quantity, step: int
    ) -> None:
        """Time a forward of the callback's probe."""
        started = self._run.clock(pl_module)
        with self._isolated(trainer, pl_module, [quantity], step) as this_round:
            if this_round is not None:
                self._attempt(quantity, partial(this_round.time_forward, quantity))
        self._budget.record(ESTIMATES, self._run.clock(pl_module) - started)

    @preserve_rng_state()
    def summarize(
        self,
        pl_module: LightningModule,
        quantities: Sequence[Quantity],
        step: int,
        final: bool = True,
    ) -> None:
        """Draw all measurements so far, the cheapest pictures first; on rank zero only.

        Not part of the estimate for the next measurement.
        """
        clock = partial(self._run.clock, pl_module)
        started_at = clock()
        outputs: list[Output] = []
        for quantity in quantities if self._run.processes.rank == 0 else ():
            started = clock()
            outputs += self._publisher.run_summary(quantity, step, final)
            quantity._bookkeeping.seconds_spent += clock() - started
        for output in sorted(outputs, key=lambda output: output.drawings):
            unlimited = output.quantity.max_overhead is None
            if unlimited or self._budget.allows_drawing(output.drawings):
                started = clock()
                output.make()
                output.quantity._bookkeeping.seconds_spent += clock() - started
            elif final:
                self._budget.left_out.append(output.name)
        if final and self._run.processes.rank == 0:
            self._publisher.report(step)
        if quantities:
            self._budget.record("pictures of the whole run", clock() - started_at)

    @contextlib.contextmanager
    def _isolated(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        quantities: Sequence[Quantity],
        step: int,
    ) -> Iterator[Round | None]:
        """A round in isolation; None if the isolation failed.

        If something could not be restored, the callbacks stop measuring.
        """
        processes = self._run.processes
        with contextlib.ExitStack() as stack:
            isolation = isolated(
                trainer,
                pl_module,
                sync=processes.sync_status,
                recordings=self._run.recordings,
                losses=[q.loss_fn for q in quantities if q.loss_fn is not None],
            )
            try:
                entered = processes.run_on_all_ranks(partial(stack.enter_context, isolation))
            except Exception as error:  # here or on another process
                reraise_interrupt(error)
                for quantity in quantities:
                    self.count_failure(quantity, error)
                yield None
                return
            self.current = Round(trainer, pl_module, entered, self._run, step)
            try:
                yield self.current
            finally:
                self.current = None
        changed = entered.changed
        if processes.total(changed is not None):
            for quantity in quantities:
                reason = changed or OtherRankError("training was changed on another process")
                stop_measuring(quantity, reason, processes.rank)

    def _attempt(self, quantity: Quantity, compute: Callable[[], _Result]) -> _Result | None:
        """The result of ``compute``; None after a failure here or on another process."""
        try:
            result = self._run.processes.run_on_all_ranks(compute)
        except BaseException as error:  # of the user's code, a solver or a device
            reraise_interrupt(error)
            self._note_failure(quantity, error)
            return None
        quantity._bookkeeping.failed_in_a_row = 0
        quantity._bookkeeping.tries_again = False
        return result

    def _note_failure(self, quantity: Quantity, error: BaseException) -> None:
        """Do what the failure asks for, on all processes the same: one may have raised it alone."""
        processes, bookkeeping = self._run.processes, quantity._bookkeeping
        kinds = [isinstance(error, kind) for kind in (_REFUSED, NotYetError, OverBudgetError)]
        seen = processes.sum(torch.tensor(kinds, dtype=torch.int64, device=processes.device))
        refused, not_yet, over_budget = seen.tolist()
        if refused:
            stop_measuring(quantity, error, processes.rank)
        elif over_budget:
            bookkeeping.skipped += 1
            quantity.warn_once(str(error))
        elif not not_yet:
            self.count_failure(quantity, error)
        elif not bookkeeping.tries_again:
            bookkeeping.tries_again = True
            bookkeeping.schedule.last_step = None  # due at the next step
        else:
            bookkeeping.failed += 1
            quantity.warn_once(f"not measured yet: {error}. It is tried again on schedule")

    def count_failure(self, quantity: Quantity, error: BaseException) -> None:
        """Warn; after three failures in a row the callback stops measuring."""
        count_failure(quantity, error, self._run.processes.rank, self._run.batch_kind)


def _measure_validated(quantity: Quantity, this_round: Round) -> Measured:
    return validated(quantity.measure(this_round), quantity.prefix)


def _at_milestone(quantity: Quantity) -> bool:
    """Whether a picture of the run so far is due: after 10, 20, 40, 80, ... measurements."""
    unlimited = quantity.max_overhead is None
    tens, remainder = divmod(quantity.measured, 10)
    milestone = remainder == 0 and tens > 0 and tens & (tens - 1) == 0
    return milestone and (unlimited or quantity._bookkeeping.seconds_spent > _MIN_SECONDS)
