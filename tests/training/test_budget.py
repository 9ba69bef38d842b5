"""What fits into the share of the training time that the callbacks may take."""

from __future__ import annotations

import functools
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lightning_landscape import (
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.training import session
from lightning_landscape.training.bookkeeping import LOSS
from lightning_landscape.training.budget import Budget, choose
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.data.probe import Probe
from tests.runs import train
from tests.small import Linear, regression
from tests.training.clock import Timed, closing_line, share_in_closing_line


@pytest.mark.parametrize(
    ("left", "names"),
    [
        (10.0, ["exact", "cheap", "expensive", "large", "small"]),
        (7.0, ["exact", "cheap", "expensive", "large", "small"]),  # just enough for all
        (6.9, ["exact", "cheap", "expensive", "large"]),
        (5.5, ["exact", "cheap", "expensive", "small"]),
        (4.0, ["exact", "cheap", "expensive", "small"]),
        (3.0, ["exact", "cheap", "expensive"]),
        (2.9, ["exact", "new"]),
        (-1.0, ["exact", "new"]),
    ],
)
def test_choose(left, names):
    """Scalars all together or not at all, then pictures in turn; no limit, no question."""
    seconds = {"large": 3.0, "cheap": 1.0, "small": 1.0, "exact": 100.0, "expensive": 2.0}
    due = [
        SimpleNamespace(
            name=name,
            max_overhead=None if name == "exact" else 0.05,
            draws=name in ("large", "small"),
            measured=2,
        )
        for name in seconds
    ]
    if "new" in names:  # not measured yet
        due.append(SimpleNamespace(name="new", max_overhead=0.05, draws=False, measured=0))
    chosen = choose(due, lambda q: seconds.get(q.name, 0.0), left)
    assert [q.name for q in chosen] == names


def test_nothing_is_chosen_of_nothing():
    assert choose([], lambda q: 1.0, -5.0) == []


def budget_of(callbacks, **known):
    """A budget, and its stopwatch, which has been started."""
    found = Costs()
    vars(found).update(known)
    return Budget(callbacks, found), found.time


def test_budget_arithmetic(clock):
    budget, time = budget_of([HessianMonitor(max_overhead=0.05)])
    clock.now = 100.0  # 100 s of training
    assert budget.left == pytest.approx(5.0)
    clock.now = 104.0
    time.add(4.0)
    assert time.trained == pytest.approx(100.0)
    assert time.share == pytest.approx(0.04)
    assert budget.left == pytest.approx(1.0)


def test_no_limit(clock):
    budget, time = budget_of([HessianMonitor(max_overhead=None)])
    time.add(1e9)
    assert budget.left == float("inf")


def test_the_closing_line(clock):
    monitor = HessianMonitor(max_overhead=0.05)
    budget, time = budget_of([monitor, SharpnessMonitor(max_overhead=None)])
    clock.now = 104.0
    time.add(4.0)
    start = "lightning_landscape: measured hessian 3, sharpness 0 times in 4.0 s"
    share = ", 4.0 % of the 100.0 s spent training"
    monitor._bookkeeping.measured = 3
    assert budget.closing_line(trains=True) == f"{start}{share} (max_overhead=0.05)"
    monitor._bookkeeping.skipped, monitor._bookkeeping.failed = 2, 1
    counts = "; skipped 2 to stay within it; 1 failed"
    assert budget.closing_line(trains=True) == f"{start}{share} (max_overhead=0.05){counts}"
    budget.record("later measurements", 2.5)
    clock.now = 54.0  # 50 s of training, 4 s of measuring
    line = budget.closing_line(trains=True)
    assert line.startswith(
        f"{start}, 8.0 % of the 50.0 s spent training (max_overhead=0.05){counts}"
    )
    assert "later measurements 2.50 s, hooks, copies, probe 1.50 s (a callback with max_" in line
    budget.limit = None
    assert budget.closing_line(trains=False) == f"{start}{counts}"


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
    spent = sum(c._bookkeeping.seconds_spent for c in callbacks)
    assert spent <= 0.1 * 300
    assert callbacks[0].measured + callbacks[0].skipped == 30
    assert callbacks[0].skipped > 0


def test_pictures_wait_for_scalars_but_the_last_is_made(tmp_path, monkeypatch, clock, caplog):
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
    # Half of the allowance is reserved for it: 0.025 * trained >= spent + 1.
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


# -- values, by the length of the whole run --------------------------------------------------------


@pytest.mark.short_runs
@pytest.mark.parametrize(
    ("limit", "ahead", "spent", "seconds"),
    [
        (0.05, 990, 0.0, 25.0),  # half of 5 % of 1000 s
        (0.05, 990, 7.0, 18.0),
        (0.05, 90, 0.0, 2.5),
        (0.05, 10, 0.0, 1.5),  # 20 s in all: as if it were a minute
        (0.01, 0, 0.0, 0.3),
        (0.05, 10, 4.0, -2.5),  # 2.5 s above that
        (1.0, 10, 7.0, 23.0),
        (1.0, 0, 28.0, 2.0),  # 30 s in all
        (0.05, float("inf"), 9.0, float("inf")),
        (None, 10, 9.0, float("inf")),
    ],
)
def test_seconds_for_values(clock, limit, ahead, spent, seconds):
    trained = 30.0 if spent == 28.0 else 10.0
    monitor = HessianMonitor(max_overhead=limit)
    budget, time = budget_of([monitor], batches=10)
    clock.now = trained + spent
    time.add(spent)
    assert budget.seconds_for_values(ahead) == pytest.approx(seconds)


@pytest.mark.short_runs
def test_the_first_value_takes_what_the_run_allows(tmp_path, monkeypatch, clock):
    # An evaluation takes 1 s.  Of 10 % of 215 s half may be used, 3 s pass before the solver
    # begins, and a product is taken to be 2.5 gradients: that makes three.  Without the limit five
    # are made, all there are in five dimensions.
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    batches = functools.partial(regression, batch_size=60)
    whole = regression().dataset.tensors
    given = {"every_n_train_steps": 10, "tol": 1e-6, "rtol": 0.0, "probe": whole}
    monitor = HessianMonitor(max_overhead=0.1, **given)
    with pytest.warns(match="after 3 products, the limit of this run by max_overhead=0.1"):
        train(Linear, batches, [monitor], tmp_path / "short", max_epochs=215)
    x = whole[0].double()
    spectrum = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    first, *later = monitor.history
    value, residual = (first[f"hessian/{name}"] for name in ("top_eigenvalue", "residual"))
    assert first["hessian/hvps"] == 3
    assert not first["converged"]
    assert float((spectrum - value).abs().min()) <= residual
    assert value < float(spectrum[-1]) * (1 + 1e-6)
    # What products really take is known now: nothing, on this clock.
    assert later
    for row in later:
        assert row["converged"]
        assert row["hessian/top_eigenvalue"] == pytest.approx(float(spectrum[-1]), rel=1e-5)
    long = HessianMonitor(max_overhead=0.1, **given)
    train(Linear, batches, [long], tmp_path / "long", max_epochs=480)
    assert long.history[0]["hessian/hvps"] == 5
    exact = HessianMonitor(max_overhead=None, **given)
    train(Linear, batches, [exact], tmp_path / "exact", max_epochs=1)
    assert exact.history[0]["hessian/hvps"] == 5


@pytest.mark.short_runs
def test_few_products_start_from_the_gradient(tmp_path, clock):
    """From a random start three of them do not see one eigenvalue of 3 among 4000 up to 1."""
    spectrum = torch.linspace(-1.0, 1.0, 4000)
    spectrum[0] = 3.0

    class Bowl(Linear):
        def __init__(self):
            super().__init__(lr=1e-9)
            self.layer = torch.nn.ParameterList([torch.ones(4000)])

        def training_step(self, batch, batch_idx):
            clock.now += 1.0
            return (spectrum * self.layer[0] ** 2).sum() / 2

    monitor = HessianMonitor(max_overhead=0.1, probe=(torch.ones(20, 1),))
    train(Bowl, functools.partial(regression, batch_size=60), [monitor], tmp_path, max_epochs=230)
    first = monitor.history[0]
    assert first["hessian/hvps"] == 3

    def best_of_three(v):  # the largest Ritz value of the Krylov space
        h = spectrum.double()
        basis = torch.linalg.qr(torch.stack([v, h * v, h**2 * v], 1)).Q
        return float(torch.linalg.eigvalsh(basis.T @ (h[:, None] * basis)).max())

    chance = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert best_of_three(chance) < 2.0
    expected = best_of_three(spectrum.double())  # the gradient at weights of one
    assert expected > 2.6
    assert first["hessian/top_eigenvalue"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.short_runs
def test_the_products_of_a_short_run_are_shared_by_all_eigenvalues(tmp_path, monkeypatch, clock):
    # As above, of half the time: 20 products, for ten samples of the trace and three problems.
    Timed(monkeypatch, clock, {}, evaluation=1.0)
    batches = functools.partial(regression, batch_size=60)
    monitor = HessianMonitor(
        max_overhead=0.5,
        tol=1e-6,
        rtol=0.0,
        probe=regression().dataset.tensors,
        min_eigenvalue=True,
        blocks=True,
        trace_samples=10,
    )
    with pytest.warns(match="after 3 products"):
        train(Linear, batches, [monitor], tmp_path, max_epochs=212)
    assert monitor.history[0]["hessian/hvps"] == 3 * 3 + 10


# -- pictures --------------------------------------------------------------------------------------


def test_the_first_estimate_comes_from_the_steps(clock):
    monitor = LandscapeMonitor(resolution=5, line_resolution=0)
    probe = monitor._bookkeeping.probes[LOSS] = Probe((torch.zeros(60, 2),))
    probe.load(lambda batch: batch)
    # 100 steps of half a second on 20 examples: 1/6 s a forward of 20
    known = Costs()
    known.batches, known.batch_size = 100, 20
    budget = Budget([monitor], known)
    clock.now = 50.0
    assert known.forward_seconds(probe) == pytest.approx(3 / 6)
    known.drawing = 0.25
    assert budget.seconds_of(monitor) == pytest.approx(25 / 2 + 0.25)
    known.record_first_forward(0.1)  # a forward was timed
    assert budget.seconds_of(monitor) == pytest.approx(2.5 + 0.25)
    monitor._bookkeeping.last_seconds = 7.0  # and now the whole
    assert budget.seconds_of(monitor) == 7.0
    line = InterpolationMonitor(resolution=5)  # its picture is drawn where there is time left
    line._bookkeeping.probes[LOSS] = probe
    assert budget.seconds_of(line) == pytest.approx(0.5)


def test_a_picture_above_the_budget_is_not_begun(tmp_path, monkeypatch, clock, caplog):
    # A forward of the probe of 3 batches takes .3 s, a picture 25 of them: 7.5 s of the 10 s.
    Timed(monkeypatch, clock, {}, evaluation=0.1)
    monitor = LandscapeMonitor(
        every_n_train_steps=10, resolution=5, line_resolution=0, max_overhead=0.1
    )
    train(Linear, regression, [monitor], tmp_path, max_epochs=34)
    # By the steps a forward takes 1 s.  Three of them are affordable at step 33, and one is timed:
    # .6 s with the one before it.  Half of the allowance is for the last picture.
    assert not [step for step in range(33, 103, 10) if 0.1 * step >= 0.6 + 7.5 + 0.05 * step]
    assert [row["step"] for row in monitor.history] == [102]
    assert share_in_closing_line(caplog) <= 0.1
    assert "Above" not in closing_line(caplog)
    assert "coarser" not in closing_line(caplog)


def test_the_last_picture_is_as_fine_as_what_is_left(tmp_path, monkeypatch, clock, caplog):
    # .06 s a forward: of the 6 s four fifths are planned with, for 49 points, not for 81.
    Timed(monkeypatch, clock, {}, evaluation=0.02)
    monitor = LandscapeMonitor(every_n_train_steps=10, line_resolution=0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=40)
    (path,) = (tmp_path / "landscape").glob("*.npz")
    plane = Slice.load(path)
    assert plane.losses.shape == (7, 7)
    assert plane.metadata["coarse"] == {"wanted": [15, 15], "taken": [7, 7]}
    assert "the last picture is coarser: landscape 7 x 7 of 15 x 15 points" in closing_line(caplog)
    assert share_in_closing_line(caplog) <= 0.05


def test_the_smallest_picture_is_made_in_any_case_and_reported(
    tmp_path, monkeypatch, clock, caplog
):
    Timed(monkeypatch, clock, {HessianMonitor: 2.0}, evaluation=0.5)  # 1.5 s a forward
    callbacks = [HessianMonitor(), LandscapeMonitor(seeds=3)]
    train(Linear, regression, callbacks, tmp_path, max_epochs=40)
    slices = [Slice.load(path) for path in (tmp_path / "landscape").glob("*.npz")]
    assert sorted(piece.losses.shape for piece in slices) == [(5, 5), (7,), (7,), (7,)]
    line = closing_line(caplog)
    assert "5 x 5 and 7 of 15 x 15 and 21 points" in line
    assert "left out: hessian/eigenvalue" in line
    assert re.search(r"Above the limit.*first values [\d.]+ s, last pictures [\d.]+ s", line)


def test_a_plane_without_lines_is_made_in_any_case(tmp_path, monkeypatch, clock, caplog):
    Timed(monkeypatch, clock, {}, evaluation=0.5)
    train(Linear, regression, [LandscapeMonitor(line_resolution=0)], tmp_path, max_epochs=40)
    slices = [Slice.load(path) for path in (tmp_path / "landscape").glob("*.npz")]
    assert [piece.losses.shape for piece in slices] == [(5, 5)]
    assert "5 x 5 of 15 x 15 points" in closing_line(caplog)


def test_within_the_limit_nothing_is_left_out(tmp_path, monkeypatch, clock, caplog):
    Timed(monkeypatch, clock, {HessianMonitor: 0.5})
    callbacks = [
        HessianMonitor(every_n_train_steps=40),
        LandscapeMonitor(every_n_train_steps=40, resolution=3, line_resolution=3),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=40)
    line = closing_line(caplog)
    assert not any(word in line for word in ("left out", "Above", "coarser"))
    assert (tmp_path / "landscape" / "landscape-plane.gif").exists()


def test_pictures_beside_values_leave_the_reserve_alone(clock):
    monitor = LandscapeMonitor()
    budget, _ = budget_of([HessianMonitor(), monitor], drawing=1.0)
    monitor._bookkeeping.last_seconds = 3.0
    clock.now = 80.0  # 4 s
    assert budget.allows_drawing(4.0)
    beside = partial(budget.allows_drawing, beside_last=True)
    assert beside(2.0)  # half of them are reserved
    assert not beside(2.1)
    clock.now = 160.0  # 8 s, 3 of them for the last picture
    assert beside(5.0)
    assert not beside(5.1)
