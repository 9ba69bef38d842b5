"""The spectral density of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_landscape.figures.canvas import (
    COLORS,
    TEXT,
    draw_grid,
    in_house_style,
    open_axes,
    set_ticks,
    write_across,
    write_titles,
)
from lightning_landscape.figures.figure_checks import check_axes, check_density
from lightning_landscape.figures.labels import comma_joined, number, probe_text
from lightning_landscape.geometry.checks import check_metadata

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_landscape.geometry.spectrum import SpectralDensity

# Decades shown: the bulk near zero has almost all eigenvalues, an outlier may be one in a million.
_DECADES = 7


@in_house_style
def density_figure(
    density: SpectralDensity,
    *,
    metadata: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws the density of the Hessian's eigenvalues, on a logarithmic axis.

    The band is +- 2 standard errors. Values more than seven decades below the peak are cut off. If
    ``sigma`` is below ``resolution`` a line of the header says what is not resolved.

    Args:
        density: the result of ``spectral_density``.
        metadata: ``step``, ``probe_samples``, ``probe_mode``, as far as known.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one of 4.0 x 3.2 inches at 140 dpi, not registered in pyplot.
    """
    check_density("density_figure(density=...)", density)
    check_metadata(metadata, "density_figure")
    check_axes("density_figure", ax)
    known = dict(metadata or {})
    x, y = np.asarray(density.grid), np.asarray(density.density)
    error = np.asarray(density.stderr)
    sigma, resolution = float(density.sigma), float(getattr(density, "resolution", math.nan))
    unresolved = sigma < resolution
    box = (0.16, 0.14, 0.81, 0.58 if unresolved else 0.64)
    figure, axes = open_axes(ax, 3.2, box)
    draw_grid(axes)
    finite = np.isfinite(y) & np.isfinite(x)
    if not finite.any() or not y[finite].max() > 0:
        write_across(axes, "no finite density")
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        top = y[finite].max()
        floor = top * 10.0**-_DECADES
        axes.set_yscale("log")
        axes.set_ylim(floor, 3 * top)
        axes.fill_between(
            x, np.maximum(y - 2 * error, floor), np.maximum(y + 2 * error, floor),
            color=COLORS[0], alpha=0.2, linewidth=0,
        )  # fmt: skip
        axes.plot(x, np.maximum(y, floor), color=COLORS[0])
        axes.axvline(0.0, color="#6b6b6b", linewidth=0.8)
        set_ticks(axes, axes.xaxis)
    axes.set_xlabel("eigenvalue", fontsize=TEXT, labelpad=1)
    axes.set_ylabel("share per unit", fontsize=TEXT, labelpad=2)
    step = known.get("step")
    write_titles(
        ax,
        figure,
        "Spectral density" if step is None else f"Spectral density, step {step}",
        [
            comma_joined(f"smoothed by {number(sigma)}", "band: ± 2 standard errors"),
            _unresolved_text(resolution) if unresolved else "",
            probe_text(known),
        ],
    )
    return figure


def _unresolved_text(resolution: float) -> str:
    if math.isinf(resolution):
        return "not resolved: too few Lanczos steps"
    return f"not resolved below {number(resolution)}: peaks may be single nodes"
