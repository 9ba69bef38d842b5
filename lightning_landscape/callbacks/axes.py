"""The two directions of a picture: where they come from, how long they are, what is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.directions import (
    aligned,
    filter_dims_of,
    filter_normalize,
    orthogonal_to,
    unit,
)
from lightning_landscape.geometry.eigen import EigenResult
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.slices import Span
from lightning_landscape.geometry.trajectory import Trajectory, pca_directions, project
from lightning_landscape.geometry.vectors import Layout, norm, random_vector, scaled

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor
    from lightning_landscape.training.round import Round

Direction = Literal["random", "eigenvectors", "gradient", "update", "pca", "between"]
DIRECTIONS = ("random", "eigenvectors", "gradient", "update", "pca", "between")
# The two axes that a single word stands for.
PAIRS = {
    "random": ("random", "random"),
    "eigenvectors": ("eigenvectors", "eigenvectors"),
    "gradient": ("gradient", "random"),
    "update": ("update", "random"),
    "pca": ("pca", "pca"),
    "between": ("between", "random"),
}

# In steps: from before the step to well past the lowest point of a step that falls short.
_UPDATE_SPAN, _BESIDE_UPDATE = (-2.0, 3.0), (-2.5, 2.5)
# Of the path's extent, left free on either side.
_MARGIN = 0.2
# Their length means something: the direction beside them gets the same one.
_WITH_LENGTH = ("update", "between")


@dataclass(frozen=True)
class Axis:
    """One axis of a picture."""

    name: str
    vector: dict[str, Tensor]
    fixed: bool  # the same direction in every picture of the run
    kind: str
    span: Span = (-1.0, 1.0)


class Axes:
    """Makes the axes of every picture of a run.

    Args:
        monitor: whose pictures.
        pair: what x and y are, each one of ``DIRECTIONS``.
        seed: of random directions.
        span: for both axes; ``None``: what suits each.

    Attributes:
        between: ``b - a``, for ``"between"``, on the CPU.
    """

    def __init__(
        self, monitor: Monitor, pair: tuple[str, str], seed: int, span: Span | None
    ) -> None:
        self._monitor = monitor
        self.pair = pair
        self._seed = seed
        self._span = span
        self.between: dict[str, Tensor] = {}
        self._last_eigen: EigenResult | None = None
        self._last_vectors: dict[tuple[str, int], dict[str, Tensor]] = {}

    def reset_warm_start(self) -> None:
        """Start afresh: after a fault processes may hold different results."""
        self._last_eigen = None
        self._last_vectors.clear()

    @property
    def filtered(self) -> bool:
        """Whether the axes are filter-normalised, not of a stated length."""
        return set(self.pair) == {"random"}

    def take(
        self, this_round: Round, objective: Objective, path: Trajectory | None
    ) -> tuple[Axis, Axis]:
        """The axes at the weights of this round; ``path`` on rank zero only."""
        if self.filtered:
            x, y = (self.random(this_round, objective, repeat) for repeat in (0, 1))
        else:
            principal = self._principal(this_round, objective, path)
            x, y = (self._one(position, this_round, objective, principal) for position in range(2))
            x, y = _of_like_length(x, y)
            x, y = self._orthogonal(x, y, objective)
        if self._span is not None:
            x, y = replace(x, span=self._span), replace(y, span=self._span)
        return x, y

    def random(self, this_round: Round, objective: Objective, repeat: int) -> Axis:
        """The direction drawn from ``seed + repeat``, filter-normalised."""
        filters = filter_dims_of(this_round.pl_module)
        vector = random_vector(objective.params, self._seed + repeat)
        normalized = filter_normalize(vector, objective.params, filter_dims=filters)
        length = norm(normalized)
        if 0.0 < length < math.inf:
            return Axis(f"random {repeat + 1}", normalized, True, "random")
        if length == 0.0:
            self._monitor.warn_once(
                "the parameters are all vectors or all zero, which filter normalisation leaves "
                "out; random directions have length 1 instead"
            )
        return replace(self._drawn(objective, repeat), name=f"random {repeat + 1}")

    def _drawn(self, objective: Objective, repeat: int) -> Axis:
        vector = random_vector(objective.params, self._seed + repeat)
        return Axis("random", unit(vector), True, "random")

    def _one(
        self, position: int, this_round: Round, objective: Objective, principal: Sequence[Axis]
    ) -> Axis:
        """One axis before the two are fitted to one another."""
        kind, repeat = self.pair[position], self.pair[:position].count(self.pair[position])
        if kind == "random":
            return self._drawn(objective, repeat)
        if kind == "pca" and repeat < len(principal):
            return principal[repeat]
        if kind == "pca":
            self._monitor.warn_once(
                "the path of the weights is a straight line so far, or a point; where there is no "
                "second (or no first) principal direction it is a random one"
            )
            return self._drawn(objective, 2 + position)
        if kind == "update" and not this_round.has_step(
            self._monitor, "the direction 'update' (a random one takes its place)"
        ):
            return self._drawn(objective, 2 + position)
        if kind == "update" and not this_round.knows_update:
            self._monitor.warn_once(
                "training ended where no end was foreseen, so that the last step was not kept; "
                "the last picture has a random direction in its place"
            )
            return self._drawn(objective, 2 + position)
        if kind == "eigenvectors":
            axis = self._eigenvector(this_round, objective, repeat)
        elif kind == "gradient":
            axis = Axis("gradient", objective.gradient(), False, kind)
        elif kind == "update":
            axis = Axis("update", this_round.last_update(objective), False, kind, _UPDATE_SPAN)
        else:
            vector = {n: self.between[n].to(p.device) for n, p in objective.params.items()}
            axis = Axis("from a to b", vector, True, kind)
        try:
            shortened = unit(axis.vector)
        except ValueError:  # where the loss is NaN, or flat, or the optimizer did not step
            self._monitor.warn_once(
                f"{axis.name} is zero or not finite; it is a random direction where it is"
            )
            return self._drawn(objective, 2 + position)
        return axis if kind in _WITH_LENGTH else replace(axis, vector=shortened)

    def _orthogonal(self, x: Axis, y: Axis, objective: Objective) -> tuple[Axis, Axis]:
        """``y`` less its part along ``x``; the other way round where only ``y`` has a length."""
        swapped = y.kind in _WITH_LENGTH and x.kind not in _WITH_LENGTH
        kept, moved = (y, x) if swapped else (x, y)
        try:
            vector = orthogonal_to(moved.vector, kept.vector)
            across = moved.kind in _WITH_LENGTH
            name = f"{moved.name}, across x" if across else moved.name
            moved = replace(moved, vector=vector, name=name, kind="" if across else moved.kind)
        except ValueError:
            self._monitor.warn_once(
                f"{moved.name} and {kept.name} are parallel; {'x' if swapped else 'y'} is a random "
                f"direction"
            )
            spare = self._drawn(objective, 1)
            vector = orthogonal_to(spare.vector, kept.vector)
            vector = scaled(vector, norm(moved.vector))
            moved = replace(spare, vector=vector, span=moved.span, fixed=False)
        return (moved, kept) if swapped else (kept, moved)

    def _eigenvector(self, this_round: Round, objective: Objective, repeat: int) -> Axis:
        wanted = self.pair.count("eigenvectors")
        last = self._last_eigen
        start = last if last is not None and last.fits(objective.params) else None
        found = self._last_eigen = this_round.top_eigenvalues(self._monitor, wanted, init=start)
        vector = found.eigenvectors[repeat]
        # The sign of an eigenvector is arbitrary: keep to the last picture's, and for the first
        # picture, here or after a resume, to the same fixed vector.
        if start is None:
            self._last_vectors.clear()
        key = ("eigenvectors", repeat)
        reference = self._last_vectors.get(key) or random_vector(vector, self._seed)
        vector = aligned(vector, reference)
        if bool(found.eigenvalues.isfinite().all()):
            self._last_vectors[key] = vector
        name = "top eigenvector" if repeat == 0 else "second eigenvector"
        return Axis(name, vector, False, "eigenvectors")

    # -- the principal directions of the path --------------------------------------------------

    def _principal(
        self, this_round: Round, objective: Objective, path: Trajectory | None
    ) -> list[Axis]:
        """As many as the pair names, or as the path has; found on rank zero, for all."""
        wanted = self.pair.count("pca")
        if not wanted:
            return []
        layout = Layout(objective.params)
        told = torch.zeros(5, dtype=layout.dtype, device=layout.device)  # how many, their spans
        flat = torch.zeros(wanted, layout.size, dtype=layout.dtype, device=layout.device)
        if path is not None:
            found = pca_directions(path.weights, objective.params, wanted)
            found = [self._kept_sign(index, vector) for index, vector in enumerate(found)]
            seen = project(path.weights, objective.params, found) if found else None
            for index, vector in enumerate(found):
                assert seen is not None
                ends = [0.0, *seen.coordinates[:, index].tolist()]
                ends = [end for end in ends if math.isfinite(end)]
                margin = _MARGIN * (max(ends) - min(ends))
                told[0] += 1
                told[1 + 2 * index] = min(ends) - margin
                told[2 + 2 * index] = max(ends) + margin
                flat[index] = layout.flatten(vector)
        count, *ends = this_round.from_rank_zero(told).tolist()
        flat = this_round.from_rank_zero(flat.flatten()).view_as(flat)
        return [
            Axis(
                f"PCA {index + 1} of the path",
                layout.unflatten(flat[index]),
                False,
                "pca",
                (ends[2 * index], ends[2 * index + 1]),
            )
            for index in range(int(count))
        ]

    def _kept_sign(self, index: int, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        vector = aligned(vector, self._last_vectors.get(("pca", index), {}))
        self._last_vectors["pca", index] = vector
        return vector


def _of_like_length(x: Axis, y: Axis) -> tuple[Axis, Axis]:
    """One unit is as long on both axes beside an update or two checkpoints."""
    axes = [x, y]
    for own, other in ((0, 1), (1, 0)):
        length, kind = norm(axes[own].vector), axes[other].kind
        if axes[own].kind in _WITH_LENGTH and kind not in (*_WITH_LENGTH, "pca"):
            span = _BESIDE_UPDATE if axes[own].kind == "update" else axes[own].span
            vector = scaled(unit(axes[other].vector), length)
            axes[other] = replace(axes[other], vector=vector, span=span)
        elif axes[own].kind == "pca" and kind == "random":
            half = (axes[own].span[1] - axes[own].span[0]) / 2
            axes[other] = replace(axes[other], span=(-half, half))
    return axes[0], axes[1]
