"""The pictures of ``HessianMonitor``; the plotting library is imported when drawing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_landscape.geometry.spectrum import SpectralDensity
from lightning_landscape.training.output.run_files import load_evenly

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_history(
    rows: Callable[[Path], list[dict[str, Any]]], folder: Path, name: str | None
) -> Figure:
    """The eigenvalue and the edge at all steps."""
    from lightning_landscape.figures import eigenvalue_figure

    return eigenvalue_figure(rows(folder), name=name)


def draw_density_film(files: dict[int, Path], label: dict[str, Any]) -> Figure:
    """The densities of a run at all steps."""
    from lightning_landscape.figures import density_film_figure

    steps = {path: step for step, path in files.items()}
    found = load_evenly(list(steps), SpectralDensity.load, most=60)
    densities = {steps[path]: density for path, density in found.items()}
    return density_film_figure(densities, metadata=label)


def draw_density(density: SpectralDensity, label: dict[str, Any]) -> Figure:
    """The density of one step."""
    from lightning_landscape.figures import density_figure

    return density_figure(density, metadata=label)
