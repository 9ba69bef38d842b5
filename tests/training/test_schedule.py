"""The budget is a debt that training pays off."""

from __future__ import annotations

import pytest

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from lightning_landscape.training import schedule, session
from lightning_landscape.training.schedule import Budget, Schedule
from tests.runs import train
from tests.small import Linear, regression


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(schedule.time, "perf_counter", clock)
    return clock


def test_budget_arithmetic(clock):
    budget = Budget(0.05)
    budget.start()
    clock.now = 100.0  # 100 s of training
    assert budget.affords(5.0)
    assert not budget.affords(5.1)
    clock.now = 104.0
    budget.charge(4.0)
    assert budget.trained == pytest.approx(100.0)
    assert budget.share == pytest.approx(0.04)
    assert budget.affords(1.0)
    assert not budget.affords(1.1)


def test_no_limit(clock):
    budget = Budget(None)
    budget.charge(1e9)
    assert budget.affords(1e9)


def test_schedule():
    plan = Schedule(10, None)
    assert plan.due(7, 0, False)  # the first time at once
    plan.last_step = 7
    assert next(step for step in range(8, 40) if plan.due(step, 0, False)) == 17
    epochs = Schedule(None, 3)
    epochs.last_step = 1
    due = [(epoch, ends) for epoch in range(7) for ends in (False, True)]
    assert [e for e, ends in due if epochs.due(5, e, ends)] == [2, 5]


class Timed:
    """Every training step takes 1 s, every measurement ``cost`` s of a clock that we turn.

    ``evaluation`` is what one evaluation of the loss on a batch takes when measuring.
    """

    def __init__(self, monkeypatch, clock, costs, evaluation=0.0):
        step = Linear.training_step

        def slow(module, batch, batch_idx):
            if getattr(module.log, "__name__", "") != "_log_nothing":
                clock.now += 1.0
            else:
                clock.now += evaluation
            return step(module, batch, batch_idx)

        monkeypatch.setattr(Linear, "training_step", slow)
        for kind, cost in costs.items():
            measure = kind.measure

            def slowly(monitor, this_round, measure=measure, cost=cost):
                clock.now += cost
                return measure(monitor, this_round)

            monkeypatch.setattr(kind, "measure", slowly)


def test_the_budget_holds_and_what_was_skipped_is_counted(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 2.0, SharpnessMonitor: 1.0})
    callbacks = [
        HessianMonitor(every_n_train_steps=10, max_overhead=0.1),
        SharpnessMonitor(every_n_train_steps=10, max_overhead=0.1),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=100)  # 300 steps, 300 s
    # First at step 3, for 3 s; then on the schedule where 0.1 * (training) >= spent + 3.
    expected = [3, 63, 93, 123, 153, 183, 213, 243, 273]
    assert [row["step"] for row in callbacks[0].history] == expected
    assert [row["step"] for row in callbacks[1].history] == expected
    spent = sum(c.seconds_spent for c in callbacks)
    assert spent <= 0.1 * 300
    assert callbacks[0].measured + callbacks[0].skipped == 30
    assert callbacks[0].skipped > 0


def test_pictures_wait_for_scalars_but_one_is_owed(tmp_path, monkeypatch, clock, caplog):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    # A forward of the probe of three batches takes 1 ms, 50,000 of them 50 s.
    Timed(monkeypatch, clock, {HessianMonitor: 1.0, LandscapeMonitor: 50.0}, evaluation=1e-3 / 3)
    callbacks = [
        LandscapeMonitor(every_n_train_steps=10, resolution=3, line_resolution=0),
        HessianMonitor(every_n_train_steps=10),
    ]
    monkeypatch.setattr(LandscapeMonitor, "forwards", 50_000)
    train(Linear, regression, callbacks, tmp_path, max_epochs=40)  # 120 s allow 6 s
    assert [row["step"] for row in callbacks[0].history] == [120]  # the one at the end
    # Half of what training has earned is put aside for it: 0.025 * trained >= spent + 1.
    assert [row["step"] for row in callbacks[1].history] == [3, 83]
    line = next(r.message for r in caplog.records if r.message.startswith("lightning_landscape"))
    assert "skipped" in line
    assert "max_overhead=0.05" in line


def test_the_smallest_budget_counts_and_none_is_exact(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 5.0, SharpnessMonitor: 5.0})
    callbacks = [
        HessianMonitor(every_n_train_steps=3, max_overhead=None),
        SharpnessMonitor(every_n_train_steps=3, max_overhead=0.05),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=10)
    assert callbacks[0].skipped == 0
    assert callbacks[0].measured == 10
    assert [callbacks[1].measured, callbacks[1].skipped] == [1, 9]
