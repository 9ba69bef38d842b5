"""The trajectory of the weights, and the plane that explains most of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import check_count, quoted, shown
from lightning_landscape.geometry.vectors import (
    Vector,
    check_vector,
    norm,
    real,
    to_double,
    working_dtype,
)

# Entries of each vector that are converted to double precision at a time.
_CHUNK = 2**18


class Trajectory:
    """Copies of the weights along a run, at most ``capacity`` for a run of any length.

    When it is full every second copy is dropped, and from then on half as many are taken: the
    copies are evenly spaced in steps, and a run of N steps takes about
    ``capacity * (1 + log2(N / capacity) / 2)`` of them.

    Args:
        capacity: maximum number of copies, each the size of the weights, in main memory.

    Attributes:
        steps: the step of each copy, in increasing order.
        weights: the copies, name -> tensor on the CPU.

    Example:
        >>> path = Trajectory(capacity=4)
        >>> for step in range(11):
        ...     path.add(step, {"w": torch.tensor([float(step)])})
        >>> path.steps
        [0, 4, 8]
    """

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = check_count("", "capacity", capacity, 4)
        self.steps: list[int] = []
        self.weights: list[dict[str, Tensor]] = []
        self._stride = 1

    def due(self, step: int) -> bool:
        """Whether :meth:`add` would store the weights of this step."""
        return not self.steps or step >= self.steps[-1] + self._stride

    def add(self, step: int, params: Vector) -> None:
        """Store a copy of the weights at ``step`` if it is due."""
        check_count("", "step", step, 0)
        check_vector("params", params)
        if not self.due(step):
            return
        if len(self.steps) == self.capacity:
            del self.steps[1::2], self.weights[1::2]
            self._stride *= 2
            if not self.due(step):
                return
        copy = {name: p.detach().to("cpu", copy=True) for name, p in params.items()}
        self.steps.append(step)
        self.weights.append(copy)


@dataclass(frozen=True)
class Projection:
    """The projection of a path onto the plane, or the line, of a slice.

    Attributes:
        coordinates: ``points x directions``, in units of the direction vectors; 0 is the centre.
        residuals: per point, its distance from the plane, in units of the weights.
        distances: per point, its distance from the centre.
        explained: per direction, the explained fraction of the path's variance, from 0 to 1; NaN if
            the weights never moved.
    """

    coordinates: Tensor
    residuals: Tensor
    distances: Tensor
    explained: Tensor


def pca_directions(path: Sequence[Vector], center: Vector, k: int = 2) -> list[dict[str, Tensor]]:
    r"""The ``k`` orthonormal directions along which the points of a path vary most.

    The leading principal components of the points, from their inner products, with signs such that
    they point from the start of the path towards ``center``.

    Args:
        path: the weights at some steps, name -> tensor.  A name that is missing at one step has the
            value of the next step that has it.  Points that are not finite are left out.
        center: the current weights; also a point of the path.
        k: number of directions.  Fewer are returned if the path spans fewer, up to the rounding of
            the weights: one for a straight line, none if the weights never moved.

    Returns:
        Directions on the CPU, most variance first.

    Cost: no gradient; the inner products of all points, in double precision.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, section 7.

    Example:
        >>> path = [{"w": x * torch.tensor([3.0, 4.0])} for x in (-2.0, -1.0, 1.0, 2.0)]
        >>> pca_directions(path, {"w": torch.zeros(2)}, k=1)[0]["w"].round(decimals=3)
        tensor([0.6000, 0.8000])
    """
    _check_path(path, center)
    check_count("", "k", k)
    products = _products(path, center, ())
    points = products.diagonal().isfinite().nonzero().flatten().tolist()
    if len(path) not in points:  # the centre
        return []
    chosen, products = [path[i] for i in points[:-1]], products[points][:, points]
    n = len(points)
    middle = torch.eye(n, dtype=torch.float64, device="cpu") - 1.0 / n
    values, vectors = torch.linalg.eigh(middle @ products @ middle)
    rounding = max(torch.finfo(working_dtype(t.dtype)).eps for t in center.values())
    floor = max(1e-12 * float(values[-1]), n * (rounding * norm(center)) ** 2)
    directions = []
    for index in range(n - 1, max(n - 1 - k, -1), -1):
        if not float(values[index]) > floor:
            break
        shares = middle @ vectors[:, index] / values[index].sqrt()
        away = float(products[0] @ shares)  # from the centre to the start, along the direction
        directions.append(_combined(chosen, center, shares if away <= 0.0 else -shares))
    return directions


def project(path: Sequence[Vector], center: Vector, directions: Sequence[Vector]) -> Projection:
    r"""Project the points of ``path`` onto the plane through ``center``.

    The coordinates minimize the distance ``||w_i - center - sum_k c_ik d_k||``, which is the
    residual.  ``explained[k]`` is the variance of ``c_k ||d_k||`` over the variance of the path,
    including the centre; for orthogonal directions they add up to at most 1.

    Args:
        path: the weights at some steps, see :func:`pca_directions`.  A point that is not finite has
            NaN coordinates.
        center: the current weights.
        directions: linearly independent directions.

    Cost: no gradient; a few inner products per point, in double precision.

    Example:
        >>> seen = project([{"w": torch.tensor([3.0, 4.0])}], {"w": torch.zeros(2)},
        ...                [{"w": torch.tensor([1.0, 0.0])}])
        >>> seen.coordinates.tolist(), seen.residuals.tolist(), seen.explained.tolist()
        ([[3.0]], [4.0], [0.36])
    """
    _check_path(path, center)
    if not isinstance(directions, (list, tuple)) or not directions:
        raise TypeError(
            f"{quoted('', 'directions', directions)}: expected a list of one or more directions"
        )
    for index, direction in enumerate(directions):
        check_vector(f"directions[{index}]", direction, center)
    products = _products(path, center, directions)
    n = len(path) + 1
    squares, gram = products.diagonal()[:n], products[n:, n:]
    along = products[:n, n:]
    try:
        coordinates = torch.linalg.solve(gram, along.T).T
    except RuntimeError as error:  # torch's LinAlgError is one
        raise ValueError(
            f"directions={shown([norm(d) for d in directions])} (their lengths) are linearly "
            f"dependent, or one is zero: expected independent ones"
        ) from error
    residuals = (squares - (coordinates * along).sum(1)).clamp_min(0.0).sqrt()
    finite = squares.isfinite()
    moves, seen = products[:n, :n][finite][:, finite], coordinates[finite]
    total = float(moves.diagonal().sum() - moves.sum() / len(moves)) if len(moves) else 0.0
    spread = ((seen - seen.mean(0)) * gram.diagonal().sqrt()).square().sum(0)
    share = spread / total if total > 0.0 else torch.full_like(spread, math.nan)
    return Projection(coordinates[:-1], residuals[:-1], squares[:-1].sqrt(), share)


def _check_path(path: object, center: object) -> None:
    check_vector("center", center)
    assert isinstance(center, Mapping)
    if not isinstance(path, Sequence) or isinstance(path, str):
        raise TypeError(
            f"{quoted('', 'path', path)}: expected a list of weights, e.g. Trajectory().weights"
        )
    for index, point in enumerate(path):
        known = (
            {n: t for n, t in point.items() if n in center} if isinstance(point, Mapping) else point
        )
        check_vector(f"path[{index}]", known, center)


def _products(path: Sequence[Vector], center: Vector, directions: Sequence[Vector]) -> Tensor:
    """Gram matrix of the points minus the centre, the centre minus itself, and the directions."""
    count = len(path) + 1 + len(directions)
    total = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for name, origin in center.items():
        middle = real(origin.detach().cpu()).flatten()
        points = [real(tensor).flatten() for tensor in _along(path, center, name)]
        others = [
            real(d[name].detach().cpu()).flatten() if name in d else torch.zeros_like(middle)
            for d in directions
        ]
        for begin in range(0, len(middle), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            here = middle[part].double()
            rows = [p[part].double() - here for p in (*points, middle)]
            block = torch.stack(rows + [d[part].double() for d in others])
            total += block @ block.T
    return total


def _along(path: Sequence[Vector], center: Vector, name: str) -> list[Tensor]:
    """One parameter along the path, on the CPU; a step without it has the value of the next."""
    found: list[Tensor] = []
    later = center[name]
    for point in reversed(path):
        later = point.get(name, later)
        found.append(later.detach().cpu())
    return found[::-1]


def _combined(path: Sequence[Vector], center: Vector, shares: Tensor) -> dict[str, Tensor]:
    """``sum_i shares_i (w_i - center)``."""
    combined = {}
    for name, origin in center.items():
        middle = to_double(origin.detach().cpu())
        total = torch.zeros_like(middle)
        for point, share in zip(_along(path, center, name), shares.tolist(), strict=False):
            total.add_(to_double(point) - middle, alpha=share)
        combined[name] = total.to(working_dtype(origin.dtype))
    return combined
