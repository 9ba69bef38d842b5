"""Cost and accuracy of one top eigenvalue during real training.

At each point of the run all methods are timed one after the other at the same weights, in an order
that turns by one place from point to point.  The unit is one gradient of the same probe by plain
autograd, timed before every method; its median at the point is what that point's times are divided
by, so that a slow phase of the machine affects both.

Errors are relative to SciPy's ``eigsh`` in float64 on products that are made outside this package,
at 1e-6.  PyHessian's largest magnitude is another number where a negative eigenvalue dominates;
such points do not enter its error, and are counted.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks import networks, solvers
from benchmarks.common import Section, rotated, seconds, settle, spread, table, timed, verdict
from benchmarks.networks import NETWORKS, Problem
from benchmarks.runs import top_by_arpack
from benchmarks.solvers import CURVLINOPS, EIGENTHINGS, OURS, PYHESSIAN
from lightning_landscape.geometry import top_eigenvalues

MEASURE = "Top eigenvalue: gradients of the probe at the median (median relative error)"
TRAIN_MODE = "ours, warm, BatchNorm in train mode"
SHARPNESS = "SAM sharpness and curvature along the gradient"


@dataclass
class Column:
    """What one method did, point by point."""

    gradients: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def eigenvalue(network: str, points: int | None = None, device: str = "cpu") -> Section:
    """Along the training of one of ``NETWORKS``, at its first ``points`` measurements or all."""
    problem = NETWORKS[network](device)
    tuned = network in ("mlp", "edge")
    methods, missing = solvers.solvers(problem, tuned)
    for solve in solvers.solvers(networks.tiny(device), tuned)[0].values():
        solve()  # one-time work of the process is not counted
    settle()
    columns = {name: Column() for name in [*methods, SHARPNESS]}
    in_train_mode = solvers.solvers(problem, False)[0][OURS]
    units: list[float] = []
    negative = 0
    for index in problem.training(min(points or problem.measurements, problem.measurements)):
        truth = _reference(problem)
        dominated = _smallest(problem) < -truth
        negative += dominated
        gradients = [_gradient(problem) for _ in range(3)]
        times: dict[str, float] = {}
        for name in rotated(methods, index):
            gradients.append(_gradient(problem))
            times[name], found = timed(methods[name], problem.device)
            problem.module.zero_grad()  # PyHessian leaves a graph in .grad
            columns[name].products.append(found.products)
            if not (dominated and name.startswith(PYHESSIAN)):
                columns[name].errors.append(abs(found.value / truth - 1))
        times[SHARPNESS] = seconds(partial(solvers.sharpness, problem), problem.device)
        units.append(statistics.median(gradients))
        for name, took in times.items():
            columns[name].gradients.append(took / units[-1])
        if problem.note:
            _add_train_mode(problem, in_train_mode, columns.setdefault(TRAIN_MODE, Column()))
    text = _table(problem, columns, units, negative, missing) + _bars(network, columns)
    cells = {
        name: f"{statistics.median(c.gradients):.1f} ({statistics.median(c.errors):.0e})"
        for name, c in columns.items()
        if c.errors and "tuned" not in name
    }
    return Section(text, MEASURE, {problem.name: cells})


def _gradient(problem: Problem) -> float:
    params = list(problem.module.parameters())
    return seconds(lambda: torch.autograd.grad(problem.probe_loss(), params), problem.device)


def _add_train_mode(problem: Problem, solve: solvers.Solver, column: Column) -> None:
    """On the training loss, in units of its gradient; restores eval mode."""
    module = problem.module.train()
    statistics_of_norms = [buffer.clone() for buffer in module.buffers()]
    unit = statistics.median(_gradient(problem) for _ in range(5))
    took, found = timed(solve, problem.device)
    column.gradients.append(took / unit)
    column.products.append(found.products)
    for buffer, kept in zip(module.buffers(), statistics_of_norms, strict=True):
        buffer.copy_(kept)
    module.eval()


def _reference(problem: Problem) -> float:
    weights = torch.cat([p.detach().reshape(-1) for p in problem.module.parameters()])
    return top_by_arpack(problem.module, problem.loss, problem.probe, weights)


def _smallest(problem: Problem) -> float:
    """To check whether it has the larger magnitude."""
    found = top_eigenvalues(solvers.objective(problem), which="SA", tol=0.05)
    return float(found.eigenvalues[0])


def _table(
    problem: Problem,
    columns: dict[str, Column],
    units: list[float],
    negative: int,
    missing: list[str],
) -> str:
    rows = []
    for name, column in columns.items():
        row = [name, spread(column.gradients)]
        if column.products:
            row += [f"{spread(_ratios(columns, name))}" if name != OURS else "1"]
            row += [f"{statistics.median(column.products):g}"]
        else:
            row += ["", ""]
        errors = column.errors
        row += [f"{statistics.median(errors):.1e}", f"{max(errors):.1e}"] if errors else ["", ""]
        rows.append(row)
    head = ["method", "gradients", "times ours", "products", "error, median", "error, worst"]
    unit = 1000 * statistics.median(units)
    text = table(f"Top eigenvalue: {problem.title}, {len(units)} points", head, rows)
    notes = [f"Median (quartiles). One gradient takes {unit:.3g} ms here."]
    if problem.note:
        notes.append(f"{problem.note}.")
    if negative:
        notes.append(
            f"At {negative} points a negative eigenvalue has the largest magnitude; PyHessian, "
            f"which returns that one, is not judged there."
        )
    return f"{text}\n{' '.join(notes + missing)}\n"


def _ratios(columns: dict[str, Column], name: str) -> list[float]:
    """Cost relative to ours, point by point."""
    pairs = zip(columns[name].gradients, columns[OURS].gradients, strict=True)
    return [theirs / ours for theirs, ours in pairs]


# network -> gradients at most, and how many times cheaper than PyHessian at least
BARS = {"mlp": (10.0, 2.5), "resnet20": (14.0, 1.0)}


def _bars(network: str, columns: dict[str, Column]) -> str:
    if network not in BARS:
        return ""
    most, cheaper = BARS[network]
    ours = columns[OURS]
    lines = [
        verdict("gradients at the median", statistics.median(ours.gradients), most, at_most=True),
        verdict("median error", statistics.median(ours.errors), 0.01, at_most=True),
        verdict("worst error", max(ours.errors), 0.05, at_most=True),
    ]
    if PYHESSIAN in columns and columns[PYHESSIAN].errors:
        theirs = statistics.median(columns[PYHESSIAN].errors)
        error = statistics.median(ours.errors)
        lines.append(verdict("median error over PyHessian's", error / theirs, 1.0, at_most=True))
    for peer, bound in ((PYHESSIAN, cheaper), (EIGENTHINGS, 5.0), (CURVLINOPS, 7.0)):
        if peer in columns:
            ratio = statistics.median(_ratios(columns, peer))
            lines.append(verdict(f"{peer} over ours, in time", ratio, bound))
    return "\n".join(["", *lines, ""])
