"""The loss between two or three sets of weights, and the loss barrier (mode connectivity)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_mapping,
    check_metadata,
    check_number,
    check_objective,
    quoted,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.slices import Slice, losses_with_progress, plane_slice
from lightning_landscape.geometry.vectors import Vector, inner, norm, scaled, working_dtype


def line_between(
    objective: Objective,
    start: Vector,
    end: Vector | None = None,
    resolution: int = 21,
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Slice:
    r"""The loss on the line segment ``w(t) = (1 - t) start + t end``, t from 0 to 1.

    Args:
        objective: the loss.
        start: weights, name -> tensor; a full state dict is accepted.
        end: the other end; ``None``: the current weights of the objective.
        resolution: number of points, at least 2, including both ends.
        metadata: stored in the result, next to ``norms``, the distance between the ends.
        progress: show a progress bar on a terminal if the computation takes long.

    Returns:
        A line whose coordinate is ``t - 1``: -1 at ``start``, 0 at ``end``.

    Raises:
        ValueError: a parameter is missing, or has another shape.

    Cost: one forward per point.  The weights are restored bit for bit.

    Source: Goodfellow et al., Qualitatively characterizing neural network optimization problems,
    ICLR 2015.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> loss = Objective(lambda: ((w**2 - 1) ** 2).sum(), {"w": w})
        >>> line_between(loss, {"w": -torch.ones(1)}, resolution=3).losses.tolist()
        [0.0, 1.0, 0.0]
    """
    check_objective(objective, "params", "losses_at")
    check_count("", "resolution", resolution, 2)
    check_metadata(metadata)
    from_start = displacement_to(objective, start, "start")
    x = np.linspace(-1.0, 0.0, resolution)
    points: list[tuple[float, ...]]
    if end is None:
        center = float(objective.loss())
        moves, points = [from_start], [(float(-a),) for a in x[:-1]]
        length = norm(from_start)
    else:
        from_end = displacement_to(objective, end, "end")
        moves, points = [from_start, from_end], [(float(-a), float(1 + a)) for a in x]
        length = norm({name: from_end[name] - from_start[name] for name in from_end})
    losses = losses_with_progress(objective, moves, points, progress).tolist()
    if end is None:
        losses.append(center)
    facts = {"norms": [length]}
    return Slice((x,), np.array(losses), losses[-1], {**facts, **(metadata or {})})


def loss_barrier(line: Slice, ends: Literal["linear", "mean"] = "linear") -> float:
    r"""How far the loss on a line rises above its two ends.

    Args:
        line: a slice with one axis, its first and last point the ends (t = 0 and t = 1).
        ends: ``"linear"``: ``max_t L(t) - ((1 - t) L(0) + t L(1))`` (Entezari et al. 2022), never
            below 0; ``"mean"``: ``max_t L(t) - (L(0) + L(1)) / 2`` (Frankle et al. 2020).

    Returns:
        The barrier in units of the loss.  Infinite if a loss on the line is infinite; NaN if one is
        NaN or the loss at an end is not finite.

    Raises:
        ValueError: the slice is a plane.

    Source: Entezari et al., The role of permutation invariance in linear mode connectivity of
    neural networks, ICLR 2022; Frankle et al., Linear mode connectivity and the lottery ticket
    hypothesis, ICML 2020.
    """
    if not isinstance(line, Slice):
        raise TypeError(f"{quoted('', 'line', line)}: expected a Slice, as line_between returns")
    if len(line.coordinates) != 1:
        raise ValueError("line has two axes: expected a slice with one, as line_between returns")
    if len(line.losses) < 2:
        raise ValueError(
            f"line has {len(line.losses)} points: expected at least 2, as line_between returns"
        )
    check_choice("", "ends", ends, ("linear", "mean"))
    x, losses = line.coordinates[0], line.losses
    first, last = float(losses[0]), float(losses[-1])
    if not np.isfinite([first, last]).all():
        return float("nan")
    t = (x - x[0]) / (x[-1] - x[0])
    below = (1 - t) * first + t * last if ends == "linear" else (first + last) / 2
    height = losses - below
    if ends == "linear":
        height[[0, -1]] = 0.0  # exactly, without rounding
    return float(height.max())


class NoPlane(ValueError):
    """The three points lie on one line and span no plane."""


def plane_through(
    objective: Objective,
    second: Vector,
    third: Vector,
    *,
    resolution: int = 15,
    margin: float = 0.25,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Slice:
    r"""The loss on the plane through the current weights and two other points.

    The directions are orthonormal (Gram-Schmidt): x points from the current weights to ``second``,
    y is the part of ``third`` orthogonal to x.  Coordinates are distances in weight space.

    Args:
        objective: the loss.
        second: weights, name -> tensor; a full state dict is accepted.
        third: weights, as ``second``.
        resolution: points along each axis, at least 2.
        margin: how far the plane extends beyond the three points, as a fraction of their extent.
        metadata: stored in the result; ``points`` holds ``name``, ``x`` and ``y`` of the three.
        progress: show a progress bar on a terminal if the computation takes long.

    Raises:
        ValueError: an argument is out of range; a parameter is missing or has another shape.
        NoPlane: the three points lie on one line (two equal points do); a ``ValueError``.

    Cost: one forward per point.  The weights are restored bit for bit.

    Source: Garipov et al., Loss surfaces, mode connectivity, and fast ensembling of DNNs,
    NeurIPS 2018, section 3.
    """
    check_objective(objective, "params", "losses_at")
    check_number("", "margin", margin, "a finite number >= 0", lambda x: 0.0 <= x < np.inf)
    check_count("", "resolution", resolution, 2)
    check_metadata(metadata)
    u = displacement_to(objective, second, "second")
    v = displacement_to(objective, third, "third")
    width = norm(u)
    # The orthogonal part of a point on the line is the rounding error of its weights.
    eps = max(torch.finfo(p.dtype).eps for p in objective.params.values())
    size = norm({name: p.detach() for name, p in objective.params.items()}) + norm(v)
    rounding = 4 * eps * size
    along, across = 0.0, dict(v)
    if width > rounding:
        u = scaled(u, 1 / width)
        along = inner(v, u)
        across = {name: v[name] - along * u[name] for name in v}
    height = norm(across)
    if not (width > rounding and height > rounding):
        raise NoPlane(
            f"second and third lie on one line with the current weights (at distances {width:.3g} "
            f"and {norm(v):.3g}): expected three points that span a plane"
        )
    corners = {"weights": (0.0, 0.0), "second": (width, 0.0), "third": (along, height)}
    spans = []
    for places in zip(*corners.values(), strict=True):
        beyond = margin * (max(places) - min(places))
        spans.append((min(places) - beyond, max(places) + beyond))
    return plane_slice(
        objective,
        u,
        scaled(across, 1 / height),
        (spans[0], spans[1]),
        resolution,
        metadata={
            "points": [{"name": name, "x": x, "y": y} for name, (x, y) in corners.items()],
            **(metadata or {}),
        },
        progress=progress,
    )


def displacement_to(objective: Objective, weights: Vector, argument: str) -> dict[str, Tensor]:
    """``weights`` minus the current weights, over the objective's parameters."""
    moves = {}
    for name, there in select_weights(argument, weights, objective.params).items():
        now = objective.params[name].detach()
        wide = working_dtype(now.dtype)
        moves[name] = there.detach().to(now.device, wide) - now.to(wide)
    return moves


def select_weights(argument: str, weights: Vector, params: Vector) -> dict[str, Tensor]:
    """The entries of ``weights`` that belong to ``params``.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    check_mapping(
        "", argument, weights, "a mapping from parameter name to tensor, e.g. a state dict"
    )
    missing = [name for name in params if not isinstance(weights.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"{argument} holds no parameter {_few(missing)}: expected all that are measured, it "
            f"has {_few(list(weights))}"
        )
    for name, parameter in params.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {tuple(weights[name].shape)}: expected "
                f"{tuple(parameter.shape)}"
            )
    return {name: weights[name] for name in params}


def _few(names: list[str]) -> str:
    first = ", ".join(map(repr, names[:4])) or "nothing"
    return f"{first} and {len(names) - 4} more" if len(names) > 4 else first
