"""Extreme eigenvalues of a symmetric operator from matrix-vector products.

``top_eigenvalues`` converts the problem to flat vectors; lanczos.py and power.py solve it with a
``matvec`` function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from lightning_landscape.geometry.lanczos import Start, Tolerance, lanczos
from lightning_landscape.geometry.matvec import HessianLike, Matvec, flat_products
from lightning_landscape.geometry.power import power
from lightning_landscape.geometry.vectors import Layout, Vector, random_vector, seed_from

# Limits of the basis: vectors, and entries of the basis and its images together.
_MOST_VECTORS, _MOST_ENTRIES = 16, 2**30

# Seeds reserved for one solution, so that a warm-started one draws other random vectors.
_DRAWS = 1000


@dataclass(frozen=True)
class EigenResult:
    """Eigenvalues with the evidence for them.

    Attributes:
        eigenvalues: ``(k,)`` float64, the wanted end first.
        eigenvectors: ``k`` unit vectors, name -> tensor.  With a preconditioner ``P``: those of
            ``P^-1/2 H P^-1/2``.
        residuals: ``(k,)`` float64, ``||H v - theta v||``: some eigenvalue lies within this
            distance of theta.  (It does not say that it is the largest one.)
        hvps: number of products with ``H``.
        converged: every residual is at most ``tol`` times its own ``|theta|``, or every estimated
            error at most ``rtol`` times that; or they are below a floor, see ``at_floor``.  From a
            random start at least 8 products are required, because a smaller eigenvalue may
            converge first.
        asymmetry: the largest ``|u'Hv - v'Hu|`` over pairs of unit vectors, relative to the largest
            ``|Ritz value|``.  A value beyond rounding means that a second derivative is wrong:
            those of some kernels are silently incomplete.  0 for ``"power"``, which cannot tell.
        checked: a search outside the kept vectors ended below the last of the eigenvalues: no
            other Ritz value plus three times its residual is above it.  ``False`` if ``max_hvps``
            did not suffice for the search: there may be a larger eigenvalue.
        at_floor: a pair counts as converged because its residual (or error) is below the floor of
            1e-3 times the largest ``|Ritz value|`` (``tol`` times that, if ``tol`` is smaller); its
            accuracy is that floor, not ``tol`` times its own size.
        outside: the last vector of the search outside; the next solution continues from it.
        warm_starts: number of consecutive solutions that were started from the one before.
    """

    eigenvalues: Tensor
    eigenvectors: tuple[dict[str, Tensor], ...]
    residuals: Tensor
    hvps: int
    converged: bool
    asymmetry: float = 0.0
    checked: bool = False
    at_floor: bool = False
    outside: dict[str, Tensor] | None = field(default=None, repr=False)
    warm_starts: int = 0

    def fits(self, params: Mapping[str, Tensor]) -> bool:
        """Whether it can warm-start a solution over ``params``: same names, same shapes."""
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
    hint: Vector | None = None,
) -> EigenResult:
    r"""The ``k`` largest (or smallest) *algebraic* eigenvalues of the Hessian.

    Args:
        objective: an :class:`~lightning_landscape.Objective`, or anything with ``params`` and
            ``hvp``.
        k: how many, counted with multiplicity.
        which: ``"LA"`` the largest, ``"SA"`` the smallest.
        method: ``"lanczos"``: Rayleigh-Ritz on a Krylov space with full reorthogonalisation,
            started from ``k`` vectors so that multiple eigenvalues are found; it stores two vectors
            per product, up to ``2 max_basis``.  ``"power"``: power iteration, one vector after the
            other, on a shifted operator if a negative eigenvalue has the largest magnitude; it
            stores ``k + 3`` vectors in total and needs several times as many products.
        tol: stop when ``||H v - theta v|| <= tol * |theta|`` for each pair, or below 1e-3 times the
            largest ``|Ritz value|``.  The error of theta itself is about ``residual^2 / gap``, so
            1e-2 usually gives four digits.  ``"power"`` stops at a third of it.
        max_hvps: hard cap on products, at least ``k``.
        init: the start: a vector of any length, or the previous result.
        preconditioner: ``P > 0``, name -> tensor or number: eigenvalues of
            ``P^-1/2 H P^-1/2``.  A missing name means 1.
        generator: seeds the random start; the same start every time without one.
        rtol: stop earlier, once the estimated error of every eigenvalue is at most ``rtol`` times
            its own ``|theta|`` (or the floor).  The estimate is ``residual^2 / gap``, with the gap
            to the next eigenvalue taken as small as that one's own residual allows.  0: the
            residual alone decides, as it always does for ``"power"``.
        max_basis: maximum number of basis vectors; when it is reached the basis is restarted with
            the leading Ritz vectors, which costs no product.  ``None``: 16, fewer if the basis and
            its images would exceed 2^30 numbers, but at least ``2k + 4``.
        hint: a vector that may contain a direction that is new since ``init``, e.g. the gradient:
            a part of the search outside.  Its length does not matter; with a preconditioner it is
            multiplied by ``P^-1/2``.

    Each solution also searches outside the vectors that it was started from: along the last vector
    of the previous search, a random vector and the hint, and then along every Ritz vector whose
    value plus three residuals exceeds the wanted one, for up to 4 products after the first.  It
    takes at least 4 in total where the largest eigenvalue has changed by more than 30 %.
    Limitation: an eigenvalue that has grown since the last solution, in a part of the network that
    is decoupled from all kept vectors, may be found one solution late; benchmarks/blindness.py
    measures how often.

    Returns:
        An :class:`EigenResult`.  ``converged`` is False if it did not converge; that is no error.
        The values are NaN if a product contains NaN or infinity.

    Raises:
        ValueError: an argument is out of range, or vectors do not match the parameters.

    Cost: one HVP, about 2 gradients, per product; warm-started during training about 5 products, 4
    with ``rtol=5e-3``, of which one or two are for the search outside.

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
    check_hint(hint)
    _check_arguments(k, which, method, tol, max_hvps, rtol, max_basis, layout.size)
    sign = 1.0 if which == "LA" else -1.0
    half = None if preconditioner is None else _inverse_root(layout, preconditioner)

    def matvec(product: Matvec, flat: Tensor) -> Tensor:
        image = product(flat if half is None else half * flat)
        if half is not None:
            image.mul_(half)
        return image if sign == 1.0 else image.neg_()

    previous = init if isinstance(init, EigenResult) else None
    warm_starts = 0 if previous is None else previous.warm_starts + 1
    first = seed_from(generator) + _DRAWS * warm_starts

    def random_start(index: int) -> Tensor:
        return layout.flatten(random_vector(objective.params, first + index))

    start = Start(
        kept=_start_vectors(layout, k, init),
        outside=_flat(layout, None if previous is None else previous.outside),
        hint=_flat(layout, hint, half),
        random=random_start,
        top=None if previous is None else sign * float(previous.eigenvalues[0]),
    )
    tolerance = Tolerance(tol, rtol)
    with flat_products(objective, layout) as product:
        symmetric = partial(matvec, product)
        if method == "lanczos":
            most = _basis_size(k, layout.size) if max_basis is None else max_basis
            found = lanczos(symmetric, start, k, tolerance, max_hvps, most)
        else:
            found = power(symmetric, start, k, tolerance, max_hvps)
    vectors = [layout.unflatten(v) for v in found.vectors]
    return EigenResult(
        eigenvalues=sign * found.values,
        eigenvectors=tuple(vectors),
        residuals=found.residuals,
        hvps=found.products,
        converged=found.converged,
        asymmetry=found.asymmetry,
        checked=found.checked,
        at_floor=found.at_floor,
        outside=None if found.outside is None else layout.unflatten(found.outside),
        warm_starts=warm_starts,
    )


