"""A 2-D slice as a colour map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import patheffects
from matplotlib.colors import LinearSegmentedColormap

from lightning_landscape.figures.canvas import (
    GREY,
    INK,
    PITCH,
    SMALL,
    TEXT,
    in_house_style,
    new_figure,
    set_ticks,
    shortened,
    write_across,
    write_header,
)
from lightning_landscape.figures.data import (
    ROUNDING,
    centred,
    check_slice,
    difference_range,
    validation_of,
)
from lightning_landscape.figures.figure_checks import check_scale
from lightning_landscape.figures.labels import (
    MINUS,
    axis_label,
    comma_joined,
    difference_text,
    direction_names,
    direction_norms,
    directions_line,
    norm_ranges,
    normalization_text,
    number,
    probe_text,
    step_and_loss,
)
from lightning_landscape.figures.path import draw_path, path_of, path_text
from lightning_landscape.figures.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# Lightness increases uniformly from end to end (CIELAB 15 to 96), so lower losses are darker in
# greyscale and for all kinds of colour blindness; the hue changes from blue to orange at the loss
# of the weights. A diverging map with a light middle would show minima and maxima as the same grey.
GROUND = LinearSegmentedColormap.from_list(
    "ground", ["#0b2454", "#2a5599", "#7f8290", "#e0a15a", "#fff4cf"]
)
# Beyond this aspect ratio a map to scale would be too narrow a strip.
MAX_ASPECT = 2.0


def plane_figure(slice: Slice, *, scale: ColorScale | None = None) -> Figure:
    """Draws a 2-D slice: colour is the loss minus the loss at the weights.

    Dark blue is below the loss at the weights, light orange above; contour lines are labelled with
    the difference; the cross marks the weights, diamonds mark the other weights in the metadata
    (``points``). Cells without a finite loss are hatched. Both axes have the same unit in weight
    space if the norms of the directions are known and the map would not be a narrow strip;
    otherwise the header says "not to scale".

    If the metadata have a validation loss, the contour lines show it, minus the validation loss at
    the cross. If they have a path, the trajectory of the weights is drawn from a square, with dots
    that are dark in the plane and pale far from it; the header counts those outside the picture.

    Args:
        slice: a slice with two coordinate axes; ``losses[j, i]`` belongs to ``(x[i], y[j])``.
        scale: the colour scale, shared by all frames of a film. None: from this slice alone.

    Returns:
        A figure of 4.0 x 4.4 inches at 140 dpi, higher with a path or a validation loss, not
        registered in pyplot.

    Raises:
        TypeError: if ``slice`` is not a slice.
        ValueError: if it is not a plane, or the shapes of coordinates and losses do not match.
    """
    check_slice("plane_figure(slice=...)", slice, axes=2)
    check_scale("plane_figure", scale)
    return draw_plane(slice, ColorScale.for_one(slice) if scale is None else scale, [slice])


@in_house_style
def draw_plane(slice: Slice, scale: ColorScale, film: Sequence[Slice]) -> Figure:
    """Draws one frame of a film; only the title and the map differ between frames."""
    first = film[0].metadata
    x, y = (np.asarray(axis, dtype=np.float64) for axis in slice.coordinates)
    ground = np.ma.masked_invalid(centred(slice)[0])

    validation, path = validation_of(slice), path_of(slice)
    # Inches: further lines of the header, if any frame needs them.
    more = PITCH * (
        any(validation_of(s) is not None for s in film)
        + 2 * any(path_of(s) is not None for s in film)
    )
    figure = new_figure(height=4.4 + more)
    bottom, height = 0.484 / (4.4 + more), 2.838 / (4.4 + more)
    axes = figure.add_axes((0.155, bottom, 0.625, height))
    mesh = draw_map(axes, x, y, ground, scale)
    lines = ground if validation is None else np.ma.masked_invalid(centred(validation)[0])
    marked = [_points(slice), *([] if path is None else [path.drawn])]
    keep_clear = np.concatenate(marked) if any(map(len, marked)) else None
    _draw_contours(axes, x, y, lines, scale, keep_clear)
    if path is not None:
        draw_path(axes, path)
    _mark_points(axes, slice)
    mark_center(axes)
    set_ticks(axes, axes.xaxis, axes.yaxis)
    names, norms = direction_names(first, 2), norm_ranges(film, 2)
    axes.set_xlabel(axis_label(shortened(names[0], 20), norms[0]), fontsize=TEXT, labelpad=2)
    axes.set_ylabel(axis_label(shortened(names[1], 20), norms[1]), fontsize=TEXT, labelpad=0)
    to_scale = set_aspect(axes, film)
    bar = figure.add_axes((0.795, bottom, 0.03, height))
    draw_colorbar(bar, mesh, film, scale, scale.ticks())
    if not ground.count():
        write_across(axes, "no finite loss")
    write_header(
        figure,
        step_and_loss(slice.metadata, slice.center_loss),
        [
            directions_line(first, 2),
            comma_joined(normalization_text(first), probe_text(first)),
            f"colour: {difference_text(film, 'cross')}",
            "" if validation is None else _validation_text(validation),
            *([] if path is None else path_text(path, axes.get_xlim(), axes.get_ylim())),
            comma_joined("" if to_scale else "not to scale", remarks(film)),
        ],
    )
    return figure


def draw_map(
    axes: Axes, x: NDArray[Any], y: NDArray[Any], ground: np.ma.MaskedArray[Any, Any],
    scale: ColorScale,
) -> Any:  # fmt: skip
    """Draws the coloured cells on a hatched background, visible where there is no loss."""
    axes.patch.set(hatch="////", edgecolor=GREY)
    mesh = axes.pcolormesh(cell_edges(x), cell_edges(y), ground, cmap=GROUND, norm=scale.norm())
    axes.set_xlim(*cell_edges(x)[[0, -1]])
    axes.set_ylim(*cell_edges(y)[[0, -1]])
    return mesh


def remarks(film: Sequence[Slice]) -> str:
    """Returns further remarks on the planes of a film, for the header."""
    found = []
    cosine = max((s.metadata.get("cosine") or 0.0 for s in film), key=abs)
    if abs(cosine) > 0.1:
        found.append(f"axes at cosine {number(cosine, 2)}")
    grounds = [np.ma.masked_invalid(centred(slice)[0]) for slice in film]
    if any(ground.count() < ground.size for ground in grounds):
        found.append("hatched: not finite")
    if all(
        ground.count() and abs(ground).max() <= ROUNDING * abs(centred(slice)[1])
        for slice, ground in zip(film, grounds, strict=True)
    ):
        found.append("flat")
    return comma_joined(*found)


def cell_edges(centers: NDArray[Any]) -> NDArray[Any]:
    """Returns the edges of cells with these centres, one more than there are centres."""
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    first, last = 2 * centers[0] - middle[0], 2 * centers[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def _draw_contours(
    axes: Axes, x: NDArray[Any], y: NDArray[Any], ground: np.ma.MaskedArray[Any, Any],
    scale: ColorScale, keep_clear: NDArray[Any] | None = None,
) -> None:  # fmt: skip
    """Draws at most seven labelled contour lines at round numbers.

    The labels avoid the points ``keep_clear``, if there are any.
    """
    if min(ground.shape) < 2 or not ground.count():
        return
    low, high = float(ground.min()), float(ground.max())
    powers = 10.0 ** np.arange(np.floor(np.log10(scale.linthresh)), np.log10(scale.limit) + 1)
    steps = np.sort(np.concatenate([powers, 3 * powers]))
    # Levels closer to zero would crowd around the cross.
    steps = steps[steps >= scale.linthresh]
    levels = [level for level in [*-steps[::-1], *steps] if low < level < high]
    levels = levels[:: max(1, -(-len(levels) // 7))]
    if not levels:
        return
    lines = axes.contour(
        x, y, ground, levels=levels, linewidths=0.9, linestyles="-",
        colors=["white" if level < 0 else INK for level in levels],
    )  # fmt: skip
    places: Any = False if keep_clear is None else _clear_places(lines, x, y, keep_clear)
    for label in axes.clabel(lines, fontsize=8.5, fmt=number, inline_spacing=2, manual=places):
        label.set_color(INK)
        label.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


def _clear_places(
    lines: Any, x: NDArray[Any], y: NDArray[Any], points: NDArray[Any]
) -> list[tuple[float, float]]:
    """Returns a position on each line, as far as possible from the points and earlier labels."""
    low, size = np.array([x[0], y[0]]), np.array([x[-1] - x[0], y[-1] - y[0]])
    taken = [*(points[np.isfinite(points).all(axis=1)] - low) / size]
    places = []
    for segments in lines.allsegs:
        vertices = np.concatenate([np.empty((0, 2)), *segments])
        if not len(vertices):
            continue
        at = (vertices - low) / size
        border = np.minimum(at, 1 - at).min(axis=1)
        room = np.linalg.norm(at[:, None] - np.array(taken), axis=2).min(axis=1)
        best = int(np.minimum(room, 2 * border).argmax())
        taken.append(at[best])
        places.append((float(vertices[best][0]), float(vertices[best][1])))
    return places


def _validation_text(validation: Slice) -> str:
    """Returns the line of the header that describes the contour lines."""
    known = validation.metadata
    probe = comma_joined(
        "" if known.get("probe_samples") is None else f"{known['probe_samples']} examples",
        "" if known.get("probe_mode") is None else f"{known['probe_mode']} mode",
    )
    return f"lines: validation loss {MINUS} {number(centred(validation)[1])} ({probe})"


def mark_center(axes: Axes, size: float = 11.0) -> None:
    """Marks the weights with a cross that is visible on dark and on light colours."""
    for color, width in (("white", 0.41 * size), (INK, 0.18 * size)):
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


def draw_colorbar(
    axes: Axes, mesh: Any, film: Sequence[Slice], scale: ColorScale, ticks: list[float]
) -> None:
    """Draws the colour bar; its end labels show if values in the film lie beyond them."""
    bar = axes.figure.colorbar(mesh, cax=axes)
    labels = [number(tick) for tick in ticks]
    low, high = difference_range(film)
    if high > scale.limit:
        labels[-1] = f"> {labels[-1]}"
    if low < -scale.limit:
        labels[0] = f"< {labels[0]}"
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=3, pad=2)
