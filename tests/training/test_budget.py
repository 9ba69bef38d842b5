"""The time budget of a run, and which measurements it allows."""

from __future__ import annotations

import functools
import itertools
import re
from functools import partial

import pytest
import torch

from lightning_landscape import (
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.callbacks.solver import Solver
from lightning_landscape.training import costs, session
from lightning_landscape.training.bookkeeping import LOSS
from lightning_landscape.training.budget import Budget
from lightning_landscape.training.closing import closing_line
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.data.probe import Probe
from tests.runs import train
from tests.small import Linear, regression
from tests.training.clock import Timed, closing_line_of, share_in_closing_line

pytestmark = pytest.mark.short_runs


PLANNED = 0.95  # of the limit


def budget_of(callbacks, **known):
    """A budget and its costs, with the stopwatch started."""
    found = Costs()
    vars(found).update(known)
    return Budget(callbacks, found), found


def complete(*callbacks, probe=None):
    """The callbacks, with complete probes."""
    for callback in callbacks:
        data = Probe((torch.zeros(60, 2),)) if probe is None else probe
        if not data.complete:
            data.load(lambda batch: batch)
        callback._bookkeeping.probes[LOSS] = data
    return list(callbacks)


# -- the limit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "grace", "ahead", "seconds"),
    [
        (0.05, 30.0, 90, 30.0),  # 100 s of training: at most doubled, and by 30 s at most
        (0.05, 30.0, 10, 20.0),  # doubled
        (0.05, 30.0, 0, 10.0),  # 10 s in any case
        (0.05, 30.0, 1190, 60.0),  # 5 % of 1200 s
        (0.05, 0.0, 90, 5.0),
        (0.05, 4.0, 0, 4.0),
        (0.5, 30.0, 90, 50.0),
        (0.05, 30.0, float("inf"), 10.0),  # may end now
        (None, 30.0, 10, float("inf")),
    ],
)
def test_seconds_of_the_budget(clock, limit, grace, ahead, seconds):
    monitor = HessianMonitor(max_overhead=limit, grace_seconds=grace)
    budget, costs = budget_of([monitor], batches=10)
    clock.now = 10.0
    budget.batches_ahead = ahead
    assert budget.whole == pytest.approx(seconds)
    clock.now = 13.0
    costs.time.add(3.0)
    assert budget.left == pytest.approx(PLANNED * seconds - 3.0)


def test_smallest_limits_are_used(clock):
    budget, _ = budget_of(
        [
            HessianMonitor(max_overhead=0.2, grace_seconds=7.0),
            SharpnessMonitor(max_overhead=0.1, grace_seconds=20.0),
            LandscapeMonitor(max_overhead=None, grace_seconds=0.0),
        ]
    )
    assert (budget.limit, budget.grace_seconds) == (0.1, 7.0)


# -- priorities ------------------------------------------------------------------------------------


def known_costs(monitors, seconds, measured=2):
    for monitor, each in zip(monitors, seconds, strict=True):
        monitor._bookkeeping.last_seconds = each
        monitor._bookkeeping.measured = measured


@pytest.mark.parametrize(
    ("grace", "names"),
    [
        (30.0, ["exact", "hessian", "sharpness", "landscape"]),
        (20.0, ["exact", "hessian", "sharpness", "landscape"]),
        (9.0, ["exact", "hessian", "sharpness"]),
        (4.0, ["exact", "hessian", "sharpness"]),
        (2.95, ["exact", "hessian"]),  # a stopper acts on its values
        (0.5, ["exact"]),
    ],
)
def test_values_come_first_and_among_them_monitored_ones(clock, grace, names):
    exact = SharpnessMonitor(name="exact", max_overhead=None)
    common = {"grace_seconds": grace / PLANNED, "every_n_train_steps": 10}
    monitors = complete(
        exact, HessianMonitor(**common), SharpnessMonitor(**common), LandscapeMonitor(**common)
    )
    monitors[1]._bookkeeping.listeners.append(SharpnessEarlyStopping("hessian/edge_ratio", 1.0))
    known_costs(monitors, [100.0, 1.0, 2.0, 6.0])
    budget, _ = budget_of(monitors, batches=10)
    clock.now, budget.batches_ahead = 10.0, 10
    chosen = budget.within_budget(monitors, 10, 100)
    assert [q.name or q.prefix for q in chosen] == names


