"""When callbacks measure, at which weights, and the work of steps without a measurement."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_landscape import HessianMonitor, SharpnessMonitor
from lightning_landscape.training import costs, measuring, probes, session
from lightning_landscape.training.data import batch as batches
from lightning_landscape.training.last_step import LastStep
from lightning_landscape.training.run_state import RunState
from tests.runs import train
from tests.small import Linear, Quartic, ones, regression
from tests.training.clock import Timed, share_in_closing_line


def steps(callback) -> list[int]:
    return [row["step"] for row in callback.history]


def test_first_measurement_when_the_probe_is_complete(tmp_path):
    captured = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=12)
    given = HessianMonitor(
        every_n_train_steps=4, max_overhead=None, probe=(torch.ones(3, 1),), name="given"
    )
    train(Quartic, ones, [captured, given], tmp_path)
    assert steps(captured) == [3, 5, 10, 15, 20]  # 12 examples are there after 3 batches of 4
    assert steps(given) == [1, 4, 8, 12, 16, 20]


def test_every_n_epochs(tmp_path):
    monitor = HessianMonitor(
        every_n_train_steps=None, every_n_epochs=2, max_overhead=None, probe_samples=8
    )
    train(Quartic, ones, [monitor], tmp_path, max_epochs=5)
    assert steps(monitor) == [2, 20, 40]


def test_accumulation_counts_optimizer_steps(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path, accumulate_grad_batches=3)
    assert run.trainer.global_step == 8  # 10 batches in threes: 4 steps an epoch
    assert steps(monitor) == [1, 2, 4, 6, 8]


def test_manual_optimization_counts_batches(tmp_path):
    class Two(Quartic):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.v = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            for optimizer, p in zip(self.optimizers(), (self.w, self.v), strict=True):
                optimizer.zero_grad()
                self.manual_backward(p.pow(4).sum() / 4)
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD([self.w], lr=0.01), torch.optim.SGD([self.v], lr=0.01)

    monitor = HessianMonitor(
        every_n_train_steps=4,
        max_overhead=None,
        probe_samples=4,
        loss_fn=lambda module, batch: module.w.pow(4).sum() / 4,
        parameters="w",
    )
    run = train(Two, ones, [monitor], tmp_path)
    assert run.trainer.global_step == 40
    assert steps(monitor) == [1, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_of_a_value_is_that_of_the_training_loss(tmp_path, accumulate):
    """H = 6 sqrt(L): the logged loss at step s gives the eigenvalue that must stand at s."""
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path, accumulate_grad_batches=accumulate)
    losses = dict(run.logger.values("train_loss"))
    compared = 0
    for step, value in run.logger.values("hessian/top_eigenvalue"):
        if step in losses:
            assert value == pytest.approx(6 * math.sqrt(losses[step]), rel=1e-5)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize(
    ("batches", "accumulated", "first"),
    [(10, 1, 9), (10, 5, 5), (10, 3, 9), (10, 4, 8), (1, 1, 0), (3, 8, 0), (math.inf, 2, None)],
)
def test_batches_of_the_last_step_of_an_epoch(batches, accumulated, first):
    found = [
        index
        for index in range(12 if batches == math.inf else batches)
        if session.Session._makes_last_step(
            SimpleNamespace(
                num_training_batches=batches,
                accumulate_grad_batches=accumulated,
                fit_loop=SimpleNamespace(batch_idx=index),
            )
        )
    ]
    assert found == ([] if first is None else list(range(first, batches)))


@pytest.mark.parametrize(
    ("limits", "optimizers", "last"),
    [
        ({"max_epochs": 3, "max_steps": -1}, 1, [11]),
        ({"max_epochs": 3, "max_steps": 9}, 1, [8, 9, 10, 11]),
        ({"max_epochs": -1, "max_steps": 9}, 2, [7, 8, 9, 10, 11]),
        ({"max_epochs": None, "max_steps": -1}, 1, []),
    ],
)
def test_last_step_by_the_limits(limits, optimizers, last):
    """``last``: of 12 batches in epochs of 4, one step each."""
    found = [
        step
        for step in range(12)
        if session.Session._is_last_step(
            SimpleNamespace(
                **limits,
                current_epoch=step // 4,
                is_last_batch=step % 4 == 3,
                global_step=step,
                optimizers=[None] * optimizers,
            )
        )
    ]
    assert found == last


def test_barebones(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe_samples=4)
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None}
    train(Quartic, ones, [monitor], tmp_path, log_every_n_steps=None, **bare)
    assert monitor.measured == 1


# -- steps without a measurement -------------------------------------------------------------------


def test_no_work_where_nothing_is_due(tmp_path, monkeypatch):
    counts = {}

    def counted(owner, name):
        call = getattr(owner, name)

        def count(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    for owner, name in (
        (batches, "clone_batch"),
        (session, "batch_size"),
        (measuring, "isolated"),
        (LastStep, "copy_weights"),
        (session.Session, "_due"),
        (probes.Probes, "captured"),
    ):
        counted(owner, name)
    monkeypatch.setattr(RunState, "clock", staticmethod(lambda module: counts["t"]()))
    counts["t"] = lambda: counts.update(clock=counts.get("clock", 0) + 1) or 0.0

    def work(epochs):
        counts.update(dict.fromkeys(counts.keys() - {"t"}, 0))
        monitors = [
            HessianMonitor(every_n_train_steps=10**6, batch_edge_ratio=True, update_curvature=True),
            SharpnessMonitor(every_n_train_steps=10**6),
        ]
        data = torch.utils.data.DataLoader(regression().dataset, batch_size=1)
        train(Linear, data, monitors, tmp_path, max_epochs=epochs, limit_train_batches=1000)
        return {name: count for name, count in counts.items() if name != "t"}

    few, many = work(1), work(3)
    assert few["isolated"] == 1
    more = {name: many[name] - few[name] for name in many}
    ends = 2  # of epochs more: looked at, for there something may be due by epochs
    assert more.pop("_due") <= 8 * ends
    assert more.pop("captured") <= 3 * ends + 2 * ends
    assert set(more.values()) == {0}, more


@pytest.mark.parametrize(
    ("seconds", "counted"),
    [(0.01, 0.01), (1.0, 0.04)],  # at most 4 % of a step of 1 s
)
def test_time_of_idle_hooks_is_counted(tmp_path, monkeypatch, clock, caplog, seconds, counted):
    monkeypatch.setattr(costs, "HOOK_SECONDS", seconds)
    Timed(monkeypatch, clock, {})
    train(Linear, regression, [HessianMonitor(every_n_train_steps=10**6)], tmp_path, max_epochs=400)
    assert share_in_closing_line(caplog) == pytest.approx(counted, abs=1e-3)


def test_fit_that_ends_before_the_probe_is_complete_measures_once(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    train(Linear, regression, [monitor], tmp_path, max_steps=2, max_epochs=-1)
    assert [(row["step"], row["probe_samples"]) for row in monitor.history] == [(2, 40)]
