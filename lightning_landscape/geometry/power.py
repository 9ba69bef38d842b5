"""The largest algebraic eigenvalues by power iteration, one vector after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_landscape.geometry.lanczos import (
    COLD_PRODUCTS,
    EigenPairs,
    Start,
    Tolerance,
    not_finite,
)
from lightning_landscape.geometry.matvec import Matvec
from lightning_landscape.geometry.subspace import (
    RESIDUAL_MARGIN,
    ScaledMatvec,
    orthonormalized,
    without,
)

# Maximum number of products of a search outside the vectors found.
_MOST_SEARCHES = 20

# The iteration stops at this share of ``tol``: within a cluster of eigenvalues a vector has a small
# residual long before its value reaches the largest of them.
_SHARE_OF_TOL = 1 / 3


class _NotFinite(Exception):
    """A product is not finite."""


@dataclass(frozen=True)
class _Pair:
    value: float
    vector: Tensor
    residual: float
    wrong_end: bool = False  # of the spectrum: stopped before the shift took effect


def power(
    matvec: Matvec, start: Start, k: int, tolerance: Tolerance, max_products: int
) -> EigenPairs:
    """Power iteration on ``A + shift``, deflated by the vectors found before.

    The shift is 0 until a negative eigenvalue dominates, or two of opposite sign have equal
    magnitude.  After all pairs have converged, one more vector searches outside them; if it finds a
    larger eigenvalue, the iteration is repeated with that vector included.
    """
    solution = _Power(matvec, start, k, tolerance, max_products)
    try:
        return solution.run()
    except _NotFinite:
        return not_finite(k, start.random(0), solution.products)


class _Power:
    def __init__(
        self, matvec: Matvec, start: Start, k: int, tolerance: Tolerance, max_products: int
    ) -> None:
        self.products = 0
        self._matvec = ScaledMatvec(matvec)
        self._start, self._k = start, k
        self._tolerance = Tolerance(_SHARE_OF_TOL * tolerance.tol, 0.0)
        self._max_products = max_products
        self._shift = 0.0
        self._magnitude = 0.0  # the largest |Rayleigh quotient| seen

    def run(self) -> EigenPairs:
        starts, cold = list(self._start.kept[: self._k]), not self._start.kept
        checked, outside, tighter = False, self._start.outside, 1.0
        while True:
            pairs = self._wanted(starts, COLD_PRODUCTS if cold else 0, tighter)
            goals = self._goals(pairs)
            excess = max(p.residual / max(g, 1e-300) for p, g in zip(pairs, goals, strict=True))
            wrong = any(pair.wrong_end for pair in pairs)
            converged = excess <= 1.0 and not wrong
            starts, cold = [pair.vector for pair in pairs], False
            if self.products > self._max_products - self._k:  # less than one per pair
                break
            if not converged:  # a pair's residual contains those of the pairs before it
                tighter /= 2.0 * max(excess, 1.0)
                continue
            known = torch.stack(starts)
            level = pairs[-1].value + 2.0 * goals[-1]
            other = self._search(known, level)
            if other is None:
                checked = True  # the vectors span the whole space
                break
            outside = other.vector
            if other.value <= level:
                checked = other.value + RESIDUAL_MARGIN * other.residual <= level
                break
            starts = [other.vector, *starts[:-1]]
        unit = self._matvec.unit
        values, residuals = (
            torch.tensor(numbers, dtype=torch.float64, device="cpu")
            for numbers in ([p.value for p in pairs], [p.residual for p in pairs])
        )
        own = self._tolerance.tol * values.abs()
        return EigenPairs(
            values=values * unit,
            vectors=[pair.vector for pair in pairs],
            residuals=residuals * unit,
            products=self.products,
            converged=converged,
            checked=converged and checked,
            at_floor=converged and bool((residuals > own).any()),
            outside=outside,
        )

    def _goals(self, pairs: Sequence[_Pair]) -> list[float]:
        values = torch.tensor([pair.value for pair in pairs], dtype=torch.float64, device="cpu")
        goals: list[float] = self._tolerance.residual(values, self._magnitude).tolist()
        return goals

    def _wanted(self, starts: Sequence[Tensor], fewest: int, tighter: float) -> list[_Pair]:
        """The wanted pairs, from ``starts`` and random vectors for the rest."""
        pairs: list[_Pair] = []
        for index in range(self._k):
            known = _rows([pair.vector for pair in pairs], self._start.random(0))
            given = index < len(starts)
            vector = orthonormalized(starts[index], known) if given else None
            attempt = index
            while vector is None:  # missing, or in the span of the pairs found
                vector = orthonormalized(self._start.random(attempt), known)
                attempt += self._k
            # At least one product is left for each following pair.
            budget = self._max_products - (self._k - 1 - index)
            least = self.products + (0 if given else fewest or COLD_PRODUCTS)
            pairs.append(self._climb(vector, known, least, budget, tighter))
        return sorted(pairs, key=lambda pair: -pair.value)

    def _search(self, known: Tensor, level: float) -> _Pair | None:
        """A pair outside ``known``, iterated until it is below ``level`` or has converged."""
        start = orthonormalized(self._start.search(known), known)
        for attempt in range(1, 4):
            if start is None:
                start = orthonormalized(self._start.random(attempt), known)
        if start is None or len(known) >= known.shape[1]:
            return None
        budget = min(self._max_products, self.products + _MOST_SEARCHES)
        return self._climb(start, known, self.products + 2, budget, 1.0, level)

    def _climb(
        self,
        vector: Tensor,
        known: Tensor,
        fewest: int,
        budget: int,
        tighter: float,
        level: float = -math.inf,
    ) -> _Pair:
        """Power iteration from ``vector``, orthogonal to the rows of ``known``.

        Stops when the residual is below the tolerance, or the largest eigenvalue that it may hide
        below ``level``: between ``fewest`` and ``budget`` products in total.
        """
        # Deflated residuals of tol/sqrt(k) bound each residual by tol, which also contains the
        # inner products with the residuals of the vectors found before.
        share = tighter / math.sqrt(self._k)
        defect, stalled, last_length = math.inf, 0, 0.0
        pair = _Pair(0.0, vector, math.inf)
        while self.products < budget:
            image = self._matvec(vector)
            self.products += 1
            if not bool(image.isfinite().all()):
                raise _NotFinite
            value = float(vector @ image)
            residual = float(torch.linalg.vector_norm(image - value * vector))
            length = float(torch.linalg.vector_norm(image))
            pair = _Pair(value, vector, residual)
            deflated = without(image, known)
            last_defect = defect
            defect = float(torch.linalg.vector_norm(deflated - value * vector))
            self._magnitude = max(self._magnitude, abs(value))
            values = torch.tensor([value], dtype=torch.float64, device="cpu")
            goal = share * float(self._tolerance.residual(values, self._magnitude))
            # A residual that grows again means that a larger eigenvalue is emerging.
            near = defect <= goal and defect <= last_defect
            stalled = stalled + 1 if abs(length - last_length) <= 1e-3 * length else 0
            last_length = length
            if value < 0.0 and (near or stalled >= 5) and self._shift < self._magnitude:
                # A negative eigenvalue has the largest magnitude: shift all above zero.  This
                # vector has almost no component of the wanted one left.
                self._shift, fewest = self._magnitude, self.products + COLD_PRODUCTS
                fresh = orthonormalized(self._start.random(self._k + self.products), known)
                vector, defect = (vector if fresh is None else fresh), math.inf
                stalled, pair = 0, _Pair(value, pair.vector, residual, wrong_end=True)
                continue
            below = value + RESIDUAL_MARGIN * residual <= level
            if (near or below) and self.products >= fewest:
                break
            if stalled >= 5 and self._shift < length:
                self._shift = length  # two eigenvalues of opposite sign and equal magnitude
            step = orthonormalized(deflated + self._shift * vector, known)
            if step is None:
                break
            vector = step
        return pair


def _rows(vectors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(vectors)) if vectors else like.new_zeros(0, like.numel())
