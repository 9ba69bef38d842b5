"""An error on one process ends the measurement on both, and training is not affected.

All tests have a time limit: a process that waits for the other one fails the test.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
    figures,
    read_history,
)
from lightning_landscape.callbacks import hessian_measurement as hessian
from lightning_landscape.callbacks import sharpness
from lightning_landscape.callbacks.solver import Solver
from lightning_landscape.training import session
from lightning_landscape.training.data import batch as batches
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.isolation import isolated, sharding
from lightning_landscape.training.isolation.errors import (
    NotYetError,
    TouchedError,
    TrainingChangedError,
)
from lightning_landscape.training.isolation.module_state import ModuleState
from lightning_landscape.training.last_step import LastStep
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output import recorder
from lightning_landscape.training.output.measured import Measured
from tests.integration.members import Mlp, end_of, fsdp2
from tests.integration.processes import both, forks, on_two
from tests.runs import differences

pytestmark = [forks, pytest.mark.slow]


def strategy(name):
    return fsdp2() if name == "fsdp2" else name


class Kind(Mlp):
    """``fault(calls, loss)`` is called with every loss that is evaluated for a measurement."""

    fault = staticmethod(lambda calls, loss: loss)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if getattr(self.log, "__name__", "") != "_log_nothing":
            return loss
        Seen.calls += 1
        return self.fault(Seen.calls, loss)


Seen = Mock(calls=0)  # isolation restores all other state


def monitors(pictures=False, **extra):
    common = {"every_n_train_steps": 2, "max_overhead": None, "probe_samples": 32, **extra}
    return [
        HessianMonitor(**common, max_hvps=5, update_curvature=True, batch_edge_ratio=True),
        SharpnessMonitor(**common, critical=True),
        *([LandscapeMonitor(**common, resolution=2, line_resolution=3)] if pictures else []),
    ]


def run(root, make_callbacks=monitors, name="ddp", patches=lambda rank: (), **settings):
    """Both ranks train; ``(what each ended with, what its callbacks have counted)``."""

    def work(rank):
        Seen.calls = 0
        for owner, attribute, value in patches(rank):
            setattr(owner, attribute, value)  # this process ends after the run
        callbacks = make_callbacks()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = end_of(
                Kind, callbacks, root, may_fail=True, strategy=strategy(name), devices=2,
                max_epochs=2, **settings,
            )  # fmt: skip
        counts = [(c.measured, c.failed, c.disabled) for c in callbacks if hasattr(c, "failed")]
        return end, counts, [len(c.history) for c in callbacks if hasattr(c, "history")]

    return both(work)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return {
        name: [end for end, *_ in run(tmp_path_factory.mktemp("plain"), list, name)]
        for name in ("ddp", "fsdp2")
    }


def check(found, without, name="ddp"):
    """Same weights as without callbacks, and equal counts on both processes."""
    for (end, *_), plain in zip(found, without[name], strict=True):
        assert differences(plain, end) == []
    (_, counts, rows), (_, others, other_rows) = found
    assert counts == others
    assert rows == other_rows
    return counts


def raising(error, first, last=10**9):
    def fault(calls, loss):
        if first <= calls <= last:
            raise error
        return loss

    return staticmethod(fault)


def on_rank_one(owner, attribute, value):
    return lambda rank: [(owner, attribute, value)] if rank == 1 else []


def failing_times(function, times, error, after=0):
    """``function``, which raises at ``times`` calls after the first ``after``."""
    calls = [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if after < calls[0] <= after + times:
            raise error
        return function(*args, **kwargs)

    return wrapped


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory (simulated)")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("first", "error", "least"),
    [
        (1, OUT_OF_MEMORY, 1),
        (6, RuntimeError("here only"), 0),  # while the batches are tried as one: they stay apart
        (20, RuntimeError("here only"), 1),
        (30, OUT_OF_MEMORY, 1),
    ],
    ids=["first", "while joining", "early", "late"],
)
def test_in_training_step(name, error, first, least, tmp_path, without):
    fault = raising(error, first, first + 2)
    found = run(tmp_path, name=name, patches=on_rank_one(Kind, "fault", fault))
    counts = check(found, without, name)
    failed = sum(failed for _, failed, _ in counts)
    assert least <= failed <= 3 * least
    assert all(measured >= 2 for measured, _, _ in counts)  # and on it goes


def test_always_in_training_step(tmp_path, without):
    found = run(tmp_path, patches=on_rank_one(Kind, "fault", raising(ValueError("always"), 1)))
    assert check(found, without) == [(0, 3, True)] * 2
    assert not list(tmp_path.rglob("history.jsonl"))


def test_rejection_on_one_process_applies_to_all(tmp_path, without):
    """Such as a queue that rank one alone writes to."""
    fault = raising(TouchedError("the loss uses self.losses"), 1)
    found = run(tmp_path, patches=on_rank_one(Kind, "fault", fault))
    assert check(found, without) == [(0, 1, True)] * 2


def test_measurement_is_postponed_on_all_if_one_is_not_ready(tmp_path, without):
    fault = raising(NotYetError("training has drawn nothing"), 1, 1)
    found = run(tmp_path, patches=on_rank_one(Kind, "fault", fault))
    counts = check(found, without)
    assert [(failed, disabled) for _, failed, disabled in counts] == [(0, False)] * 2
    assert all(measured >= 2 for measured, _, _ in counts)


def test_change_on_one_process_stops_all(tmp_path, without):
    error = TrainingChangedError("an evaluation changed self.bank")
    restore = ModuleState.restore

    def changed(state):
        restore(state)
        return error

    found = run(tmp_path, patches=on_rank_one(ModuleState, "restore", changed))
    assert check(found, without) == [(0, 1, True)] * 2


def test_nan(tmp_path, without):
    fault = staticmethod(lambda calls, loss: loss * float("nan"))
    found = run(tmp_path, patches=on_rank_one(Kind, "fault", fault))
    counts = check(found, without)
    assert all(measured >= 2 for measured, _, _ in counts)
    rows = read_history(tmp_path / "history.jsonl")
    values = [row["sharpness/sam"] for row in rows if "sharpness/sam" in row]
    assert values
    assert all(value != value for value in values)


PLACES = {  # outside the objective, whose reductions carry its own faults
    "in a solver": (hessian, "curvature_along"),
    "in vector arithmetic": (sharpness, "norm"),
    "while isolating": (isolated, "ModuleState"),
    "while copying random states": (isolated, "RandomState"),
    "while copying the weights before": (LastStep, "_copy_weights"),
    "while copying the batch": (LastStep, "copy_batch"),
}


@pytest.mark.parametrize("place", PLACES)
def test_error_outside_of_the_objective(place, tmp_path, without):
    owner, attribute = PLACES[place]
    broken = failing_times(getattr(owner, attribute), 1, OUT_OF_MEMORY, after=1)
    counts = check(run(tmp_path, patches=on_rank_one(owner, attribute, broken)), without)
    assert sum(failed for _, failed, _ in counts) >= 1
    assert all(measured >= 2 for measured, _, _ in counts)


def test_solvers_start_alike_after_a_fault(tmp_path, without):
    """Rank zero has kept the result of the round that failed; rank one has not."""

    def make():
        return [
            HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=32, tol=1e-4)
        ]

    broken = failing_times(Solver.store, 1, OUT_OF_MEMORY)
    for folder, patches in (
        ("fault", on_rank_one(Solver, "store", broken)),
        ("none", lambda rank: ()),
    ):
        check(run(tmp_path / folder, make, patches=patches), without)
    top = {
        folder: {
            row["step"]: row["hessian/top_eigenvalue"]
            for row in map(json.loads, (tmp_path / folder / "history.jsonl").open())
            if "hessian/top_eigenvalue" in row
        }
        for folder in ("fault", "none")
    }
    assert len(top["fault"]) == len(top["none"]) - 1
    for step, value in top["fault"].items():
        assert value == pytest.approx(top["none"][step], rel=1e-3)


def test_while_gathering_shards(tmp_path, without):
    broken = failing_times(sharding._mesh_device, 1, OUT_OF_MEMORY, after=20)
    patches = on_rank_one(sharding, "_mesh_device", broken)
    counts = check(run(tmp_path, name="fsdp2", patches=patches), without, "fsdp2")
    assert sum(failed for _, failed, _ in counts) >= 1
    assert all(measured >= 2 for measured, _, _ in counts)


@pytest.mark.parametrize("times", [1, 100])
def test_while_capturing_the_probe(times, tmp_path, without):
    broken = failing_times(batches.clone_batch, times, OUT_OF_MEMORY)
    counts = check(run(tmp_path, patches=on_rank_one(batches, "clone_batch", broken)), without)
    if times == 1:  # a later batch takes its place
        assert all(measured >= 2 and failed == 1 for measured, failed, _ in counts)
    else:
        assert counts == [(0, 3, True)] * 2


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (figures, "figure_to_image"),
        (recorder.json, "dumps"),
        (Probe, "fingerprint"),
        (Probe, "save"),
    ],
    ids=["drawing", "writing", "hashing the probe", "saving the probe"],
)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.pictures
def test_recording(where, owner, attribute, tmp_path, without):
    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    def patches(rank):
        return [(owner, attribute, broken)] if rank == where else []

    counts = check(run(tmp_path, lambda: monitors(True), patches=patches), without)
    assert all(measured >= 2 and failed == 0 for measured, failed, _ in counts)


def test_different_collectives(tmp_path, without):
    """One process has finished while the other waits for an all-reduce."""

    class Hasty(SharpnessMonitor):
        def measure(self, this_round):
            if this_round.trainer.global_rank == 1:
                return Measured({self.key("sam"): 1.0})
            return super().measure(this_round)

    def make():
        return [Hasty(every_n_train_steps=2, max_overhead=None, probe_samples=32), *monitors()[:1]]

    (hasty, other) = check(run(tmp_path, make), without)
    assert hasty == (0, 3, True)
    assert other[0] >= 3
    assert other[1] == 0


@pytest.mark.parametrize("budget", [1e-6, 0.05, 10.0])
def test_one_budget(budget, tmp_path, without):
    """Each process has its own clock; rank zero's decides."""

    def slower(rank):
        real = session.time.perf_counter
        return [(session.time, "perf_counter", lambda: real() * (1 + 2 * rank))]

    def make():
        return monitors(True, max_overhead=budget)

    check(run(tmp_path, make, patches=slower), without)


