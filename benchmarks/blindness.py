"""Whether HessianMonitor finds the top eigenvalue if parts of a module are decoupled.

    python -m benchmarks.blindness                    all kinds: below 20 minutes of one core
    python -m benchmarks.blindness --quick            three of them: below a minute
    python -m benchmarks.blindness --kinds ramp rows --jobs 2
    python -m benchmarks.blindness --without search       with a safeguard switched off

A warm-started solver stays in the Krylov space of its retained vectors: it cannot detect a block of
the Hessian to which these are orthogonal.  Each run trains a small module for 200 steps with a
live ``HessianMonitor``, which measures at every tenth step, and compares the converged values with
dense float64 Hessians at the same weights.  The second table compares the ratio to the edge in the
same way, where it is an eigenvalue problem of its own.

Errors are relative.  A blindness is a run of consecutive measurements that are converged and more
than 5 % off.  A measurement is the first after a change if the module declares a jump since the
measurement before, or if the dense value has moved by more than 20 % since then and the measurement
before was right within 20 %: along a ramp only the first such measurement counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.blindness_modules import KINDS, OPTIMIZERS, Kind
from benchmarks.blindness_report import EIGENVALUE, FAR, RATIO, Point, Task, report
from benchmarks.runs import Batch, fit
from lightning_landscape import HessianMonitor
from lightning_landscape.geometry import lanczos
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round
from tests.oracles import dense_hessian

STEPS, EVERY, BATCH = 200, 10, 16
QUICK = ("networks", "ramp", "tanh")
MOVED = 0.2  # of the dense value, since the measurement before: a change


# -- safeguards, switched off ---------------------------------------------------------------------


def _cold() -> AbstractContextManager[Any]:
    """Each measurement starts cold."""
    measure = HessianMonitor.measure

    def measured(self: HessianMonitor, this_round: Round) -> Measured:
        self.reset_warm_start()
        return measure(self, this_round)

    return mock.patch.object(HessianMonitor, "measure", measured)


# name -> a context in which the safeguard is off
def _set(**values: float) -> AbstractContextManager[Any]:
    return mock.patch.multiple(lanczos, **values)


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """No search outside the Krylov space of the retained vectors."""
    nothing = mock.patch.object(lanczos.Start, "search", lambda start, _: 0 * start.random(0))
    with nothing, _set(RESIDUAL_MARGIN=0.0):
        yield


SAFEGUARDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "warm-start": _cold,
    "search": _no_search,
    "reach": partial(_set, RESIDUAL_MARGIN=0.0),  # no search from pairs that may hide something
    "random": partial(_set, _RANDOM=1e-9),
    "gradient": partial(_set, _HINT=0.0),
}


# -- one run --------------------------------------------------------------------------------------


class _Snapshots(pl.Callback):
    """Keeps the module and the optimizer's edge where a measurement may follow."""

    def __init__(self, data: Batch) -> None:
        self.at: dict[int, tuple[Kind, StabilityEdge]] = {}
        self._data: Any = data

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % EVERY <= 1:
            kept = copy.deepcopy(pl_module)
            with torch.enable_grad():
                kept.loss(self._data, trainer.global_step).backward()
            gradient = {n: p.grad for n, p in kept.named_parameters() if p.grad is not None}
            trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
            edge = stability_edge(trainer.optimizers, trained, gradient=gradient)
            self.at[trainer.global_step] = kept, edge


class _Monitor(HessianMonitor):
    """Without figures, which would take half of the time."""

    def run_summary(self, *_: Any) -> Measured:
        return Measured()


