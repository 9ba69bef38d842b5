"""Decides at each step that is due which callbacks measure, and when they may measure next."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_landscape.training.budget import Budget
from lightning_landscape.training.measuring import Measuring
from lightning_landscape.training.publisher import Publisher
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.run_state import RunState
from lightning_landscape.training.schedule import batches_ahead, steps_ahead

# About how often a callback measures in a run, with every_n_train_steps="auto".
_VALUES, _PICTURES = 50, 5


class Rounds:
    """The rounds of one fit.  Rank zero decides: processes have clocks of their own."""

    def __init__(
        self,
        quantities: Sequence[Quantity],
        run: RunState,
        budget: Budget,
        measuring: Measuring,
        publisher: Publisher,
    ) -> None:
        self._quantities = quantities
        self._run = run
        self._budget = budget
        self._measuring = measuring
        self._publisher = publisher
        self._forecast_made = False

    def plan(self, trainer: Trainer, begins_at: int) -> None:
        """Set the length of the run, which starts after ``begins_at`` steps."""
        steps = begins_at + steps_ahead(trainer)
        if getattr(trainer, "fast_dev_run", False):
            self._budget.grace_seconds = 0.0
        for quantity in self._quantities:
            count = _PICTURES if quantity.draws else _VALUES
            quantity._bookkeeping.schedule.set_length(steps, count, at_end=quantity.draws)

    def measure_due(
        self, trainer: Trainer, pl_module: LightningModule, due: Sequence[Quantity], step: int
    ) -> None:
        """Measure those of ``due`` that the budget allows."""
        ahead = steps_ahead(trainer)
        self._budget.batches_ahead, self._budget.steps_ahead = batches_ahead(trainer), ahead
        chosen = self._choose(trainer, pl_module, due, step, ahead)
        for quantity in due:
            bookkeeping = quantity._bookkeeping
            bookkeeping.skipped += bookkeeping.schedule.advance(step) + (quantity not in chosen)
        if chosen:
            self._begin_round(trainer, any(q.must_measure for q in chosen))
            self._measuring.measure(trainer, pl_module, chosen, step)
        if self._budget.limit is not None:
            self._forecast(step, ahead)
            found = trainer.strategy.broadcast(self._budget.next_steps(step, ahead))
            for quantity in self._quantities:
                if quantity.prefix in found and quantity.max_overhead is not None:
                    quantity._bookkeeping.schedule.not_before = found[quantity.prefix]

    def _forecast(self, step: int, ahead: float) -> None:
        """Say once what the run can afford, when the first costs are known."""
        if self._forecast_made or not math.isfinite(ahead):
            return
        if forecast := self._budget.forecast(ahead):
            self._forecast_made = True
            rank_zero_info(
                f"lightning_landscape: this run of {step + ahead:.0f} steps can afford {forecast}, "
                f"{self._budget.whole:.0f} s in all; for more pass a larger max_overhead or "
                f"grace_seconds, or max_overhead=None"
            )

    def _choose(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        due: Sequence[Quantity],
        step: int,
        ahead: float,
    ) -> list[Quantity]:
        budget = self._budget
        if budget.limit is None:
            return list(due)
        for again in (False, True):
            chosen = budget.within_budget(due, step, ahead)
            times = not again and budget.should_time_forward(due, chosen)
            names, times = trainer.strategy.broadcast(([q.prefix for q in chosen], times))
            if not times:
                break
            first = next(q for q in due if not q.measured and q.prefix not in names)
            self._measuring.time_forward(trainer, pl_module, first, step)
        return [q for q in due if q.prefix in names]  # scalars before pictures

    def _begin_round(self, trainer: Trainer, unlimited: bool = False) -> None:
        seconds = math.inf if unlimited else trainer.strategy.broadcast(self._budget.left)
        self._run.begin_round(time.perf_counter() + seconds)

    def measure_at_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure what is due at the end of the fit, as far as there is time."""
        self._budget.batches_ahead = self._budget.steps_ahead = 0.0
        due = [q for q in self._quantities if self._due_at_end(q, step)]
        for number, quantity in enumerate(due):
            if quantity.draws:  # before the remaining budget is divided
                self._publisher.draw(final=True)
            times = self._budget.should_time_forward([quantity], [])
            if quantity.max_overhead is not None and trainer.strategy.broadcast(times):
                self._measuring.time_forward(trainer, pl_module, quantity, step)
            forwards = self._budget.forwards_at_end(quantity, len(due) - number)
            if not quantity.fit_to_budget(trainer.strategy.broadcast(forwards)):
                quantity._bookkeeping.skipped += quantity.draws  # a value was counted when due
                continue
            self._begin_round(trainer)
            self._measuring.measure(trainer, pl_module, [quantity], step, final=True)

    def count_passed(self, step: int) -> None:
        """Count as skipped what was put off when the fit ended, after ``step``."""
        for quantity in self._quantities:
            bookkeeping = quantity._bookkeeping
            decided = quantity.draws or bookkeeping.last_measured_step == step
            if not quantity.disabled:
                bookkeeping.skipped += bookkeeping.schedule.end(step, decided)

    @staticmethod
    def _due_at_end(quantity: Quantity, step: int) -> bool:
        bookkeeping = quantity._bookkeeping
        if quantity.disabled or bookkeeping.last_measured_step == step:
            return False
        if any(not probe.complete for probe in bookkeeping.probes.values()):
            return False
        if quantity.measures_at_end or not (quantity.measured or quantity.failed):
            return True
        # What the budget has put off is measured now, if there is time.
        last = bookkeeping.last_measured_step or 0
        return quantity.max_overhead is not None and bookkeeping.schedule.was_due(last, step)
