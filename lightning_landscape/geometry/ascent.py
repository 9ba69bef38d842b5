"""The largest rise of the loss within a ball or a box around the weights, from several starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import Layout, Vector, random_vector

Norm = Literal["l2", "linf"]

# In units of the radius: the ascent stops at shorter moves, and no step is longer before it is
# projected onto the ball.
_SMALLEST_MOVE, _LONGEST_STEP = 1e-6, 1e6

# With fewer steps than this the ascent starts from the gradient only.
_FEWEST_STEPS = 5
# Per step: gradients in total, and Hessian-vector products, each of which counts as two gradients.
_GRADIENTS, _PRODUCTS = 4, 0.4
# Gradients spent on each start before the best one is continued.
_WALK = 6
# No further start is tried once this many led to the best point.
_ENOUGH = 3
# Two starts led to the same point if their rises and their directions (cosine) agree.
_SAME_RISE, _SAME_PLACE = 0.02, 0.8
# Tolerances of a settled rise, see Rise.
_AT_REST, _OFF_PARABOLA, _OF_SECOND_ORDER = 0.02, 1 / 3, 2.0


@dataclass(frozen=True)
class Rise:
    """A rise of the loss within a ball.

    Attributes:
        height: ``L(w + d) - L(w)``, never below 0.
        move: ``d``, of shape ``(size,)``.
        settled: a longer search is not expected to find 3 % more, because

            - a linear model at ``d`` gains at most 2 % within the ball;
            - two starts led here;
            - the loss is close to its second-order model at ``w``: along ``d`` its slope at ``d``
              is, to within a third, that of the parabola given by the gradient at ``w`` and this
              rise, and the rise is at most twice ``g'd + lambda ||d||^2 / 2`` with the top
              eigenvalue ``lambda`` of the Hessian at ``w``.
    """

    height: float
    move: Tensor
    settled: bool


@dataclass(frozen=True)
class Endpoint:
    """The point that the ascent from a start reached, and its rise."""

    height: float
    u: Tensor


def largest_rise(
    objective: Objective, scale: Tensor, radius: float, norm: Norm, steps: int
) -> Rise:
    r"""The largest ``L(w + d) - L(w)`` found with ``||d / scale|| <= radius``.

    The ascent starts from the points of the sphere, or the corners of the box, along the gradient
    at ``w`` (where a step of SAM ends), along the two top eigenvectors of the Hessian with both
    signs, and along random vectors.  It continues monotonically from the best point reached, and
    also from ``w`` if SAM's step does not raise the loss.

    Args:
        objective: the loss.
        scale: ``(size,)``, at least 0: the unit of each entry of ``d``.
        radius: of the ball, in that unit.
        norm: ``"l2"`` a ball, ``"linf"`` a box.
        steps: maximum number of points of the last ascent.  Below 5 it starts from the gradient
            only, and the result is not settled.

    Returns:
        A :class:`Rise`; height NaN and move 0 if the loss or its gradient at ``w`` is not finite.
    """
    ascent = Ascent(objective, scale, radius, norm)
    origin = Endpoint(0.0, torch.zeros_like(scale))
    if not math.isfinite(ascent.base) or not bool(ascent.gradient.isfinite().all()):
        return Rise(math.nan, origin.u, False)
    # Products first, because moving the weights drops the graph that they use.
    top = ascent.top(int(_PRODUCTS * steps)) if steps >= _FEWEST_STEPS else None
    stationary = not bool(ascent.gradient.any())
    first = ascent.ball_maximizer(ascent.random(0) if stationary else ascent.gradient)
    step = Endpoint(ascent.rise(first), first)
    falls = not step.height > 0.0
    found, tries, most = [], steps - 1, _GRADIENTS * steps
    if top is not None:
        found = ascent.explore(first, top, most - (steps if falls else steps // 4))
    ends = [*found, step] if not math.isnan(step.height) else found
    if falls and not stationary:
        ends = [*ends, ascent.climb(origin, radius / 2, tries)]
    if ends:
        if top is not None:
            tries = min(tries, most - ascent.gradients - 1)  # one to test for settled
        ends = [ascent.climb(_highest(ends), 2 * radius, tries)]
    best = _highest([*ends, origin])
    settled = (
        top is not None
        and len(_at_best(found)) >= 2
        and ascent.settled(best, float(top.eigenvalues[0]))
    )
    return Rise(best.height, scale * best.u, settled)


def _highest(ends: Sequence[Endpoint]) -> Endpoint:
    return max(ends, key=attrgetter("height"))


def _at_best(ends: list[Endpoint]) -> list[Endpoint]:
    """The ends at the point of the largest rise."""
    if not ends:
        return []
    best = _highest(ends)
    length = torch.linalg.vector_norm(best.u)
    return [
        end
        for end in ends
        if end.height >= (1 - _SAME_RISE) * best.height
        and float(end.u @ best.u) > _SAME_PLACE * float(length * torch.linalg.vector_norm(end.u))
    ]


class _Scaled:
    """The Hessian in units of ``scale``: ``diag(scale) H diag(scale)``."""

    def __init__(self, objective: Objective, scale: Tensor, layout: Layout) -> None:
        self.params = objective.params
        self._objective, self._scale, self._layout = objective, scale, layout

    def hvp(self, vector: Vector) -> dict[str, Tensor]:
        scaled = self._layout.unflatten(self._scale * self._layout.flatten(vector))
        image = self._layout.flatten(self._objective.hvp(scaled))
        return self._layout.unflatten(self._scale * image)


class Ascent:
    """The rise of the loss as a function of ``u = d / scale`` in a ball.

    Attributes:
        base: the loss at the weights.
        gradient: at the weights, with respect to ``u``.
        gradients: number of gradients so far; a Hessian-vector product counts as two.
    """

    def __init__(self, objective: Objective, scale: Tensor, radius: float, norm: Norm) -> None:
        self._objective = objective
        self._scale = scale
        self._radius = radius
        self._norm = norm
        self._layout = Layout(objective.params)
        self.base = float(objective.loss())
        gradient = objective.gradient(products_follow=True)
        self.gradient = scale * self._layout.flatten(gradient)
        self.gradients = 1

    def rise(self, u: Tensor) -> float:
        moved = self._layout.unflatten(self._scale * u)
        return float(self._objective.loss_at(moved)) - self.base

    def slope(self, u: Tensor) -> Tensor:
        self.gradients += 1
        gradient = self._objective.gradient_at(self._layout.unflatten(self._scale * u))
        return self._scale * self._layout.flatten(gradient)

    def random(self, seed: int) -> Tensor:
        return self._layout.flatten(random_vector(self._objective.params, seed))

    def top(self, products: int) -> EigenResult:
        """The two top eigenvalues of the Hessian with respect to ``u``."""
        hessian = _Scaled(self._objective, self._scale, self._layout)
        found = top_eigenvalues(hessian, min(2, self._layout.size), max_hvps=products)
        self.gradients += 2 * found.hvps
        return found

    def nearest(self, u: Tensor) -> Tensor:
        """The projection of ``u`` onto the ball."""
        if self._norm == "linf":
            return u.clamp(-self._radius, self._radius)
        length = float(torch.linalg.vector_norm(u))
        return u * (self._radius / length) if length > self._radius else u

    def ball_maximizer(self, slope: Tensor, sharpness: float = math.inf) -> Tensor:
        """The point of the ball that maximizes the linear function with gradient ``slope``.

        In a box it is a corner; with a finite ``sharpness`` entries of small slope stay inside.
        """
        if self._norm == "l2":
            return slope * (self._radius / float(torch.linalg.vector_norm(slope) or 1.0))
        if math.isinf(sharpness):
            return self._radius * slope.sign()
        size = float(slope.square().mean().sqrt()) or 1.0
        return self._radius * torch.tanh(sharpness / size * slope)

    def linear_gain(self, u: Tensor, slope: Tensor) -> float:
        """The further gain within the ball if the loss were linear around ``u``."""
        dual = slope.abs().sum() if self._norm == "linf" else torch.linalg.vector_norm(slope)
        return self._radius * float(dual) - float(slope @ u)

    def settled(self, end: Endpoint, top: float) -> bool:
        """Whether ``end`` is a maximum, and the loss is close to its second-order model."""
        if not 0.0 < end.height < math.inf:
            return end.height == math.inf
        slope = self.slope(end.u)
        linear, along = float(self.gradient @ end.u), float(slope @ end.u)
        parabola = 2 * end.height - linear  # its slope at the end
        bound = linear + top * float(end.u @ end.u) / 2
        return (
            self.linear_gain(end.u, slope) <= _AT_REST * end.height
            and abs(along - parabola) <= _OFF_PARABOLA * abs(along)
            and end.height <= _OF_SECOND_ORDER * bound
        )

    def explore(self, first: Tensor, top: EigenResult, most: int) -> list[Endpoint]:
        """The ends of all starts, until enough led to the best point or ``most`` gradients."""
        ends: list[Endpoint] = []
        for index, start in enumerate(self._starts(first, top)):
            if index > 0 and self.gradients + _WALK > most:
                break
            u = self._walk(start)
            height = self.rise(u)
            if not math.isnan(height):
                ends.append(Endpoint(height, u))
            highest = max((end.height for end in ends), default=0.0)
            ends = [end for end in ends if end.height >= (1 - _SAME_RISE) * highest]
            if index >= 2 and len(_at_best(ends)) >= _ENOUGH:
                break
        return ends

    def _starts(self, first: Tensor, top: EigenResult) -> Iterator[Tensor]:
        yield first
        for index, vector in enumerate(top.eigenvectors):
            v = self._layout.flatten(vector)
            if bool(v.isfinite().all()):
                yield self.ball_maximizer(v)
                yield self.ball_maximizer(-v)
            if index == 0:
                yield self.ball_maximizer(self.random(1))
        for seed in count(2):
            yield self.ball_maximizer(self.random(seed))

    def _walk(self, u: Tensor) -> Tensor:
        """Repeatedly move to the maximizer of the linear model at the current point.

        In a ball this is power iteration on the gradient.  In a box almost every corner would be a
        fixed point, so entries of small slope move to the sides gradually (annealing).
        """
        last = self.gradients + _WALK
        slope, turned = self.slope(u), False
        for index in range(_WALK - 1):
            trapezium = abs(float((self.gradient + slope) @ u)) / 2
            if not self.linear_gain(u, slope) > _AT_REST / 4 * trapezium:  # NaN too
                return u
            if self.gradients >= last:
                break
            target = self.ball_maximizer(slope, 10 ** (index / (_WALK - 2)))
            ahead = self.slope(target)
            before, after = float(slope @ (target - u)), float(ahead @ (target - u))
            if after < -1e-3 * before < 0.0 and self.gradients < last:
                # The target is beyond the maximum along a concave line.
                turned = True
                target = u + (target - u) * (before / (before - after))
                ahead = self.slope(target)
            u, slope = target, ahead
        return u if turned else self.ball_maximizer(slope)

    def climb(self, start: Endpoint, reach: float, tries: int) -> Endpoint:
        """Monotone projected ascent from ``start``, with a first step of length ``reach``.

        If the loss is convex along the last move the step grows: on the sphere long steps are
        power iteration on the gradient.  If it is concave the step is that of Barzilai & Borwein
        (1988), which avoids zigzagging.
        """
        u, height = start.u, start.height
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
        return Endpoint(height, u)

    @staticmethod
    def _next(step: float, move: Tensor, change: Tensor) -> float:
        """The step size after ``move``, which changed the gradient by ``change``."""
        bend = float(move @ change)
        return float(move @ move) / -bend if bend < 0.0 else 4 * step
