"""Accuracy of the values, as markdown tables.

    make bench-accuracy
    python -m benchmarks.accuracy --quick      a small part of each, as a test

Eigenvalues along training against ARPACK, the edge of stability against plain torch,
the trace against a dense Hessian.  Fixed seeds, nothing downloaded; every figure is an error or a
count, so it does not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from benchmarks.common import table
from benchmarks.runs import (
    DATA,
    EDGE_ROWS,
    EdgeRow,
    along_training,
    digits,
    edge_ratios,
    late_mean,
    mlp,
)
from lightning_landscape.geometry import Objective, hessian_trace
from tests.oracles import dense_hessian

EDGE_SEEDS = range(3)
TRACE_SEEDS = range(200)


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{table(title, head, rows)}", end="", flush=True)


def eigenvalues(datasets: Sequence[str], measurements: int) -> None:
    """The same run for both methods: measuring does not change it."""
    methods: list[tuple[str, Literal["lanczos", "power"]]] = [
        ("warm Lanczos", "lanczos"),
        ("warm power iteration", "power"),
    ]
    rows = []
    for dataset in datasets:
        for name, method in methods:
            series = along_training(dataset, method, measurements)
            rows.append(
                [
                    dataset,
                    name,
                    f"{statistics.median(series.errors):.1e}",
                    f"{max(series.errors):.1e}",
                    f"{statistics.median(series.hvps):g}",
                    f"{max(series.hvps[1:])}",
                    f"{series.hvps[0]}",
                ]
            )
    show(
        f"Top eigenvalue: {measurements} measurements along minibatch SGD, relative error "
        f"against ARPACK",
        ["data", "method", "error, median", "worst", "HVPs, median", "worst", "first (cold)"],
        rows,
    )


def edge_of_stability(edge_rows: Sequence[EdgeRow], seeds: Sequence[int]) -> None:
    rows = []
    for row in edge_rows:
        means = [late_mean(edge_ratios(row.make_optimizer, row.steps, s), row.steps) for s in seeds]
        found = [f"{min(means):.3f}-{max(means):.3f}", f"{row.low:.3f}-{row.high:.3f}"]
        rows.append([row.name, f"{row.steps}", f"{statistics.fmean(means):.3f}", *found])
    show(
        f"Edge of stability: mean edge ratio over the last 40 % of steps, {len(seeds)} seeds",
        ["optimizer", "steps", "mean", "from-to", "plain torch, 5 seeds"],
        rows,
    )


def trace(seeds: Sequence[int]) -> None:
    """A network of 610 parameters, trained for 200 steps, in float64."""
    torch.manual_seed(0)
    inputs, targets = (tensor[:200] for tensor in digits())
    inputs = inputs.double()
    net = mlp([64, 8, 10], nn.Tanh).double()

    def loss(module: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(module(inputs), targets)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
    truth = float(dense_hessian(net, loss).trace())
    objective = Objective(lambda: loss(net), dict(net.named_parameters()))
    rows = []
    for samples in (5, 10, 30):
        found = [
            hessian_trace(objective, samples, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        errors = [abs(one.value / truth - 1) for one in found]
        covered = sum(abs(one.value - truth) <= 2 * one.stderr for one in found) / len(found)
        rows.append(
            [
                f"{samples}",
                f"{statistics.median(errors):.1%}",
                f"{max(errors):.1%}",
                f"{statistics.median(one.stderr for one in found) / truth:.1%}",
                f"{covered:.1%}",
            ]
        )
    show(
        f"Trace: {len(seeds)} seeds against the dense Hessian of a small network",
        ["samples", "error, median", "worst", "standard error", "within 2 standard errors"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a little of each")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    trace(TRACE_SEEDS[:5] if quick else TRACE_SEEDS)
    eigenvalues(list(DATA)[:1] if quick else list(DATA), 3 if quick else 40)
    if quick:
        edge_of_stability([dataclasses.replace(EDGE_ROWS[0], steps=60)], EDGE_SEEDS[:1])
    else:
        edge_of_stability(EDGE_ROWS, EDGE_SEEDS)


if __name__ == "__main__":
    main()
