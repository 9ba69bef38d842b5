"""Projected gradient ascent of the loss within a ball or a box around the weights."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import Layout, random_vector

Norm = Literal["l2", "linf"]

# In units of the radius: the ascent ends at shorter moves, and no step is made longer before it is
# cut to the ball.
_SMALLEST_MOVE, _LONGEST_STEP = 1e-6, 1e6


def largest_rise(
    objective: Objective, scale: Tensor, radius: float, norm: Norm, steps: int
) -> tuple[float, Tensor]:
    r"""The largest ``L(w + d) - L(w)`` found with ``||d / scale|| <= radius``, and ``d``.

    Climbs from the corner or the point of the sphere that the gradient at ``w`` points to, which
    is what one step of SAM reaches; where that is no rise, from ``w`` itself too.

    Args:
        objective: the loss.
        scale: ``(size,)``, at least 0: the unit of each entry of ``d``.
        radius: of the ball, in that unit.
        norm: ``"l2"`` a ball, ``"linf"`` a box.
        steps: points tried from each start, the first one included.

    Returns:
        The rise, never below 0, and ``d`` of shape ``(size,)``; NaN and 0 where the loss or its
        gradient at ``w`` is not finite.
    """
    ascent = _Ascent(objective, scale, radius, norm)
    origin = torch.zeros_like(scale)
    gradient = scale * ascent.layout.flatten(objective.gradient())
    if not math.isfinite(ascent.base) or not bool(gradient.isfinite().all()):
        return math.nan, origin
    stationary = not bool(gradient.any())
    if stationary:  # any direction will do to get away
        gradient = ascent.layout.flatten(random_vector(objective.params, 0))
    unit = gradient.sign() if norm == "linf" else gradient / torch.linalg.vector_norm(gradient)
    first = radius * unit
    height = ascent.rise(first)
    ends = [(0.0, origin)]
    if not math.isnan(height):
        ends.append(ascent.climb(first, height, 2 * radius, steps - 1))
    if not height > 0.0 and not stationary:
        ends.append(ascent.climb(origin, 0.0, radius / 2, steps - 1))
    height, u = max(ends, key=itemgetter(0))
    return height, scale * u


class _Ascent:
    """The rise of the loss as a function of ``u = d / scale`` in a ball."""

    def __init__(self, objective: Objective, scale: Tensor, radius: float, norm: Norm) -> None:
        self.layout = Layout(objective.params)
        self.base = float(objective.loss())
        self._objective = objective
        self._scale = scale
        self._radius = radius
        self._norm = norm

    def rise(self, u: Tensor) -> float:
        return float(self._objective.loss_at(self.layout.unflatten(self._scale * u))) - self.base

    def slope(self, u: Tensor) -> Tensor:
        gradient = self._objective.gradient_at(self.layout.unflatten(self._scale * u))
        return self._scale * self.layout.flatten(gradient)

    def nearest(self, u: Tensor) -> Tensor:
        """The point of the ball next to ``u``."""
        if self._norm == "linf":
            return u.clamp(-self._radius, self._radius)
        length = float(torch.linalg.vector_norm(u))
        return u * (self._radius / length) if length > self._radius else u

    def climb(self, u: Tensor, height: float, reach: float, tries: int) -> tuple[float, Tensor]:
        """Uphill from ``u``, always higher, with a first step of length ``reach``.

        Where the loss bends up along the last move the steps grow: on the sphere long ones are
        power iteration on the gradient, the fastest way round a bowl.  Where it bends down they
        have the length of Barzilai & Borwein (1988), which keeps clear of zigzagging.
        """
        gradient: Tensor | None = None
        move, step = torch.zeros_like(u), 0.0
        for _ in range(tries):
            if gradient is None or bool(move.any()):  # at a new point
                last, gradient = gradient, self.slope(u)
                size = float(torch.linalg.vector_norm(gradient))
                if not 0.0 < size < math.inf:
                    break
                step = reach / size if last is None else self._next(step, move, gradient - last)
                step = min(step, _LONGEST_STEP * self._radius / size)
            candidate = self.nearest(u + step * gradient)
            move = candidate - u
            if not float(torch.linalg.vector_norm(move)) > _SMALLEST_MOVE * self._radius:
                break
            found = self.rise(candidate)
            if found > height:
                u, height = candidate, found
            else:  # NaN too
                move, step = torch.zeros_like(u), step / 4
        return height, u

    @staticmethod
    def _next(step: float, move: Tensor, change: Tensor) -> float:
        """The step after one that went ``move`` and changed the gradient by ``change``."""
        bend = float(move @ change)
        return float(move @ move) / -bend if bend < 0.0 else 4 * step