@pytest.mark.parametrize(
    ("picture", "value", "seconds"),
    [
        (4.0, 1.0, 14.0),  # 70 % of 20 s
        (10.0, 1.0, 10.0),
        (18.0, 1.0, 7.0),  # 35 %
        (18.0, 3.0, 9.0),  # three values
        (18.0, 8.0, 16.0),  # two
        (18.0, 11.0, 11.0),
    ],
)
def test_values_leave_time_for_the_last_pictures(clock, picture, value, seconds):
    grace = {"grace_seconds": 20.0 / PLANNED}
    monitors = complete(HessianMonitor(**grace), LandscapeMonitor(**grace))
    known_costs(monitors, [value, picture], measured=0)
    budget, _ = budget_of(monitors, batches=10)
    clock.now, budget.batches_ahead = 10.0, 20
    assert budget.left_for_values == pytest.approx(seconds)


def test_first_value_that_lightning_reads_is_measured(clock):
    (monitor,) = complete(HessianMonitor(grace_seconds=0.0))
    budget, _ = budget_of([monitor], batches=10)
    clock.now, budget.batches_ahead = 10.0, 10
    assert budget.within_budget([monitor], 10, 10) == []
    monitor._bookkeeping.read.add("hessian/edge_ratio")
    assert budget.within_budget([monitor], 10, 10) == [monitor]
    monitor._bookkeeping.published["hessian/edge_ratio"] = 3
    assert budget.within_budget([monitor], 10, 10) == []


def spread_of(steps):
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    return min(gaps), max(gaps)


@pytest.mark.parametrize(
    ("cost", "least", "most"), [(1.0, 11, 21), (3.0, 4, 7), (6.0, 3, 3), (0.1, 100, 100)]
)
def test_affordable_values_are_spread_over_the_run(tmp_path, monkeypatch, clock, cost, least, most):
    """300 steps of 1 s have a budget of 30 s, of which 70 % are for values."""
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: cost / 2, SharpnessMonitor: cost / 2})
    callbacks = [HessianMonitor(every_n_train_steps=3), SharpnessMonitor(every_n_train_steps=3)]
    train(Linear, regression, callbacks, tmp_path, max_epochs=100)
    for monitor in callbacks:
        steps = [row["step"] for row in monitor.history]
        assert least <= len(steps) <= most
        assert steps[0] == 3
        assert steps[-1] >= 290
        assert all(step % 3 == 0 for step in steps)
        shortest, longest = spread_of(steps)
        assert longest <= 2 * shortest + 6
        assert monitor.measured + monitor.skipped == 100
    assert sum(q.seconds_spent for q in callbacks) <= 0.7 * 30


def test_schedule_becomes_sparser_in_a_run_of_unknown_length(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 2.0})
    monitor = HessianMonitor(every_n_train_steps=3)
    train(Linear, regression, [monitor], tmp_path, max_epochs=300, max_time="01:00:00:00")
    steps = [row["step"] for row in monitor.history]
    assert 6 <= len(steps) <= 15  # 900 s allow 45 s
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps[: len(gaps) // 2]) <= max(gaps[len(gaps) // 2 :]) <= 450 / PLANNED
    for spent, step in enumerate(steps):  # never more than the budget of a run that ends now
        assert 2.0 * (spent + 1) <= max(0.05 * step, min(max(step, 10), 30))


def test_single_affordable_value_is_the_last(tmp_path, monkeypatch, clock):
    """A forward takes 0.08 s and a value 63 of them: of the budget of 10 s, 7 s are for values."""
    Timed(monkeypatch, clock, {HessianMonitor: 4.0}, evaluation=0.08)
    monitor = HessianMonitor(every_n_train_steps=2)
    train(Linear, regression, [monitor], tmp_path, max_epochs=3)  # 9 steps
    assert [row["step"] for row in monitor.history] == [8]


def test_warning_with_the_cost_if_no_value_is_affordable(tmp_path, monkeypatch, clock):
    Timed(monkeypatch, clock, {}, evaluation=1.0)  # a value takes a minute
    monitor = HessianMonitor()
    with pytest.warns(match="measured 0 times in 9 steps: one takes about 63 s, and of the 10 s"):
        train(Linear, regression, [monitor], tmp_path, max_epochs=3)
    assert monitor.history == []


def test_callback_without_a_limit_is_on_schedule(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 5.0, SharpnessMonitor: 5.0})
    callbacks = [
        HessianMonitor(every_n_train_steps=3, max_overhead=None),
        SharpnessMonitor(every_n_train_steps=3),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=10)
    assert callbacks[0].skipped == 0
    assert callbacks[0].measured == 10
    assert callbacks[1].measured + callbacks[1].skipped == 10
    assert callbacks[1].measured < 4


