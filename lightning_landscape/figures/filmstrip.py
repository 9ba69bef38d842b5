"""Filmstrips: several slices as small pictures in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Rectangle

from lightning_landscape.figures.canvas import (
    COLORS,
    GREY,
    HEADER,
    PITCH,
    SMALL,
    TEXT,
    WIDTH,
    draw_grid,
    figure_of,
    in_house_style,
    new_figure,
    set_ticks,
    shortened,
    write_header,
)
from lightning_landscape.figures.data import by_change, center_of, evenly, losses_of
from lightning_landscape.figures.figure_checks import check_axes, check_limits, check_names
from lightning_landscape.figures.film import as_film
from lightning_landscape.figures.labels import (
    axis_label,
    comma_joined,
    common_metadata,
    count_title,
    direction_names,
    norm_ranges,
    normalization_text,
    number,
    probe_text,
)
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.figures.line import line_remark, mark_outside
from lightning_landscape.figures.plane import (
    mark_center,
    remarks,
    set_aspect,
)
from lightning_landscape.figures.plane_map import draw_colorbar, draw_isolines, draw_map, map_limits
from lightning_landscape.geometry.checks import check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_landscape.geometry.slices import Slice

MOST, MOST_NAMED = 6, 9
# Inches: the caption above each picture, the gap between columns, the margin below.
_WORDS, _GAP, _FOOT = 0.34, 0.09, 0.42
# Inches: the colour bar with its labels.
_BAR = 0.92


def filmstrip_figure(
    slices: Sequence[Slice],
    *,
    limits: LossLimits | None = None,
    of: int | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws up to six slices side by side on one scale, with step and loss above each.

    Of more slices six are shown: both ends, and between them those after equal shares of the total
    change of the surface.  Planes are coloured as in ``plane_figure``; lines are drawn as in
    ``line_figure``, with the first one in grey behind the others.

    Args:
        slices: lines, or planes, on the same coordinates, in the order of their steps. With
            ``names`` the coordinates may differ, and up to nine are shown, evenly spaced: each is
            drawn on its own grid, in axes that contain the widest.
        limits: the range of losses of the run's pictures. None: one that contains all pictures.
        of: the number of pictures of the run, if ``slices`` are a selection.
        names: captions instead of the step, for slices of several runs or networks.
        ax: axes of another figure, in whose place the pictures are drawn, without the header. None:
            a new figure.

    Returns:
        The figure of ``ax``, or one 4 inches wide at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``slices`` is not a sequence of slices.
        ValueError: if it is empty, if the slices differ in their kind or coordinates, or if the
            number of names differs.
    """
    owner = "filmstrip_figure"
    film = as_film(owner, slices, one_grid=names is None)
    check_limits(owner, limits)
    check_axes(owner, ax)
    if of is not None:
        check_count(owner, "of", of, 1, ", or None")
    if names is not None:
        check_names(owner, names)
        if len(names) != len(film):
            raise ValueError(
                f"{owner}(names={names!r:.80}): got {len(names)} names for {len(film)} slices; "
                f"pass one name per slice"
            )
    chosen = by_change(film, MOST) if names is None else evenly(len(film), MOST_NAMED)
    called = None if names is None else [names[index] for index in chosen]
    shown = [film[index] for index in chosen]
    limits = LossLimits.for_film(film) if limits is None else limits
    if ax is not None:
        return _draw_into(ax, shown, limits, called)
    return _draw(shown, limits, of or len(film), called)


@in_house_style
def _draw_into(
    ax: Axes, shown: list[Slice], limits: LossLimits, called: list[str] | None
) -> Figure:
    """Draws the pictures in the place of the user's axes."""
    planes = len(shown[0].coordinates) == 2
    columns, rows = _grid(len(shown))
    ax.set_axis_off()
    ax.set_title(_title(shown, called is not None), fontsize=TEXT, pad=30)  # above the captions
    gap, words = 0.08, 0.35  # as a part of the axes
    wide, high = (1 + gap) / columns - gap, (1 + words) / rows - words
    for index, slice in enumerate(shown):
        row, column = divmod(index, columns)
        place = (column * (wide + gap), 1 - row * (high + words) - high, wide, high)
        panel = ax.inset_axes(place)
        _draw_panel(panel, slice, shown, limits)
        panel.tick_params(labelleft=column == 0, labelbottom=index + columns >= len(shown))
        over = _caption(slice, None if called is None else called[index])
        panel.set_title(over, fontsize=SMALL, loc="left", pad=3)
    if planes:
        draw_colorbar(ax.inset_axes((1.03, 0.0, 0.04, 1.0)), shown, limits)
    return figure_of(ax)


