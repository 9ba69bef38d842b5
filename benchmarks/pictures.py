"""Time to draw a figure, and import time of the package beyond Lightning's own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Section, seconds, spread, table, verdict
from benchmarks.networks import mlp
from lightning_landscape.geometry import (
    Objective,
    filter_normalize,
    line_slice,
    plane_slice,
    random_direction,
)
from lightning_landscape.geometry.slices import Slice


def pictures(points: int | None = None, device: str = "cpu") -> Section:
    """Times from a slice to pixels, for slices of a real run; few if ``points`` is small."""
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
    return Section(drawing + "\n" + _import(1 if points else 5))


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


_PACKAGE = "lightning_landscape"

# The package imports Lightning under both of its names where both are installed.
_IMPORTS = f"""
import importlib, json, time

import pytorch_lightning

def seconds(name):
    began = time.process_time()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    return time.process_time() - began

print(json.dumps([seconds("lightning.pytorch"), seconds("{_PACKAGE}")]))
"""


def _import(processes: int) -> str:
    """Processor time in a process that has Lightning already, compiled as pip leaves it."""
    lightning, package = zip(*[_imports() for _ in range(processes + 1)][1:], strict=True)
    rows = [["this package", spread(package, ".2f")]]
    if None not in lightning:
        rows.append(["`lightning.pytorch`, where both are installed", spread(lightning, ".2f")])
    text = table("Import, beside that of pytorch_lightning", ["what", "seconds added"], rows)
    bar = verdict("import, seconds added", statistics.median(package), 0.2, at_most=True)
    return f"{text}\n{bar}\n"


def _imports() -> list[float]:
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], env=compiled, check=True, stdout=subprocess.PIPE
    )
    found: list[float] = json.loads(done.stdout)
    return found
