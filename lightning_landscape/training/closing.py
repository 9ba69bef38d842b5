"""What is said when a fit ends: one line, and warnings where there is less than was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_landscape.training.budget import Budget
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.quantity import Quantity


def closing_line(quantities: Sequence[Quantity], budget: Budget, costs: Costs, trains: bool) -> str:
    """One line: measurements made and skipped, time spent, and on what if above the limit."""
    time, limit = costs.time, budget.limit
    counts = ", ".join(f"{q.prefix} {q.measured}" for q in quantities)
    skipped = sum(q.skipped for q in quantities)
    failed = sum(q.failed for q in quantities)
    line = f"lightning_landscape: measured {counts} times in {time.spent:.1f} s"
    if trains:
        line += f", {100 * time.share:.1f} % of the {time.trained:.1f} s spent training"
    if limit is not None:
        line += f" (max_overhead={limit}, grace_seconds={budget.grace_seconds:g})"
    if skipped:
        line += f"; skipped {skipped} to stay within it"
    if failed:
        line += f"; {failed} failed"
    reduced = [f"{q.prefix} {q.reduced_resolution}" for q in quantities if q.reduced_resolution]
    if reduced:
        line += f"; the last picture is coarser: {', '.join(reduced)}"
    if budget.left_out:
        line += f"; left out: {', '.join(budget.left_out)}"
    if budget.exceeded:
        other = time.spent - sum(budget.spent_on.values())
        parts = {**budget.spent_on, "hooks, copies, probe": other}
        listed = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in parts.items())
        line += f". Above the limit of {budget.whole:.1f} s; the time was spent on: {listed}"
        if any(q.max_overhead is None for q in quantities):
            line += " (a callback with max_overhead=None always measures on schedule)"
    return line


def warn_of_missing(quantities: Sequence[Quantity], budget: Budget, steps: int) -> None:
    """Warn of callbacks that measured nothing, and of stoppers that could not have stopped."""
    for quantity in quantities:
        bookkeeping = quantity._bookkeeping
        if not quantity.measured and not quantity.disabled and not quantity.failed:
            quantity.warn_once(f"measured 0 times in {steps} steps: {_reason(quantity, budget)}")
        for listener in bookkeeping.listeners:
            if bookkeeping.heard.get(listener.monitor, 0) < listener.least_values:
                quantity.warn_once(
                    f"{type(listener).__name__}(monitor={listener.monitor!r}) got "
                    f"{bookkeeping.heard.get(listener.monitor, 0)} values in {steps} steps and "
                    f"needs {listener.least_values}: it could not have stopped; pass "
                    f"max_overhead=None, a smaller every_n_train_steps or a smaller patience"
                )


def _reason(quantity: Quantity, budget: Budget) -> str:
    if not all(probe.complete for probe in quantity._bookkeeping.probes.values()):
        return "its data was never complete; pass probe=..."
    if quantity.max_overhead is None:
        return "its schedule gave no step; pass a smaller every_n_train_steps"
    return (
        f"one takes about {budget.seconds_of(quantity):.2g} s, and of the {budget.whole:.2g} s "
        f"that this run may become longer {max(budget.left, 0.0):.2g} s are left; pass a larger "
        f"max_overhead or grace_seconds, max_overhead=None for no limit, or a smaller probe_samples"
    )
