"""The spectral density of the Hessian over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_landscape.figures.canvas import (
    COLORS,
    GREY,
    SMALL,
    TEXT,
    in_house_style,
    open_axes,
    set_ticks,
    write_across,
    write_titles,
)
from lightning_landscape.figures.data import evenly
from lightning_landscape.figures.figure_checks import check_axes, check_density
from lightning_landscape.figures.labels import comma_joined, number, probe_text
from lightning_landscape.geometry.checks import check_metadata, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lightning_landscape.geometry.spectrum import SpectralDensity

MOST = 60
_COLUMNS = 300
# Decades shown: the bulk has almost all eigenvalues, an outlier may be one in a million.
_DECADES = 6
INKS = LinearSegmentedColormap.from_list(
    "inks", ["#ffffff", "#c6d9ec", "#5b95c9", "#1d5596", "#0b2454"]
)


@in_house_style
def density_film_figure(
    densities: Mapping[int, SpectralDensity],
    *,
    metadata: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws the spectral density of the Hessian over training, one row per step.

    Darker means a higher density, on a logarithmic scale; the axis of the eigenvalues is linear
    near zero and logarithmic beyond. The dots are the largest Ritz value of each step. Rows without
    a finite density are hatched.

    Args:
        densities: step -> result of ``spectral_density``. Of more than 60 steps 60 are drawn,
            evenly spaced and including both ends.
        metadata: ``probe_samples``, ``probe_mode``, as far as known.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one of 4.0 x 4.2 inches at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``densities`` is not a mapping.
    """
    owner = "density_film_figure"
    if not isinstance(densities, Mapping) or not all(
        isinstance(step, (int, np.integer)) for step in densities
    ):
        raise TypeError(
            f"{quoted(owner, 'densities', densities)}: expected a dict from the step to a "
            "SpectralDensity"
        )
    for step, density in densities.items():
        check_density(f"{owner}(densities={{{step}: ...}})", density)
    check_metadata(metadata, owner)
    check_axes(owner, ax)
    every = sorted(densities)
    steps = [every[index] for index in evenly(len(every), MOST)]
    shown = [densities[step] for step in steps]
    finite = [d for d in shown if bool(np.isfinite(np.asarray(d.density)).all())]

    figure, axes = open_axes(ax, 4.2, (0.155, 0.11, 0.625, 0.675))
    axes.patch.set(hatch="////", edgecolor=GREY)
    axes.set_xlabel("eigenvalue", fontsize=TEXT, labelpad=1)
    axes.set_ylabel("step", fontsize=TEXT, labelpad=2)
    if finite:
        _draw_rows(axes, steps, shown, finite)
    else:
        write_across(axes, "no finite density")
        axes.set_xticks([])
        axes.set_yticks([])
    write_titles(
        ax,
        figure,
        "Spectral density over training",
        [
            "dark: many eigenvalues, dot: the largest seen",
            comma_joined(
                probe_text(dict(metadata or {})),
                f"{len(steps)} of {len(every)} steps" if len(steps) < len(every) else "",
                "hatched: not finite" if len(finite) < len(shown) else "",
            ),
        ],
    )
    return figure


def _draw_rows(
    axes: Axes, steps: list[int], shown: list[SpectralDensity], finite: list[SpectralDensity]
) -> None:
    """Draws the map, its axes and its colour bar."""
    low = min(float(d.grid[0]) for d in finite)
    high = max(float(d.grid[-1]) for d in finite)
    # Nothing narrower than the smoothing is visible at any step.
    linear = min(max(float(d.sigma) for d in finite) * 2, max(-low, high) / 3)
    axes.set_xscale("symlog", linthresh=linear, linscale=1.0, base=10)
    axes.set_xlim(low, high)
    to_chart = axes.transScale.transform
    ends = to_chart([(low, 0), (high, 0)])[:, 0]
    borders = np.linspace(ends[0], ends[1], _COLUMNS + 1)
    back = axes.transScale.inverted().transform
    edges = back(np.stack([borders, 0 * borders], 1))[:, 0]
    middle = (borders[1:] + borders[:-1]) / 2
    centers = back(np.stack([middle, 0 * middle], 1))[:, 0]
    rows = np.ma.masked_invalid([_row(d, centers) for d in shown])
    top = float(rows.max())
    norm = LogNorm(vmin=top * 10.0**-_DECADES, vmax=top, clip=True)
    mesh = axes.pcolormesh(edges, _row_edges(steps), rows, cmap=INKS, norm=norm)
    largest = [float(np.max(np.asarray(d.ritz_values))) for d in shown]
    axes.plot(
        largest, steps, "o", color=COLORS[1], markersize=3.5 if len(steps) <= 30 else 2.5,
        clip_on=False,
    )  # fmt: skip
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    ticks = _ticks(linear, low, high, lambda value: float(to_chart((value, 0))[0]), ends)
    axes.set_xticks(ticks, labels=[number(tick) for tick in ticks])
    axes.minorticks_off()
    set_ticks(axes, axes.yaxis, bins=6)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.032, 0.0, 0.048, 1.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=3, pad=2)
    bar.set_label("share per unit", fontsize=SMALL, labelpad=1)


def _ticks(
    linear: float, low: float, high: float, place: Callable[[float], float], ends: NDArray[Any]
) -> list[float]:
    """Returns zero and round numbers on both sides, powers of ten first, as far as labels fit."""
    first = int(np.floor(np.log10(linear)))
    last = int(np.ceil(np.log10(max(-low, high))))
    powers = [10.0**exponent for exponent in range(last, first - 1, -1)]
    chosen = [0.0]
    for tick in [sign * m * power for m in (1, 5, 2) for power in powers for sign in (1, -1)]:
        room = 0.13 * (ends[1] - ends[0])
        near = any(abs(place(tick) - place(other)) < room for other in chosen)
        if low <= tick <= high and not near:
            chosen.append(tick)
    return sorted(chosen)


def _row(density: SpectralDensity, centers: NDArray[Any]) -> NDArray[Any]:
    """Returns one density at the columns: 0 outside of its grid, nan if it is not finite."""
    values = np.asarray(density.density, dtype=np.float64)
    if not np.isfinite(values).all():
        return np.full(len(centers), np.nan)
    row: NDArray[Any] = np.interp(centers, np.asarray(density.grid), values, left=0.0, right=0.0)
    return row


def _row_edges(steps: list[int]) -> NDArray[Any]:
    """Returns the edges of the rows: midway between two steps."""
    at = np.asarray(steps, dtype=np.float64)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    first, last = at[0] - (middle[0] - at[0]), at[-1] + (at[-1] - middle[-1])
    return np.concatenate([[first], middle, [last]])
