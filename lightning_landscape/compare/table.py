"""The table of a comparison: summaries of each run, and of the seeds of each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """A value and its step; NaN and ``None`` if there is none."""

    value: float
    step: int | None


@dataclass(frozen=True)
class RunCell:
    """One key of one run.

    Attributes:
        last: the value at the last step, NaN if it is not finite.
        lowest: the lowest finite value, the first of equal ones.
        highest: the highest finite value, the first of equal ones.
        mean: the mean of the finite values.
        measured: number of values.
        not_finite: number of values that are not finite.
    """

    last: Reading
    lowest: Reading
    highest: Reading
    mean: Reading  # its step is always None
    measured: int
    not_finite: int

    def to_dict(self) -> dict[str, Any]:
        """A flat dict of plain values."""
        flat: dict[str, Any] = {}
        for name in ("last", "lowest", "highest"):
            flat[name], flat[f"{name}_step"] = getattr(self, name)
        return {
            **flat, "mean": self.mean.value, "measured": self.measured,
            "not_finite": self.not_finite,
        }  # fmt: skip


class Spread(NamedTuple):
    """One value of several seeds.

    Attributes:
        median: over the seeds with a finite value; NaN if there is none, as the next two.
        low: the lowest of them.
        high: the highest of them.
        seeds: number of seeds with a finite value.
        not_finite: number of seeds with a value that is not finite.
        first_step: the earliest step of these values, ``None`` for a mean.
        last_step: the latest step.
    """

    median: float
    low: float
    high: float
    seeds: int
    not_finite: int
    first_step: int | None
    last_step: int | None


@dataclass(frozen=True)
class GroupCell:
    """One key of one group: the values of :class:`RunCell` over ``seeds`` of its ``of`` runs."""

    last: Spread
    lowest: Spread
    highest: Spread
    mean: Spread
    seeds: int  # that have the key
    of: int


def run_cell(series: Mapping[int, float]) -> RunCell:
    """Summarize one key of a run: step -> value, at least one.

    Example:
        >>> run_cell({10: 3.0, 20: 5.0, 30: 4.0}).highest
        Reading(value=5.0, step=20)
    """
    points = sorted(series.items())
    finite = [(value, step) for step, value in points if math.isfinite(value)]
    none = Reading(math.nan, None)
    last_step, last = points[-1]
    return RunCell(
        last=Reading(last if math.isfinite(last) else math.nan, last_step),
        lowest=Reading(*min(finite, key=lambda point: point[0])) if finite else none,
        highest=Reading(*max(finite, key=lambda point: point[0])) if finite else none,
        mean=Reading(sum(value for value, _ in finite) / len(finite), None) if finite else none,
        measured=len(points),
        not_finite=len(points) - len(finite),
    )


def group_cell(cells: Sequence[RunCell], of: int) -> GroupCell:
    """Summarize one key over the runs of a group that have it; the group has ``of`` runs."""
    last, lowest, highest, mean = (
        _spread([getattr(cell, name) for cell in cells])
        for name in ("last", "lowest", "highest", "mean")
    )
    return GroupCell(last, lowest, highest, mean, len(cells), of)


def _spread(readings: Sequence[Reading]) -> Spread:
    finite = [reading for reading in readings if math.isfinite(reading.value)]
    values = [reading.value for reading in finite]
    steps = [reading.step for reading in finite if reading.step is not None]
    return Spread(
        median(values) if values else math.nan,
        min(values, default=math.nan),
        max(values, default=math.nan),
        len(values),
        len(readings) - len(values),
        min(steps, default=None),
        max(steps, default=None),
    )
