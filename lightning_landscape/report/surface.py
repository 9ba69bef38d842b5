"""Planes as surfaces that the reader can turn: their data, which surface.js draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_landscape.figures.canvas import shortened
from lightning_landscape.figures.data import by_change, center_of, evenly, losses_of
from lightning_landscape.figures.labels import direction_names, exactly, number
from lightning_landscape.figures.limits import LossLimits, isolines
from lightning_landscape.figures.plane_map import COLOR_MAP
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.report.words import value_text

SURFACES = 6  # maximum number of surfaces of one series
_POINTS = 45  # maximum number of points along an axis: 44 x 44 quadrilaterals
_COLORS = 64
_TICKS = 5


def surface_view(planes: Mapping[int, Slice], limits: LossLimits) -> str:
    """A canvas and its data, hidden until surface.js draws it.

    Args:
        planes: the planes of a series, by step.
        limits: the range of losses of the whole series, as in the flat pictures.

    Returns:
        HTML; empty if no plane has at least two points along both axes.
    """
    planes = {step: plane for step, plane in planes.items() if min(plane.losses.shape) > 1}
    if not planes:
        return ""
    chosen = _chosen(planes)
    data = json.dumps(surface_data(chosen, limits), allow_nan=False, separators=(",", ":"))
    # Nothing in the data can end the script: "<" is only in texts, where this means the same.
    data = data.replace("<", "\\u003c")
    reading = "The same loss as height, on a logarithmic scale. Dot: the weights."
    if any(np.nanmax(limits.values(p), initial=0.0) > limits.high for p in chosen.values()):
        reading += f" Losses above {number(limits.high)} are cut off at the top."
    if len(chosen) < len(planes):
        reading += f" {len(chosen)} of {len(planes)} steps: the nearest one is shown."
    return (
        '<div class="surface" hidden><canvas tabindex="0" role="img" aria-label="The surface">'
        f'</canvas><p class="count"><span></span>. {reading} Drag it, or press the arrow keys, '
        f'to turn it.</p><script type="application/json">{data}</script></div>'
    )


def surface_data(planes: Mapping[int, Slice], limits: LossLimits) -> dict[str, Any]:
    """What surface.js draws, as plain values for JSON.

    Heights and ticks are places in the colour map, from 0 to 1.
    """
    ticks = isolines(limits.low, limits.high, _TICKS)
    places = limits.color(ticks).round(3).tolist()
    return {
        "loss": "loss above the lowest" if limits.excess else "loss",
        "ticks": [[exactly(tick), place] for tick, place in zip(ticks, places, strict=True)],
        "colors": COLOR_MAP(np.linspace(0, 1, _COLORS), bytes=True)[:, :3].tolist(),
        "frames": [_frame(step, plane, limits) for step, plane in planes.items()],
    }


def _chosen(planes: Mapping[int, Slice]) -> dict[int, Slice]:
    """At most ``SURFACES`` planes, chosen by change if their points are as many."""
    steps, film = list(planes), list(planes.values())
    if len({plane.losses.shape for plane in film}) == 1:
        indices = by_change(film, SURFACES)
    else:
        indices = evenly(len(film), SURFACES)
    return {steps[index]: film[index] for index in indices}


def _frame(step: int, plane: Slice, limits: LossLimits) -> dict[str, Any]:
    rows, columns = (evenly(count, _POINTS) for count in plane.losses.shape)
    x, y = plane.coordinates
    return {
        "step": step,
        "text": f"Step {step}: {_losses_text(plane)}",
        "names": [shortened(name, 20) for name in direction_names(plane.metadata, 2)],
        "ends": [[number(axis[0]), number(axis[-1])] for axis in (x, y)],
        "x": _unit(x[columns], x),
        "y": _unit(y[rows], y),
        "heights": _heights(limits.values(plane)[np.ix_(rows, columns)], limits),
        "weights": _weights(plane, limits),
    }


def _losses_text(plane: Slice) -> str:
    losses = losses_of(plane)
    finite = losses[np.isfinite(losses)]
    text = f"loss {value_text(plane.center_loss)} at the weights"
    if not finite.size:
        return f"{text}, not finite anywhere"
    return f"{text}, {value_text(finite.min())} to {value_text(finite.max())} in the plane"


def _heights(values: Any, limits: LossLimits) -> list[list[float | None]]:
    known = np.isfinite(values)
    places = limits.color(np.where(known, values, limits.high)).round(3)
    return [
        [place if finite else None for place, finite in zip(*row, strict=True)]
        for row in zip(places.tolist(), known.tolist(), strict=True)
    ]


def _weights(plane: Slice, limits: LossLimits) -> list[float] | None:
    """The place of the weights in the box, ``None`` if it is not known or outside."""
    loss, inside = center_of(plane), all(axis[0] <= 0 <= axis[-1] for axis in plane.coordinates)
    if not (np.isfinite(loss) and inside):
        return None
    if limits.excess:
        loss -= float(np.nanmin(losses_of(plane), initial=loss))
    places = [_unit(np.zeros(1), axis)[0] for axis in plane.coordinates]
    return [*places, round(float(limits.color(loss)), 3)]


def _unit(coordinates: Any, axis: Any) -> list[float]:
    """The coordinates, rescaled so that the axis is from -1 to 1."""
    places = np.interp(coordinates, [axis[0], axis[-1]], [-1.0, 1.0])
    return places.round(5).tolist()  # type: ignore[no-any-return]