def measure(task: Task) -> list[Point]:
    """Train one module once; compare every measurement with the dense values."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(task.seed)
    module: Any = KINDS[task.kind](task.optimizer)
    data = module.data(torch.Generator().manual_seed(100 + task.seed))
    batches: Any = [data] * STEPS if task.full_batch else list(_minibatches(data))
    monitor = _Monitor(every_n_train_steps=EVERY, max_overhead=None, probe=[data])
    snapshots = _Snapshots(data)
    with warnings.catch_warnings(), contextlib.ExitStack() as patches:
        warnings.simplefilter("ignore")
        for name in task.without:
            patches.enter_context(SAFEGUARDS[name]())
        fit(module, DataLoader(batches, batch_size=None), STEPS, [snapshots, monitor])
    return list(_points(task, data, snapshots, monitor.history))


def _minibatches(data: Batch) -> Iterator[Batch]:
    for _ in range(STEPS):
        chosen = torch.randperm(len(data[0]))[:BATCH]
        yield data[0][chosen], data[1][chosen]


def _points(
    task: Task, data: Batch, snapshots: _Snapshots, rows: Sequence[dict[str, Any]]
) -> Iterator[Point]:
    jumps, before = KINDS[task.kind].jumps, 0
    previous: dict[str, Point] = {}
    for row in rows:
        step = row["step"]
        module, edge = snapshots.at[step]
        dense = _dense(module, data, step, edge)
        problems = len(dense)
        for key in (key for key in dense if key in row):
            after_change = any(before < jump <= step for jump in jumps)
            if key in previous and not previous[key].is_off(FAR):
                after_change |= abs(dense[key] / previous[key].dense - 1) > MOVED
            previous[key] = Point(
                task=task,
                key=key,
                step=step,
                value=row[key],
                dense=dense[key],
                converged=row["converged"],
                after_change=after_change,
                products=row["hessian/hvps"] / problems,
            )
            yield previous[key]
        before = step


def _dense(module: Kind, data: Batch, step: int, edge: StabilityEdge) -> dict[str, float]:
    """The dense values in float64; the ratio only where it needs a matrix of its own."""
    module = module.double()
    batch: Any = tuple(part.double() if part.is_floating_point() else part for part in data)
    trained = [p.requires_grad for p in module.parameters() for _ in range(p.numel())]
    hessian = dense_hessian(module, lambda _: module.loss(batch, step))
    hessian = hessian[trained][:, trained]
    if not hessian.isfinite().all():
        raise RuntimeError(f"{type(module).__name__} has diverged: it needs a smaller rate")
    values = {EIGENVALUE: _top(hessian)}
    if edge.preconditioner or len(set(edge.scale.values())) > 1:
        scale, decay = (_flat(module, part) for part in (edge.scale, edge.weight_decay))
        root = scale.sqrt()
        values[RATIO] = _top(root[:, None] * (hessian + decay.diag()) * root) / 2
    return values


def _flat(module: Kind, values: dict[str, Any]) -> Tensor:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    full = [torch.as_tensor(values[n]).double().expand_as(p) for n, p in named.items()]
    return torch.cat([part.reshape(-1) for part in full])


def _top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


# -- all runs -------------------------------------------------------------------------------------


def tasks(kinds: Sequence[str], seeds: Sequence[int], without: Sequence[str]) -> list[Task]:
    settings = itertools.product(OPTIMIZERS, (True, False))
    return [
        Task(kind, seed, optimizer, full_batch, tuple(without))
        for kind, (optimizer, full_batch), seed in itertools.product(kinds, settings, seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blindness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three kinds, one seed")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--without", nargs="+", choices=list(SAFEGUARDS), default=[])
    chosen = parser.parse_args()
    kinds = chosen.kinds or (QUICK if chosen.quick else list(KINDS))
    seeds = chosen.seeds or ([0] if chosen.quick else [0, 1, 2])
    started, todo = time.perf_counter(), tasks(kinds, seeds, chosen.without)
    if chosen.jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(chosen.jobs, context) as pool:
            found = list(pool.map(measure, todo))
    else:
        found = [measure(task) for task in todo]
    print(report([point for points in found for point in points], chosen.without))
    spent = os.times()
    processor = spent.user + spent.system + spent.children_user + spent.children_system
    wall = time.perf_counter() - started
    print(f"{len(todo)} runs: {processor:.0f} s of one core, {wall:.0f} s by the clock")


if __name__ == "__main__":
    main()
