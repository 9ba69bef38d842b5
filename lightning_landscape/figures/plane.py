"""A 2-D slice as a colour map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects

from lightning_landscape.figures.canvas import (
    INK,
    SMALL,
    WIDTH,
    in_house_style,
    name_mark,
    open_axes,
    packed,
    set_ticks,
    shortened,
    write_across,
    write_titles,
)
from lightning_landscape.figures.data import (
    ROUNDING,
    center_of,
    check_slice,
    losses_of,
    validation_of,
)
from lightning_landscape.figures.figure_checks import check_axes, check_limits
from lightning_landscape.figures.labels import (
    axis_label,
    comma_joined,
    direction_names,
    direction_norms,
    directions_line,
    norm_ranges,
    normalization_text,
    number,
    probe_text,
    step_and_loss,
)
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.figures.path import draw_path, path_of, path_text, shares_text
from lightning_landscape.figures.plane_map import draw_colorbar, draw_isolines, draw_map
from lightning_landscape.geometry.checks import check_flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# Beyond this aspect ratio a map to scale would be too narrow a strip.
MAX_ASPECT = 2.0
# Inches: the map and its colour bar, from the lower edge of the figure.
_LEFT, _BOTTOM, _SIDE, _GAP, _BAR = 0.58, 0.484, 2.6, 0.05, 0.12
_HIGH = 4.0
# Isolines with a number on them, at most.
_LABELLED = 4


def plane_figure(
    slice: Slice,
    *,
    limits: LossLimits | None = None,
    interpolate: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Draws a 2-D slice: colour is the loss, on a logarithmic scale.

    Dark is low.  Faint dots are the sampled points; the colours between them are interpolated.
    Isolines join equal losses.  The cross marks the weights, a circle the lowest sampled point if
    it is another one, diamonds other weights in the metadata (``points``).  Points without a finite
    loss are hatched.  Both axes have the same unit in weight space if the norms of the directions
    are known and the map would not be a narrow strip; otherwise the header says "not to scale".

    If some losses are not positive, the colour is the loss minus the lowest sampled one.  If the
    metadata have a validation loss, the isolines show it.  If they have a path, the trajectory of
    the weights is drawn from a square, with dots that are dark in the plane and pale far from it.

    Args:
        slice: a slice with two coordinate axes; ``losses[j, i]`` belongs to ``(x[i], y[j])``.
        limits: the range of losses that all pictures of a run share. None: from this slice alone.
        interpolate: False: one cell of one colour for each sampled point.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one of 4.0 x 4.0 inches at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``slice`` is not a slice.
        ValueError: if it is not a plane, or the shapes of coordinates and losses do not match.
    """
    check_slice("plane_figure(slice=...)", slice, axes=2)
    check_limits("plane_figure", limits)
    check_flags("plane_figure", interpolate=interpolate)
    check_axes("plane_figure", ax)
    chosen = LossLimits.for_film([slice]) if limits is None else limits.widened(slice)
    return draw_plane(slice, chosen, [slice], interpolate, ax)


