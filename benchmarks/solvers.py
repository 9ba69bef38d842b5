"""The top eigenvalue by this package and by its peers, each called as documented.

Choices for a fair comparison:

- All get the same module, in the same mode, the same probe as one batch, float32, one thread.
  Building the operator is counted, because every measurement during training builds it again.
  Checks that run on top are off, ours and curvlinops' (``check_deterministic=False``).
- PyHessian: ``hessian(...).eigenvalues()`` with its defaults (power iteration, 1e-3 between two
  iterations).  It forces eval mode and returns the eigenvalue of largest *magnitude*.
- hessian-eigenthings: ``lanczos`` with its default of 20 steps, but asked for one pair only and not
  for its default of ten, and for ``which="LA"`` instead of the largest magnitude.
- curvlinops: its Hessian as a SciPy operator, ``eigsh(k=1, which="LA", tol=1e-2)``, otherwise
  defaults.
- "Tuned" lines give each peer the cheapest setting that we found among its own options, also a warm
  start where its interface takes one.  They are no defaults; look at their errors.
- Ours is ``top_eigenvalues`` with the settings of ``HessianMonitor()``, started from the last
  result as in live use (the first measurement is cold), and once more always cold.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from benchmarks.networks import Problem
from lightning_landscape import HessianMonitor
from lightning_landscape.geometry import (
    EigenResult,
    Objective,
    curvature_along,
    sam_sharpness,
    top_eigenvalues,
)

OURS, COLD = "ours, warm", "ours, cold"
PYHESSIAN, EIGENTHINGS, CURVLINOPS = (
    "PyHessian",
    "hessian-eigenthings Lanczos",
    "curvlinops + eigsh",
)

PACKAGES = {
    PYHESSIAN: "pyhessian",
    EIGENTHINGS: "hessian_eigenthings",
    CURVLINOPS: "curvlinops",
}


@dataclass(frozen=True)
class Found:
    """An eigenvalue and the Hessian-vector products it took."""

    value: float
    products: int


Solver = Callable[[], Found]


def solvers(problem: Problem, tuned: bool) -> tuple[dict[str, Solver], list[str]]:
    """The solvers by name, and one line for each peer that is not installed."""
    found: dict[str, Solver] = {
        OURS: _ours(problem, warm=True),
        COLD: _ours(problem, warm=False),
    }
    makers: dict[str, Callable[[Problem, Any, bool], dict[str, Solver]]] = {
        PYHESSIAN: _pyhessian,
        EIGENTHINGS: _eigenthings,
        CURVLINOPS: _curvlinops,
    }
    missing = []
    for peer, make in makers.items():
        try:
            package = importlib.import_module(PACKAGES[peer])
        except ImportError as error:
            missing.append(f"{peer} is left out: {error}.")
            continue
        found |= make(problem, package, tuned)
    if tuned:
        found["ours, power iteration, cold"] = _power(problem)
    return found, missing


def objective(problem: Problem) -> Objective:
    """As in a monitor, without repeated checks."""
    return Objective(problem.probe_loss, problem.params, check_deterministic=False)


def sharpness(problem: Problem) -> None:
    """What ``SharpnessMonitor`` measures by default; no eigenvalue."""
    one = objective(problem)
    curvature_along(one, one.gradient())
    sam_sharpness(one)


def _ours(problem: Problem, warm: bool) -> Solver:
    monitor = HessianMonitor()
    last: EigenResult | None = None

    def solve() -> Found:
        nonlocal last
        result = top_eigenvalues(
            objective(problem), monitor.k, init=last, **monitor._solver.settings()
        )
        last = result if warm else None
        return Found(float(result.eigenvalues[0]), result.hvps)

    return solve


def _power(problem: Problem) -> Solver:
    def solve() -> Found:
        result = top_eigenvalues(objective(problem), method="power", max_hvps=200)
        return Found(float(result.eigenvalues[0]), result.hvps)

    return solve


def _pyhessian(problem: Problem, package: Any, tuned: bool) -> dict[str, Solver]:
    inside: Any = importlib.import_module("pyhessian.hessian")
    product = inside.hessian_vector_product

    def solver(**settings: float) -> Solver:
        def solve() -> Found:
            products = 0

            def counted(*args: Any) -> Any:
                nonlocal products
                products += 1
                return product(*args)

            inside.hessian_vector_product = counted
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's about create_graph
                    peer = package.hessian(
                        problem.module,
                        problem.loss,
                        data=problem.probe,
                        cuda=problem.device.type == "cuda",
                    )
                    values, _ = peer.eigenvalues(**settings)
            finally:
                inside.hessian_vector_product = product
            return Found(float(values[0]), products)

        return solve

    found = {PYHESSIAN: solver()}
    if tuned:
        found[f"{PYHESSIAN}, tuned: tol=1e-2"] = solver(tol=1e-2)
    return found


def _eigenthings(problem: Problem, package: Any, tuned: bool) -> dict[str, Solver]:
    def solver(steps: int) -> Solver:
        def solve() -> Found:
            operator = package.HessianOperator(
                problem.module, [problem.probe], package.supervised_loss(problem.loss)
            )
            result = package.lanczos(operator, k=1, max_iter=steps, which="LA", seed=0)
            return Found(float(result.eigenvalues[0]), result.iterations)

        return solve

    found = {EIGENTHINGS: solver(20)}
    if tuned:
        found[f"{EIGENTHINGS}, tuned: 8 steps"] = solver(8)
    return found


def _curvlinops(problem: Problem, package: Any, tuned: bool) -> dict[str, Solver]:
    def solver(warm: bool = False, **settings: Any) -> Solver:
        last: np.ndarray | None = None

        def solve() -> Found:
            nonlocal last
            hessian = package.HessianLinearOperator(
                problem.module,
                problem.loss,
                list(problem.module.parameters()),
                [problem.probe],
                check_deterministic=False,
            ).to_scipy()
            products = 0

            def counted(vector: np.ndarray) -> np.ndarray:
                nonlocal products
                products += 1
                result: np.ndarray = hessian @ vector
                return result

            operator = LinearOperator(hessian.shape, matvec=counted, dtype=hessian.dtype)
            start = last if warm else None
            values, vectors = eigsh(operator, k=1, which="LA", tol=1e-2, v0=start, **settings)
            last = vectors[:, 0]
            return Found(float(values[0]), products)

        return solve

    found = {CURVLINOPS: solver()}
    if tuned:
        found[f"{CURVLINOPS}, tuned: warm, ncv=5"] = solver(warm=True, ncv=5)
    return found
