"""Comparisons of networks: a matrix of pairwise values, and a scatter plot of two values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from lightning_landscape.figures.canvas import (
    COLORS,
    GREY,
    HEADER,
    INK,
    PITCH,
    SMALL,
    TEXT,
    WIDTH,
    draw_grid,
    draw_legend,
    in_house_style,
    open_axes,
    set_ticks,
    shortened,
    write_across,
    write_titles,
)
from lightning_landscape.figures.curves import MARKERS, MOST
from lightning_landscape.figures.data import HUGE
from lightning_landscape.figures.figure_checks import (
    check_axes,
    check_groups,
    check_names,
    check_text,
)
from lightning_landscape.figures.labels import MINUS, comma_joined, legend_name, number
from lightning_landscape.figures.plane_map import COLOR_MAP
from lightning_landscape.geometry.checks import check_span, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

# With more columns the cells are too small for a legible number.
_LARGEST = 9


@in_house_style
def barrier_matrix_figure(
    matrix: ArrayLike,
    names: Sequence[str],
    *,
    limits: tuple[float, float] | None = None,
    title: str = "Loss barrier",
    ax: Axes | None = None,
) -> Figure:
    """Draws a small matrix of pairwise values as a heat map with the numbers in its cells.

    The cell of row ``i`` and column ``j`` is the value of ``names[i]`` and ``names[j]``, e.g. the
    barrier on the line between two networks, or the fraction of examples on which they disagree.
    All numbers have the same number of decimals, and a common power of ten if necessary, which is
    in the header. Cells without a finite value are hatched.

    Args:
        matrix: n x n numbers, n from 1 to 9; need not be symmetric.
        names: n names, for the rows and the columns.
        limits: the ends of the colour scale, e.g. a common one for several figures; values beyond
            get the colour of the end. None: from 0, or the lowest value if that is lower, to the
            highest.
        title: the title of the figure.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one 4 inches wide at 140 dpi, not registered in pyplot.

    Raises:
        ValueError: if the matrix is not square or has more than nine rows, the number of names
            differs, or the limits are not finite and increasing.
    """
    call = "barrier_matrix_figure"
    try:
        if matrix is None:
            raise TypeError
        table = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{quoted(call, 'matrix', matrix)}: expected a square table of numbers"
        ) from error
    check_text(call, title=title)
    check_axes(call, ax)
    if not isinstance(names, str):
        check_names(call, names)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not 1 <= len(table) <= _LARGEST:
        raise ValueError(
            f"{call}(matrix=...): got shape {table.shape}; expected (n, n) with n from 1 to "
            f"{_LARGEST}, more numbers cannot be read: pass a choice"
        )
    if isinstance(names, str) or len(names) != len(table):
        raise ValueError(
            f"{call}(names={names!r:.80}): got {len(names)} names for {len(table)} rows; pass one "
            f"name per row"
        )
    table = np.where(np.abs(table) < HUGE, table, np.nan)
    finite = table[np.isfinite(table)]
    if limits is None:
        low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
        high = high if high > low else low + 1.0
    else:
        check_span(call, "limits", limits)
        low, high = limits
    norm = Normalize(low, high, clip=True)
    # Inches.
    count, top = len(table), HEADER + PITCH * 2 + 0.06
    labels = [legend_name(str(name), 14) for name in names]
    letters = max(map(len, labels))
    left, right = 0.2 + 0.085 * letters, 0.62
    side = min((WIDTH - left - right) / count, 0.75)
    # Names below the columns are horizontal if they fit, otherwise vertical.
    lie = 0.085 * letters < side
    bottom = 0.28 if lie else 0.16 + 0.085 * letters
    height = top + count * side + bottom
    area = (left / WIDTH, bottom / height, count * side / WIDTH, count * side / height)
    figure, axes = open_axes(ax, height, area)
    axes.imshow(np.ma.masked_invalid(table), cmap=COLOR_MAP, norm=norm, aspect="auto")
    power, decimals = _digits(finite, letters=min(int((side - 0.02) / 0.07), 5))
    for (row, column), value in np.ndenumerate(table):
        if math.isfinite(value):
            shade = np.dot(COLOR_MAP(norm(value))[:3], (0.2126, 0.7152, 0.0722))
            text = f"{value / 10.0**power:.{decimals}f}".replace("-", MINUS)
            axes.text(
                column, row, text, ha="center", va="center", fontsize=SMALL,
                color="white" if shade < 0.45 else INK,
            )  # fmt: skip
        else:
            cell = (column - 0.5, row - 0.5)
            axes.add_patch(
                Rectangle(cell, 1, 1, hatch="////", facecolor="white", edgecolor=GREY, linewidth=0)
            )
    axes.set_xticks(range(count), labels=labels, rotation=0 if lie else 90)
    axes.set_yticks(range(count), labels=labels)
    axes.tick_params(labelsize=SMALL, length=0, pad=3)
    axes.spines[:].set_visible(False)
    wide = count * side  # inches
    _draw_scale(axes.inset_axes((1 + 0.08 / wide, 0.0, 0.12 / wide, 1.0)), norm, finite)
    unit = f"in units of 1e{power}" if power else ""
    lines = [unit, "hatched: not finite" if finite.size < table.size else ""]
    write_titles(ax, figure, title, [comma_joined(*lines)])
    return figure


def _draw_scale(axes: Axes, norm: Normalize, finite: NDArray[Any]) -> None:
    """Draws the colour bar; its end labels show if values lie beyond them."""
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    bar = axes.figure.colorbar(ScalarMappable(norm, COLOR_MAP), cax=axes)
    ends = [number(low, 2), number(high, 2)]
    if finite.size and finite.min() < low:
        ends[0] = f"< {ends[0]}"
    if finite.size and finite.max() > high:
        ends[1] = f"> {ends[1]}"
    bar.set_ticks([low, high], labels=ends)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=3, pad=2)


def _digits(finite: NDArray[Any], letters: int = 5) -> tuple[int, int]:
    """Returns the power of ten that the numbers are divided by, and the number of decimals.

    Two decimals, or fewer if the longest number would exceed ``letters`` characters.

    Example:
        >>> _digits(np.array([0.0, 0.5])), _digits(np.array([3e-4])), _digits(np.array([-42.0]))
        ((0, 2), (-4, 2), (0, 1))
    """
    largest = float(np.abs(finite).max(initial=0.0))
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    power = 0 if -2 <= power <= 2 else power
    for decimals in (2, 1):
        written = [f"{value / 10.0**power:.{decimals}f}" for value in finite]
        if max(map(len, written), default=0) <= letters:
            return power, decimals
    return power, 0


@in_house_style
def points_figure(
    points: Mapping[str, tuple[float, float]],
    *,
    x: str,
    y: str,
    groups: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws one value against another, one marker per run: e.g. the gap against the sharpness.

    An axis is logarithmic if its values are positive and span more than two decades. With
    ``groups`` the runs (seeds) of a group share colour and marker, and a large marker shows the
    median of both values. Runs in which one of the two is not finite are left out; the header
    counts them.

    Args:
        points: run -> ``(x value, y value)``.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        groups: run -> group, for all runs. Groups after the first ten are grey; without groups up
            to ten runs are labelled with their names.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one 4 inches wide at 140 dpi, not registered in pyplot.

    Raises:
        ValueError: if ``points`` is empty or not pairs of numbers, or ``groups`` lacks a run.
    """
    if not isinstance(points, Mapping) or not points:
        raise ValueError(
            f"points_figure(points={points!r:.80}): expected a mapping from at least one name to "
            f"two numbers"
        )
    places = {}
    for name, place in points.items():
        pair = np.asarray(place)
        if pair.shape != (2,) or pair.dtype.kind not in "iuf":
            raise ValueError(
                f"points_figure(points=...): got {place!r:.80} for {name!r}; pass two numbers"
            )
        places[name] = pair.astype(np.float64)
    check_groups("points_figure", groups, points)
    check_text("points_figure", x=x, y=y)
    check_axes("points_figure", ax)
    finite = {name: at for name, at in places.items() if (np.abs(at) < HUGE).all()}
    members: dict[str, list[Any]] = {}
    for name, at in finite.items():
        members.setdefault(name if groups is None else str(groups[name]), []).append(at)
    named = list(members)[: MOST if groups is not None or len(members) <= MOST else 0]

    columns = 2 if len(named) > 2 and max(map(len, named)) <= 18 else 1
    lost = len(places) - len(finite)
    grey = len(members) - len(named)
    small = [
        comma_joined(
            f"{len(finite)} run{'s' if len(finite) != 1 else ''}",
            f"{lost} more not finite" if lost else "",
            "large: median over seeds" if groups is not None else "",
        ),
        f"grey: {grey} more groups" if grey and groups is not None else "",
    ]
    legend = HEADER + PITCH * len(list(filter(None, small)))
    top = legend + PITCH * -(-len(named) // columns) + 0.08
    height = top + 2.9
    figure, axes = open_axes(ax, height, (0.175, 0.45 / height, 0.795, 2.45 / height))
    draw_grid(axes)
    for name, group in members.items():
        style = named.index(name) if name in named else None
        _draw_group(axes, name, np.stack(group), style, median=groups is not None)
    _set_value_axis(axes, axes.xaxis, [float(at[0]) for at in finite.values()])
    _set_value_axis(axes, axes.yaxis, [float(at[1]) for at in finite.values()])
    axes.set_xlabel(shortened(x, 46), fontsize=TEXT, labelpad=2)
    axes.set_ylabel(shortened(y, 34), fontsize=TEXT, labelpad=1)
    if not finite:
        write_across(axes, "nothing finite")
    title = " against ".join(what.rpartition("/")[2] for what in (y, x))
    write_titles(ax, figure, title, small)
    if named:
        draw_legend(figure, legend, columns, ax=ax, markerscale=0.65, handlelength=1.2)
    return figure


def _draw_group(
    axes: Axes, name: str, places: NDArray[Any], style: int | None, median: bool
) -> None:
    """Draws the runs of a group and their median, or a single run."""
    color, marker, label = GREY, "o", None
    if style is not None:
        color = COLORS[style % len(COLORS)]
        marker = MARKERS[(style + style // len(COLORS)) % len(MARKERS)]
        seeds = f", {len(places)} seed{'s' if len(places) > 1 else ''}" if median else ""
        label = f"{legend_name(name, 30)}{seeds}"
    axes.plot(
        *places.T, marker, color=color, markersize=5.5 if median else 7, linestyle="None",
        alpha=0.6 if median else 1.0, label=None if median else label,
    )  # fmt: skip
    if median:
        axes.plot(
            *np.median(places, axis=0)[:, None], marker, color=color, markersize=11,
            linestyle="None", markeredgecolor=INK, markeredgewidth=1.2, label=label, zorder=4,
        )  # fmt: skip


def _set_value_axis(axes: Axes, axis: Axis, values: Sequence[float]) -> None:
    """Makes an axis logarithmic if its values are positive and span more than two decades."""
    if values and min(values) > 0 and max(values) > 100 * min(values):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(labelsize=SMALL, length=3, pad=2)
    else:
        set_ticks(axes, axis)
    axes.margins(0.08)
