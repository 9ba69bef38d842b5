"""The loss on a line or a plane through the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_landscape.geometry.archive import load_arrays
from lightning_landscape.geometry.checks import (
    check_count,
    check_flags,
    check_mapping,
    check_metadata,
    check_number,
    check_objective,
    check_path,
    check_span,
    quoted,
    shown,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.progress import progress_bar
from lightning_landscape.geometry.vectors import Vector, check_vector, inner, norm

Span = tuple[float, float]


@dataclass(frozen=True)
class Slice:
    """Losses on a grid around the weights.

    Attributes:
        coordinates: ``(x,)`` for a line, ``(x, y)`` for a plane; float64, in units of the
            direction vectors.  The weights are at 0.
        losses: ``(len(x),)`` for a line, ``(len(y), len(x))`` for a plane, with rows along y.
        center_loss: the loss at the weights.
        metadata: origin of the slice, plain values only; ``norms`` holds the Euclidean length of
            each direction, ``cosine`` the cosine between the two.
    """

    coordinates: tuple[NDArray[np.float64], ...]
    losses: NDArray[np.float64]
    center_loss: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes = self.coordinates if isinstance(self.coordinates, (tuple, list)) else (None,)
        arrays = (*axes, self.losses)
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise TypeError(
                f"Slice(coordinates={shown(self.coordinates)}, losses={shown(self.losses)}): "
                f"expected a tuple of one or two numpy arrays, and an array of losses"
            )
        check_number("Slice", "center_loss", self.center_loss, "a number", lambda _: True)
        check_mapping("Slice", "metadata", self.metadata, "a mapping of plain values")
        expected = tuple(len(axis) for axis in reversed(self.coordinates))
        flat = all(axis.ndim == 1 for axis in self.coordinates)
        if len(self.coordinates) not in (1, 2) or self.losses.shape != expected or not flat:
            raise ValueError(
                f"losses have shape {self.losses.shape} on coordinates of lengths "
                f"{[len(axis) for axis in self.coordinates]}: expected "
                f"(len(x),) for a line or (len(y), len(x)) for a plane"
            )

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` file that :meth:`load` (and plain ``numpy.load``) reads."""
        check_path("", "path", path, "the path of a file, e.g. 'line.npz'")
        axes = dict(zip("xy", self.coordinates, strict=False))
        metadata = np.array(json.dumps(self.metadata))
        with open(path, "wb") as file:  # numpy would append ".npz" to a name
            np.savez_compressed(
                file,
                allow_pickle=False,
                losses=self.losses,
                center_loss=np.float64(self.center_loss),
                metadata=metadata,
                **axes,
            )

    @classmethod
    def load(cls, path: str | Path) -> Slice:
        """Read a file written by :meth:`save`.  Nothing is unpickled.

        Raises:
            ValueError: the file is not a slice.
        """
        check_path("", "path", path, "the path of a file that Slice.save wrote")
        try:
            file = load_arrays(path)
            axes = tuple(file[name].astype(np.float64) for name in "xy" if name in file)
            metadata = json.loads(str(file["metadata"]))
            if not isinstance(metadata, dict):
                raise ValueError(f"its metadata is a {type(metadata).__name__}")
            losses = file["losses"].astype(np.float64)
            return cls(axes, losses, float(file["center_loss"]), metadata)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"path={str(path)!r}: no such file; expected one that Slice.save wrote"
            ) from error
        except Exception as error:  # a damaged archive raises any of a dozen types
            raise ValueError(
                f"path={str(path)!r}: not a saved Slice ({error}); expected what Slice.save wrote"
            ) from error


