"""What a picture takes to draw, and what the package adds to Lightning's own import."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Section, seconds, spread, table, verdict
from benchmarks.networks import mlp
from lightning_landscape import (
    Objective,
    filter_normalize,
    line_slice,
    plane_slice,
    random_direction,
)
from lightning_landscape.geometry.slices import Slice


def pictures(points: int | None = None, device: str = "cpu") -> Section:
    """Times from a slice to pixels, of slices along a real run; few where ``points`` are."""
    planes, rows = [], []
    problem = mlp(device)
    seeds = torch.Generator().manual_seed(0)
    drawn = [random_direction(problem.params, generator=seeds) for _ in range(2)]
    for index in problem.training(9):
        objective = Objective(problem.probe_loss, problem.params, check_deterministic=False)
        axes = [filter_normalize(direction, problem.params) for direction in drawn]
        facts = {"step": (index + 1) * problem.every}
        planes.append(plane_slice(objective, *axes, metadata=facts))
        rows.append({"step": facts["step"], "hessian/top_eigenvalue": 3.0 + index})
    line = line_slice(objective, axes[0], resolution=21, metadata=facts)
    drawing = _drawing(line, planes, rows, 1 if points else 5)
    return Section(drawing + "\n" + _import(3 if points else 5))


def _drawing(line: Slice, planes: list[Slice], rows: list[dict[str, Any]], repeats: int) -> str:
    from lightning_landscape import figures

    kinds: dict[str, Callable[[], Any]] = {
        "line": lambda: figures.line_figure(line),
        "plane": lambda: figures.plane_figure(planes[-1]),
        "filmstrip of nine planes": lambda: figures.filmstrip_figure(planes),
        "eigenvalue": lambda: figures.eigenvalue_figure(rows),
    }
    draw = {
        kind: (lambda make=make: figures.figure_to_image(make())) for kind, make in kinds.items()
    }
    first = seconds(draw["line"])
    times: dict[str, list[float]] = {kind: [] for kind in draw}
    for _ in range(repeats):
        for kind, function in draw.items():
            times[kind].append(seconds(function))
    return table(
        "Drawing, from numbers to pixels",
        ["picture", "seconds"],
        [
            ["loading what draws, when the first picture is due", f"{_loading():.2f}"],
            ["the first picture of a process", f"{first:.2f}"],
            *[[kind, spread(found, ".2f")] for kind, found in times.items()],
        ],
    )


def _loading() -> float:
    code = (
        f"import time, {_PACKAGE}; began = time.perf_counter(); import {_PACKAGE}.figures; "
        f"print(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _import(pairs: int) -> str:
    """Whole processes, in turn: with Lightning alone, and with the package (which imports it)."""
    added = []
    for _ in range(pairs):
        alone, ours = (_process(f"import {name}") for name in ("pytorch_lightning", _PACKAGE))
        added.append(ours - alone)
    text = table(
        "Import above Lightning's own",
        ["pairs of processes", "seconds added"],
        [[f"{pairs}", spread(added, ".2f")]],
    )
    bar = verdict("import, seconds added", statistics.median(added), 0.2, at_most=True)
    return f"{text}\n{bar}\n"


_PACKAGE = "lightning_landscape"


def _process(code: str) -> float:
    """Its processor time: the clock on the wall would tell what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