@in_house_style
def draw_plane(
    slice: Slice,
    limits: LossLimits,
    film: Sequence[Slice],
    interpolate: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Draws one frame of a film; only the title and the map differ between frames."""
    first = film[0].metadata
    path, validation = path_of(slice), validation_of(slice)
    box = (_LEFT / WIDTH, _BOTTOM / _HIGH, _SIDE / WIDTH, _SIDE / _HIGH)
    figure, axes = open_axes(ax, _HIGH, box)
    bar = axes.inset_axes((1.0 + _GAP / _SIDE, 0.0, _BAR / _SIDE, 1.0))
    draw_map(axes, slice, limits, interpolate)
    lines = limits.values(slice) if validation is None else losses_of(validation)
    marked = [np.zeros((1, 2)), _points(slice), *([] if path is None else [path.dense])]
    draw_isolines(axes, slice, lines, _LABELLED, np.concatenate([*marked, _lowest(slice)]))
    if path is not None:
        draw_path(axes, path)
    _mark_points(axes, slice)
    _mark_lowest(axes, slice, named=len(film) == 1)
    mark_center(axes)
    set_ticks(axes, axes.xaxis, axes.yaxis)
    for axis, label in zip("xy", _axis_labels(slice, film), strict=True):
        axes.set(**{f"{axis}label": label})
    axes.xaxis.labelpad, axes.yaxis.labelpad = 2, 0
    to_scale = set_aspect(axes, film)
    draw_colorbar(bar, film, limits)
    if not np.isfinite(slice.losses).any():
        write_across(axes, "no finite loss")
    title = step_and_loss(slice.metadata, slice.center_loss)
    write_titles(
        ax,
        figure,
        title,
        packed(
            [
                directions_line(first, 2),
                comma_joined(normalization_text(first), probe_text(first)),
            ],
            "" if validation is None else _validation_text(validation),
            "" if path is None else path_text(path, axes.get_xlim(), axes.get_ylim()),
            "" if to_scale else "not to scale",
            remarks(film),
        ),
    )
    return figure


def _lowest(slice: Slice) -> NDArray[Any]:
    """Returns the place of the lowest sampled point, as a row, if it is not at the weights."""
    losses, center = losses_of(slice), center_of(slice)
    if not np.isfinite(losses).any():
        return np.empty((0, 2))
    row, column = np.unravel_index(np.nanargmin(losses), losses.shape)
    x, y = float(slice.coordinates[0][column]), float(slice.coordinates[1][row])
    lowest = float(losses[row, column])
    if (x == 0 == y) or center - lowest <= ROUNDING * max(abs(center), abs(lowest)):
        return np.empty((0, 2))
    return np.array([[x, y]])


def _mark_lowest(axes: Axes, slice: Slice, named: bool) -> None:
    """Marks the lowest sampled point; with its name, which would flicker in a film."""
    for x, y in _lowest(slice):
        for color, width in ((INK, 2.6), ("white", 1.3)):
            axes.plot(
                [x], [y], "o", color=color, markersize=8, markerfacecolor="none", zorder=5,
                markeredgewidth=width, label="_lowest", scalex=False, scaley=False,
            )  # fmt: skip
        if named:
            low, high = axes.get_ylim()
            name_mark(axes, x, y, "lowest", above=8 if y < low + (high - low) / 4 else -8)


def _axis_labels(slice: Slice, film: Sequence[Slice]) -> list[str]:
    """Returns the names of both directions, with the norm or the share of the path."""
    path, norms = path_of(slice), norm_ranges(film, 2)
    names = [shortened(name, 20) for name in direction_names(film[0].metadata, 2)]
    if path is None:
        return [axis_label(name, norm) for name, norm in zip(names, norms, strict=True)]
    return [f"{name}{share}" for name, share in zip(names, shares_text(path), strict=True)]


def remarks(film: Sequence[Slice]) -> str:
    """Returns further remarks on the planes of a film, for the header."""
    found = []
    cosine = max((s.metadata.get("cosine") or 0.0 for s in film), key=abs)
    if abs(cosine) > 0.1:
        found.append(f"axes at cosine {number(cosine, 2)}")
    grounds = [np.ma.masked_invalid(losses_of(slice)) for slice in film]
    if any(ground.count() < ground.size for ground in grounds):
        found.append("hatched: not finite")
    if all(ground.count() and np.ptp(ground) <= ROUNDING * abs(ground).max() for ground in grounds):
        found.append("flat")
    return comma_joined(*found)


def _validation_text(validation: Slice) -> str:
    """Describes the isolines of a validation loss."""
    samples = validation.metadata.get("probe_samples")
    return f"lines: validation{'' if samples is None else f', {samples}'}"


def mark_center(axes: Axes, size: float = 10.0) -> None:
    """Marks the weights with a cross that is visible on dark and on light colours."""
    for color, width in (("white", 0.36 * size), (INK, 0.13 * size)):
        axes.plot(
            [0.0], [0.0], "+", color=color, markersize=size, markeredgewidth=width, zorder=5,
            scalex=False, scaley=False,
        )  # fmt: skip


def _mark_points(axes: Axes, slice: Slice) -> None:
    """Marks and labels the points in the metadata: other weights in the plane."""
    middle = float(np.mean(axes.get_xlim()))
    for point, (x, y) in zip(slice.metadata.get("points") or (), _points(slice), strict=True):
        # The label of the weights is below, to keep it apart from that of a point nearby.
        at_center = not (x or y)
        if not at_center:
            axes.plot(
                [x], [y], "D", color="white", markersize=8, markeredgecolor=INK,
                markeredgewidth=1.4, zorder=5, scalex=False, scaley=False,
            )  # fmt: skip
        label = axes.annotate(
            shortened(str(point["name"]), 18), (x, y), xytext=(0, -9 if at_center else 9),
            textcoords="offset points", ha="right" if x > middle else "left",
            va="top" if at_center else "bottom", fontsize=SMALL, zorder=6,
        )  # fmt: skip
        label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])


def _points(slice: Slice) -> NDArray[Any]:
    """Returns the coordinates of the points in the metadata, one per row."""
    known = slice.metadata.get("points") or ()
    return np.array([[float(p["x"]), float(p["y"])] for p in known]).reshape(-1, 2)


def set_aspect(axes: Axes, film: Sequence[Slice]) -> bool:
    """Gives both axes the same unit in weight space if the map stays legible; returns whether."""
    width, height = (abs(np.subtract(*limits)) for limits in (axes.get_xlim(), axes.get_ylim()))
    units = []
    for slice in film:
        across, up = direction_norms(slice.metadata, 2)
        if across is None or up is None:
            return False
        units.append(up / across)
    unit = float(np.median(units))
    if max(units) > 1.1 * unit or min(units) < unit / 1.1:
        return False  # no single aspect ratio is right for all frames
    if not 1 / MAX_ASPECT <= height * unit / width <= MAX_ASPECT:
        return False
    axes.set_aspect(unit)
    return True
