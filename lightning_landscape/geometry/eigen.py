"""Extreme eigenvalues of a symmetric operator that is seen only through its products.

``top_eigenvalues`` lays the problem out flat; below it, plain functions of a ``matvec``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import (
    check_choice,
    check_mapping,
    check_number,
    check_objective,
    quoted,
)
from lightning_landscape.geometry.hessian import HessianLike, Matvec, flat_products
from lightning_landscape.geometry.subspace import Space, orthonormal, without
from lightning_landscape.geometry.vectors import Layout, Vector, random_vector, seed_from

# A warm start from the last top vector alone locks on to it when two eigenvalues cross.  The next
# Ritz vector keeps the way to the others open, as a start of its own: of a sum, the products around
# a crossing see one combination only, and the other vector is lost for good.  Two of them cost one
# product more and were no truer along training (benchmarks/accuracy.py).
_EXTRA_VECTORS = 1

# A random start may hold next to nothing of the top eigenvector, and a smaller eigenvalue then
# passes the residual test first.  A few products more, on a cold start only, bring the top one up.
COLD_PRODUCTS = 8

# A warm start whose first residual is above this share of its value has gone cold in part: between
# two far measurements another eigenvalue may have risen that it knows nothing of.
_STALE_RESIDUAL, _STALE_PRODUCTS = 0.5, 5

# The pair after the wanted ones is known when its residual is below this share of the largest
# |Ritz value|.  Where all vectors turn fast it otherwise fades away, and with it the view of what
# overtakes: errors of 17 % on such films of matrices, below .1 % with this.
_KNOWN = 0.2

# The basis and its images hold at most this many entries, unless that is too few.
_MOST_VECTORS, _MOST_ENTRIES = 16, 2**30


@dataclass(frozen=True)
class EigenResult:
    """Eigenvalues with the evidence for them.

    Attributes:
        eigenvalues: ``(k,)`` float64, the wanted end first.
        eigenvectors: ``k`` unit vectors, name -> tensor.  With a preconditioner ``P``: those of
            ``P^-1/2 H P^-1/2``.
        residuals: ``(k,)`` float64, ``||H v - theta v||``: some eigenvalue lies within this
            distance of theta.  (It does not say that it is the largest one.)
        hvps: products with ``H`` that were made.
        converged: every residual is at most ``tol`` times the largest ``|Ritz value|`` seen; with
            ``rtol`` also where the estimated errors are below it.  Not from a random start before
            8 products: the top one may not have come up yet.
        subspace: the next Ritz vectors, kept for a warm start (``init=result``).
        asymmetry: the largest ``|u'Hv - v'Hu|`` seen over pairs of unit vectors, relative to the
            largest ``|Ritz value|``.  Beyond rounding the second derivative is wrong somewhere:
            some kernels have one that is silently incomplete.  Not seen by ``"power"``: 0.
    """

    eigenvalues: Tensor
    eigenvectors: tuple[dict[str, Tensor], ...]
    residuals: Tensor
    hvps: int
    converged: bool
    subspace: tuple[dict[str, Tensor], ...] = field(default=(), repr=False)
    asymmetry: float = 0.0

    def fits(self, params: Mapping[str, Tensor]) -> bool:
        """Whether it can start a solution over ``params``: same names, same shapes."""
        known = {name: v.shape for name, v in self.eigenvectors[0].items()}
        return known == {name: p.shape for name, p in params.items()}


def top_eigenvalues(
    objective: HessianLike,
    k: int = 1,
    *,
    which: Literal["LA", "SA"] = "LA",
    method: Literal["lanczos", "power"] = "lanczos",
    tol: float = 1e-2,
    max_hvps: int = 50,
    init: Vector | EigenResult | None = None,
    preconditioner: Mapping[str, Tensor | float] | None = None,
    generator: torch.Generator | None = None,
    rtol: float = 0.0,
    max_basis: int | None = None,
) -> EigenResult:
    r"""The ``k`` largest (or smallest) *algebraic* eigenvalues of the Hessian.

    Args:
        objective: an :class:`~lightning_landscape.Objective`, or anything with ``params`` and
            ``hvp``.
        k: how many, counted with multiplicity.
        which: ``"LA"`` the largest, ``"SA"`` the smallest.
        method: ``"lanczos"``: Rayleigh-Ritz on a Krylov space with full reorthogonalisation,
            started from ``k`` vectors so that multiple eigenvalues are found; it keeps two vectors
            per product, up to ``2 max_basis``.  ``"power"``: power iteration, one vector after the
            other, on a shifted operator where a negative eigenvalue has the largest magnitude; it
            keeps three vectors in all, needs several times the products, and may stay with an
            eigenvalue that has been overtaken when it is warm-started: 17 % low at worst along a
            training run.
        tol: stop when ``||H v - theta v|| <= tol * max |Ritz value|``.  The error of theta itself
            is about ``residual^2 / gap``, so 1e-2 usually gives four digits.
        max_hvps: hard cap on products, at least ``k``.
        init: where to start: a vector (its length does not matter) or the previous result.
        preconditioner: ``P > 0``, name -> tensor or number: eigenvalues of
            ``P^-1/2 H P^-1/2``.  A missing name means 1.
        generator: seeds the random start; the same start every time without one.
        rtol: stop earlier, once the estimated error of every eigenvalue is at most ``rtol`` times
            the largest ``|Ritz value|``.  The estimate is ``residual^2 / gap``, with the gap to the
            next eigenvalue taken as small as that one's own residual allows.  0: the residual alone
            decides, as it always does for ``"power"``.
        max_basis: basis vectors kept at a time; when there are as many they are condensed to the
            leading Ritz vectors, which costs no product.  ``None``: 16, fewer where the basis and
            its images would exceed 2^30 numbers, and at least ``2k + 4``.

    Returns:
        An :class:`EigenResult`.  Not converging is not an error: ``converged`` is then False.  An
        operator that returns NaN or infinity gives NaN.

    Raises:
        ValueError: an argument out of its range, or vectors that do not match the parameters.

    Cost: one HVP, about 2 gradients, per product; warm-started during training some 5 products, 3
    with ``rtol=5e-3``.

    Source: Lanczos 1950; Saad, Numerical Methods for Large Eigenvalue Problems, ch. 6; the bound
    residual^2 / gap, Temple 1928; restarts that keep Ritz vectors, Wu and Simon 2000.

    Example:
        >>> from lightning_landscape.geometry.objective import Objective
        >>> w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        >>> spectrum = torch.tensor([-5.0, 3.0, 1.0], dtype=torch.float64)
        >>> result = top_eigenvalues(Objective(lambda: (spectrum * w**2).sum() / 2, {"w": w}))
        >>> round(result.eigenvalues.item(), 6)
        3.0
    """
    check_objective(objective, "params", "hvp")
    layout = Layout(objective.params)
    _check_arguments(k, which, method, tol, max_hvps, rtol, max_basis, layout.size)
    sign = 1.0 if which == "LA" else -1.0
    half = None if preconditioner is None else _inverse_root(layout, preconditioner)

    def matvec(product: Matvec, flat: Tensor) -> Tensor:
        image = product(flat if half is None else half * flat)
        if half is not None:
            image.mul_(half)
        return image if sign == 1.0 else image.neg_()

    def random_start(index: int) -> Tensor:
        return layout.flatten(random_vector(objective.params, seed + index))

    seed = seed_from(generator)
    starts = _start_vectors(layout, k, init)
    with flat_products(objective, layout) as product:
        symmetric = partial(matvec, product)
        if method == "lanczos":
            most = _basis_size(k, layout.size) if max_basis is None else max_basis
            ritz = _lanczos(symmetric, starts, random_start, k, tol, rtol, max_hvps, most)
        else:
            ritz = _power(symmetric, starts, random_start, k, tol, max_hvps)
    vectors = [layout.unflatten(v) for v in ritz.vectors]
    return EigenResult(
        eigenvalues=sign * ritz.values,
        eigenvectors=tuple(vectors[:k]),
        residuals=ritz.residuals,
        hvps=ritz.products,
        converged=ritz.converged,
        subspace=tuple(vectors[k:]),
        asymmetry=ritz.asymmetry,
    )


@dataclass(frozen=True)
class _Ritz:
    values: Tensor  # (k,) float64, largest first
    vectors: Sequence[Tensor]  # k, and up to _EXTRA_VECTORS more
    residuals: Tensor  # (k,)
    products: int
    converged: bool
    asymmetry: float = 0.0


def _lanczos(
    matvec: Matvec,
    starts: Sequence[Tensor],
    random_start: Callable[[int], Tensor],
    k: int,
    tol: float,
    rtol: float,
    max_products: int,
    max_basis: int,
) -> _Ritz:
    """Rayleigh-Ritz on a growing orthonormal basis ``Q`` whose images ``A Q`` are kept.

    From one start vector, growing by the residual of the wanted Ritz pair spans the Krylov space:
    this is Lanczos.  Keeping the images costs memory and gives true residuals from any number of
    start vectors, where the three-term recurrence would need restarts to see multiplicities.

    More than ``k`` start vectors are a warm start.  Where the residual decides, it spends one
    product on the residual of the pair after the wanted ones, which would otherwise grow stale
    until it overtakes them unseen.  Where the estimated error decides, that pair is taken to be as
    large as its residual allows, and needs the product only where it is hardly known.
    """
    space = Space(matvec, starts[0] if starts else random_start(0), max_basis)
    fewest = 0 if starts else COLD_PRODUCTS
    runner_up_due = len(starts) > k
    pending = list(starts[:max_products])
    attempts, converged, trusted = 0, False, -1  # products after which an estimate is trusted
    while True:
        if len(space) >= k and not pending:
            values, defects = space.ritz(k + 1)
            lengths = torch.linalg.vector_norm(defects, dim=1).cpu().double()
            scale = float(values.abs().max())
            errors = _estimated_errors(values, lengths, k)
            by_residual = bool((lengths[:k] <= tol * scale).all())
            if trusted < 0:
                stale = float(lengths[0]) > _STALE_RESIDUAL * scale
                trusted = _STALE_PRODUCTS if stale else 0
            exact = rtol > 0.0 and bool((errors <= rtol * scale).all())
            exact = exact and space.products >= trusted
            seen = len(lengths) > k and float(lengths[k]) <= _KNOWN * scale
            by_error = exact and seen
            converged = by_residual or by_error
            if len(space) >= space.size:
                break
            if space.products >= max_products:
                converged = converged and space.products >= fewest
                break
            chosen = k if exact and not seen else int(lengths[:k].argmax())
            if converged and space.products >= fewest:
                if by_error or not runner_up_due or len(defects) == k:
                    break
                runner_up_due, chosen = False, k
            if space.grow(defects[chosen]):
                if not space.finite:
                    return _not_finite(k, space.basis.rows, space.products)
                continue
        # Start vectors still to come, or the space is invariant and something may lie outside it.
        candidate = pending.pop(0) if pending else random_start(attempts)
        attempts += 1
        space.grow(candidate)
        if not space.finite:
            return _not_finite(k, space.basis.rows, space.products)

    vectors = space.vectors(k + _EXTRA_VECTORS)
    asymmetry = space.asymmetry / max(scale, torch.finfo(torch.float64).tiny)
    return _Ritz(values[:k], list(vectors), lengths[:k], space.products, converged, asymmetry)


def _estimated_errors(values: Tensor, residuals: Tensor, k: int) -> Tensor:
    """``residual^2 / gap`` of the first ``k`` pairs; infinite where the next may be as large.

    The next one is known to within its own residual only, and is taken at the upper end.
    """
    if len(residuals) <= k:
        return torch.full((k,), float("inf"), dtype=torch.float64, device="cpu")
    gaps = values[:k] - (values[k] + residuals[k])
    return torch.where(gaps > 0, residuals[:k] ** 2 / gaps, torch.inf)


def _power(
    matvec: Matvec,
    starts: Sequence[Tensor],
    random_start: Callable[[int], Tensor],
    k: int,
    tol: float,
    max_products: int,
) -> _Ritz:
    """Power iteration on ``A + shift``, deflated by the vectors found before.

    The shift is 0 until a negative eigenvalue is seen to dominate, or two of opposite sign tie.
    Deflated residuals of ``tol/sqrt(k)`` bound each pair's own residual by ``tol``: it has in
    addition the products with the residuals of the vectors found before.
    """
    products, shift, magnitude, wrong_ends = 0, 0.0, 0.0, 0
    reach = tol / math.sqrt(k)
    found: list[Tensor] = []
    values: list[float] = []
    residuals: list[float] = []
    for index in range(k):
        start = starts[index] if index < len(starts) else random_start(index)
        previous = _rows(found, start)
        vector = orthonormal(start, previous)
        attempt = 0
        while vector is None:  # a start inside the span of what was found
            attempt += 1
            vector = orthonormal(random_start(k + attempt), previous)
        defect, stalled, last_length, wrong_end = float("inf"), 0, 0.0, False
        fewest = 0 if index < len(starts) else products + COLD_PRODUCTS
        budget = max_products - (k - 1 - index)  # at least one product for each that follows
        while products < budget:
            image = matvec(vector)
            products += 1
            if not bool(image.isfinite().all()):
                return _not_finite(k, _rows([*found, vector], vector), products)
            value = float(vector @ image)
            measured, wrong_end = vector, False
            residual = float(torch.linalg.vector_norm(image - value * vector))
            length = float(torch.linalg.vector_norm(image))
            deflated = without(image, previous)
            last_defect = defect
            defect = float(torch.linalg.vector_norm(deflated - value * vector))
            magnitude = max(magnitude, abs(value))
            # A residual that grows again is a larger eigenvalue on its way up.
            near = defect <= reach * magnitude and defect <= last_defect
            stalled = stalled + 1 if abs(length - last_length) <= 1e-3 * length else 0
            last_length = length
            if value < 0.0 and (near or stalled >= 5) and shift < magnitude:
                # A negative eigenvalue has the largest magnitude: lift all above zero.  This vector
                # has next to nothing left of the wanted one.
                shift, fewest = magnitude, products + COLD_PRODUCTS
                fresh = orthonormal(random_start(k + products), previous)
                vector, defect = (vector if fresh is None else fresh), float("inf")
                stalled, wrong_end = 0, True
                continue
            if near and products >= fewest:
                break
            if stalled >= 5 and shift < length:
                shift = length  # two eigenvalues of opposite sign and equal magnitude
            step = orthonormal(deflated + shift * vector, previous)
            if step is None:
                break
            vector = step
        found.append(measured)
        values.append(value)
        residuals.append(residual)
        wrong_ends += wrong_end
    order = sorted(range(k), key=lambda i: -values[i])
    sorted_values, final = (
        torch.tensor([numbers[i] for i in order], dtype=torch.float64, device="cpu")
        for numbers in (values, residuals)
    )
    return _Ritz(
        sorted_values,
        [found[i] for i in order],
        final,
        products,
        bool((final <= tol * magnitude).all()) and wrong_ends == 0,
    )


def _not_finite(k: int, basis: Tensor, products: int) -> _Ritz:
    nan = torch.full((k,), float("nan"), dtype=torch.float64, device="cpu")
    zero = torch.zeros_like(basis[0])
    return _Ritz(nan, [zero] * k, nan.clone(), products, False)


def _rows(vectors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(vectors)) if vectors else like.new_zeros(0, like.numel())


def _start_vectors(layout: Layout, k: int, init: Vector | EigenResult | None) -> list[Tensor]:
    if init is None:
        return []
    if not isinstance(init, EigenResult):
        check_mapping("", "init", init, "a vector (name -> tensor), an EigenResult, or None")
        start = layout.flatten(init)
        if not bool(start.isfinite().all()) or not bool(start.any()):
            raise ValueError("init is zero or not finite: expected a direction")
        return [start]
    known = [*init.eigenvectors, *init.subspace][: k + _EXTRA_VECTORS]
    vectors = [layout.flatten(v) for v in known]
    return [v for v in vectors if 0.0 < float(torch.linalg.vector_norm(v)) < math.inf]


def _inverse_root(layout: Layout, preconditioner: Mapping[str, Tensor | float]) -> Tensor:
    words = "a mapping from parameter name to tensor or number, or None"
    check_mapping("", "preconditioner", preconditioner, words)
    ones: dict[str, Tensor | float] = dict.fromkeys(layout.shapes, 1.0)
    flat = layout.flatten({**ones, **preconditioner})
    if not bool((flat > 0).all()):
        low = float(flat.nan_to_num(nan=-math.inf).min())
        raise ValueError(
            f"preconditioner: expected positive entries only, its lowest is "
            f"{'nan' if low == -math.inf else f'{low:.3g}'}"
        )
    return flat.rsqrt()


def _basis_size(k: int, size: int) -> int:
    return max(2 * k + 4, min(_MOST_VECTORS + k, _MOST_ENTRIES // (2 * size)))


def _check_arguments(
    k: int,
    which: str,
    method: str,
    tol: float,
    max_hvps: int,
    rtol: float,
    max_basis: int | None,
    size: int,
) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
        words = f"expected an integer from 1 to the {size} parameters"
        raise ValueError(f"{quoted('', 'k', k)}: {words}")
    if which not in ("LA", "SA"):
        raise ValueError(
            f"{quoted('', 'which', which)}: expected 'LA' (largest) or 'SA' (smallest)"
        )
    check_choice("", "method", method, ("lanczos", "power"))
    check_number("", "tol", tol, "a number > 0, not infinite", lambda x: 0.0 < x < math.inf)
    check_number("", "rtol", rtol, "a number from 0 to 1", lambda x: 0.0 <= x < 1.0)
    for name, value, least, words in (
        ("max_hvps", max_hvps, k, f"at least k={k} products"),
        ("max_basis", max_basis, 2 * k + 4, f"at least 2k + 4 = {2 * k + 4}, or None"),
    ):
        if value is None and name == "max_basis":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{quoted('', name, value)}: expected {words}")
