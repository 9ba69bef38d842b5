"""Validation of slices, and choices among them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# Relative differences of losses below this are float32 rounding.
ROUNDING = 1e-6
# Far beyond float32; matplotlib's axis arithmetic overflows not far above.
HUGE = 1e100


def check_slice(call: str, slice: Slice, axes: int | None = None) -> None:
    """Raises unless ``slice`` is a slice with the given number of coordinate axes."""
    if not all(hasattr(slice, name) for name in ("coordinates", "losses", "center_loss")):
        maker = "line_slice" if axes == 1 else "plane_slice"
        raise TypeError(f"{call}: got {slice!r:.80}; expected a Slice, as {maker} returns")
    if axes is None:
        return
    if len(slice.coordinates) != axes:
        other = "plane_figure" if axes == 1 else "line_figure"
        raise ValueError(
            f"{call}: got a slice with {len(slice.coordinates)} coordinate axes, expected {axes}; "
            f"pass it to {other} instead"
        )
    shape = tuple(len(axis) for axis in reversed(slice.coordinates))
    if np.shape(slice.losses) != shape or 0 in shape:
        raise ValueError(
            f"{call}: got losses of shape {np.shape(slice.losses)} on coordinates that make "
            f"{shape}; pass one loss a point, at least one point, rows along y"
        )
    for axis in slice.coordinates:
        if not (np.isfinite(axis).all() and (np.diff(axis) > 0).all()):
            raise ValueError(
                f"{call}: got coordinates {np.array2string(np.asarray(axis), threshold=6)}; pass "
                "finite ones in rising order"
            )


def losses_of(slice: Slice) -> NDArray[Any]:
    """Returns the losses as float64, nan where not finite or too large for a chart."""
    losses = np.asarray(slice.losses, dtype=np.float64)
    return np.where(np.abs(losses) < HUGE, losses, np.nan)


def center_of(slice: Slice) -> float:
    """Returns the loss at the weights, nan where it is not finite or too large for a chart."""
    center = float(slice.center_loss)
    return center if abs(center) < HUGE else math.nan


def validation_of(slice: Slice) -> Slice | None:
    """Returns the validation loss on the points of a slice, None if it was not measured.

    Raises:
        ValueError: if there is not one loss per point.
    """
    known = slice.metadata.get("validation")
    if not known:
        return None
    return dataclasses.replace(
        slice,
        losses=np.asarray(known["losses"], dtype=np.float64),
        center_loss=float(known["center_loss"]),
        metadata={key: known[key] for key in ("probe_samples", "probe_mode") if key in known},
    )


def nonzero_magnitudes(difference: NDArray[Any]) -> NDArray[Any]:
    """Returns the absolute values of the finite nonzero differences, as a flat array."""
    size: NDArray[Any] = np.abs(difference[np.isfinite(difference)])
    return size[size > 0]


def evenly(count: int, most: int) -> list[int]:
    """Returns at most ``most`` evenly spaced indices of ``range(count)``, including both ends.

    Example:
        >>> evenly(10, 4), evenly(3, 9), evenly(5, 1)
        ([0, 3, 6, 9], [0, 1, 2], [4])
    """
    if most == 1:
        return list(range(count))[-1:]
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def by_change(film: Sequence[Slice], most: int) -> list[int]:
    """Returns at most ``most`` indices of a film, after equal shares of its total change.

    The change between two neighbours is the mean absolute difference of their losses, on a
    logarithmic scale if all losses are positive.  Both ends are included.
    """
    if len(film) <= most or most < 2:
        return evenly(len(film), most)
    losses = np.stack([losses_of(slice) for slice in film]).reshape(len(film), -1)
    if np.nanmin(losses, initial=1.0) > 0:
        losses = np.log(losses)
    steps = np.abs(np.diff(losses, axis=0))
    known = np.isfinite(steps)
    changes = np.where(known, steps, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    total = np.concatenate([[0.0], changes.cumsum()])
    if not total[-1] > 0:
        return evenly(len(film), most)
    chosen = [0]
    for share in range(1, most - 1):
        nearest = int(np.abs(total - total[-1] * share / (most - 1)).argmin())
        # Each at least one further, and enough left for the others.
        chosen.append(int(np.clip(nearest, chosen[-1] + 1, len(film) - most + share)))
    return [*chosen, len(film) - 1]
