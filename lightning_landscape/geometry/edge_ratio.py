"""The ratio of the curvature to the optimizer's edge of stability."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_landscape.geometry.checks import check_objective, quoted
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.matvec import (
    FlatHessian,
    HessianLike,
    Matvec,
    flat_products,
)
from lightning_landscape.geometry.stability import StabilityEdge
from lightning_landscape.geometry.vectors import Layout, Vector


@dataclass(frozen=True)
class EdgeRatio:
    """The ratio, and the solution of its eigenvalue problem if one had to be solved.

    Attributes:
        ratio: ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``; 1 is the edge.
        solved: the eigenvalues of that matrix; ``None`` if those of ``H`` were sufficient.
        residual: half an eigenvalue of that matrix lies within this distance of the ratio.
    """

    ratio: float
    solved: EigenResult | None
    residual: float


def edge_ratio(
    objective: HessianLike,
    edge: StabilityEdge,
    plain: EigenResult,
    *,
    init: Vector | EigenResult | None = None,
    method: Literal["lanczos", "power"] = "lanczos",
    tol: float = 1e-2,
    max_hvps: int = 50,
    rtol: float = 0.0,
    hint: Vector | None = None,
) -> EdgeRatio:
    r"""``lambda_max(S^1/2 (H + wd) S^1/2) / 2`` for the effective step ``S`` of the optimizer.

    Args:
        objective: the loss, or anything with ``params`` and ``hvp``.
        edge: the result of :func:`stability_edge` for these parameters, and possibly others.
        plain: the top eigenvalues of ``H``, sufficient if all parameters share one step size.
        init: the previous ``solved``, for a warm start; or a vector.
        method: as in :func:`top_eigenvalues`, like ``tol``, ``max_hvps``, ``rtol`` and ``hint``.

    Cost: nothing for SGD and variants with one group; otherwise one eigenvalue problem.

    Raises:
        ValueError: no edge is known, or not for all of the objective's parameters.
    """
    check_objective(objective, "params", "hvp")
    if not isinstance(edge, StabilityEdge):
        raise TypeError(f"{quoted('', 'edge', edge)}: expected what stability_edge returns")
    if not isinstance(plain, EigenResult):
        raise TypeError(f"{quoted('', 'plain', plain)}: expected what top_eigenvalues returns")
    if not edge.scale:
        raise ValueError(f"edge has no scale: {edge.note}")
    missing = [name for name in objective.params if name not in edge.scale]
    if missing:
        raise ValueError(
            f"edge has no scale for {missing[:4]}: expected one for each of the objective's "
            f"parameters, stability_edge(optimizers, objective.params)"
        )
    shared = shared_step(objective, edge)
    if shared is not None:
        step, decay = shared
        ratio = step * (float(plain.eigenvalues[0]) + decay) / 2
        return EdgeRatio(ratio, None, step * float(plain.residuals[0]) / 2)
    solved = top_eigenvalues(
        _DescentHessian(objective, edge),
        method=method,
        tol=tol,
        max_hvps=max_hvps,
        init=init,
        rtol=rtol,
        hint=hint,
        preconditioner={name: _inverse(edge.scale[name]) for name in objective.params},
    )
    return EdgeRatio(float(solved.eigenvalues[0]) / 2, solved, float(solved.residuals[0]) / 2)


def shared_step(objective: HessianLike, edge: StabilityEdge) -> tuple[float, float] | None:
    """Effective step and weight decay if all parameters share them, else None."""
    step = _common_number({name: edge.scale[name] for name in objective.params})
    decay = _common_number({name: edge.weight_decay[name] for name in objective.params})
    return None if step is None or decay is None or edge.maximize else (step, decay)


class _DescentHessian(FlatHessian):
    """The Hessian of what the optimizer minimizes: with weight decay, of -L if it maximizes."""

    def __init__(self, objective: HessianLike, edge: StabilityEdge) -> None:
        self.params = objective.params
        self._objective = objective
        self._layout = Layout(self.params)
        decay = {name: edge.weight_decay.get(name, 0.0) for name in self.params}
        self._decay = self._layout.flatten(decay)
        self._sign = -1.0 if edge.maximize else 1.0

    @contextlib.contextmanager
    def products(self) -> Iterator[Matvec]:
        with flat_products(self._objective, self._layout) as product:
            yield lambda flat: product(flat).mul_(self._sign).addcmul_(self._decay, flat)

    def hvp(self, vector: Vector) -> Mapping[str, Tensor]:
        with self.products() as product:
            return self._layout.unflatten(product(self._layout.flatten(vector)))


def _common_number(values: Mapping[str, Tensor | float]) -> float | None:
    distinct = {value for value in values.values() if not isinstance(value, Tensor)}
    tensors = any(isinstance(value, Tensor) for value in values.values())
    return distinct.pop() if len(distinct) == 1 and not tensors else None


def _inverse(scale: Tensor | float) -> Tensor | float:
    if isinstance(scale, Tensor):
        return scale.reciprocal()
    return 1.0 / scale if scale > 0.0 else float("inf")