def lists(*sizes):
    """A probe for this process: a list with batches of these sizes."""
    return [tuple(tensor[:size] for tensor in Mlp().examples(20)) for size in sizes]


def test_lists_of_different_lengths(tmp_path, without):
    def patches(rank):
        return [(Monitor, "share", lists(8, 3, 9) if rank == 0 else lists(20))]

    def make():
        return monitors(probe=Monitor.share)

    counts = check(run(tmp_path, make, patches=patches), without)
    assert all(measured >= 3 and failed == 0 for measured, failed, _ in counts)


@pytest.mark.parametrize("empty", [0, 1])
def test_loader_without_batches_raises_on_both(empty, tmp_path):
    """(A list without any is refused where it is given, before the processes have met.)"""

    def work(rank):
        given = torch.utils.data.DataLoader([]) if rank == empty else lists(8)
        end_of(Kind, monitors(probe=given), tmp_path, strategy="ddp", devices=2)

    answers = on_two(work)
    assert "it holds no batch" in str(answers[empty])
    assert "on another process" in str(answers[1 - empty])


class _Checkpoint(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("name", "lost"), [("ddp", None), ("ddp", 0), ("ddp", 1), ("fsdp2", None), ("fsdp2", 1)]
)
def test_resuming_with_one_part_of_the_probe(name, lost, tmp_path):
    """Captured probes lie in one file for each process; one may be missing later."""

    def work(rank):
        path = tmp_path / "half.ckpt"
        settings = {"devices": 2, "max_epochs": 2}
        first = monitors()
        end_of(Kind, [*first, _Checkpoint(path)], tmp_path, strategy=strategy(name), **settings)
        kept = first[0].loss.probe.fingerprint()
        if lost == rank:
            next(tmp_path.rglob(f"training-examples-*-rank{rank}.pt")).unlink()
        torch.distributed.barrier()
        again = monitors()
        end_of(Kind, again, tmp_path, seed=9, ckpt_path=path, strategy=strategy(name), **settings)
        return kept == again[0].loss.probe.fingerprint(), again[0].loss.probe.size

    (same, size), (other_same, other_size) = both(work)
    assert same == other_same == (lost is None)
    assert size == other_size == 16
