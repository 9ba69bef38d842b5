"""All numbers of the README's table of costs, in one run.

    make bench                                     40 minutes, on an idle machine
    python -m benchmarks --quick                   the same in little time, at one point
    python -m benchmarks --only eigenvalue-mlp slices

One thread, freed memory kept by the process; times are ratios taken side by side.  Ends with one
section of markdown.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.common import Section, keep_memory, summary
from benchmarks.eigenvalue import eigenvalue
from benchmarks.networks import NETWORKS
from benchmarks.pictures import pictures
from benchmarks.slices import slices

Part = Callable[[int | None, str], Section]

PARTS: dict[str, Part] = {
    **{f"eigenvalue-{name}": functools.partial(eigenvalue, name) for name in NETWORKS},
    "slices": slices,
    "pictures": pictures,
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PEERS = (
    "PyHessian",
    "hessian-eigenthings",
    "curvlinops-for-pytorch",
    "scipy",
    "loss-landscapes",
    "Landscaper",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--points", type=int, help="measure at so many of a run at most")
    parser.add_argument("--quick", action="store_true", help="one point: to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    chosen = parser.parse_args()
    # SciPy's BLAS threads keep spinning after eigsh, which slows down what follows.
    if any(os.environ.get(name) != "1" for name in THREADS):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks", *sys.argv[1:]],
            {**os.environ, **dict.fromkeys(THREADS, "1")},
        )
    torch.set_num_threads(1)
    keep_memory()
    sections = []
    for name in chosen.only:
        started = time.perf_counter()
        sections.append(PARTS[name](1 if chosen.quick else chosen.points, chosen.device))
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    texts = [section.text for section in sections]
    print("\n".join([_heading(chosen.device), summary(sections), *texts]))


def _heading(device: str) -> str:
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU, one thread"
    versions = [f"{name} {_version(name)}" for name in PEERS]
    return (
        f"## Costs, beside the peers\n\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {where}. "
        f"{', '.join(versions)}.\n"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    main()
