"""One scalar of several runs, or of groups of runs that differ in the seed, in one chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lightning_landscape.figures.canvas import (
    COLORS,
    GREY,
    HEADER,
    INK,
    PITCH,
    TEXT,
    draw_grid,
    draw_legend,
    in_house_style,
    open_axes,
    set_ticks,
    write_across,
    write_titles,
)
from lightning_landscape.figures.data import HUGE, evenly, nonzero_magnitudes
from lightning_landscape.figures.eigenvalue import differ_by_decades
from lightning_landscape.figures.figure_checks import check_axes, check_groups, check_numbers
from lightning_landscape.figures.labels import comma_joined, legend_name, number
from lightning_landscape.figures.limits import round_up
from lightning_landscape.figures.line import line_remark, mark_outside
from lightning_landscape.geometry.checks import check_flags, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# More curves, or names in the legend, cannot be distinguished.
MOST = 10
MARKERS = "os^vDP"
# A diverged run extends the axis to at most this many times a typical value, and tiny values extend
# a logarithmic axis downwards by at most this factor.
_OUTLIER, _NOTHING = 1e4, 1e-12
_NEAR = 4.0  # the chart includes an edge up to this factor above the curves
_STEPS = 1000  # maximum number of steps of the spread over seeds


@dataclass(frozen=True)
class _Curve:
    """The curve of one run, or of one group with its lowest and highest seed."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]  # nan where not finite
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    label: str = ""

    @property
    def shown(self) -> list[NDArray[np.float64]]:
        """All values to draw."""
        return [part for part in (self.values, self.low, self.high) if part is not None]


