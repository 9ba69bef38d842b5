"""The two axes of a picture: their directions, lengths and spans."""

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
# The two axes for a single word.
PAIRS = {
    "random": ("random", "random"),
    "eigenvectors": ("eigenvectors", "eigenvectors"),
    "gradient": ("gradient", "random"),
    "update": ("update", "random"),
    "pca": ("pca", "pca"),
    "between": ("between", "random"),
}

# In steps, from before the step to beyond the lowest point of a step that is too short.
_UPDATE_SPAN, _SPAN_BESIDE_UPDATE = (-2.0, 3.0), (-2.5, 2.5)
# Fraction of the path's extent that is added on either side.
_MARGIN = 0.2
# Directions with a meaningful length; the other axis gets the same length.
_HAVE_LENGTH = ("update", "between")


@dataclass(frozen=True)
class Axis:
    """One axis of a picture."""

    name: str
    vector: dict[str, Tensor]
    fixed: bool  # whether it is the same in every picture of the run
    kind: str
    span: Span = (-1.0, 1.0)


class Axes:
    """Makes the axes of every picture of a run.

    Args:
        monitor: the callback, for its warnings and its loss.
        pair: the directions of x and y, each one of ``DIRECTIONS``.
        seed: the seed of random directions.
        span: the span of both axes; ``None``: by direction.

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
        """Drop warm starts: after a failure they may differ between processes."""
        self._last_eigen = None
        self._last_vectors.clear()

    @property
    def filtered(self) -> bool:
        """Whether the axes are filter-normalised."""
        return set(self.pair) == {"random"}

    def make(
        self, this_round: Round, objective: Objective, path: Trajectory | None
    ) -> tuple[Axis, Axis]:
        """The axes at the current weights; ``path`` is given on rank zero only."""
        if self.filtered:
            x, y = (self.random(this_round, objective, repeat) for repeat in (0, 1))
        else:
            principal = self._principal(this_round, objective, path)
            x, y = (self._axis(position, this_round, objective, principal) for position in range(2))
            x, y = _match_lengths(x, y)
            x, y = self._orthogonal(x, y, objective)
        if self._span is not None:
            x, y = replace(x, span=self._span), replace(y, span=self._span)
        return x, y

    def random(self, this_round: Round, objective: Objective, repeat: int) -> Axis:
        """A random direction with the seed ``seed + repeat``, filter-normalised."""
        filters = filter_dims_of(this_round.pl_module)
        vector = random_vector(objective.params, self._seed + repeat)
        normalized = filter_normalize(vector, objective.params, filter_dims=filters)
        length = norm(normalized)
        if 0.0 < length < math.inf:
            return Axis(f"random {repeat + 1}", normalized, True, "random")
        if length == 0.0:
            self._monitor.warn_once(
                "all parameters are vectors or zero, which filter normalisation excludes; random "
                "directions have length 1 instead"
            )
        return replace(self._random_unit(objective, repeat), name=f"random {repeat + 1}")

    def _random_unit(self, objective: Objective, repeat: int) -> Axis:
        vector = random_vector(objective.params, self._seed + repeat)
        return Axis("random", unit(vector), True, "random")

    def _axis(
        self, position: int, this_round: Round, objective: Objective, principal: Sequence[Axis]
    ) -> Axis:
        """One axis, before lengths are matched and the two are made orthogonal."""
        kind, repeat = self.pair[position], self.pair[:position].count(self.pair[position])
        if kind == "random":
            return self._random_unit(objective, repeat)
        if kind == "pca" and repeat < len(principal):
            return principal[repeat]
        if kind == "pca":
            self._monitor.warn_once(
                "the path of the weights is a straight line so far, or a point; its missing "
                "principal directions are replaced by random ones"
            )
            return self._random_unit(objective, 2 + position)
        if kind == "update" and not this_round.has_step(
            self._monitor, "the direction 'update' (replaced by a random one)"
        ):
            return self._random_unit(objective, 2 + position)
        if kind == "update" and not this_round.has_update:
            self._monitor.warn_once(
                "training ended earlier than the Trainer's limits, so that there is no copy of the "
                "last step; the last picture has a random direction instead"
            )
            return self._random_unit(objective, 2 + position)
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
            normalized = unit(axis.vector)
        except ValueError:  # the loss is NaN or flat, or the optimizer did not step
            self._monitor.warn_once(
                f"{axis.name} is zero or not finite, and is replaced by a random direction"
            )
            return self._random_unit(objective, 2 + position)
        return axis if kind in _HAVE_LENGTH else replace(axis, vector=normalized)

    def _orthogonal(self, x: Axis, y: Axis, objective: Objective) -> tuple[Axis, Axis]:
        """``y`` without its part along ``x``; vice versa if only ``y`` has a meaningful length."""
        swapped = y.kind in _HAVE_LENGTH and x.kind not in _HAVE_LENGTH
        base, other = (y, x) if swapped else (x, y)
        try:
            vector = orthogonal_to(other.vector, base.vector)
            across = other.kind in _HAVE_LENGTH
            name = f"{other.name}, across x" if across else other.name
            other = replace(other, vector=vector, name=name, kind="" if across else other.kind)
        except ValueError:
            self._monitor.warn_once(
                f"{other.name} and {base.name} are parallel; {'x' if swapped else 'y'} is a random "
                f"direction instead"
            )
            random = self._random_unit(objective, 1)
            vector = orthogonal_to(random.vector, base.vector)
            vector = scaled(vector, norm(other.vector))
            other = replace(random, vector=vector, span=other.span, fixed=False)
        return (other, base) if swapped else (base, other)

    def _eigenvector(self, this_round: Round, objective: Objective, repeat: int) -> Axis:
        count = self.pair.count("eigenvectors")
        last = self._last_eigen
        start = last if last is not None and last.fits(objective.params) else None
        found = self._last_eigen = this_round.top_eigenvalues(self._monitor, count, init=start)
        vector = found.eigenvectors[repeat]
        # The sign of an eigenvector is arbitrary: align it with the last picture; in the first one,
        # also after a resume, with a fixed vector.
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
        """The principal directions for the pair, as far as they exist; computed on rank zero."""
        most = self.pair.count("pca")
        if not most:
            return []
        layout = Layout(objective.params)
        header = torch.zeros(5, dtype=layout.dtype, device=layout.device)  # count, spans
        flat = torch.zeros(most, layout.size, dtype=layout.dtype, device=layout.device)
        if path is not None:
            found = pca_directions(path.weights, objective.params, most)
            found = [self._with_last_sign(index, vector) for index, vector in enumerate(found)]
            projection = project(path.weights, objective.params, found) if found else None
            for index, vector in enumerate(found):
                assert projection is not None
                ends = [0.0, *projection.coordinates[:, index].tolist()]
                ends = [end for end in ends if math.isfinite(end)]
                margin = _MARGIN * (max(ends) - min(ends))
                header[0] += 1
                header[1 + 2 * index] = min(ends) - margin
                header[2 + 2 * index] = max(ends) + margin
                flat[index] = layout.flatten(vector)
        count, *ends = this_round.from_rank_zero(header).tolist()
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

    def _with_last_sign(self, index: int, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        vector = aligned(vector, self._last_vectors.get(("pca", index), {}))
        self._last_vectors["pca", index] = vector
        return vector


def _match_lengths(x: Axis, y: Axis) -> tuple[Axis, Axis]:
    """Give the axis beside an update or two checkpoints the same length."""
    axes = [x, y]
    for own, other in ((0, 1), (1, 0)):
        length, kind = norm(axes[own].vector), axes[other].kind
        if axes[own].kind in _HAVE_LENGTH and kind not in (*_HAVE_LENGTH, "pca"):
            span = _SPAN_BESIDE_UPDATE if axes[own].kind == "update" else axes[own].span
            vector = scaled(unit(axes[other].vector), length)
            axes[other] = replace(axes[other], vector=vector, span=span)
        elif axes[own].kind == "pca" and kind == "random":
            half = (axes[own].span[1] - axes[own].span[0]) / 2
            axes[other] = replace(axes[other], span=(-half, half))
    return axes[0], axes[1]
