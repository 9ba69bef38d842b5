"""The notes in the figure of a spectral density."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_landscape.figures import density_figure
from lightning_landscape.geometry import SpectralDensity

GRID = torch.linspace(-1, 1, 200, dtype=torch.float64)
BUMP = torch.exp(-(GRID**2) / 0.02)


@pytest.mark.parametrize(
    ("resolution", "note"),
    [
        (0.3, "not resolved below 0.3: peaks may be single nodes"),
        (math.inf, "not resolved: too few Lanczos steps"),
        (0.1, None),
        (0.0, None),
        (math.nan, None),  # from a file of an older version
    ],
)
def test_note_on_the_resolution(resolution: float, note: str | None) -> None:
    density = SpectralDensity(GRID, BUMP, 0.1 * BUMP, 0.1, GRID[None], GRID[None], 1, resolution)
    figure = density_figure(density, metadata={"step": 7, "probe_samples": 512})
    title, *notes = [text.get_text() for text in figure.texts]
    assert title == "Spectral density, step 7"
    assert notes[0] == "smoothed by 0.1, band: ± 2 standard errors"
    assert notes[1:-1] == ([note] if note else [])
    assert "512" in notes[-1]
    figure.draw_without_rendering()
    top = figure.axes[0].get_position().y1 * figure.bbox.height
    assert all(text.get_window_extent().y0 > top for text in figure.texts)