def line_slice(
    objective: Objective,
    direction: Vector,
    span: Span = (-1.0, 1.0),
    resolution: int = 21,
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Slice:
    r"""``L(w + x d)`` for ``resolution`` values of x, evenly spaced over ``span``.

    Args:
        objective: the loss.
        direction: ``d``; its length sets the unit of the axis.
        span: the first and the last x.
        resolution: number of points, at least 2; with an odd number and a symmetric span one of
            them is at the weights.
        metadata: stored in the result.
        progress: show a progress bar on a terminal if the computation takes long.

    Cost: one forward per point.  The weights are restored bit for bit.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> loss = Objective(lambda: (w**2).sum() / 2, {"w": w})
        >>> line_slice(loss, {"w": torch.tensor([1.0, 0.0])}, resolution=3).losses.tolist()
        [0.5, 0.0, 0.5]
    """
    check_objective(objective, "params", "losses_at")
    check_vector("direction", direction, objective.params)
    check_metadata(metadata)
    x = _axis(span, resolution)
    center = float(objective.loss())
    losses = _losses(objective, [direction], [(float(a),) for a in x], center, progress)
    facts = {"norms": [norm(direction)]}
    return Slice((x,), losses, center, {**facts, **(metadata or {})})


def lowest_point(line: Slice) -> tuple[float, bool]:
    """The coordinate of the minimum of a line, and whether it is inside and not at an end.

    That of the parabola through the lowest point and its neighbours.  NaN and ``False`` if no loss
    is finite.
    """
    x = line.coordinates[0]
    losses = np.where(np.isfinite(line.losses), line.losses, np.inf)
    index = int(losses.argmin())
    if not np.isfinite(losses[index]):
        return float("nan"), False
    if index in (0, len(x) - 1):
        return float(x[index]), False
    left, right = float(x[index] - x[index - 1]), float(x[index + 1] - x[index])
    up, down = (float(losses[index + i] - losses[index]) for i in (-1, 1))
    # The parabola's slope at the point and half its curvature, times left * right * (left + right).
    slope, bend = down * left**2 - up * right**2, down * left + up * right
    if not (np.isfinite(slope) and bend > 0):  # next to a non-finite loss, or on a plateau
        return float(x[index]), True
    return float(x[index] - slope / (2 * bend)), True


def plane_slice(
    objective: Objective,
    direction_x: Vector,
    direction_y: Vector,
    span: Span | tuple[Span, Span] = (-1.0, 1.0),
    resolution: int | Sequence[int] = 15,
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Slice:
    r"""``L(w + x d_x + y d_y)`` on a grid.

    Args:
        objective: the loss.
        direction_x: ``d_x``, the horizontal axis.
        direction_y: ``d_y``, the vertical axis.
        span: ``(first, last)`` for both axes, or ``((x0, x1), (y0, y1))``.
        resolution: points along both axes, or ``(along x, along y)``.
        metadata: stored in the result.
        progress: show a progress bar on a terminal if the computation takes long.

    Cost: one forward per point.  The weights are restored bit for bit.
    """
    check_objective(objective, "params", "losses_at")
    check_vector("direction_x", direction_x, objective.params)
    check_vector("direction_y", direction_y, objective.params)
    check_metadata(metadata)
    pairs = _is_pair(span) and _is_pair(span[0])
    span_x, span_y = cast("tuple[Span, Span]", span if pairs else (span, span))
    listed = isinstance(resolution, Sequence) and not isinstance(resolution, str)
    sizes = cast("Sequence[int]", resolution if listed else (resolution, resolution))
    if len(sizes) != 2:
        raise ValueError(
            f"{quoted('', 'resolution', resolution)}: expected one integer >= 2, or two for x and y"
        )
    x, y = _axis(span_x, sizes[0]), _axis(span_y, sizes[1])
    center = float(objective.loss())
    grid = [(float(a), float(b)) for a in x for b in y]  # y varies fastest
    losses = _losses(objective, [direction_x, direction_y], grid, center, progress)
    lengths = [norm(direction_x), norm(direction_y)]
    product = lengths[0] * lengths[1]
    facts = {
        "norms": lengths,
        "cosine": inner(direction_x, direction_y) / product if product else 0.0,
    }
    return Slice((x, y), losses.reshape(len(x), len(y)).T, center, {**facts, **(metadata or {})})


def _losses(
    objective: Objective,
    directions: Sequence[Vector],
    points: Sequence[tuple[float, ...]],
    center: float,
    progress: bool,
) -> NDArray[np.float64]:
    """The losses at ``points``; ``center`` is the one at the weights."""
    elsewhere = [point for point in points if any(point)]
    measured = iter(losses_with_progress(objective, directions, elsewhere, progress).tolist())
    return np.array([next(measured) if any(point) else center for point in points])


def losses_with_progress(
    objective: Objective,
    directions: Sequence[Vector],
    points: Sequence[tuple[float, ...]],
    progress: bool,
) -> Tensor:
    """``objective.losses_at``, with a progress bar."""
    check_flags("", progress=progress)
    if not (progress and points):
        return objective.losses_at(directions, points)
    before = objective.forwards
    with progress_bar(len(points), lambda: objective.forwards - before, show=True):
        return objective.losses_at(directions, points)


def _is_pair(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _axis(span: Span, size: int) -> NDArray[np.float64]:
    check_span("", "span", span)
    check_count("", "resolution", size, 2)
    axis = np.linspace(float(span[0]), float(span[1]), size)
    # With a symmetric span and an odd resolution one point is exactly at the weights.
    axis[np.abs(axis) < 1e-12 * (span[1] - span[0])] = 0.0
    return axis
