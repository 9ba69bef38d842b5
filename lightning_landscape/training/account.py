"""What measurements are predicted to take, which of them are affordable, and where time went.

A price is known before it is paid: it is the last one of the same callback, or what it computes, in
forwards of the probe, times a forward.  A forward is timed in the first measurement of all; before
that the run's own steps tell: one is about a forward and a gradient, three forwards of its batch.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_landscape.training.probe import Probe
from lightning_landscape.training.schedule import Budget

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor

# Seconds: a picture, and the plotting library's import, until they were seen; on a slow machine.
_DRAWING, _IMPORT = 0.1, 0.6
# Of what is left at the end of the fit, the part to plan with: no training follows to pay for more.
_SURE = 0.8
# Of what the whole run will earn, the part that values may borrow; the rest is for the pictures.
# Runs of less than a minute may borrow as much as one of a minute: their first values are dear.
_BORROWED, _SHORT_RUN = 0.5, 60.0
# Gradients of the probe behind the first values, however few products they are made of.
_FEWEST_GRADIENTS = 10
# Seconds: what a callback must have spent for a picture along the run to be little beside it.
WORTH_A_PICTURE = 2.0


class Account:
    """One run's prices and payments."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        given = [m.max_overhead for m in monitors if m.max_overhead is not None]
        self.monitors = monitors
        self.budget = Budget(min(given) if given else None)
        self.forward: float | None = None  # seconds a forward of the probe takes
        self.drawing: float | None = None  # and a picture
        self.batches = 0  # of training, that have passed
        self._after_first = 0, 0.0  # batches, and the seconds of training that they took
        self.batch_size = 1  # of the last one that was looked at
        self.went: defaultdict[str, float] = defaultdict(float)  # what for -> seconds
        self.left_out: list[str] = []  # pictures of the whole run, for want of time
        self.trains = True  # else no time is spent training

    def passed(self, batches: int) -> None:
        """So many training batches have passed."""
        if batches > 0 and self._after_first[0] == 0:
            self._after_first = batches, self.budget.trained
        self.batches = batches

    @property
    def pace(self) -> float:
        """Seconds of training a batch, the first apart, which does much once."""
        first, seconds = self._after_first if self.batches > self._after_first[0] else (0, 0.0)
        return (self.budget.trained - seconds) / max(self.batches - first, 1)

    # -- prices --------------------------------------------------------------------------------

    def of_a_forward(self, probe: Probe) -> float:
        """Seconds for a forward of the probe."""
        if self.forward is not None:
            return self.forward
        return self.pace * probe.size / self.batch_size / 3

    def of_drawing(self, pictures: float) -> float:
        """Seconds for so many pictures."""
        if self.drawing is not None or not pictures:
            return pictures * (self.drawing or 0.0)
        return pictures * _DRAWING + (0.0 if "matplotlib.figure" in sys.modules else _IMPORT)

    def of(self, monitor: Monitor) -> float:
        """Seconds for the callback's next measurement."""
        if monitor.last_seconds is not None:
            return monitor.last_seconds
        forwards = monitor.forwards * self.of_a_forward(monitor.probe_in_use)
        return forwards + self.of_drawing(monitor.pictures if monitor.draws else 0)

    @property
    def reserve(self) -> float:
        """Seconds put aside for the pictures owed at the end."""
        owed = [m for m in self.monitors if m.draws and m.max_overhead and not m.disabled]
        # Not more than half: scalars come first.
        return min(sum(self.of(m) for m in owed), 0.5 * self.budget.earned)

    def affords(self, drawings: float) -> bool:
        """Whether so many pictures can be afforded now."""
        return self.budget.affords(self.of_drawing(drawings))

    def spares(self, drawings: float) -> bool:
        """Whether they can be afforded beside those owed at the end."""
        return self.budget.affords(self.reserve + self.of_drawing(drawings))

    # -- decisions -----------------------------------------------------------------------------

    def affordable(self, due: Sequence[Monitor]) -> list[Monitor]:
        """Those whose predicted cost the budget allows, beside the pictures owed at the end."""
        exact = [m for m in due if m.max_overhead is None]
        limited = [m for m in due if m.max_overhead is not None]
        # Scalars go together, or cheap ones would starve a dearer one for ever.
        scalars = [m for m in limited if not m.draws]
        cost = self.reserve + sum(self.of(m) for m in scalars)
        if not self.budget.affords(cost):
            return exact + [m for m in scalars if not m.measured]
        chosen = exact + scalars
        for monitor in limited:
            if monitor.draws and self.budget.affords(cost + self.of(monitor)):
                cost += self.of(monitor)
                chosen.append(monitor)
        return chosen

    def worth_timing_a_forward(self, due: Sequence[Monitor]) -> bool:
        """Whether to time one before a picture is decided on, if that itself is affordable."""
        if self.forward is not None or not all(m.draws for m in due):
            return False
        return any(
            m.max_overhead is not None
            and self.budget.affords(3 * self.of_a_forward(m.probe_in_use))
            for m in due
        )

    def seconds_for_values(self, batches_ahead: float) -> float:
        """What values may take now: what is left, or may be borrowed from the training to come."""
        limit = self.budget.max_overhead
        if limit is None or not math.isfinite(batches_ahead):
            return math.inf
        length = self.budget.trained + self.pace * batches_ahead
        borrowed = _BORROWED * limit * max(length, _SHORT_RUN)
        return max(self.budget.left, borrowed - self.budget.spent)

    def pays_for(self, batches: int, batches_ahead: float) -> bool:
        """Whether values on a probe of so many training batches are within reach at all.

        A training step takes about a gradient of its batch.
        """
        seconds = self.seconds_for_values(batches_ahead)
        return _FEWEST_GRADIENTS * batches * self.pace <= seconds

    def allowance(self, monitor: Monitor, owing: int) -> float | None:
        """Forwards that its last picture may take, of ``owing`` to be made; None: all it wants."""
        left = _SURE * self.budget.left / owing
        if monitor.max_overhead is None or self.of(monitor) <= left:
            return None
        left -= self.of_drawing(monitor.pictures)
        return max(left / max(self.of_a_forward(monitor.probe_in_use), 1e-9), 0.0)

    def saw_forward(self, seconds: float) -> None:
        """A forward took so long; a picture, of many, tells better."""
        if self.forward is None:
            self.forward = seconds

    # -- payments ------------------------------------------------------------------------------

    def note(self, what: str, seconds: float) -> None:
        """Remember what they were spent on; they are charged elsewhere."""
        self.went[what] += seconds

    def closing_line(self) -> str:
        """What was measured, skipped and spent, in one line; and for what, if above the limit."""
        budget = self.budget
        spent, trained, share = budget.spent, budget.trained, budget.share
        counts = ", ".join(f"{m.prefix} {m.measured}" for m in self.monitors)
        skipped = sum(m.skipped for m in self.monitors)
        failed = sum(m.failed for m in self.monitors)
        line = f"lightning_landscape: measured {counts} times in {spent:.1f} s"
        if self.trains:
            line += f", {100 * share:.1f} % of the {trained:.1f} s spent training"
        limit = budget.max_overhead
        if limit is not None:
            line += f" (max_overhead={limit})"
        if skipped:
            line += f"; skipped {skipped} to stay within it"
        if failed:
            line += f"; {failed} failed"
        smaller = [f"{m.prefix} {m.coarse}" for m in self.monitors if m.coarse]
        if smaller:
            line += f"; the last picture is coarser: {', '.join(smaller)}"
        if self.left_out:
            line += f"; left out: {', '.join(self.left_out)}"
        if limit is not None and spent > limit * trained:
            went = {**self.went, "hooks, copies, probe": spent - sum(self.went.values())}
            told = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in went.items())
            line += f". Above the limit, by what is done in any case; it went into: {told}"
            if any(m.max_overhead is None for m in self.monitors):
                line += " (a callback with max_overhead=None keeps its exact schedule)"
        return line
