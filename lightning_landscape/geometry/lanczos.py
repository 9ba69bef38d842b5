"""The largest eigenvalues by Rayleigh-Ritz on a growing space, and a search outside what it knows.

A warm start stays in the Krylov space of the vectors that it kept.  Where parts of a network are
decoupled, an eigenvalue that rises in another part is never seen there, however small the residual
is.  So each solution also looks outside: from a vector that was not kept, and on from every Ritz
pair that may hide something larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_landscape.geometry.matvec import Matvec
from lightning_landscape.geometry.subspace import RESIDUAL_MARGIN, RitzSpace, orthonormalized

# A random start may hold next to nothing of the top eigenvector, and a smaller eigenvalue then
# passes the residual test first.  A few products more, on a cold start only, bring the top one up.
COLD_PRODUCTS = 8

# Tolerances are relative to each eigenvalue itself, but no smaller than this times the largest
# |Ritz value|: an eigenvalue near zero has no digits of its own.
FLOOR = 1e-3

# The search outside: shares of a random vector and of the hint in its start, products after that.
_RANDOM, _HINT = 0.6, 1.0
_MOST_SEARCHES = 6

# Largest residual, relative to its own value, of a pair whose estimated error is believed.
_KNOWN = 0.2


@dataclass(frozen=True)
class Tolerance:
    """How close is close enough: ``tol`` for residuals, ``rtol`` for estimated errors."""

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
    """Where a solution begins.

    Attributes:
        kept: the vectors of the last solution, or one that was given; empty for a cold start.
        outside: where the last search outside them ended.
        hint: a vector that may hold what is new: the gradient.
        random: a random vector for each number.
    """

    kept: Sequence[Tensor]
    outside: Tensor | None
    hint: Tensor | None
    random: Callable[[int], Tensor]

    def search(self, known: Tensor) -> Tensor:
        """The start of the search outside the rows of ``known``."""
        total = torch.zeros_like(self.random(0))
        parts = ((self.outside, 1.0), (self.random(0), _RANDOM), (self.hint, _HINT))
        for vector, share in parts:
            direction = None if vector is None else orthonormalized(vector, known)
            if direction is not None:
                known = torch.cat([known, direction[None]])  # no part takes from another
                total.add_(direction, alpha=share)
        return total


@dataclass(frozen=True)
class EigenPairs:
    """What a solver found, in the order and with the meanings of ``EigenResult``."""

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
    """After a product that was not finite."""
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
    """Rayleigh-Ritz on a growing orthonormalized basis ``Q`` whose images ``A Q`` are kept.

    From one start vector, growing by the residual of the wanted Ritz pair spans the Krylov space:
    this is Lanczos.  Keeping the images costs memory and gives true residuals from any number of
    start vectors, where the three-term recurrence would need restarts to see multiplicities.
    """
    space = RitzSpace(matvec, start.random(0), max_basis)  # random(0) itself is the search's
    pending = list(start.kept[:k])
    cold = not pending
    searching = start.outside is not None  # from the beginning, not when all else has converged
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
            else:
                break
            if not grown:  # the space is invariant, and something may lie outside it
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
    """What the Ritz pairs of a space say of the ``k`` largest eigenvalues."""

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
        # The estimate knows nothing of what is not in the space: not where a residual says that
        # much of the vector is.
        known = bool((self.lengths <= (_KNOWN * wanted.abs()).clamp(min=self._goals)).all())
        by_error = known and bool((errors <= tolerance.error(wanted, self.scale)).all())
        self.converged = by_residual or (tolerance.rtol > 0.0 and by_error)
        own_residual, own_error = tolerance.tol * wanted.abs(), tolerance.rtol * wanted.abs()
        self.at_floor = bool(((self.lengths > own_residual) & (errors > own_error)).any())
        # Products that went into eigenvalues of larger magnitude at the other end of the spectrum.
        self.at_the_other_end = 2 * int((values < -abs(values[k - 1])).sum())
        # Pairs that may hide an eigenvalue above the last wanted one, beyond its tolerance twice.
        level = values[k - 1] + 2.0 * self._goals[-1]
        reach = values + RESIDUAL_MARGIN * space.lengths
        reach[:k] = -torch.inf
        highest = int(reach.argmax())
        self.hidden = highest if bool(reach[highest] > level) else None

    def residual(self, index: int) -> Tensor:
        """The residual vector of one Ritz pair."""
        if index < len(self._defects):
            return self._defects[index]
        return self._space.residuals([index])[0]

    def residual_of_worst(self) -> Tensor:
        """That of the wanted pair that is furthest from its tolerance."""
        tiny = torch.finfo(torch.float64).tiny
        return self._defects[int((self.lengths / self._goals.clamp(min=tiny)).argmax())]


def estimated_errors(values: Tensor, residuals: Tensor, k: int) -> Tensor:
    """``residual^2 / gap`` of the first ``k`` pairs; infinite where the next may be as large.

    The next one is known to within its own residual only, and is taken at the upper end.
    """
    if len(residuals) <= k:
        return torch.full((k,), float("inf"), dtype=torch.float64, device="cpu")
    gaps = values[:k] - (values[k] + residuals[k])
    return torch.where(gaps > 0, residuals[:k] ** 2 / gaps, torch.inf)
