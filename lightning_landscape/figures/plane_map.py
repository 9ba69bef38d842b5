"""The map of a plane: colours, sampled points, isolines, and the colour bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.ticker import FixedFormatter, FixedLocator

from lightning_landscape.figures.canvas import GREY, INK, SMALL, TEXT
from lightning_landscape.figures.data import ROUNDING, losses_of
from lightning_landscape.figures.interpolation import refined
from lightning_landscape.figures.labels import exactly
from lightning_landscape.figures.limits import LossLimits, isolines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# Perceptually uniform, and its lightness increases from end to end: lower losses are darker in
# greyscale and for all kinds of colour blindness.
COLOR_MAP = colormaps["viridis"]
# Room that the number of an isoline needs, as a share of the width.
_ROOM = 0.07


def draw_map(axes: Axes, slice: Slice, limits: LossLimits, interpolate: bool = True) -> None:
    """Draws the colours and the sampled points; hatched where there is no loss."""
    x, y = (np.asarray(axis, dtype=np.float64) for axis in slice.coordinates)
    values = limits.values(slice)
    axes.patch.set(hatch="////", edgecolor=GREY)
    if interpolate and min(values.shape) > 1 and np.isfinite(values).any():
        fine_x, fine_y, fine = refined(x, y, values)
        fine = np.ma.masked_invalid(fine)
        axes.contourf(
            fine_x, fine_y, fine, levels=limits.bands(fine.min(), fine.max()), cmap=COLOR_MAP,
            norm=limits.norm(), extend="both",
        )  # fmt: skip
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(y[0], y[-1])
        _draw_samples(axes, x, y)
    else:
        cells = np.ma.masked_invalid(values)
        edges = cell_edges(x), cell_edges(y)
        axes.pcolormesh(*edges, cells, cmap=COLOR_MAP, norm=limits.norm())
        axes.set_xlim(*edges[0][[0, -1]])
        axes.set_ylim(*edges[1][[0, -1]])


def map_limits(slice: Slice) -> list[tuple[float, float]]:
    """Returns the ends of both axes of an interpolated map, or of cells along a single point."""
    axes = [np.asarray(axis, dtype=np.float64) for axis in slice.coordinates]
    cells = min(map(len, axes)) < 2 or not np.isfinite(losses_of(slice)).any()
    ends = [cell_edges(axis) if cells else axis for axis in axes]
    return [(float(axis[0]), float(axis[-1])) for axis in ends]


def cell_edges(centers: NDArray[Any]) -> NDArray[Any]:
    """Returns the edges of cells with these centres, one more than there are centres."""
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    first, last = 2 * centers[0] - middle[0], 2 * centers[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def _draw_samples(axes: Axes, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Draws the sampled points as faint dots."""
    across, up = np.meshgrid(x, y)
    size = 3.0 if max(across.shape) <= 21 else 1.5
    axes.plot(
        across.ravel(), up.ravel(), ".", color="white", alpha=0.5, markersize=size,
        markeredgewidth=0, label="_samples", zorder=3, scalex=False, scaley=False,
    )  # fmt: skip


def draw_isolines(
    axes: Axes,
    slice: Slice,
    values: NDArray[Any],
    labelled: int = 0,
    keep_clear: NDArray[Any] | None = None,
) -> None:
    """Draws lines of equal values at round numbers, some of them with the number.

    The numbers avoid the points ``keep_clear``, if there are any.
    """
    finite = values[np.isfinite(values)]
    if min(values.shape) < 2 or not finite.size:
        return
    low, high = float(finite.min()), float(finite.max())
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        return
    x, y = (np.asarray(axis, dtype=np.float64) for axis in slice.coordinates)
    fine_x, fine_y, fine = refined(x, y, values)
    # The lowest value of an excess is 0.
    levels = isolines(low if low else float(np.min(finite[finite > 0])), high)
    if not levels:
        return
    lines = axes.contour(
        fine_x, fine_y, np.ma.masked_invalid(fine), levels=levels, linewidths=0.7,
        linestyles="-", colors="white", alpha=0.8, zorder=2,
    )  # fmt: skip
    if not labelled:
        return
    chosen = levels[:: -(-len(levels) // labelled)]
    points = np.zeros((1, 2)) if keep_clear is None else keep_clear
    for level, place in _clear_places(lines, chosen, x, y, points).items():
        label = axes.text(
            *place, exactly(level), color=INK, fontsize=8.5, ha="center", va="center", zorder=3
        )
        label.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


def _clear_places(
    lines: Any, chosen: Sequence[float], x: NDArray[Any], y: NDArray[Any], points: NDArray[Any]
) -> dict[float, tuple[float, float]]:
    """Returns a place on each chosen line, far from the points and earlier ones, if there is."""
    low, size = np.array([x[0], y[0]]), np.array([x[-1] - x[0], y[-1] - y[0]])
    taken = [*(points[np.isfinite(points).all(axis=1)] - low) / size]
    places = {}
    for level, segments in zip(lines.levels, lines.allsegs, strict=True):
        if level not in chosen:
            continue
        vertices = np.concatenate([np.empty((0, 2)), *segments])
        if not len(vertices):
            continue
        at = (vertices - low) / size
        border = np.minimum(at, 1 - at).min(axis=1)
        room = np.linalg.norm(at[:, None] - np.array(taken), axis=2).min(axis=1)
        clear = np.minimum(room, 2 * border)
        best = int(clear.argmax())
        if clear[best] >= _ROOM:
            taken.append(at[best])
            places[level] = (float(vertices[best][0]), float(vertices[best][1]))
    return places


def draw_colorbar(axes: Axes, film: Sequence[Slice], limits: LossLimits, bins: int = 7) -> None:
    """Draws the colours from the lowest to the highest loss of the limits and of a film.

    The label at an end shows if losses lie beyond it.
    """
    found = [limits.values(slice) for slice in film]
    every = np.concatenate([values[np.isfinite(values)] for values in found])
    every = every[every > 0]
    low, high = limits.shown(film)
    borders = limits.bands(low, high)
    middle = (borders[1:] + borders[:-1]) / 2
    axes.set_yscale("log")
    axes.pcolormesh([0.0, 1.0], borders, middle[:, None], cmap=COLOR_MAP, norm=limits.norm())
    axes.set_ylim(low, high)
    axes.set_xlim(0.0, 1.0)
    ticks = isolines(low, high, bins - 1)
    if high >= 10 * low or not ticks:
        ticks = [low, *ticks, high]
    ticks = _spaced(ticks, low, high, bins)
    labels = [exactly(tick) for tick in ticks]
    if every.size and every.max() > high * (1 + 1e-9):
        labels[-1] = f"> {labels[-1]}"
    if limits.excess:
        labels[0] = f"< {labels[0]}"  # the lowest point is at 0, which has no logarithm
    elif every.size and every.min() < low * (1 - 1e-9):
        labels[0] = f"< {labels[0]}"
    axes.set_xticks([])
    axes.minorticks_off()
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter(labels))
    axes.tick_params(labelsize=SMALL, length=3, pad=2)
    axes.set_ylabel("loss above the lowest" if limits.excess else "loss", fontsize=TEXT)
    axes.yaxis.labelpad = 1


def _spaced(ticks: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    """Returns both ends and what is at least a part of the bar away from all others."""
    length = math.log(high / low)
    kept = [ticks[0], ticks[-1]]
    for tick in ticks[1:-1]:
        if all(abs(math.log(tick / other)) >= 0.75 * length / bins for other in kept):
            kept.append(tick)
    return sorted(set(kept))