@in_house_style
def curves_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str,
    *,
    groups: Mapping[str, str] | None = None,
    edge: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Draws one scalar over the training steps of several runs in one chart.

    The axis is logarithmic if all values are positive and span more than two decades, or the median
    of one run (for a ratio, also the edge at 1) is more than one decade above that of another. It
    is symmetric logarithmic if some values are not positive and they span more than two decades.
    Values that are not finite, or more than 10,000 times the typical value of the runs, are marked
    at the border of the chart and do not affect the axis.

    The optimizer's edge of stability is dashed, in the colour of its run, if ``key`` is the
    eigenvalue that it bounds: the preconditioned one for adaptive optimizers, the top eigenvalue
    for others. For ``.../edge_ratio`` a dashed line marks 1.

    With ``groups`` each group is one curve: the median over its runs (seeds), with a band from the
    lowest to the highest. If only some runs were measured at a step, the others are interpolated
    linearly; before its first and after its last measurement, and where it is not finite, a run is
    ignored.

    Args:
        histories: run -> its rows, as ``read_history`` returns them, in any order. Runs without
            ``key`` have no curve; the header counts them. Of more than ten curves ten are shown,
            evenly spaced, as the header then says.
        key: the scalar, e.g. ``"hessian/top_eigenvalue"``.
        groups: run -> group, for all runs. None: a curve for each run.
        edge: draw the edge.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one 4 inches wide at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``histories`` is not a mapping from names to sequences of mappings.
        ValueError: if ``histories`` is empty, or a run is missing in ``groups``.
    """
    check_flags("curves_figure", edge=edge)
    check_axes("curves_figure", ax)
    if not isinstance(key, str):
        raise TypeError(
            f"{quoted('curves_figure', 'key', key)}: expected the name of a scalar, e.g. "
            f"'hessian/top_eigenvalue'"
        )
    rows = _checked(histories, groups)
    check_numbers("curves_figure(histories=...)", chain.from_iterable(rows.values()), key)
    curves = _curves(rows, key, groups)
    bounds = {curve.name: curve for curve in _edges(rows, key, groups) if edge}
    chosen = [curves[index] for index in evenly(len(curves), MOST)]
    dashed = [bounds[curve.name] for curve in chosen if curve.name in bounds]

    shown = np.concatenate([values for curve in chosen for values in curve.shown] or [np.empty(0)])
    low, high, scale = _limits(chosen, dashed, key)
    without = sum(not any(key in row for row in known) for known in rows.values())
    count = f"{len(chosen)} of {len(curves)} {'runs' if groups is None else 'groups'}"
    small = [
        "" if groups is None else "line: median over seeds, band: lowest to highest",
        comma_joined(
            count if len(chosen) < len(curves) else "",
            f"not measured in {without} of {len(rows)} runs" if without else "",
        ),
        _dashed_text(dashed, key, high),
        line_remark(shown, low, high) if chosen else "",
    ]
    legend = HEADER + PITCH * len(list(filter(None, small)))
    columns = 2 if len(chosen) > 2 and max(len(curve.label) for curve in chosen) <= 21 else 1
    top = legend - PITCH * (-len(chosen) // columns) + 0.08
    height = top + 2.5
    figure, axes = open_axes(ax, height, (0.165, 0.43 / height, 0.805, 2.07 / height))
    _set_axes(axes, low, high, scale)
    if key.endswith("edge_ratio"):
        axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    one = len({value for curve in dashed for value in curve.values}) == 1
    for index, curve in enumerate(chosen):
        _draw(axes, curve, index, low, high)
        if bound := bounds.get(curve.name):
            color = INK if one else COLORS[index % len(COLORS)]
            axes.plot(bound.steps, bound.values, "--", color=color, linewidth=1.2, zorder=1.8)
    if not np.isfinite(shown).any():
        write_across(axes, "nothing finite" if chosen else "not measured")
    write_titles(ax, figure, key, small)
    if chosen:
        draw_legend(figure, legend, columns, ax=ax, handlelength=2.0)
    return figure


def _draw(axes: Axes, curve: _Curve, index: int, low: float, high: float) -> None:
    """Draws one curve with some markers, its band, and marks for values outside of the chart."""
    color = COLORS[index % len(COLORS)]
    marker = MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
    # About eight of them, and at single values between two gaps.
    gap = np.isnan(np.concatenate([[np.nan], curve.values, [np.nan]]))
    every = max(1, len(curve.steps) // 8)
    marked = np.arange(len(curve.steps)) % every == index % every
    axes.plot(
        curve.steps, curve.values, "-", color=color, marker=marker, markersize=4.5,
        markevery=np.flatnonzero(marked | (gap[:-2] & gap[2:])).tolist(), label=curve.label,
    )  # fmt: skip
    if curve.low is not None and curve.high is not None:
        axes.fill_between(
            curve.steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0, zorder=1.5
        )  # fmt: skip
    for values in curve.shown:
        mark_outside(axes, curve.steps, values, low, high, color)


def _limits(
    curves: Sequence[_Curve], dashed: Sequence[_Curve], key: str
) -> tuple[float, float, float | None]:
    """Returns the lowest and the highest value of the chart, and the scale of its axis.

    The scale is ``None`` for a linear axis, 0 for a logarithmic one, and the end of the linear part
    for a symmetric logarithmic one.
    """
    finite = [part[np.isfinite(part)] for curve in curves for part in curve.shown]
    values = np.concatenate([*finite, np.empty(0)])
    if not values.size:
        return 0.0, 1.0, None
    typical = sorted(
        float(np.median(size)) for size in map(nonzero_magnitudes, finite) if size.size
    )
    bound = _OUTLIER * typical[(len(typical) - 1) // 2] if typical else 1.0
    low, high = max(float(values.min()), -bound), min(float(values.max()), bound)
    ratio = key.endswith("edge_ratio")
    if ratio:
        high = max(high, 1.0)
    edges = np.concatenate([curve.values for curve in dashed] or [np.empty(0)])
    # With an adaptive optimizer the edge is usually far above, and always in the chart.
    farthest = bound if key.endswith("preconditioned_eigenvalue") else _NEAR * high
    near = edges[edges <= farthest]
    high = max(high, float(near.max(initial=-np.inf)))
    size = nonzero_magnitudes(np.clip(values, low, high))
    lines = [*(curve.values for curve in curves), near, np.ones(int(ratio))]
    if low > 0 and (high > 100 * low or differ_by_decades(lines)):
        return max(low, _NOTHING * high), high, 0.0
    if low <= 0 and size.size and size.max() > 100 * float(np.median(size)):
        limit = max(-low, high)
        return low, high, float(np.clip(np.quantile(size, 0.1), limit / 5000, limit / 20))
    # Include zero, unless that would flatten curves that are far from it.
    if high - low > 0.3 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high, None


def _set_axes(axes: Axes, low: float, high: float, scale: float | None) -> None:
    """Sets the axes to the result of `_limits`, with a margin."""
    draw_grid(axes)
    axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
    set_ticks(axes, axes.xaxis, *([axes.yaxis] if scale is None else []), bins=6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if scale is None:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    elif scale == 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.5, high * 1.5)
    else:
        linear, limit = round_up(scale), round_up(max(-low, high))
        axes.set_yscale("symlog", linthresh=linear, linscale=0.5, base=10)
        axes.set_ylim(1.5 * min(low, -scale), 1.5 * max(high, scale))
        ticks = [t for t in _symmetric_ticks(linear, limit) if 1.5 * low <= t <= 1.5 * high]
        axes.set_yticks(ticks, labels=[number(tick) for tick in ticks])
        axes.minorticks_off()


def _symmetric_ticks(linear: float, limit: float) -> list[float]:
    """Returns both ends, zero, and powers of ten between them, as far as labels fit."""
    first = math.ceil(math.log10(linear) - 1e-9)
    last = math.ceil(math.log10(limit / 3) - 1e-9)
    powers = [float(f"1e{exponent}") for exponent in range(first, last)]
    positive = [*powers[:: 1 + len(powers) // 4], float(limit)]
    return [-value for value in reversed(positive)] + [0.0] + positive


def _dashed_text(dashed: Sequence[_Curve], key: str, high: float) -> str:
    """Returns what the dashed lines are, and the edge if it is above the chart."""
    if key.endswith("edge_ratio"):
        return "dashed: the edge, 1"
    edges = np.concatenate([curve.values for curve in dashed] or [np.empty(0)])
    edges = edges[np.isfinite(edges)]
    if not edges.size:
        return ""
    if edges.min() > high:
        return f"edge above the chart, at {number(float(edges.min()))}"
    return "dashed: edge of stability"


def _checked(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], groups: Mapping[str, str] | None
) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows of each run that have a step, sorted by step."""
    good = isinstance(histories, Mapping) and all(
        isinstance(rows, Sequence)
        and not isinstance(rows, str)
        and all(isinstance(row, Mapping) for row in rows)
        for rows in histories.values()
    )
    if not good:
        raise TypeError(
            f"curves_figure(histories={histories!r:.80}): expected a mapping from names to lists "
            f"of dicts, such as {{'adam': read_history('logs/adam/history.jsonl')}}"
        )
    if not histories:
        raise ValueError("curves_figure(histories={}): expected at least one run")
    check_groups("curves_figure", groups, histories)
    return {
        name: sorted(
            (row for row in rows if row.get("step") is not None), key=lambda row: float(row["step"])
        )
        for name, rows in histories.items()
    }


