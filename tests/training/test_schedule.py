"""The budget is a debt that training pays off."""

from __future__ import annotations

import functools
import re
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from lightning_landscape import (
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.training import costs, measuring, probes, publisher, session
from lightning_landscape.training.bookkeeping import LOSS
from lightning_landscape.training.budget import Budget
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.data import batch as batches
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.last_step import LastStep
from lightning_landscape.training.run_state import RunState
from lightning_landscape.training.schedule import Schedule, batches_ahead
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
    monkeypatch.setattr(costs.time, "perf_counter", clock)
    monkeypatch.setattr(session, "HOOK_SECONDS", 0.0)  # by this clock
    return clock


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
    spent = sum(c._bookkeeping.seconds_spent for c in callbacks)
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


def closing_line(caplog):
    return next(r.message for r in caplog.records if r.message.startswith("lightning_landscape"))


def share_told(caplog):
    return float(re.search(r"([\d.]+) % of the", closing_line(caplog))[1]) / 100


# -- values that the whole run cannot pay for ------------------------------------------------------


@pytest.mark.short_runs
@pytest.mark.parametrize(
    ("limit", "ahead", "spent", "seconds"),
    [
        (0.05, 990, 0.0, 25.0),  # half of 5 % of 1000 s
        (0.05, 990, 7.0, 18.0),
        (0.05, 90, 0.0, 2.5),
        (0.05, 10, 0.0, 1.5),  # 20 s in all: as if it were a minute
        (0.01, 0, 0.0, 0.3),
        (0.05, 10, 4.0, -2.5),  # borrowed in full
        (1.0, 10, 7.0, 23.0),
        (1.0, 0, 28.0, 2.0),  # all was borrowed, and training has paid some back
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


class TwoOptimizers(Linear):
    """Steps each of two optimizers at every batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=self.lr) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "settings", "ahead"),
    [
        (Linear, {"max_epochs": 4}, 11),  # of 12
        (Linear, {"max_epochs": 4, "max_steps": 5}, 4),
        (Linear, {"max_epochs": 4, "max_steps": 100}, 11),
        (Linear, {"max_epochs": -1, "max_steps": 5}, 4),
        (Linear, {"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, 10),
        (TwoOptimizers, {"max_epochs": -1, "max_steps": 10}, 4),
    ],
)
def test_batches_ahead(tmp_path, kind, settings, ahead):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(batches_ahead(trainer))

    train(kind, regression, [Look()], tmp_path, **settings)
    assert seen[0] == ahead
    assert seen[-1] <= 1


def test_nobody_knows_how_long_it_will_be(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(batches_ahead(trainer))
            trainer.should_stop = True

    train(Linear, regression, [Look()], tmp_path, max_epochs=-1, max_steps=-1)
    assert seen == [float("inf")]


@pytest.mark.short_runs
def test_the_first_value_is_what_the_run_can_pay_for(tmp_path, monkeypatch, clock):
    # An evaluation takes 1 s.  Of 10 % of 215 s half may be borrowed, 3 s pass before the solver
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
@pytest.mark.parametrize(
    ("steps", "limits", "examples"),
    [
        (1000, [0.1], 100),  # 50 s, and ten gradients of five batches take as long
        (60, [0.1], 40),  # two at least: the first one tells nothing
        (60, [0.1, 1.0], 40),  # the smallest limit
        (4000, [0.1], 400),
        (10_000, [0.1], 520),  # 512 are wanted, of 20 at a time
        (60, [0.1, None], 520),
        (-1, [0.1], 520),  # nobody knows how long it will be
    ],
)
def test_a_probe_is_no_larger_than_the_run_can_pay_for(
    tmp_path, monkeypatch, clock, steps, limits, examples
):
    Timed(monkeypatch, clock, {})
    monitors = [
        SharpnessMonitor(max_overhead=limit, name=f"at{place}")
        for place, limit in enumerate(limits)
    ]

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 26

    data = functools.partial(regression, 1040)
    settings = {"max_epochs": -1, "max_steps": steps, "min_steps": 26}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(Linear, data, [*monitors, Stop()], tmp_path, **settings)
    assert monitors[0].history[0]["probe_samples"] == examples
    told = [str(w.message) for w in said if "the probe holds" in str(w.message)]
    if examples == 520:
        assert not told
    else:
        (message,) = told
        assert f"holds {examples} examples, {examples // 20} training batches, " in message
        assert "instead of 512" in message


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
def test_what_a_short_run_pays_for_is_shared_by_all_eigenvalues(tmp_path, monkeypatch, clock):
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


# -- prices ---------------------------------------------------------------------------------------


def test_the_first_price_comes_from_the_steps(clock):
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


def test_a_picture_is_not_begun_that_the_budget_cannot_pay(tmp_path, monkeypatch, clock, caplog):
    # A forward of the probe of 3 batches takes .3 s, a picture 25 of them: 7.5 s of the 10 s.
    Timed(monkeypatch, clock, {}, evaluation=0.1)
    monitor = LandscapeMonitor(
        every_n_train_steps=10, resolution=5, line_resolution=0, max_overhead=0.1
    )
    train(Linear, regression, [monitor], tmp_path, max_epochs=34)
    # By the steps a forward takes 1 s.  Three of them are affordable at step 33, and one is timed:
    # .6 s with the one before it.  Half of what is earned is for the last picture.
    assert not [step for step in range(33, 103, 10) if 0.1 * step >= 0.6 + 7.5 + 0.05 * step]
    assert [row["step"] for row in monitor.history] == [102]
    assert share_told(caplog) <= 0.1
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
    assert share_told(caplog) <= 0.05


def test_the_smallest_picture_is_made_in_any_case_and_it_is_said(
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


def test_what_is_dear_of_the_whole_run_is_left_out(tmp_path, monkeypatch, clock, caplog):
    # A picture takes .5 s, so the animation of the two 1.2, the film .7: 6 s less 5 are left.
    picture = publisher.Publisher._make

    def slow(self, measured, step):
        clock.now += 0.5 * len(measured.pictures)
        picture(self, measured, step)

    monkeypatch.setattr(publisher.Publisher, "_make", slow)
    Timed(monkeypatch, clock, {LandscapeMonitor: 2.0})
    monitor = LandscapeMonitor(every_n_train_steps=10**6, resolution=3, line_resolution=0)
    monitor._bookkeeping.schedule.due = lambda step, *_: step == 110
    train(Linear, regression, [monitor], tmp_path, max_epochs=40)
    assert [row["step"] for row in monitor.history] == [110, 120]
    assert "left out: landscape-plane.gif" in closing_line(caplog)
    assert "landscape/film" not in closing_line(caplog)
    assert share_told(caplog) <= 0.05


# -- pictures of callbacks that are there for values ----------------------------------------------


@pytest.fixture
def dear_pictures(monkeypatch, clock):
    """Each takes 4 s of a clock that we turn, and that is known before."""
    make = publisher.Publisher._make

    def slow(self, measured, step):
        clock.now += 4.0 * len(measured.pictures)
        make(self, measured, step)

    monkeypatch.setattr(publisher.Publisher, "_make", slow)
    monkeypatch.setattr(costs, "_DRAWING_SECONDS", 4.0)


def made(folder, kind, suffix):
    """Steps of the files ``<kind>-step00000120.<suffix>`` beside the logs."""
    return sorted(int(path.stem[-8:]) for path in folder.glob(f"landscape/{kind}-step*.{suffix}"))


@pytest.mark.pictures
def test_a_picture_beside_values_waits_until_it_is_affordable(
    tmp_path, monkeypatch, clock, dear_pictures
):
    Timed(monkeypatch, clock, {InterpolationMonitor: 0.5})
    monitor = InterpolationMonitor(every_n_train_steps=10, max_overhead=0.1)
    train(Linear, regression, [monitor], tmp_path, max_epochs=100)  # 300 steps, 300 s
    # The values do not wait for their pictures: they come where 0.1 * step >= spent + 0.5.
    spent, values, drawn = 0.0, [], []
    for step in range(3, 301, 10):
        if values and 0.1 * step < spent + 0.5:
            continue
        values.append(step)
        spent += 0.5
        if 0.1 * step >= spent + 4.0:
            drawn.append(step)
            spent += 4.0
    assert 2 <= len(drawn) < len(values) - 10
    # All their numbers are there, and the last picture is.
    assert [row["step"] for row in monitor.history] == [*values, 300]
    assert made(tmp_path, "interpolation-line", "npz") == [*values, 300]
    assert made(tmp_path, "interpolation-line", "png") == [*drawn, 300]


@pytest.mark.pictures
def test_the_last_one_put_off_is_drawn_at_the_end(tmp_path, monkeypatch, clock, dear_pictures):
    Timed(monkeypatch, clock, {HessianMonitor: 0.1})
    monitor = HessianMonitor(every_n_train_steps=10, density_samples=2)
    train(Linear, regression, [monitor], tmp_path, max_epochs=25)  # 75 s allow one of 3.75 s
    assert made(tmp_path, "hessian-density", "npz") == [3, *range(13, 75, 10)]
    assert made(tmp_path, "hessian-density", "png") == [73]


@pytest.mark.pictures
def test_without_a_limit_every_picture_is_drawn(tmp_path, monkeypatch, clock, dear_pictures):
    monitors = [
        InterpolationMonitor(every_n_train_steps=10, max_overhead=None),
        HessianMonitor(density_samples=2, every_n_train_steps=10, max_overhead=None),
        SharpnessMonitor(),  # the budget is that of the others
    ]
    train(Linear, regression, monitors, tmp_path, max_epochs=10)
    assert made(tmp_path, "interpolation-line", "png") == [3, 13, 23, 30]
    assert made(tmp_path, "hessian-density", "png") == [3, 13, 23]


@pytest.mark.pictures
def test_what_was_put_off_leaves_what_it_takes_out_of_the_last_picture(
    tmp_path, monkeypatch, clock, dear_pictures, caplog
):
    # Of 12 s less 4 for the density four fifths are planned with, less 4 for drawing the plane, and
    # less than .5 went before: 2.0 to 2.4 s at .06 a forward, for 25 points, not for 49.
    Timed(monkeypatch, clock, {}, evaluation=0.02)
    callbacks = [
        HessianMonitor(every_n_train_steps=10**6, density_samples=2),
        LandscapeMonitor(every_n_train_steps=10**6, line_resolution=0),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=80)
    assert made(tmp_path, "hessian-density", "png") == [3]
    (path,) = (tmp_path / "landscape").glob("landscape-plane-*.npz")
    assert Slice.load(path).losses.shape == (5, 5)
    assert share_told(caplog) <= 0.05


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


# -- where nothing is due -------------------------------------------------------------------------


def test_nothing_is_done_where_nothing_is_due(tmp_path, monkeypatch):
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


def test_the_idle_hooks_are_charged(tmp_path, monkeypatch, clock, caplog):
    monkeypatch.setattr(session, "HOOK_SECONDS", 0.01)
    Timed(monkeypatch, clock, {})
    train(Linear, regression, [HessianMonitor(every_n_train_steps=10**6)], tmp_path, max_epochs=40)
    assert "times in 1.2 s" in closing_line(caplog)  # 120 steps


def test_limit_of_a_drawing_is_asked_with_the_import(monkeypatch, clock):
    known = Costs()
    monkeypatch.setitem(costs.sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(costs.sys.modules, "matplotlib.figure")
    assert known.drawing_seconds(2) == pytest.approx(0.2 + 0.6)
    assert known.drawing_seconds(0) == 0.0
    known.drawing = 0.05
    assert known.drawing_seconds(2) == pytest.approx(0.1)
