"""How much slower a run may become, and which measurements that allows, spread over the run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from lightning_landscape.training.costs import Costs
from lightning_landscape.training.quantity import Quantity

# The share of the allowance that is planned with.  The rest is for what no clock here sees, such as
# imports, and for the estimates.
_PLANNED = 0.95
# A short run may at least become this much longer, as far as `grace_seconds` allows it.
_SHORTEST_GRACE = 10.0
# The share of these seconds for values: the larger one, and down to the smaller one where the
# pictures at the end of the fit need more than the rest.  The first, one in the middle and the last
# value come before pictures.
_VALUES, _VALUES_BESIDE_PICTURES, _FIRST_VALUES = 0.7, 0.35, 3
# Warm-started measurements take about this much of the first one; more if they are far apart.
_LATER, _LATER_FAR_APART = 0.6, 0.8
# A forward is timed before a first measurement is refused, if this many of them fit, and again as
# long as all timings take at most this share of the seconds left.
_FIRST_FORWARDS, _TIMINGS = 3, 0.1
# The part of the remaining seconds to plan with at the end of the fit, when no training follows.
_SAFETY = 0.8
# The purpose of pictures that callbacks for values draw during the run, and of timed forwards.
BESIDE_VALUES, ESTIMATES = "pictures beside values", "estimates of costs"


class Budget:
    """One run's allowance, for all callbacks with a ``max_overhead``.

    ``B = max(max_overhead * T, min(max(T, 10 s), grace_seconds))`` for a training time of T, which
    is estimated from the batches so far and those ahead.

    Attributes:
        limit: the smallest ``max_overhead``; None without one.
        grace_seconds: the smallest of these callbacks.
        batches_ahead: training batches still to come; infinite if unknown.
        steps_ahead: optimizer steps still to come; infinite if unknown.
        spent_on: purpose -> seconds.
        left_out: pictures of the whole run that were not drawn for lack of time.
    """

    def __init__(self, quantities: Sequence[Quantity], costs: Costs) -> None:
        limited = [q for q in quantities if q.max_overhead is not None]
        self.limit = min((q.max_overhead for q in limited if q.max_overhead), default=None)
        self.grace_seconds = min((q.grace_seconds for q in limited), default=0.0)
        self.batches_ahead = math.inf
        self.steps_ahead = math.inf
        self.spent_on: defaultdict[str, float] = defaultdict(float)
        self.left_out: list[str] = []
        self._limited = limited
        self._spent_before = {q.prefix: q.seconds_spent for q in limited}  # in another fit
        self._costs = costs

    # -- seconds -------------------------------------------------------------------------------

    @property
    def whole(self) -> float:
        """Seconds that the whole run may become longer; infinite without a limit.

        A run of unknown length may end now.
        """
        if self.limit is None:
            return math.inf
        trained = self._costs.time.trained
        ahead = self._costs.seconds_per_batch * self._known_ahead
        return max(self.limit * (trained + ahead), self._grace(trained + ahead))

    def _grace(self, seconds: float) -> float:
        return min(max(seconds, _SHORTEST_GRACE), self.grace_seconds)

    @property
    def _known_ahead(self) -> float:
        return self.batches_ahead if math.isfinite(self.batches_ahead) else 0.0

    @property
    def _planned(self) -> float:
        """Seconds for measurements, without idle hooks, those at the batches ahead too."""
        idle = self._costs.idle + self._costs.hook_seconds * self._known_ahead
        return _PLANNED * self.whole - idle

    @property
    def _spent(self) -> float:
        """Seconds of them that were spent."""
        return self._costs.time.spent - self._costs.idle

    @property
    def left(self) -> float:
        """Seconds that may still be planned with; negative if more was spent."""
        return self._planned - self._spent

    def seconds_of(self, quantity: Quantity) -> float:
        """Estimated seconds of the callback's next measurement."""
        last = quantity._bookkeeping.last_seconds
        if last is not None:
            return last
        forwards = quantity.forwards * self._costs.forward_seconds(quantity.loss.probe)
        return forwards + self._costs.drawing_seconds(quantity.pictures if quantity.draws else 0)

    def _sum(self, quantities: Sequence[Quantity]) -> float:
        return sum(map(self.seconds_of, quantities))

    @property
    def _active(self) -> list[Quantity]:
        """The callbacks with a limit whose data is there."""
        return [
            q
            for q in self._limited
            if not q.disabled and all(p.complete for p in q._bookkeeping.probes.values())
        ]

    @property
    def _scalars(self) -> list[Quantity]:
        return [q for q in self._active if not q.draws]

    @property
    def _drawing(self) -> list[Quantity]:
        return [q for q in self._active if q.draws]

    @property
    def left_for_values(self) -> float:
        """Seconds for values, with the pictures at the end of the fit still to come."""
        whole, drawing = self._planned, self._drawing
        if not math.isfinite(whole):
            return whole
        beside = max(whole - self._sum(drawing), _VALUES_BESIDE_PICTURES * whole)
        share = min(beside, _VALUES * whole)
        on_pictures = sum(q.seconds_spent - self._spent_before[q.prefix] for q in drawing)
        on_pictures += self._drawn
        seconds = min(share - (self._spent - on_pictures), self.left)
        return max(seconds, self._for_first_values)

    @property
    def _for_first_values(self) -> float:
        """Seconds for the first three values, or as many of them as there is time for."""
        scalars = self._scalars
        missing = _FIRST_VALUES - min((q.measured for q in scalars), default=_FIRST_VALUES)
        cost = max(self._sum(scalars), 1e-9)
        return max(min(missing, self.left // cost), 0) * cost

    def left_for_pictures(self, steps_ahead: float, now: float = 0.0) -> float:
        """Seconds for pictures, with values for ``now`` seconds and those planned still to come."""
        left, scalars = self.left, self._scalars
        if not math.isfinite(left) or not scalars:
            return left - now
        due = max(q._bookkeeping.schedule.ahead(steps_ahead) for q in scalars)
        planned = min(now + self._sum(scalars) * due, max(self.left_for_values, now))
        return left - max(planned, 0.0)

    # -- decisions -----------------------------------------------------------------------------

    def within_budget(
        self, due: Sequence[Quantity], step: int, steps_ahead: float
    ) -> list[Quantity]:
        """The callbacks among ``due`` that can be measured at ``step``, and those without a limit.

        Scalars all together or, where that is too much, only those whose values somebody acts on.
        Where there is time for one measurement alone, it is the last of the run.
        """
        chosen = [q for q in due if q.max_overhead is None or q.must_measure]
        scalars = [q for q in due if q not in chosen and not q.draws]
        left = self.left_for_values
        for group in (scalars, [q for q in scalars if q.is_watched]):
            if group and self._fits(group, left, step):
                chosen += group
                break
        now = self._sum([q for q in chosen if q.max_overhead is not None])
        left = self.left_for_pictures(steps_ahead, now)
        for quantity in due:
            draws = quantity.draws and quantity not in chosen
            if draws and self._fits([quantity], left, step):
                left -= self.seconds_of(quantity)
                chosen.append(quantity)
        return chosen

    def _fits(self, group: Sequence[Quantity], left: float, step: int) -> bool:
        """Whether there is time for the group, and at the first time for another one later."""
        last = all(step >= q._bookkeeping.schedule.last_planned for q in group)
        times = 1 if last or any(q.measured for q in group) else 2
        return times * self._sum(group) <= left

    def next_steps(self, step: int, steps_ahead: float) -> dict[str, float]:
        """Prefix -> the step before which the budget allows no measurement after ``step``.

        What is affordable is spread evenly over the steps ahead; a run of unknown length counts
        as a quarter done.  Where nothing is, a decision is made anew after half of them.
        """
        known = math.isfinite(steps_ahead)
        steps_ahead = steps_ahead if known else 3 * step
        scalars, left = self._scalars, self.left_for_values
        groups = [(scalars, left)] if scalars else []
        groups += [([q], self.left_for_pictures(steps_ahead)) for q in self._drawing]
        found: dict[str, float] = {}
        for group, seconds in groups:
            cost = max(self._sum(group), 1e-9)
            if known and all(q.measured == 1 and not q.draws for q in group):
                cost *= _LATER if seconds > 3 * cost else _LATER_FAR_APART
            affordable = max(math.floor(min(seconds / cost, 1e9)), 0)
            wait = steps_ahead / (affordable or 2)
            found |= {quantity.prefix: step + wait for quantity in group}
        return found

    def forecast(self, steps_ahead: float) -> str:
        """What is affordable from now on, e.g. "about 20 values and 1 picture"; or empty.

        Empty as well until a value has been measured, and where the whole schedule is affordable.
        """
        scalars, drawing = self._scalars, self._drawing
        if not scalars or not all(q.measured for q in scalars):
            return ""
        planned = max(q._bookkeeping.schedule.ahead(steps_ahead) for q in scalars)
        affordable = max(self.left_for_values / max(self._sum(scalars), 1e-9), 0.0)
        if affordable >= planned:
            return ""
        values = int(affordable)
        left = self.left_for_pictures(steps_ahead)
        pictures = sum(self.seconds_of(q) <= left for q in drawing)
        text = f"about {values} more value{'s' * (values != 1)}"
        return f"{text} and {pictures} picture{'s' * (pictures != 1)}" if drawing else text

    def should_time_forward(self, due: Sequence[Quantity], chosen: Sequence[Quantity]) -> bool:
        """Whether to time a forward, the first or another one, before refusing a measurement."""
        refused = [q for q in due if not q.measured and q not in chosen]
        if not refused:
            return False
        seconds = min(self._costs.forward_seconds(q.loss.probe) for q in refused)
        if self._costs.forward is None:
            return _FIRST_FORWARDS * seconds <= self.left
        return self.spent_on.get(ESTIMATES, 0.0) + seconds <= _TIMINGS * self.left

    def allows_drawing(self, pictures: float, *, beside_last: bool = False) -> bool:
        """Whether there is time for ``pictures`` now.

        ``beside_last``: with the values that are planned and the last pictures still to come; what
        these leave is spread over the run.
        """
        seconds = self._costs.drawing_seconds(pictures)
        if not beside_last:
            return seconds <= self.left
        reserve = min(self._sum(self._drawing), 0.5 * self._planned)
        reserve += seconds if self.steps_ahead else 0.0  # the last of these, drawn in any case
        allowed = self.left_for_pictures(self.steps_ahead) - reserve + self._drawn
        return self._drawn + seconds <= self._done * allowed

    @property
    def _done(self) -> float:
        """The share of the run that is done; a run of unknown length may end now."""
        batches, known = self._costs.batches, math.isfinite(self.batches_ahead)
        return batches / (batches + self.batches_ahead) if known and self.batches_ahead else 1.0

    @property
    def _drawn(self) -> float:
        """Seconds spent on pictures beside values."""
        return self.spent_on.get(BESIDE_VALUES, 0.0)

    def forwards_at_end(self, quantity: Quantity, remaining: int) -> float | None:
        """Forwards for the last measurement, of ``remaining`` ones; None: no limit.

        Values may take all that is left, pictures share it.
        """
        left = _SAFETY * self.left / remaining if quantity.draws else self.left
        if quantity.max_overhead is None or self.seconds_of(quantity) <= left:
            return None
        if not quantity.draws:
            return 0.0  # a value cannot be made smaller
        left -= self._costs.drawing_seconds(quantity.pictures)
        return max(left / max(self._costs.forward_seconds(quantity.loss.probe), 1e-9), 0.0)

    # -- what was spent ------------------------------------------------------------------------

    def record(self, purpose: str, seconds: float) -> None:
        """Add seconds to those spent on ``purpose``."""
        self.spent_on[purpose] += seconds

    @property
    def exceeded(self) -> bool:
        """Whether more was spent than allowed."""
        return self._costs.time.spent > self.whole