def series_of(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    """Returns steps and values of one key, the last per step, nan where not finite."""
    found = {
        float(row["step"]): math.nan if row[key] is None else float(row[key])
        for row in rows
        if key in row
    }
    values = np.array(list(found.values()), dtype=np.float64)
    return np.array(list(found), dtype=np.float64), np.where(np.abs(values) < HUGE, values, np.nan)


def _curves(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], key: str, groups: Mapping[str, str] | None
) -> list[_Curve]:
    """Returns a curve for each run that has the key, or for each group."""
    series = {name: series_of(known, key) for name, known in rows.items()}
    if groups is None:
        return [
            _Curve(name, *found, label=legend_name(name, 46))
            for name, found in series.items()
            if len(found[0])
        ]
    members: dict[str, list[Any]] = {}
    for name, found in series.items():
        members.setdefault(str(groups[name]), []).append(found)
    curves = []
    for group, runs in members.items():
        if known := [found for found in runs if len(found[0])]:
            seeds = f"{len(known)} of {len(runs)}" if len(known) < len(runs) else f"{len(known)}"
            label = f"{legend_name(group, 32)}, {seeds} seed{'s' if len(runs) > 1 else ''}"
            curves.append(_Curve(group, *spread_over(known), label=label))
    return curves


def spread_over(series: Sequence[tuple[Any, Any]]) -> tuple[Any, Any, Any, Any]:
    """Returns steps, median, lowest and highest of several runs, each ``(steps, values)``.

    Example:
        >>> one, two = ([0, 10], [1.0, 3.0]), ([0, 5], [2.0, 6.0])
        >>> [part.tolist() for part in spread_over([one, two])]
        [[0.0, 5.0, 10.0], [1.5, 4.0, 3.0], [1.0, 2.0, 3.0], [2.0, 6.0, 3.0]]
    """
    steps = np.unique(np.concatenate([np.asarray(at, dtype=np.float64) for at, _ in series]))
    steps = steps[evenly(len(steps), _STEPS)]
    table = np.stack([np.interp(steps, *run, left=np.nan, right=np.nan) for run in series])
    known = np.isfinite(table).any(axis=0)  # numpy warns where there are no numbers
    middle, low, high = np.full((3, len(steps)), np.nan)
    middle[known] = np.nanmedian(table[:, known], axis=0)
    low[known], high[known] = np.nanmin(table[:, known], 0), np.nanmax(table[:, known], 0)
    return steps, middle, low, high


def _edges(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], key: str, groups: Mapping[str, str] | None
) -> list[_Curve]:
    """Returns the edge of each run in which it is a bound of the key."""
    prefix, _, last = key.rpartition("/")
    preconditioned = f"{prefix}/preconditioned_eigenvalue"
    kinds = ("top_eigenvalue", "preconditioned_eigenvalue")
    bounded = {
        name: known
        for name, known in rows.items()
        if last == kinds[any(preconditioned in row for row in known)]
    }
    return _curves(bounded, f"{prefix}/edge", groups)
