"""The settings and warm starts of an eigenvalue solver during a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lightning_landscape.geometry.edge_ratio import EdgeRatio, edge_ratio
from lightning_landscape.geometry.eigen import EigenResult
from lightning_landscape.geometry.lanczos import COLD_PRODUCTS
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.stability import StabilityEdge
from lightning_landscape.geometry.vectors import Vector, as_complex, inner, norm, real

# The squared cosine above which the top eigenvector of H replaces the last one of the ratio.
_NEAR = 0.5


class Solver:
    """Starts each eigenvalue problem of a callback from its last result.

    Attributes:
        limit: ``max_hvps`` of the last problem, lowered if the budget requires it.
    """

    def __init__(
        self,
        method: Literal["lanczos", "power"],
        tol: float,
        rtol: float | None,
        max_hvps: int,
    ) -> None:
        self.limit = max_hvps
        self._settings = {"method": method, "tol": tol, "rtol": tol / 2 if rtol is None else rtol}
        self._max_hvps = max_hvps
        self._last: dict[str, EigenResult] = {}
        self._products, self._problems, self._fewest = math.inf, 0, 0

    def limit_products(self, products: float, problems: int = 0, fewest: int = 0) -> None:
        """Limit the products of this measurement, of all its ``problems`` together.

        Each may use what those before it have left, but for the ``fewest`` that each later one
        needs.
        """
        self._products, self._problems, self._fewest = products, problems, fewest

    def lower_limit(self, products: float) -> None:
        """Limit the products of the remaining problems, if they are limited to more."""
        self._products = min(self._products, products)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of ``top_eigenvalues`` for the next problem."""
        most = self._products - self._fewest * max(self._problems - 1, 0)
        self.limit = int(min(self._max_hvps, max(most, self._fewest)))
        return {**self._settings, "max_hvps": self.limit}

    @property
    def is_limited(self) -> bool:
        """Whether the limit of the last problem was below ``max_hvps``."""
        return self.limit < self._max_hvps

    def has_result(self, problem: str) -> bool:
        """Whether there is a last result of ``problem``."""
        return problem in self._last

    def start(self, problem: str, objective: Objective) -> EigenResult | None:
        """The last result, unless the trained parameters have changed (e.g. one was frozen)."""
        last = self._last.get(problem)
        return last if last is not None and last.fits(objective.params) else None

    def gradient(self, objective: Objective) -> dict[str, Tensor] | None:
        """A start for few products: the gradient is closer to the top than a random vector."""
        if self.settings()["max_hvps"] >= min(COLD_PRODUCTS, self._max_hvps):
            return None
        gradient = objective.gradient()
        return gradient if 0.0 < norm(gradient) < math.inf else None

    def block_starts(self, objective: Objective) -> dict[str, EigenResult]:
        """The last result of each block whose parameters are still trained."""
        return {
            problem.removeprefix("block "): last
            for problem, last in self._last.items()
            if problem.startswith("block ")
            and last.fits(
                {name: p for name, p in objective.params.items() if name in last.eigenvectors[0]}
            )
        }

    def store(self, problem: str, result: EigenResult) -> None:
        """Store a result as the start of the next solution, if it is finite."""
        self._products, self._problems = self._products - result.hvps, self._problems - 1
        self._last.pop(problem, None)
        if bool(result.eigenvalues.isfinite().all()):
            self._last[problem] = result

    def reset(self) -> None:
        """Drop all results."""
        self._last.clear()

    def ratio(
        self, problem: str, objective: Objective, edge: StabilityEdge, plain: EigenResult
    ) -> EdgeRatio:
        """The ratio to the edge; ``plain``: the eigenvalues of the Hessian itself."""
        start = _start_of_ratio(self.start(problem, objective), edge, plain)
        gradient = objective.gradient()
        found = edge_ratio(objective, edge, plain, init=start, hint=gradient, **self.settings())
        if found.solved is not None:
            self.store(problem, found.solved)
        return found

    def cut_off_warning(self, key: str) -> str:
        """Why there is no value where the budget ended the solver, and what to pass instead."""
        return (
            f"{key} is not logged: the eigenvalue solver had not converged after "
            f"{self.limit} products, the most that the budget of this run allows; "
            f"pass a larger max_overhead or grace_seconds, max_overhead=None for no limit, or a "
            f"smaller probe_samples; the next measurement continues from here"
        )

    def warning_for(
        self,
        key: str,
        value: float,
        residual: float,
        converged: bool,
    ) -> str:
        """Why a value may be inaccurate and what to pass instead, or an empty string."""
        if not converged and math.isfinite(value):
            tol = self._settings["tol"]
            return (
                f"the eigenvalue solver stopped at max_hvps={self.limit} before its residual fell "
                f"to {tol=}, so the value may be too low by about the residual, and no stopper and "
                f"no other callback is given it; raise max_hvps or tol"
            )
        if residual > abs(value):
            return (
                f"{key} is small compared with the largest eigenvalue seen, and not larger than "
                f"its residual ({value:.3g}, residual {residual:.3g}); for a more accurate value "
                f"pass a smaller tol, below 1e-3, rtol=0 and a larger max_hvps"
            )
        return ""


def _start_of_ratio(
    last: EigenResult | None, edge: StabilityEdge, plain: EigenResult
) -> Vector | EigenResult | None:
    """A start from ``S^1/2 v`` for the top eigenvector v of H, at the weights of this measurement.

    It is the image of ``S^-1/2 v`` under ``S^1/2 H S^1/2``, without a product.  A last result far
    from it is kept too, because it may belong to another part of the network.
    """
    if edge.maximize:
        return last
    top = {name: _scaled(v, edge.scale[name]) for name, v in plain.eigenvectors[0].items()}
    length = norm(top)
    if not 0.0 < length < math.inf:
        return last  # all effective steps are zero, or the solver diverged
    if last is None:
        return top
    near = inner(top, last.eigenvectors[0]) ** 2 > _NEAR * length**2
    return replace(last, eigenvectors=(top,) if near else (top, *last.eigenvectors))


def _scaled(tensor: Tensor, scale: Tensor | float) -> Tensor:
    """``S^1/2 v``; a complex tensor has a scale for each of its parts."""
    numbers = real(tensor) * scale**0.5
    return as_complex(numbers) if tensor.is_complex() else numbers