def test_forward_is_timed_before_a_value_is_skipped(tmp_path, monkeypatch, clock):
    """Steps take 1 s, as with a slow data loader, and forwards 10 ms."""
    Timed(monkeypatch, clock, {}, evaluation=0.01)
    monitor = HessianMonitor(every_n_train_steps=3)
    train(Linear, regression, [monitor], tmp_path, max_epochs=3)
    assert [row["step"] for row in monitor.history] == [3, 6, 9]


def test_forward_that_was_slow_once_does_not_skip_all_values(tmp_path, monkeypatch, clock):
    """The first forwards take 10 s each, by load on the machine; later ones next to nothing."""
    step = Linear.training_step

    def slow(module, batch, batch_idx):
        measuring = getattr(module.log, "__name__", "") == "_log_nothing"
        clock.now += (10.0 if clock.now < 250.0 else 0.001) if measuring else 1.0
        return step(module, batch, batch_idx)

    monkeypatch.setattr(Linear, "training_step", slow)
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=2.0, grace_seconds=0.0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=100)
    assert monitor.history[0]["step"] < 290  # not only at the end


# -- the first value -------------------------------------------------------------------------------


def test_value_that_has_not_converged_is_not_logged(tmp_path, monkeypatch, clock):
    """An evaluation takes 1 s, which leaves products for three of five dimensions."""
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    monkeypatch.setattr(HessianMonitor, "forwards", 1)
    batches = functools.partial(regression, batch_size=60)
    whole = regression().dataset.tensors
    given = {"every_n_train_steps": 10, "tol": 1e-6, "rtol": 0.0, "probe": whole}
    monitor = HessianMonitor(grace_seconds=6.0, **given)
    with pytest.warns(match="hessian/top_eigenvalue is not logged: the eigenvalue solver had not"):
        train(Linear, batches, [monitor], tmp_path / "short", max_epochs=101)
    x = whole[0].double()
    spectrum = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    for row in monitor.history:  # continued from there
        assert row["converged"]
        assert row["hessian/top_eigenvalue"] == pytest.approx(float(spectrum[-1]), rel=1e-5)
    assert 0 not in [row["step"] for row in monitor.history]
    assert monitor.failed == 0
    exact = HessianMonitor(max_overhead=None, **given)
    train(Linear, batches, [exact], tmp_path / "exact", max_epochs=1)
    assert exact.history[0]["hessian/hvps"] == 5


def test_nothing_is_started_without_time_for_two_products(tmp_path, monkeypatch, clock):
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    monkeypatch.setattr(HessianMonitor, "forwards", 1)
    monitor = HessianMonitor(grace_seconds=4.0, probe=regression().dataset.tensors)
    with pytest.warns(match="not measured: one Hessian-vector product takes about"):
        train(Linear, regression, [monitor], tmp_path, max_epochs=30)
    assert monitor.history == []


# -- pictures --------------------------------------------------------------------------------------


def test_first_estimate_is_from_the_steps(clock):
    monitor = LandscapeMonitor(resolution=5, line_resolution=0)
    probe = Probe((torch.zeros(60, 2),))
    complete(monitor, probe=probe)
    # 100 steps of half a second on 20 examples: 1/6 s a forward of 20
    known = Costs()
    known.batches, known.batch_size = 100, 20
    budget = Budget([monitor], known)
    clock.now = 50.0
    assert known.forward_seconds(probe) == pytest.approx(3 / 6)
    known.drawing = 0.25
    assert budget.seconds_of(monitor) == pytest.approx(25 / 2 + 0.25)
    known.record_forward(0.1)  # a forward was timed
    assert budget.seconds_of(monitor) == pytest.approx(2.5 + 0.25)
    known.record_forward(0.2)  # under load
    assert budget.seconds_of(monitor) == pytest.approx(2.5 + 0.25)
    monitor._bookkeeping.last_seconds = 7.0  # and now the whole
    assert budget.seconds_of(monitor) == 7.0
    line = InterpolationMonitor(resolution=5)  # its picture is drawn where there is time left
    complete(line, probe=probe)
    assert budget.seconds_of(line) == pytest.approx(0.5)


