"""The time budget of measuring, and which of the callbacks that are due fit into it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from lightning_landscape.training.costs import Costs
from lightning_landscape.training.quantity import Quantity

# The part of the remaining seconds to plan with at the end of the fit, when no training follows.
_SAFETY = 0.8
# The part of the whole run's allowance that values may use in advance; the rest is for pictures.
# A run counts as one minute at least: the first values cost the most.
_SHARE_IN_ADVANCE, _SHORT_RUN = 0.5, 60.0
# The first values take at least this many gradients of the probe.
_MIN_GRADIENTS = 10


def choose(
    due: Sequence[Quantity], seconds: Callable[[Quantity], float], left: float
) -> list[Quantity]:
    """The callbacks that fit into ``left`` seconds, and those without a limit.

    Scalars are chosen all together; otherwise cheap ones could exclude an expensive one forever.
    One that has not been measured yet is always chosen.
    """
    unlimited = [q for q in due if q.max_overhead is None]
    limited = [q for q in due if q.max_overhead is not None]
    scalars = [q for q in limited if not q.draws]
    left -= sum(map(seconds, scalars))
    if left < 0.0:
        return unlimited + [q for q in scalars if not q.measured]
    chosen = unlimited + scalars
    for quantity in limited:
        if quantity.draws and seconds(quantity) <= left:
            left -= seconds(quantity)
            chosen.append(quantity)
    return chosen


class Budget:
    """One run's allowance: ``limit`` times the time spent training.

    Attributes:
        limit: the smallest ``max_overhead``; None without one.
        spent_on: purpose -> seconds.
        left_out: pictures of the whole run that were not drawn for lack of time.
    """

    def __init__(self, quantities: Sequence[Quantity], costs: Costs) -> None:
        limits = [q.max_overhead for q in quantities if q.max_overhead is not None]
        self.limit = min(limits) if limits else None
        self.spent_on: defaultdict[str, float] = defaultdict(float)
        self.left_out: list[str] = []
        self._quantities = quantities
        self._costs = costs

    # -- costs ---------------------------------------------------------------------------------

    def seconds_of(self, quantity: Quantity) -> float:
        """Estimated seconds of the callback's next measurement."""
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
        """Seconds that may still be spent; negative above the limit."""
        return self.allowance - self._costs.time.spent

    @property
    def reserve(self) -> float:
        """Seconds reserved for the last pictures, at most half of the allowance."""
        last = [q for q in self._quantities if q.draws and q.max_overhead and not q.disabled]
        return min(sum(map(self.seconds_of, last)), 0.5 * self.allowance)

    # -- decisions -----------------------------------------------------------------------------

    def within_budget(self, due: Sequence[Quantity]) -> list[Quantity]:
        """The callbacks that can be measured now, with the last pictures still to come."""
        return choose(due, self.seconds_of, self.left - self.reserve)

    def allows_drawing(self, pictures: float, *, beside_last: bool = False) -> bool:
        """Whether there is time for ``pictures`` now; ``beside_last``: and for the last ones."""
        reserve = self.reserve if beside_last else 0.0
        return reserve + self._costs.drawing_seconds(pictures) <= self.left

    def should_time_forward(self, due: Sequence[Quantity]) -> bool:
        """Whether to time a forward before deciding on a picture."""
        if self._costs.forward is not None or not all(q.draws for q in due):
            return False
        return any(
            q.max_overhead is not None
            and 3 * self._costs.forward_seconds(q.loss.probe) <= self.left
            for q in due
        )

    def seconds_for_values(self, batches_ahead: float) -> float:
        """Seconds for values: those left, or a part of the whole run's allowance if larger."""
        if self.limit is None or not math.isfinite(batches_ahead):
            return math.inf
        time = self._costs.time
        length = time.trained + self._costs.seconds_per_batch * batches_ahead
        in_advance = _SHARE_IN_ADVANCE * self.limit * max(length, _SHORT_RUN)
        return max(self.left, in_advance - time.spent)

    def allows_probe(self, batches: int, batches_ahead: float) -> bool:
        """Whether there is time for values on a probe of ``batches`` training batches.

        A training step takes about as long as a gradient of its batch.
        """
        gradient = batches * self._costs.seconds_per_batch
        return _MIN_GRADIENTS * gradient <= self.seconds_for_values(batches_ahead)

    def forwards_at_end(self, quantity: Quantity, remaining: int) -> float | None:
        """Forwards for the last picture, one of ``remaining``; None: no limit."""
        left = _SAFETY * self.left / remaining
        if quantity.max_overhead is None or self.seconds_of(quantity) <= left:
            return None
        left -= self._costs.drawing_seconds(quantity.pictures)
        return max(left / max(self._costs.forward_seconds(quantity.loss.probe), 1e-9), 0.0)

    # -- what was spent ------------------------------------------------------------------------

    def record(self, purpose: str, seconds: float) -> None:
        """Add seconds to those spent on ``purpose``."""
        self.spent_on[purpose] += seconds

    def closing_line(self, trains: bool) -> str:
        """One line: measurements made and skipped, time spent, and on what if above the limit."""
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
            line += ". Above the limit, because first values and last pictures are always made; "
            line += f"the time was spent on: {listed}"
            if any(q.max_overhead is None for q in quantities):
                line += " (a callback with max_overhead=None always measures on schedule)"
        return line