def check_hint(hint: Vector | None) -> None:
    """Raise unless ``hint`` is a vector or None."""
    if hint is not None:
        check_mapping("", "hint", hint, "a vector (name -> tensor), or None")


def _flat(layout: Layout, vector: Vector | None, scale: Tensor | None = None) -> Tensor | None:
    """``vector`` as a flat tensor, times ``scale``; None if it is zero or not finite."""
    if vector is None:
        return None
    flat = layout.flatten(vector) if scale is None else layout.flatten(vector) * scale
    return flat if 0.0 < float(torch.linalg.vector_norm(flat)) < math.inf else None


def _start_vectors(layout: Layout, k: int, init: Vector | EigenResult | None) -> list[Tensor]:
    if init is None:
        return []
    if not isinstance(init, EigenResult):
        check_mapping("", "init", init, "a vector (name -> tensor), an EigenResult, or None")
        start = layout.flatten(init)
        if not bool(start.isfinite().all()) or not bool(start.any()):
            raise ValueError("init is zero or not finite: expected a direction")
        return [start]
    known = (_flat(layout, vector) for vector in init.eigenvectors)
    return [flat for flat in known if flat is not None]


def _inverse_root(layout: Layout, preconditioner: Mapping[str, Tensor | float]) -> Tensor:
    expected = "a mapping from parameter name to tensor or number, or None"
    check_mapping("", "preconditioner", preconditioner, expected)
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
        expected = f"expected an integer from 1 to the {size} parameters"
        raise ValueError(f"{quoted('', 'k', k)}: {expected}")
    if which not in ("LA", "SA"):
        raise ValueError(
            f"{quoted('', 'which', which)}: expected 'LA' (largest) or 'SA' (smallest)"
        )
    check_choice("", "method", method, ("lanczos", "power"))
    check_number("", "tol", tol, "a number > 0, not infinite", lambda x: 0.0 < x < math.inf)
    check_number("", "rtol", rtol, "a number from 0 to 1", lambda x: 0.0 <= x < 1.0)
    for name, value, least, expected in (
        ("max_hvps", max_hvps, k, f"at least k={k} products"),
        ("max_basis", max_basis, 2 * k + 4, f"at least 2k + 4 = {2 * k + 4}, or None"),
    ):
        if value is None and name == "max_basis":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{quoted('', name, value)}: expected {expected}")
