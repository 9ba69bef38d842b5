"""Small line charts as SVG: one or several curves over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from lightning_landscape.figures.eigenvalue import differ_by_decades
from lightning_landscape.figures.labels import TIMES, number
from lightning_landscape.report.words import counted

Point = tuple[int, float]

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
_POINTS = 300  # longer curves are thinned, see thinned()


@dataclass(frozen=True)
class Curve:
    """A name and its values by step, NaN if not finite."""

    name: str
    points: Sequence[Point]


def chart(
    title: str,
    curves: Sequence[Curve],
    reference: float | None = None,
    steps: tuple[int, int] | None = None,
) -> str:
    """An ``<svg>``: axes, curves with gaps at non-finite values, and values on hover.

    Args:
        title: what is drawn.
        curves: at least one.
        reference: the height of a dotted line.
        steps: the first and the last step of the axis; ``None``: those of the curves.
    """
    measured = [step for curve in curves for step, _ in curve.points]
    lines = [[v for _, v in curve.points if math.isfinite(v)] for curve in curves]
    finite = [value for line in lines for value in line]
    # A summary for screen readers.
    summary = f"{title}: {counted(len(measured), 'value')}"
    if finite:
        low, high = number(min(finite)), number(max(finite))
        summary += f", {low}" if low == high else f" from {low} to {high}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary)}">']
    if not finite:
        parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" class="mid">nothing finite</text>')
        return "".join([*parts, "</svg>"])
    if reference is not None:
        lines.append([reference])
    axes = _Axes(steps or (min(measured), max(measured)), lines)
    parts.append(axes.drawn())
    if reference is not None:
        y = axes.y(reference)
        parts.append(f'<line class="ref" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
    for index, curve in enumerate(curves):
        parts.append(_curve(axes, curve, index % 3))
    return "".join([*parts, "</svg>"])


class _Axes:
    """Steps along x, values along y; logarithmic if the values differ by decades."""

    def __init__(self, steps: tuple[int, int], lines: Sequence[Sequence[float]]) -> None:
        self.first, self.last = steps
        values = [value for line in lines for value in line]
        low, high = min(values), max(values)
        self.log = differ_by_decades(lines)
        if self.log:
            low, high = low / 1.5, high * 1.5
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            room = 0.06 * (high - low or 1.0)
            high, low = high + room, low - (room if low < 0 else 0.0)
        self.low, self.high = low, high

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        # Halved, because the difference of two huge numbers could overflow.
        share = (at / 2 - low / 2) / (high / 2 - low / 2)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def drawn(self) -> str:
        parts = []
        for value in self._ticks():
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text class="left" x="{_LEFT - 6}" y="{y + 4}">{number(value)}</text>'
            )
        locator = MaxNLocator(5, integer=True, min_n_ticks=1)
        for tick in locator.tick_values(self.first, max(self.last, self.first + 1)):
            if self.first <= tick <= self.last:
                parts.append(
                    f'<text class="mid" x="{self.x(tick)}" y="{_HEIGHT - 12}">{int(tick)}</text>'
                )
        base = _HEIGHT - _BOTTOM
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
        )
        return "".join(parts)

    def _ticks(self) -> list[float]:
        if not self.log:
            found = MaxNLocator(4).tick_values(self.low, self.high)
            return [float(v) for v in found if self.low <= v <= self.high]
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        powers = range(first, last + 1)
        if len(powers) > 2:
            return [10.0**power for power in powers[:: 1 + len(powers) // 5]]
        found = [part * 10.0**power for power in range(first - 1, last + 1) for part in (1, 3)]
        return [value for value in found if self.low <= value <= self.high]


def _curve(axes: _Axes, curve: Curve, style: int) -> str:
    stretches: list[list[Point]] = [[]]
    lost = []
    for step, value in thinned(curve.points):
        if math.isfinite(value):
            stretches[-1].append((step, value))
        else:
            lost.append(step)
            stretches.append([])
    parts = []
    for stretch in filter(None, stretches):
        line = " ".join(f"{axes.x(step)},{axes.y(value)}" for step, value in stretch)
        parts.append(f'<polyline class="c{style}" points="{line}"/>')
    for step, value in (point for stretch in stretches for point in stretch):
        text = escape(f"{curve.name}, step {step}: {number(value, 4)}")
        parts.append(
            f'<circle class="p{style}" cx="{axes.x(step)}" cy="{axes.y(value)}" r="4">'
            f"<title>{text}</title></circle>"
        )
    for step in lost:
        text = escape(f"{curve.name}, step {step}: not finite")
        parts.append(
            f'<text class="lost c{style}" x="{axes.x(step)}" y="{_HEIGHT - _BOTTOM - 4}">{TIMES}'
            f"<title>{text}</title></text>"
        )
    return "".join(parts)


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """About ``most`` points at most: per interval the lowest, the highest, and a gap if any.

    Example:
        >>> thinned([(1, 5.0), (2, 9.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 3.0)], most=4)
        [(2, 9.0), (3, 1.0), (4, 2.0), (6, 3.0)]
    """
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    chosen: list[Point] = []
    for index in range(stretches):
        part = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        finite = [point for point in part if math.isfinite(point[1])]
        kept = {part[0]} if not finite else set()
        for pick in (min, max):
            if finite:
                kept.add(pick(finite, key=lambda point: point[1]))
        lost = [point for point in part if not math.isfinite(point[1])]
        chosen += sorted({*kept, *lost[:1]}, key=lambda point: point[0])
    return chosen