def _grid(count: int) -> tuple[int, int]:
    """Returns the numbers of columns and rows."""
    columns = 2 if count in (2, 4) else min(count, 3)
    return columns, -(-count // columns)


def _draw_panel(axes: Axes, slice: Slice, shown: Sequence[Slice], limits: LossLimits) -> bool:
    """Draws one small picture; returns whether it is to scale."""
    ends = [_ends(shown, axis) for axis in range(len(slice.coordinates))]
    if len(ends) == 2:
        draw_map(axes, slice, limits)
        draw_isolines(axes, slice, limits.values(slice))
        mark_center(axes, size=6.0)
        _set_frame(axes, shown, ends)
        return set_aspect(axes, shown)
    _draw_line(axes, slice, shown[0], limits)
    low, high = min(ends[0][0], 0.0), max(ends[0][-1], 0.0)
    margin = 0.05 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    _mark_ends(axes, ends[0])
    return True


def _title(shown: Sequence[Slice], compared: bool) -> str:
    kind = "plane" if len(shown[0].coordinates) == 2 else "line"
    return count_title(len(shown), kind) if compared else f"Loss on the {kind} over training"


@in_house_style
def _draw(
    shown: list[Slice], limits: LossLimits, of: int, called: list[str] | None = None
) -> Figure:
    """Draws the figure."""
    planes = len(shown[0].coordinates) == 2
    shared = common_metadata([slice.metadata for slice in shown])
    columns, rows = _grid(len(shown))
    marks = [number(value) for value in _ends(shown, 1)] if planes else []
    # A character is about 0.07 inches wide.
    left, right = (0.27 + 0.07 * max(map(len, marks)), _BAR) if planes else (0.68, 0.1)
    side = min((WIDTH - left - right + _GAP) / columns - _GAP, 1.5)
    top = HEADER + PITCH * 2 + 0.04
    figure = new_figure(height=top + rows * (side + _WORDS) + _FOOT)
    height = figure.get_figheight()
    names, norms = direction_names(shared, 2), norm_ranges(shown, len(shown[0].coordinates))
    span = rows * (side + _WORDS) - _WORDS

    to_scale = True
    for index, slice in enumerate(shown):
        row, column = divmod(index, columns)
        x = left + column * (side + _GAP)
        y = height - top - (row + 1) * (side + _WORDS)
        axes = figure.add_axes((x / WIDTH, y / height, side / WIDTH, side / height))
        to_scale = _draw_panel(axes, slice, shown, limits)
        axes.tick_params(labelleft=column == 0, labelbottom=index + columns >= len(shown))
        over = _caption(slice, None if called is None else called[index])
        figure.text(
            (x + 0.02) / WIDTH, (y + side + 0.03) / height, over, fontsize=SMALL,
            ha="left", va="bottom", linespacing=1.0,
        )  # fmt: skip
    middle = (left + (columns * (side + _GAP) - _GAP) / 2) / WIDTH
    figure.text(
        middle, 0.04 / height, axis_label(shortened(names[0], 20), norms[0]), fontsize=TEXT,
        ha="center", va="bottom",
    )  # fmt: skip
    bottom = _FOOT / height
    if planes:
        up = (1 - top / height + bottom) / 2
        label = axis_label(shortened(names[1], 20), norms[1])
        bar = figure.add_axes(
            ((left + columns * (side + _GAP)) / WIDTH, bottom, 0.12 / WIDTH, span / height)
        )
        draw_colorbar(bar, shown, limits, bins=max(3, int(4 * span)))
        if rows == 1:  # too low for the whole label
            label = shortened(names[1], 16)
        figure.text(0.012, up, label, fontsize=TEXT, rotation=90, ha="left", va="center")
    _write_text(figure, shown, limits, of, to_scale, called is not None)
    return figure


def _set_frame(axes: Axes, shown: Sequence[Slice], ends: Sequence[list[float]]) -> None:
    """Gives a small map the axis limits of all; outside of its own grid it stays white."""
    edges = [map_limits(slice) for slice in shown]
    (left, right), (bottom, top) = (
        (min(low for low, _ in sides), max(high for _, high in sides))
        for sides in zip(*edges, strict=True)
    )
    own_x, own_y = axes.get_xlim(), axes.get_ylim()
    if (*own_x, *own_y) != (left, right, bottom, top):
        grid = Rectangle(
            (own_x[0], own_y[0]), own_x[1] - own_x[0], own_y[1] - own_y[0], hatch="////",
            facecolor="white", edgecolor=GREY, linewidth=0, zorder=0,
        )  # fmt: skip
        axes.patch.set(hatch="")
        axes.add_patch(grid)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    _mark_ends(axes, ends[0])
    axes.set_yticks(ends[1], labels=[number(value) for value in ends[1]])


def _draw_line(axes: Axes, slice: Slice, first: Slice, limits: LossLimits) -> None:
    """Draws one small curve in front of that of the first slice."""
    x = np.asarray(slice.coordinates[0], dtype=np.float64)
    margin = 0.05 * (limits.high - limits.low)
    low, high = limits.low - margin, limits.high + margin
    axes.set_ylim(low, high)
    set_ticks(axes, axes.yaxis, bins=4)
    draw_grid(axes)
    if slice is not first:
        axes.plot(first.coordinates[0], losses_of(first), color=GREY, linewidth=1.2)
    curve = losses_of(slice)
    axes.plot(x, curve, color=COLORS[0], linewidth=1.6)
    axes.plot([0.0], [center_of(slice)], "o", color=COLORS[0], markersize=4, zorder=5)
    mark_outside(axes, x, curve, low, high, COLORS[0])


def _ends(shown: Sequence[Slice], axis: int) -> list[float]:
    """Returns the first and the last coordinate of all slices, and 0 if it lies between."""
    first = min(float(slice.coordinates[axis][0]) for slice in shown)
    last = max(float(slice.coordinates[axis][-1]) for slice in shown)
    return [first, 0.0, last] if first < 0 < last else sorted({first, last})


def _mark_ends(axes: Axes, ends: list[float]) -> None:
    """Labels the ends of the horizontal axis, within its width, as the next picture is close."""
    axes.tick_params(labelsize=SMALL, length=3, pad=2)
    axes.set_xticks(ends, labels=[number(value) for value in ends])
    labels = axes.get_xticklabels()
    if len(labels) > 1:
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")


def _caption(slice: Slice, name: str | None) -> str:
    """Returns the name, or the step, and the loss below it."""
    step = slice.metadata.get("step")
    loss = f"loss {number(float(slice.center_loss))}"
    if name is not None:
        return f"{shortened(name, 20)}\n{loss}"
    return loss if step is None else f"step {step}\n{loss}"


def _write_text(
    figure: Figure, shown: list[Slice], limits: LossLimits, of: int, to_scale: bool, compared: bool
) -> None:
    """Writes the header."""
    first, shared = shown[0].metadata, common_metadata([slice.metadata for slice in shown])
    planes = len(shown[0].coordinates) == 2
    what = _title(shown, compared)
    count = f"{len(shown)} of {of} pictures" if len(shown) < of else ""
    if planes:
        last = comma_joined(count, "" if to_scale else "not to scale", remarks(shown))
    else:
        curves = np.concatenate([losses_of(slice) for slice in shown])
        behind = "the first" if compared else f"step {first.get('step', '?')}"
        grey = f"grey: {behind}" if len(shown) > 1 else ""
        last = comma_joined(count, grey, line_remark(curves, limits.low, limits.high))
    write_header(figure, what, [comma_joined(normalization_text(shared), probe_text(shared)), last])
