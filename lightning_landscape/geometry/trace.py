"""Trace and Frobenius norm of the Hessian and traces of its blocks, by Hutchinson's method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_landscape.geometry.blocks import names_by_block
from lightning_landscape.geometry.checks import check_objective
from lightning_landscape.geometry.estimate import Estimate, check_samples, mean_and_stderr
from lightning_landscape.geometry.matvec import HessianLike, flat_products
from lightning_landscape.geometry.vectors import Layout, inner, random_signs, seed_from


@dataclass(frozen=True)
class TraceEstimate(Estimate):
    """The trace, and other estimates from the same products.

    Attributes:
        frobenius: ``||H||_F``, the square root of the sum of squared eigenvalues.
        blocks: the trace of each diagonal block; they add up to ``value`` if every parameter is in
            a block.
    """

    frobenius: Estimate
    blocks: dict[str, Estimate]


def hessian_trace(
    objective: HessianLike,
    samples: int = 30,
    *,
    blocks: Mapping[str, str] | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    r"""The trace of the Hessian, of each of its blocks, and its Frobenius norm (Hutchinson).

    .. math:: tr(H) = E[v'Hv], \quad tr(H_{bb}) = E[v_b'(Hv)_b], \quad \|H\|_F^2 = E[\|Hv\|^2],
       \quad v_i = \pm 1

    With random signs ``v`` the diagonal of ``H`` adds no variance.

    Args:
        objective: the loss, or anything with ``params`` and ``hvp``.
        samples: products to average over, at least 2.  30 give the trace of a small network to
            3 to 4 %; the error decreases with their square root.
        blocks: parameter name -> block; names that are missing belong to none.  Default: one block
            per module, :func:`module_blocks`.
        generator: seeds the signs.  Without one they are the same in every call, so that a change
            of the result is a change of the Hessian.

    Returns:
        A :class:`TraceEstimate`.  ``value +- 2 stderr`` covered the truth 92 to 94 % of the time
        at 5 to 30 samples of a spread-out spectrum; where one direction carries the Hessian the
        samples are skewed, and it was 85 % at 5, 91 % at 30.

    Raises:
        ValueError: fewer than 2 samples, or a block for a name that is no trainable parameter.

    Cost: one HVP, about 2 gradients, per sample; the norm and the blocks cost no more.

    Source: Hutchinson 1989; Yao et al., PyHessian, 2020, section 3.

    Example:
        >>> from lightning_landscape.geometry.objective import Objective
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> loss = Objective(lambda: (torch.tensor([2.0, 4.0, -1.0]) * w**2).sum() / 2, {"w": w})
        >>> found = hessian_trace(loss, samples=5)  # a diagonal Hessian leaves no error
        >>> found.value, found.stderr, round(found.frobenius.value**2, 4)
        (5.0, 0.0, 21.0)
    """
    check_objective(objective, "params", "hvp")
    check_samples(samples)
    params = objective.params
    groups = names_by_block(params, blocks)
    seed = seed_from(generator)
    layout = Layout(params)
    rows = []
    with flat_products(objective, layout) as product:
        for index in range(samples):
            flat = layout.flatten(random_signs(params, seed + index))
            signs, image = layout.unflatten(flat), layout.unflatten(product(flat))
            parts = [inner({n: signs[n] for n in names}, image) for names in groups.values()]
            rows.append([inner(signs, image), inner(image, image), *parts])
    means, errors = mean_and_stderr(torch.tensor(rows, dtype=torch.float64, device="cpu"))
    trace, square, *traces = [
        Estimate(value, error, len(rows), len(rows))
        for value, error in zip(means.tolist(), errors.tolist(), strict=True)
    ]
    return TraceEstimate(
        trace.value,
        trace.stderr,
        trace.samples,
        trace.hvps,
        frobenius=_root(square),
        blocks=dict(zip(groups, traces, strict=True)),
    )


def hessian_frobenius(
    objective: HessianLike, samples: int = 30, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""The Frobenius norm of the Hessian, ``||H||_F = sqrt(E ||Hv||^2)`` over random signs ``v``.

    Args:
        objective: the loss, or anything with ``params`` and ``hvp``.
        samples: products to average over, at least 2.
        generator: seeds the signs; the same signs every time without one.

    Returns:
        An :class:`Estimate`; ``stderr`` is that of the mean square over ``2 ||H||_F`` (the delta
        method).  Where no eigenvalue is negative, ``trace^2 / frobenius^2`` counts the directions
        that carry the curvature.

    Raises:
        ValueError: fewer than 2 samples.

    Cost: one HVP per sample.  :func:`hessian_trace` returns the same as ``frobenius``.

    Example:
        >>> from lightning_landscape.geometry.objective import Objective
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> loss = Objective(lambda: 1.5 * w[0] ** 2 - 2 * w[1] ** 2, {"w": w})
        >>> hessian_frobenius(loss, samples=3).value
        5.0
    """
    return hessian_trace(objective, samples, generator=generator).frobenius


def _root(square: Estimate) -> Estimate:
    """The square root, with its standard error to first order."""
    value = math.sqrt(square.value)
    stderr = square.stderr / (2 * value) if value != 0.0 else 0.0
    return Estimate(value, stderr, square.samples, square.hvps)