def test_pictures_are_spread_with_the_last_at_the_end(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 0.5, LandscapeMonitor: 4.0}, evaluation=1e-3)
    callbacks = [
        LandscapeMonitor(resolution=11, line_resolution=0),
        HessianMonitor(),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=100)  # 30 s longer
    steps = [row["step"] for row in callbacks[0].history]
    assert steps[-1] == 300
    assert 2 <= len(steps) <= 5
    assert 12 <= callbacks[1].measured <= 42
    shortest, longest = spread_of(steps)
    assert longest <= 2 * shortest + 60


def test_last_picture_has_the_resolution_that_fits(tmp_path, monkeypatch, clock, caplog):
    # .05 s a forward: of the 10 s four fifths are planned with, for 121 points, not for 169.
    Timed(monkeypatch, clock, {}, evaluation=0.05)
    monitor = LandscapeMonitor(line_resolution=0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=3)
    (path,) = (tmp_path / "landscape").glob("*.npz")
    plane = Slice.load(path)
    assert plane.losses.shape == (11, 11)
    assert plane.metadata["coarse"] == {"wanted": [15, 15], "taken": [11, 11]}
    assert "the last picture is coarser: landscape 11 x 11 of 15" in closing_line_of(caplog)
    assert "Above" not in closing_line_of(caplog)


def test_pictures_have_at_least_11_x_11_points(tmp_path, monkeypatch, clock, caplog):
    Timed(monkeypatch, clock, {}, evaluation=0.15)  # 121 points do not fit
    monitor = LandscapeMonitor(line_resolution=0)
    with pytest.warns(match="landscape: measured 0 times in 9 steps: one takes about 34 s"):
        train(Linear, regression, [monitor], tmp_path, max_epochs=3)
    assert not list(tmp_path.rglob("*.npz"))
    assert "Above" not in closing_line_of(caplog)
    small = LandscapeMonitor(line_resolution=0, resolution=5)  # as requested
    train(Linear, regression, [small], tmp_path / "small", max_epochs=3)
    assert len(small.history) == 1


def test_nothing_is_skipped_within_the_limit(tmp_path, monkeypatch, clock, caplog):
    Timed(monkeypatch, clock, {HessianMonitor: 0.5})
    callbacks = [
        HessianMonitor(every_n_train_steps=40),
        LandscapeMonitor(every_n_train_steps=40, resolution=3, line_resolution=3),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=40)
    line = closing_line_of(caplog)
    assert not any(word in line for word in ("left out", "Above", "coarser"))
    assert (tmp_path / "landscape" / "landscape-plane.gif").exists()


def test_pictures_with_values_do_not_use_the_reserve(clock):
    both = complete(HessianMonitor(grace_seconds=0.0), LandscapeMonitor(grace_seconds=0.0))
    budget, _ = budget_of(both, drawing=1.0)
    monitor = both[1]
    monitor._bookkeeping.last_seconds = 3.0
    budget.batches_ahead = budget.steps_ahead = 0
    clock.now = 80.0 / PLANNED  # 4 s
    assert budget.allows_drawing(4.0)
    beside = partial(budget.allows_drawing, beside_last=True)
    assert beside(2.0)  # half of them are reserved
    assert not beside(2.1)
    clock.now = 160.0 / PLANNED  # 8 s, 3 of them for the last picture
    assert beside(5.0)
    assert not beside(5.1)


# -- messages --------------------------------------------------------------------------------------


def test_closing_line(clock):
    monitors = [HessianMonitor(grace_seconds=0.0), SharpnessMonitor(max_overhead=None)]
    budget, costs = budget_of(monitors)
    budget.batches_ahead = 0
    clock.now = 104.0
    costs.time.add(4.0)
    start = "lightning_landscape: measured hessian 3, sharpness 0 times in 4.0 s"
    share = ", 4.0 % of the 100.0 s spent training (max_overhead=0.05, grace_seconds=0)"
    monitors[0]._bookkeeping.measured = 3
    assert closing_line(monitors, budget, costs, trains=True) == start + share
    monitors[0]._bookkeeping.skipped, monitors[0]._bookkeeping.failed = 2, 1
    counts = "; skipped 2 to stay within it; 1 failed"
    assert closing_line(monitors, budget, costs, trains=True) == start + share + counts
    budget.record("later measurements", 2.5)
    clock.now = 54.0  # 50 s of training, 4 s of measuring
    line = closing_line(monitors, budget, costs, trains=True)
    assert ", 8.0 % of the 50.0 s spent training" in line
    assert "Above the limit of 2.5 s; the time was spent on: later measurements 2.50 s, " in line
    assert "hooks, copies, probe 1.50 s (a callback with max_" in line
    budget.limit = None
    assert closing_line(monitors, budget, costs, trains=False) == f"{start}{counts}"


