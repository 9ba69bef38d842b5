"""Eigenvalues of known spectra: wrong ones that are marked as converged, and failures to converge.

    python -m benchmarks.spectra                  500 spectra for each row, 3 minutes of one core
    python -m benchmarks.spectra --spectra 40     the same on fewer

Random orthogonal bases, float32, 300 dimensions.  Each spectrum is a bulk with one of these ends:
clusters, multiple eigenvalues, a long negative end, a long positive end, crowded tops, a continuous
edge.  Solved from a cold start with the callback's tolerances (tol 1e-2, rtol 5e-3), at most 60
products for k = 1 and 40 k above.  "Off": the error of the worst of the k pairs is more than tol
times its own value, or more than the floor of 1e-3 times the largest in magnitude.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import table
from lightning_landscape.geometry import top_eigenvalues

SIZE, TOL, RTOL, FLOOR = 300, 1e-2, 5e-3, 1e-3
Random = np.random.Generator
Spectrum = np.ndarray


class Matrix:
    """A symmetric matrix with the interface that ``top_eigenvalues`` needs."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.params: dict[str, Tensor] = {"w": torch.nn.Parameter(torch.zeros(len(matrix)))}

    def hvp(self, vector: object) -> dict[str, Tensor]:
        return {"w": self.matrix @ vector["w"]}  # type: ignore[index]


def bulk(random: Random) -> Spectrum:
    return 0.1 * random.standard_normal(SIZE)


def clusters(random: Random) -> Spectrum:
    values = bulk(random)
    for start, centre in ((0, 5.0), (4, 3.0), (8, 1.5)):
        values[start : start + 4] = centre * (1 + 0.02 * random.standard_normal(4))
    return values


def multiple(random: Random) -> Spectrum:
    values = bulk(random)
    values[: random.integers(2, 12)] = 5.0
    return values


def long_negative_end(random: Random) -> Spectrum:
    values = bulk(random)
    count = random.integers(1, 5)
    values[:count] = -100 * random.uniform(0.3, 1, count)
    values[count : count + 12] = [3.0, *random.uniform(0.5, 2.9, 11)]
    return values


def long_positive_end(random: Random) -> Spectrum:
    values = random.uniform(-0.3, 0.3, SIZE)
    values[:5] = random.uniform(5, 10, 5)
    return values


def crowded(random: Random) -> Spectrum:
    values = bulk(random)
    values[:15] = 5.0 * 0.95 ** np.arange(15) * (1 + 0.01 * random.standard_normal(15))
    return values


def decaying(random: Random) -> Spectrum:
    signs = random.choice([-1.0, 1.0], SIZE, p=[0.2, 0.8])
    return 10.0 * signs * np.arange(1, SIZE + 1) ** -random.uniform(0.7, 1.5)


KINDS = (clusters, multiple, long_negative_end, long_positive_end, crowded, decaying)


@dataclass
class Row:
    """The results of one setting."""

    wrong: int = 0
    converged: int = 0
    unchecked: int = 0
    at_floor: int = 0
    products: list[int] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)


def solve(
    kind: Callable[[Random], Spectrum],
    seed: int,
    k: int,
    which: Literal["LA", "SA"],
    preconditioned: bool,
    method: Literal["lanczos", "power"],
    row: Row,
) -> None:
    random = np.random.default_rng(seed)
    spectrum = kind(random)
    basis, _ = np.linalg.qr(random.standard_normal((SIZE, SIZE)))
    matrix = (basis * spectrum) @ basis.T
    scale = np.exp(random.uniform(-1, 1, SIZE)) if preconditioned else np.ones(SIZE)
    # With P = diag(scale^2) the eigenvalues of P^-1/2 (scale A scale) P^-1/2 are those of A.
    operator = Matrix(torch.tensor(scale[:, None] * matrix * scale, dtype=torch.float32))
    found = top_eigenvalues(
        operator,
        k,
        which=which,
        method=method,
        tol=TOL,
        rtol=RTOL,
        max_hvps=60 if k == 1 else 40 * k,
        preconditioner={"w": torch.tensor(scale**2, dtype=torch.float32)},
        generator=torch.Generator().manual_seed(seed),
    )
    true = np.sort(spectrum)[:k] if which == "SA" else np.sort(spectrum)[::-1][:k]
    allowed = np.maximum(TOL * np.abs(true), FLOOR * np.abs(spectrum).max())
    error = np.abs(found.eigenvalues.numpy() - true)
    row.products.append(found.hvps)
    row.converged += found.converged
    row.wrong += found.converged and bool((error > allowed).any())
    row.unchecked += found.converged and not found.checked
    row.at_floor += found.at_floor
    if not found.converged:
        row.unfinished.append(kind.__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectra", description=__doc__)
    parser.add_argument("--spectra", type=int, default=500, help="for each row")
    parser.add_argument("--method", choices=("lanczos", "power"), default="lanczos")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 3, 5, 7, 10])
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    cells = []
    for which in ("LA", "SA"):
        for preconditioned in (False, True):
            for k in given.ks:
                row = Row()
                for seed in range(given.spectra):
                    kind = KINDS[seed % len(KINDS)]
                    solve(kind, seed, k, which, preconditioned, given.method, row)
                cells.append([
                    which, "yes" if preconditioned else "no", str(k),
                    f"{row.wrong / max(row.converged, 1):.2%}",
                    f"{row.converged / given.spectra:.1%}",
                    f"{row.unchecked / max(row.converged, 1):.1%}",
                    f"{row.at_floor / given.spectra:.1%}",
                    f"{statistics.median(row.products):g}",
                    ", ".join(f"{name} {row.unfinished.count(name)}"
                              for name in dict.fromkeys(row.unfinished)) or "none",
                ])  # fmt: skip
    head = ["end", "preconditioned", "k", "converged but off", "converged", "of these unchecked"]
    head += ["at the floor", "products, median", "not converged"]
    print(table(f"Known spectra, {given.spectra} a row, {given.method}", head, cells))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
