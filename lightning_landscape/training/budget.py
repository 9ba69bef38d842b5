"""What the run may spend on measuring, and which of the callbacks that are due it can afford."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from lightning_landscape.training.costs import Costs
from lightning_landscape.training.quantity import Quantity

# Of what is left at the end of the fit, the part to plan with: no training follows.
_SAFETY = 0.8
# Of the allowance of the whole run, the part that values may use in advance; the rest is for the
# pictures.  Runs of less than a minute count as one of a minute: their first values cost the most.
_IN_ADVANCE, _SHORT_RUN = 0.5, 60.0
# Gradients of the probe behind the first values, however few products they take.
_FEWEST_GRADIENTS = 10


def choose(
    due: Sequence[Quantity], seconds: Callable[[Quantity], float], left: float
) -> list[Quantity]:
    """Those that fit into ``left`` seconds, and those without a limit.

    Scalars go together, or cheap ones would keep an expensive one out for ever.  One that was never
    measured goes in any case.
    """
    exact = [q for q in due if q.max_overhead is None]
    limited = [q for q in due if q.max_overhead is not None]
    scalars = [q for q in limited if not q.draws]
    left -= sum(map(seconds, scalars))
    if left < 0.0:
        return exact + [q for q in scalars if not q.measured]
    chosen = exact + scalars
    for quantity in limited:
        if quantity.draws and seconds(quantity) <= left:
            left -= seconds(quantity)
            chosen.append(quantity)
    return chosen


class Budget:
    """One run's allowance: ``limit`` times the time spent training.

    Attributes:
        limit: the smallest ``max_overhead``; None without one.
        spent_on: what for -> seconds.
        left_out: pictures of the whole run that were not drawn for want of time.
    """

    def __init__(self, quantities: Sequence[Quantity], costs: Costs) -> None:
        given = [q.max_overhead for q in quantities if q.max_overhead is not None]
        self.limit = min(given) if given else None
        self.spent_on: defaultdict[str, float] = defaultdict(float)
        self.left_out: list[str] = []
        self._quantities = quantities
        self._costs = costs

    # -- costs ---------------------------------------------------------------------------------

    def seconds_of(self, quantity: Quantity) -> float:
        """Seconds of the callback's next measurement."""
        last = quantity._bookkeeping.last_seconds
        if last is not None:
            return last
        forwards = quantity.forwards * self._costs.forward_seconds(quantity.loss.probe)
        return forwards + self._costs.drawing_seconds(quantity.pictures if quantity.draws else 0)

    @property
    def allowance(self) -> float:
        """Seconds that may be spent so far; infinite without a limit."""
        return math.inf if self.limit is None else self.limit * self._costs.time.trained

    @property
    def left(self) -> float:
        """Seconds that may still be spent; below zero once more was."""
        return self.allowance - self._costs.time.spent

    @property
    def reserve(self) -> float:
        """Seconds reserved for the pictures at the end, at most half: scalars come first."""
        last = [q for q in self._quantities if q.draws and q.max_overhead and not q.disabled]
        return min(sum(map(self.seconds_of, last)), 0.5 * self.allowance)

    # -- decisions -----------------------------------------------------------------------------

    def affordable(self, due: Sequence[Quantity]) -> list[Quantity]:
        """Those that can be measured now, beside the pictures at the end."""
        return choose(due, self.seconds_of, self.left - self.reserve)

    def affords_drawing(self, pictures: float, *, beside_last: bool = False) -> bool:
        """Whether so many pictures can be drawn now; ``beside_last``: and those at the end too."""
        reserve = self.reserve if beside_last else 0.0
        return reserve + self._costs.drawing_seconds(pictures) <= self.left

    def times_a_forward(self, due: Sequence[Quantity]) -> bool:
        """Whether to time a forward before deciding on a picture."""
        if self._costs.forward is not None or not all(q.draws for q in due):
            return False
        return any(
            q.max_overhead is not None
            and 3 * self._costs.forward_seconds(q.loss.probe) <= self.left
            for q in due
        )

    def seconds_for_values(self, batches_ahead: float) -> float:
        """What values may take now: what is left, or part of the allowance of the whole run."""
        if self.limit is None or not math.isfinite(batches_ahead):
            return math.inf
        time = self._costs.time
        length = time.trained + self._costs.seconds_per_batch * batches_ahead
        in_advance = _IN_ADVANCE * self.limit * max(length, _SHORT_RUN)
        return max(self.left, in_advance - time.spent)

    def affords_probe(self, batches: int, batches_ahead: float) -> bool:
        """Whether values on a probe of so many training batches can be had at all.

        A training step takes about a gradient of its batch.
        """
        gradient = batches * self._costs.seconds_per_batch
        return _FEWEST_GRADIENTS * gradient <= self.seconds_for_values(batches_ahead)

    def forwards_at_end(self, quantity: Quantity, remaining: int) -> float | None:
        """Forwards for its last picture, of ``remaining`` to be made; None: no limit."""
        left = _SAFETY * self.left / remaining
        if quantity.max_overhead is None or self.seconds_of(quantity) <= left:
            return None
        left -= self._costs.drawing_seconds(quantity.pictures)
        return max(left / max(self._costs.forward_seconds(quantity.loss.probe), 1e-9), 0.0)

    # -- what was spent ------------------------------------------------------------------------

    def note(self, what: str, seconds: float) -> None:
        """Remember what they were spent on."""
        self.spent_on[what] += seconds

    def closing_line(self, trains: bool) -> str:
        """What was measured, skipped and spent, in one line; and for what, if above the limit."""
        time, quantities = self._costs.time, self._quantities
        counts = ", ".join(f"{q.prefix} {q.measured}" for q in quantities)
        skipped = sum(q.skipped for q in quantities)
        failed = sum(q.failed for q in quantities)
        line = f"lightning_landscape: measured {counts} times in {time.spent:.1f} s"
        if trains:
            line += f", {100 * time.share:.1f} % of the {time.trained:.1f} s spent training"
        if self.limit is not None:
            line += f" (max_overhead={self.limit})"
        if skipped:
            line += f"; skipped {skipped} to stay within it"
        if failed:
            line += f"; {failed} failed"
        reduced = [f"{q.prefix} {q.reduced_resolution}" for q in quantities if q.reduced_resolution]
        if reduced:
            line += f"; the last picture is coarser: {', '.join(reduced)}"
        if self.left_out:
            line += f"; left out: {', '.join(self.left_out)}"
        if self.limit is not None and time.spent > self.limit * time.trained:
            other = time.spent - sum(self.spent_on.values())
            parts = {**self.spent_on, "hooks, copies, probe": other}
            listed = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in parts.items())
            line += f". Above the limit, by what is done in any case; the time went into: {listed}"
            if any(q.max_overhead is None for q in quantities):
                line += " (a callback with max_overhead=None keeps its exact schedule)"
        return line
