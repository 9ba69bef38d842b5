"""Messages at the end of a fit: a summary, and warnings where less was measured than planned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_landscape.geometry.judgement import edge_judgement
from lightning_landscape.training.bookkeeping import LOSS
from lightning_landscape.training.budget import Budget
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.output.history import converged_rows
from lightning_landscape.training.quantity import Quantity

_MOST_KEYS = 5  # in the summary


def closing_line(quantities: Sequence[Quantity], budget: Budget, costs: Costs, trains: bool) -> str:
    """One line: measurements made and skipped, time spent, and on what if above the limit."""
    time, limit = costs.time, budget.limit
    counts = ", ".join(f"{q.prefix} {q.measured}" for q in quantities)
    skipped = sum(q.skipped for q in quantities)
    failed = sum(q.failed for q in quantities)
    times = "time" if [q.measured for q in quantities] == [1] else "times"
    line = f"lightning_landscape: measured {counts} {times} in {time.spent:.1f} s"
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


# -- what was measured -----------------------------------------------------------------------------


def summary(quantities: Sequence[Quantity]) -> list[tuple[str, str]]:
    """``(key, text)`` for the main keys: the first, the last and the highest value."""
    rows = []
    for quantity in quantities:
        for key in _main_keys(quantity):
            found = _values(quantity, key)
            if not found:
                continue
            (first_step, first), (last_step, last) = found[0], found[-1]
            text = f"{first:.3g} at step {first_step}"
            if len(found) > 1:
                high_step, high = max(found, key=lambda pair: pair[1])
                text += f", {last:.3g} at step {last_step}, highest {high:.3g} at step {high_step}"
            rows.append((key, f"{text} ({len(found)} value{'s' if len(found) > 1 else ''})"))
    return rows[:_MOST_KEYS]


def judgement(quantities: Sequence[Quantity]) -> str:
    """One sentence on the distance to the stability edge; empty without enough values."""
    for quantity in quantities:
        key = quantity.key("edge_ratio")
        if sentence := edge_judgement(key, _converged(quantity, key)):
            return sentence
    return ""


def as_lines(rows: Sequence[tuple[str, str]], sentence: str) -> list[str]:
    """The summary as lines of plain text."""
    width = max((len(key) for key, _ in rows), default=0)
    lines = [f"  {key.ljust(width)}  {text}" for key, text in rows]
    return lines + ([f"  {sentence}"] if sentence else [])


def as_markdown(rows: Sequence[tuple[str, str]], sentence: str, line: str) -> str:
    """The summary as Markdown, for the loggers that take text."""
    table = ["| key | values |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in rows)]
    return "\n\n".join(filter(None, ("\n".join(table) if rows else "", sentence, line)))


def _main_keys(quantity: Quantity) -> list[str]:
    return [quantity.key(tag) for tag in quantity.main_tags]


def _values(quantity: Quantity, key: str) -> list[tuple[int, float]]:
    """Step and value of ``key``, where it is finite, has converged and is not superseded."""
    return [pair for pair in _converged(quantity, key) if math.isfinite(pair[1])]


def _converged(quantity: Quantity, key: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[key]) for row in converged_rows(quantity.history, key)]


# -- what is missing -------------------------------------------------------------------------------


def warn_of_missing(quantities: Sequence[Quantity], budget: Budget, steps: int) -> None:
    """Warn of callbacks that measured nothing, and of stoppers that could not have stopped."""
    for quantity in quantities:
        bookkeeping = quantity._bookkeeping
        if not quantity.measured and not quantity.disabled and not quantity.failed:
            quantity.warn_once(f"measured 0 times in {steps} steps: {_reason(quantity, budget)}")
        for listener in bookkeeping.listeners:
            heard = bookkeeping.heard.get(listener.monitor, 0)
            if heard < listener.least_values and not bookkeeping.resumed:
                limited = quantity.max_overhead is not None
                remedy = "max_overhead=None, " if limited else ""
                quantity.warn_once(
                    f"{type(listener).__name__}(monitor={listener.monitor!r}) got {heard} "
                    f"value{'' if heard == 1 else 's'} in {steps} steps and needs "
                    f"{listener.least_values}: it could not have stopped; pass {remedy}a smaller "
                    f"every_n_train_steps or a smaller patience"
                )


def _reason(quantity: Quantity, budget: Budget) -> str:
    probes = quantity._bookkeeping.probes
    if LOSS in probes and probes[LOSS].captured and not probes[LOSS].batches:
        return (
            "no training batch gave a loss, e.g. because training_step always returns None; return "
            "the loss, or pass loss_fn=... and probe=..."
        )
    if not all(probe.complete for probe in probes.values()):
        return "its data was never complete; pass probe=..."
    if quantity.max_overhead is None:
        return "its schedule gave no step; pass a smaller every_n_train_steps"
    return (
        f"one takes about {budget.seconds_of(quantity):.2g} s, and of the {budget.whole:.2g} s "
        f"that this run may become longer {max(budget.left, 0.0):.2g} s are left; pass a larger "
        f"max_overhead or grace_seconds, max_overhead=None for no limit, or a smaller probe_samples"
    )
