"""The largest eigenvalues by Rayleigh-Ritz on a growing space, and a search outside that space.

A warm start stays in the Krylov space of the vectors that it starts from.  If parts of a network
are decoupled, it never finds an eigenvalue that grows in another part, however small the residuals
are.  Therefore each solution also searches outside: from a vector orthogonal to the kept ones, and
from every Ritz pair that may hide a larger eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_landscape.geometry.kernels import full_float32
from lightning_landscape.geometry.matvec import Matvec
from lightning_landscape.geometry.subspace import RESIDUAL_MARGIN, RitzSpace, orthonormalized

# A random start may be almost orthogonal to the top eigenvector, and a smaller eigenvalue then
# converges first.  On a cold start a minimum of products makes that unlikely.
COLD_PRODUCTS = 8

# Tolerances are relative to each eigenvalue, but at least this times the largest |Ritz value|,
# because an eigenvalue near zero has no accurate digits.
FLOOR = 1e-3

# The search outside: weights of a random vector and of the hint in its start, and the maximum
# number of products after the first.
_RANDOM, _HINT = 0.6, 1.0
_MOST_SEARCHES = 4

# The kept vectors say little if the top eigenvalue has changed by more than this share since the
# previous solution, if less than this share of the squared length of an eigenvector lies in their
# span, or if there are none.  A search then takes at least so many products.
_MOVED, _STAYED, _FEWEST_AFTER_A_MOVE = 0.3, 0.8, 4

# Largest residual, relative to the value, of a pair whose error estimate is used.
_KNOWN = 0.2


@dataclass(frozen=True)
class Tolerance:
    """Relative to each eigenvalue: ``tol`` of residuals, ``rtol`` of estimated errors."""

    tol: float
    rtol: float

    def residual(self, values: Tensor, scale: float) -> Tensor:
        """The largest residual of each value that counts as converged."""
        return (self.tol * values.abs()).clamp(min=self.floor(self.tol, scale))

    def error(self, values: Tensor, scale: float) -> Tensor:
        """The largest estimated error of each value that counts as converged; 0 without rtol."""
        return (self.rtol * values.abs()).clamp(min=self.floor(self.rtol, scale))

    @staticmethod
    def floor(relative: float, scale: float) -> float:
        return min(relative, FLOOR) * scale


@dataclass(frozen=True)
class Start:
    """The start vectors of a solver.

    Attributes:
        kept: the vectors of the previous solution, or one passed by the user; empty for a cold
            start.
        outside: the last vector of the previous search outside them.
        hint: a vector that may contain a new direction, e.g. the gradient.
        random: index -> random vector.
        top: the largest eigenvalue of the previous solution; None without one.
    """

    kept: Sequence[Tensor]
    outside: Tensor | None
    hint: Tensor | None
    random: Callable[[int], Tensor]
    top: float | None

    def fewest_searches(self, top: float, vectors: Tensor) -> int:
        """The least products of a search, where ``top`` is now the largest eigenvalue.

        ``vectors``: the eigenvectors now, as rows.
        """
        if not self.kept:
            return 1
        if self.top is None or abs(top - self.top) > _MOVED * abs(self.top):
            return _FEWEST_AFTER_A_MOVE
        return 1 if self._share_kept(vectors) >= _STAYED else _FEWEST_AFTER_A_MOVE

    @full_float32()
    def _share_kept(self, vectors: Tensor) -> float:
        """The smallest share of the squared length of a vector in the span of the kept ones."""
        lengths = torch.stack([torch.linalg.vector_norm(kept) for kept in self.kept])
        cosines = torch.stack([vectors @ kept for kept in self.kept], dim=1) / lengths
        return float(cosines.square().sum(1).min())  # several kept ones are orthonormal

    def search(self, known: Tensor) -> Tensor:
        """The start of the search outside the rows of ``known``."""
        total = torch.zeros_like(self.random(0))
        parts = ((self.outside, 1.0), (self.random(0), _RANDOM), (self.hint, _HINT))
        for vector, share in parts:
            direction = None if vector is None else orthonormalized(vector, known)
            if direction is not None:
                known = torch.cat([known, direction[None]])  # so that the parts are orthogonal
                total.add_(direction, alpha=share)
        return total


@dataclass(frozen=True)
class EigenPairs:
    """The result of a solver; see ``EigenResult`` for the attributes."""

    values: Tensor  # (k,) float64, largest first
    vectors: Sequence[Tensor]  # k
    residuals: Tensor  # (k,)
    products: int
    converged: bool
    checked: bool = False
    at_floor: bool = False
    outside: Tensor | None = None
    asymmetry: float = 0.0


def not_finite(k: int, like: Tensor, products: int) -> EigenPairs:
    """The result after a product that is not finite."""
    nan = torch.full((k,), float("nan"), dtype=torch.float64, device="cpu")
    return EigenPairs(nan, [torch.zeros_like(like)] * k, nan.clone(), products, False)


def lanczos(
    matvec: Matvec,
    start: Start,
    k: int,
    tolerance: Tolerance,
    max_products: int,
    max_basis: int,
) -> EigenPairs:
    """Rayleigh-Ritz on a growing orthonormal basis ``Q`` whose images ``A Q`` are kept.

    From one start vector, adding the residual of the wanted Ritz pair spans the Krylov space, as in
    Lanczos.  Keeping the images takes memory, but gives true residuals from any number of start
    vectors; the three-term recurrence would need restarts to find multiple eigenvalues.
    """
    space = RitzSpace(matvec, start.random(0), max_basis)  # a template only
    pending = list(start.kept)
    cold = not pending
    searching = start.outside is not None  # from the beginning, not only after convergence
    searches, attempts = 0, 0
    while True:
        room = space.products < max_products
        if pending and room:
            grown = space.grow(pending.pop(0))
        elif searching and searches == 0 and room:
            space.keep_uncertain = True
            searches, grown = 1, space.grow(start.search(space.basis.rows))
        elif len(space) < k:
            attempts += 1
            grown = space.grow(start.random(attempts))
        else:
            state = _State(space, k, tolerance)
            enough = not cold or space.products >= COLD_PRODUCTS * k + state.at_the_other_end
            if len(space) >= space.size or not room:
                break
            if not state.converged or not enough:
                grown = space.grow(state.residual_of_worst())
            elif searches == 0:
                searching = True
                continue
            elif state.hidden is not None and searches <= _MOST_SEARCHES:
                searches, grown = searches + 1, space.grow(state.residual(state.hidden))
            elif len(space) > k and searches < start.fewest_searches(
                state.top * space.unit, space.vectors(k)
            ):
                searches, grown = searches + 1, space.grow(state.residual(state.highest))
            else:
                break
            if not grown:  # the space is invariant, but need not contain all
                attempts += 1
                grown = space.grow(start.random(attempts))
        if grown and not space.finite:
            return not_finite(k, space.basis.rows[0], space.products)

    whole = len(space) >= space.size
    converged = state.converged and (whole or enough)
    return EigenPairs(
        values=space.values[:k] * space.unit,
        vectors=list(space.vectors(k)),
        residuals=state.lengths * space.unit,
        products=space.products,
        converged=converged,
        checked=whole or (converged and searches > 0 and state.hidden is None),
        at_floor=converged and state.at_floor,
        outside=None if whole else space.beyond(k),
        asymmetry=space.asymmetry / max(state.scale, torch.finfo(torch.float64).tiny),
    )


class _State:
    """Convergence of the ``k`` largest Ritz pairs of a space, and pairs that may hide more."""

    def __init__(self, space: RitzSpace, k: int, tolerance: Tolerance) -> None:
        space.solve(k + 1)
        self._space, self._k = space, k
        values = space.values
        self.scale = float(values.abs().max())
        self._defects = space.residuals(range(min(k + 1, len(values))))
        lengths = torch.linalg.vector_norm(self._defects, dim=1).cpu().double()
        self.lengths, wanted = lengths[:k], values[:k]
        self._goals = tolerance.residual(wanted, self.scale)
        errors = estimated_errors(values, lengths, k)
        by_residual = bool((self.lengths <= self._goals).all())
        # The estimate ignores what is outside the space, so it is not used for large residuals.
        known = bool((self.lengths <= (_KNOWN * wanted.abs()).clamp(min=self._goals)).all())
        by_error = known and bool((errors <= tolerance.error(wanted, self.scale)).all())
        self.converged = by_residual or (tolerance.rtol > 0.0 and by_error)
        own_residual, own_error = tolerance.tol * wanted.abs(), tolerance.rtol * wanted.abs()
        self.at_floor = bool(((self.lengths > own_residual) & (errors > own_error)).any())
        # Products spent on eigenvalues of larger magnitude at the other end of the spectrum.
        self.at_the_other_end = 2 * int((values < -abs(values[k - 1])).sum())
        # Pairs that may hide an eigenvalue above the last wanted one by twice its tolerance.
        level = values[k - 1] + 2.0 * self._goals[-1]
        reach = values + RESIDUAL_MARGIN * space.lengths
        reach[:k] = -torch.inf
        self.top, self.highest = float(values[0]), int(reach.argmax())
        self.hidden = self.highest if bool(reach[self.highest] > level) else None

    def residual(self, index: int) -> Tensor:
        """The residual vector of one Ritz pair."""
        if index < len(self._defects):
            return self._defects[index]
        return self._space.residuals([index])[0]

    def residual_of_worst(self) -> Tensor:
        """The residual vector of the wanted pair that is farthest from its tolerance."""
        tiny = torch.finfo(torch.float64).tiny
        return self._defects[int((self.lengths / self._goals.clamp(min=tiny)).argmax())]


def estimated_errors(values: Tensor, residuals: Tensor, k: int) -> Tensor:
    """``residual^2 / gap`` of the first ``k`` pairs; infinite if the next may be as large.

    The next eigenvalue is taken to be its Ritz value plus its residual.
    """
    if len(residuals) <= k:
        return torch.full((k,), float("inf"), dtype=torch.float64, device="cpu")
    gaps = values[:k] - (values[k] + residuals[k])
    return torch.where(gaps > 0, residuals[:k] ** 2 / gaps, torch.inf)