def test_fast_dev_run_has_no_budget(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 5.0}, evaluation=0.1)
    monitor = HessianMonitor()
    train(Linear, regression, [monitor], tmp_path, fast_dev_run=2)
    assert monitor.measured == 0


def test_early_stopping_with_too_few_values_warns(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(session.time, "perf_counter", clock)
    Timed(monkeypatch, clock, {HessianMonitor: 3.0})
    monitor = HessianMonitor(every_n_train_steps=3)
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", threshold=1e9, patience=4)
    with pytest.warns(match=r"edge_ratio'\) got \d values in 12 steps and needs 4: it could not"):
        train(Linear, regression, [monitor, stopper], tmp_path, max_epochs=4)
    assert re.search("[1-3]", str(monitor.measured))


def two_problems(**settings):
    """57 s are planned with."""
    probe = regression().dataset.tensors
    return HessianMonitor(
        grace_seconds=60.0, max_overhead=0.6, probe=probe, min_eigenvalue=True, **settings
    )


@pytest.mark.parametrize("seconds", [0.0, 12.0])
def test_products_of_a_short_run_are_shared(tmp_path, monkeypatch, clock, seconds):
    """By all eigenvalues, and with the callbacks that follow in the same round."""
    # As above: products for ten samples of the trace, and three problems together.
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    monkeypatch.setattr(HessianMonitor, "forwards", 1)
    monkeypatch.setattr(SharpnessMonitor, "forwards", 3 * seconds)  # a third of a step each
    limits = []
    limit_products = Solver.limit_products

    def noted(solver, products, *of):
        limits.append((products, *of))
        limit_products(solver, products, *of)

    monkeypatch.setattr(Solver, "limit_products", noted)
    monitor = two_problems(blocks=True, trace_samples=10)
    batches = functools.partial(regression, batch_size=60)
    others = [SharpnessMonitor(grace_seconds=60.0, max_overhead=0.6)] if seconds else []
    train(Linear, batches, [monitor, *others], tmp_path, max_epochs=100)
    # 57 s but for those before the solver, 1 s a product; two products at least for each problem.
    assert limits[1] == (pytest.approx(57 - 3 - 10 - seconds, abs=1), 3, 2)


def test_products_that_become_slower_are_fewer(tmp_path, monkeypatch, clock):
    """Load on the machine begins in the first of two problems, which takes 40 s of 57."""
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    monkeypatch.setattr(HessianMonitor, "forwards", 1)
    limits = {}
    store = Solver.store

    def slowly(solver, problem, result):
        limits[problem] = solver.limit
        clock.now += 40.0 if problem == "top" else 0.0
        store(solver, problem, result)

    monkeypatch.setattr(Solver, "store", slowly)
    monitor = two_problems()
    batches = functools.partial(regression, batch_size=60)
    train(Linear, batches, [monitor], tmp_path, max_epochs=100)
    assert limits["top"] > 40
    assert limits["min"] == 2


def test_values_leave_time_for_idle_hooks_ahead(tmp_path, monkeypatch, clock, caplog):
    """1,200 steps of 1 s may become 60 s longer; idle hooks take 48 s of them."""
    monkeypatch.setattr(costs, "HOOK_SECONDS", 1.0)
    Timed(monkeypatch, clock, {HessianMonitor: 0.5})
    monitor = HessianMonitor(grace_seconds=0.0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=400)
    assert 0.045 <= share_in_closing_line(caplog) <= 0.0475
    assert 6 <= monitor.measured <= 12  # of .5 s, with .7 of the 9 s that are left, or more
    steps = [row["step"] for row in monitor.history]
    assert steps[-1] > 900


def test_timed_forwards_leave_the_budget_to_values(tmp_path, monkeypatch, clock):
    # An eigenvalue takes longer than the 30 s allowed, one SAM value does not.
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    callbacks = [HessianMonitor(), SharpnessMonitor()]
    train(Linear, regression, callbacks, tmp_path, max_epochs=100)
    assert [callback.measured for callback in callbacks] == [0, 1]
