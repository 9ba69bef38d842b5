"""An eigenvalue over training steps, with the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_landscape.figures.canvas import (
    COLORS,
    SMALL,
    TEXT,
    draw_grid,
    in_house_style,
    open_axes,
    set_ticks,
    write_across,
    write_titles,
)
from lightning_landscape.figures.figure_checks import check_axes, check_numbers
from lightning_landscape.figures.labels import TIMES, comma_joined, number
from lightning_landscape.geometry.checks import check_flags, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CURVE, EDGE = COLORS[0], COLORS[1]
# More rows are not distinguishable: they are drawn in groups.
_MOST, _GROUPS = 1000, 250
# The chart of the ratio, in inches; left and width of all charts as a part of the figure.
_RATIO, _BETWEEN = 1.3, 0.3
_LEFT, _WIDE = 0.165, 0.805


@in_house_style
def eigenvalue_figure(
    history: Sequence[Mapping[str, Any]],
    *,
    edge: bool = True,
    name: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws the top eigenvalue and the optimizer's edge of stability over training steps.

    If the rows have a preconditioned eigenvalue (adaptive optimizers) it is drawn instead, because
    the edge applies to it, and the ratio to the edge above it with a line at 1. The band is the
    residual, if it is wide enough to be visible. A row without a finite eigenvalue leaves a gap,
    and a cross at the bottom of the chart. The axis is logarithmic if the values are positive and
    span more than two decades, or the eigenvalue and the edge are more than one decade apart.

    More than 1000 rows are drawn in 250 groups: the median as a line, and a band from the lowest to
    the highest value.

    Args:
        history: rows such as ``{"step": 120, "hessian/top_eigenvalue": 9.6, "hessian/edge": 10.0}``
            in any order, like ``HessianMonitor.history``. A row may lack keys.
        edge: draw the edge.
        name: the ``name`` of a second monitor, whose keys are ``hessian/<name>/...``.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, which has no ratio, or one of 4.0 x 3.2 inches, with a ratio 4.0 x 4.8
        inches, at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``history`` is not a sequence of mappings.
    """
    rows = _as_rows(history)
    check_flags("eigenvalue_figure", edge=edge)
    check_axes("eigenvalue_figure", ax)
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"{quoted('eigenvalue_figure', 'name', name)}: expected the name of a HessianMonitor, "
            f"or None"
        )
    prefix = "hessian/" if name is None else f"hessian/{name}/"
    plain, preconditioned = f"{prefix}top_eigenvalue", f"{prefix}preconditioned_eigenvalue"
    key = preconditioned if np.isfinite(_column(rows, preconditioned)).any() else plain
    rows = sorted((row for row in rows if key in row), key=lambda row: float(row["step"]))
    steps, values = _column(rows, "step"), _column(rows, key)
    edges = _column(rows, f"{prefix}edge" if edge else "")
    # The residual is that of the plain Hessian.
    residuals = _column(rows, f"{prefix}residual" if key == plain else "")

    ratios = _column(rows, f"{prefix}edge_ratio")
    both = ax is None and key == preconditioned and bool(np.isfinite(ratios).any())
    height = 3.2 + (_RATIO + _BETWEEN) * both
    figure, axes = open_axes(ax, height, (_LEFT, 0.448 / height, _WIDE, 2.048 / height))
    if both:
        bottom = (0.448 + 2.048 + _BETWEEN) / height
        _draw_ratio(figure.add_axes((_LEFT, bottom, _WIDE, _RATIO / height)), steps, ratios)
    _set_axes(axes, values, edges)
    absent, last = ~np.isfinite(values), _last_text(rows, values, prefix)
    grouped = len(rows) > _MOST
    if grouped:
        _draw_spread(axes, steps, values)
        absent = np.array([part.any() for part in _groups(absent)])
        steps, values, edges = map(_medians, (steps, values, edges))
    if np.isfinite(values).any():
        _draw_curve(axes, steps, values, "-", CURVE)
    else:
        write_across(axes, "no finite eigenvalue" if rows else "no eigenvalue measured")
    band = not grouped and _draw_band(axes, steps, values, residuals)
    if np.isfinite(edges).any():
        _draw_curve(axes, steps, edges, "--", EDGE)
        label = _label_edge(axes, steps, values, edges)
        if grouped:  # otherwise a broad band would hide it
            label.set_zorder(3)
    if absent.any():
        axes.plot(
            steps[absent], np.full(absent.sum(), 0.04), "x", color=CURVE, markersize=6,
            markeredgewidth=1.6, transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
    what = "eigenvalue" if key == plain else "preconditioned eigenvalue"
    axes.set_ylabel(what, fontsize=SMALL, labelpad=1)
    title = "Top Hessian eigenvalue" if key == plain else "Top preconditioned eigenvalue"
    title = "Ratio to the edge of stability" if both else title
    remarks = comma_joined(
        "band: ± residual" if band else "",
        "line: median, band: lowest to highest" if grouped else "",
        f"{TIMES} not finite" if absent.any() else "",
    )
    write_titles(
        ax,
        figure,
        title if name is None else f"{title} ({name})",
        [last, remarks],
    )
    return figure


def _as_rows(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows that have a step."""
    good = isinstance(history, Sequence) and not isinstance(history, str)
    if not good or not all(isinstance(row, Mapping) for row in history):
        raise TypeError(
            f"eigenvalue_figure(history={history!r:.80}): expected a list of dicts, such as "
            "HessianMonitor.history"
        )
    check_numbers("eigenvalue_figure(history=...)", history)
    return [row for row in history if row.get("step") is not None]


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[Any]:
    """Returns one value per row, nan if it is missing."""
    found = (row.get(key) for row in rows)
    return np.array([math.nan if value is None else float(value) for value in found], dtype=float)


def differ_by_decades(lines: Sequence[Sequence[float] | NDArray[Any]]) -> bool:
    """Returns whether the lines of one chart need a logarithmic axis.

    That is, all values are positive, and all together span more than two decades, or the medians of
    the lines more than one.

    Example:
        >>> differ_by_decades([[1.0, 2.0], [30.0]]), differ_by_decades([[1.0, 2.0, 30.0]])
        (True, False)
    """
    finite = [line[np.isfinite(line)] for line in map(np.asarray, lines)]
    finite = [line for line in finite if line.size]
    if not finite or min(line.min() for line in finite) <= 0:
        return False
    low, high = min(line.min() for line in finite), max(line.max() for line in finite)
    medians = [float(np.median(line)) for line in finite]
    return bool(high / 100 > low or max(medians) / 10 > min(medians))


def _set_axes(axes: Axes, values: NDArray[Any], edges: NDArray[Any]) -> None:
    """Sets the axes, with room for the label above the edge and the crosses at the bottom."""
    shown = np.concatenate([values, edges])
    shown = shown[np.isfinite(shown)]
    draw_grid(axes)
    if not shown.size:
        axes.set_xticks([])
        axes.set_yticks([])
    elif differ_by_decades([values, edges]):
        set_ticks(axes, axes.xaxis, bins=6)
        axes.set_yscale("log")
        if shown.max() <= 100 * shown.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(shown.min() / 2, shown.max() * 3)
    else:
        set_ticks(axes, axes.xaxis, axes.yaxis, bins=6)
        low, high = min(0.0, float(shown.min())), max(0.0, float(shown.max()))
        room = (high - low) or 1.0
        axes.set_ylim(low - 0.08 * room, high + 0.18 * room)
    if shown.size:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _draw_ratio(axes: Axes, steps: NDArray[Any], ratios: NDArray[Any]) -> None:
    """Draws the ratio to the edge, with a line at 1."""
    _set_axes(axes, ratios, np.ones(1))
    if len(steps) > _MOST:
        _draw_spread(axes, steps, ratios)
        steps, ratios = _medians(steps), _medians(ratios)
    axes.axhline(1.0, color=EDGE, linestyle="--")
    _draw_curve(axes, steps, ratios, "-", CURVE)
    axes.set_ylabel("ratio", fontsize=SMALL, labelpad=1)


def _groups(column: NDArray[Any]) -> list[NDArray[Any]]:
    """Splits a long column into 250 consecutive parts."""
    return np.array_split(column, _GROUPS)


def _medians(column: NDArray[Any]) -> NDArray[Any]:
    """Returns the median of the finite values of each group, nan if there is none."""
    finite = (part[np.isfinite(part)] for part in _groups(column))
    return np.array([np.median(part) if part.size else math.nan for part in finite])


def _draw_spread(axes: Axes, steps: NDArray[Any], values: NDArray[Any]) -> None:
    """Draws the band from the lowest to the highest finite value of each group."""
    finite = [part[np.isfinite(part)] for part in _groups(values)]
    low = [part.min() if part.size else math.nan for part in finite]
    high = [part.max() if part.size else math.nan for part in finite]
    axes.fill_between(_medians(steps), low, high, color=CURVE, alpha=0.25, linewidth=0)


def _draw_curve(
    axes: Axes, steps: NDArray[Any], values: NDArray[Any], dashes: str, color: str
) -> None:
    """Draws a curve with gaps."""
    values = np.where(np.isfinite(values), values, np.nan)
    # A single point between two gaps has no visible line, so it gets a dot.
    gap = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    dots = np.flatnonzero((gap[:-2] & gap[2:]) | (dashes == "-" and len(steps) <= 40))
    axes.plot(steps, values, dashes, color=color, marker="o", markersize=4, markevery=dots.tolist())


def _draw_band(
    axes: Axes, steps: NDArray[Any], values: NDArray[Any], residuals: NDArray[Any]
) -> bool:
    """Draws eigenvalue +- residual if that is wide enough to be visible; returns whether."""
    usable = np.isfinite(values) & np.isfinite(residuals)
    low, high = values[usable] - residuals[usable], values[usable] + residuals[usable]
    to_points = axes.transData.transform
    zeros = np.zeros_like(low)
    with np.errstate(invalid="ignore"):
        width = to_points(np.stack([zeros, high], 1)) - to_points(np.stack([zeros, low], 1))
    # The line is 1.8 points or 3.5 pixels wide; the same on either side is visible.
    if not (np.nan_to_num(width[:, 1], nan=np.inf) > 7).any():
        return False
    band = np.where(usable, residuals, np.nan)
    axes.fill_between(steps, values - band, values + band, color=CURVE, alpha=0.25, linewidth=0)
    return True


def _label_edge(axes: Axes, steps: NDArray[Any], values: NDArray[Any], edges: NDArray[Any]) -> Any:
    """Labels the edge with its value, at the end and on the side that are far from the curve.

    If the curve is close everywhere, the label is at the top of the chart, which is kept free.
    """
    known = np.flatnonzero(np.isfinite(edges))
    both = np.isfinite(values)
    axes.get_xlim()  # applies autoscaling, which transData does not
    to_chart = axes.transData.transform
    curve = axes.transAxes.inverted().transform(to_chart(np.stack([steps, values], 1)[both]))
    # Size of the label as a fraction of the chart: about 22 characters in one line.
    wide, high = 0.5, 0.11
    clear = []
    for index, side in ((known[0], "left"), (known[-1], "right")):
        at = axes.transAxes.inverted().transform(to_chart((steps[index], edges[index])))
        left = at[0] if side == "left" else at[0] - wide
        beside = curve[(curve[:, 0] >= left) & (curve[:, 0] <= left + wide)]
        for above in (True, False):
            middle = at[1] + (high if above else -high) / 2
            gap = np.abs(beside[:, 1] - middle).min(initial=1.0)
            clear.append((float(gap) if middle >= high / 2 else -1.0, index, side, above))
    room, index, side, above = max(clear, key=lambda place: place[0])
    place: dict[str, Any] = {"xytext": (0, 3 if above else -4), "textcoords": "offset points"}
    if room < high / 2:
        above = False
        place = {
            "xytext": (0.01 if side == "left" else 0.99, 0.985), "textcoords": "axes fraction"
        }  # fmt: skip
    return axes.annotate(
        f"edge of stability {number(edges[index])}", (steps[index], edges[index]),
        **place, ha=side,
        va="bottom" if above else "top", color=EDGE, fontsize=SMALL, fontweight="bold", zorder=1.9,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
    )  # fmt: skip


def _last_text(rows: Sequence[Mapping[str, Any]], values: NDArray[Any], prefix: str) -> str:
    """Returns 'step 120: 9.6, 0.96 of the edge' for the last finite eigenvalue."""
    finite = np.flatnonzero(np.isfinite(values))
    if not finite.size:
        return ""
    row = rows[finite[-1]]
    text = f"step {row['step']}: {number(values[finite[-1]])}"
    ratio = row.get(f"{prefix}edge_ratio")
    if ratio is not None and math.isfinite(ratio):
        text += f", {number(ratio, 2)} of the edge"
    return text
