"""Directions of slices in real runs: the last step, the path, two checkpoints."""

from __future__ import annotations

import itertools
import math
import time
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_landscape import LandscapeMonitor, Probe, Slice
from lightning_landscape.callbacks.axes import Axes
from lightning_landscape.geometry.trajectory import Trajectory
from lightning_landscape.geometry.vectors import inner, norm
from lightning_landscape.training.costs import Stopwatch
from tests.runs import differences, train
from tests.small import Linear, ones, regression
from tests.training.clock import Timed

SETTINGS = {"every_n_train_steps": 2, "max_overhead": None}
F64 = {"precision": "64-true"}


@pytest.fixture
def taken(monkeypatch):
    """The axes of every slice, with its step and the loss there."""
    found = []
    take = Axes.make

    def keep(self, this_round, objective, path):
        axes = take(self, this_round, objective, path)
        found.append((this_round.step, axes))
        return axes

    monkeypatch.setattr(Axes, "make", keep)
    return found


class Watch(pl.Callback):
    """The step that plain gradient descent makes, from the gradient before it."""

    def __init__(self):
        self.steps, self.weights = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        lr = optimizer.param_groups[0]["lr"]
        self.steps.append({n: -lr * p.grad for n, p in pl_module.named_parameters()})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def slices(root, part):
    return [Slice.load(path) for path in sorted((root / "landscape").glob(f"*{part}-step*.npz"))]


class Valley(pl.LightningModule):
    """L = curvature w_0^2 / 2; the loss does not depend on w_1."""

    curvature = 4.0

    def __init__(self, lr):
        super().__init__()
        self.w, self.lr = nn.Parameter(torch.tensor([1.0, 2.0])), lr

    def training_step(self, batch, batch_idx):
        return batch[0].mean() * self.curvature * self.w[0] ** 2 / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


# -- the last step --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": 4}, {"max_steps": 5, "max_epochs": -1}, {"accumulate_grad_batches": 2}],
)
def test_update_is_the_last_step(tmp_path, taken, settings):
    watch = Watch()
    monitor = LandscapeMonitor(directions="update", resolution=3, **SETTINGS)
    train(Linear, regression, [monitor, watch], tmp_path, **F64, **settings)
    assert monitor.failed == 0
    assert taken[-1][0] == len(watch.steps)
    for step, (x, y) in taken:
        expected = watch.steps[step - 1]["layer.weight"]
        torch.testing.assert_close(x.vector["layer.weight"], expected, rtol=1e-9, atol=1e-15)
        assert (x.name, x.fixed, x.span) == ("update", False, (-2.0, 3.0))
        assert norm(y.vector) == pytest.approx(norm(x.vector))
        assert inner(x.vector, y.vector) == pytest.approx(0.0, abs=1e-9 * norm(x.vector) ** 2)


@pytest.mark.short_runs
def test_last_slice_without_the_budget_for_the_last_step(tmp_path, monkeypatch, clock, taken):
    """A forward takes .05 s: 10 s are not enough for 225 points, but enough for 121."""
    Timed(monkeypatch, clock, {}, evaluation=0.05)
    monitor = LandscapeMonitor(directions="update", line_resolution=0, every_n_train_steps=1)
    train(Linear, regression, [monitor], tmp_path)
    assert monitor.skipped > 0
    assert monitor.reduced_resolution == "11 x 11 of 15 x 15 points"
    assert [(step, axes[0].name) for step, axes in taken] == [(6, "update")]


def test_unexpected_end(tmp_path, taken):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

    monitor = LandscapeMonitor(
        directions="update", resolution=3, every_n_train_steps=100, max_overhead=None
    )
    with pytest.warns(UserWarning, match="earlier than the Trainer's limits"):
        train(Linear, regression, [monitor, Stop()], tmp_path, max_epochs=50, min_epochs=0)
    assert monitor.failed == 0
    assert [axes[0].name for _, axes in taken] == ["update", "random"]


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, 1.7, 2.5])
def test_overshoot_of_a_parabola(tmp_path, share):
    monitor = LandscapeMonitor(directions="update", resolution=0, probe_samples=4, **SETTINGS)
    lr = share / Valley.curvature
    train(lambda: Valley(lr), ones, [monitor], tmp_path, **F64, max_epochs=1)
    first = monitor.history[0]
    assert first["step"] == 1
    assert first["overshoot"] == pytest.approx(share, rel=1e-5)
    assert first["lowest_along_update"] == pytest.approx(1 / share - 1, rel=1e-4, abs=1e-5)
    assert first["update_norm"] == pytest.approx(share)
    line = slices(tmp_path, "line-1")[0]
    at = line.coordinates[0].tolist().index(-1.0)
    assert line.losses[at] == pytest.approx(Valley.curvature / 2)  # before the step


def test_no_overshoot_if_the_lowest_point_is_beyond_the_line(tmp_path):
    monitor = LandscapeMonitor(directions="update", resolution=0, **SETTINGS)
    train(lambda: Valley(0.1 / Valley.curvature), ones, [monitor], tmp_path, max_epochs=1)
    assert all(math.isnan(row["overshoot"]) for row in monitor.history)
    assert all(row["lowest_along_update"] == 3.0 for row in monitor.history)


@pytest.mark.parametrize(
    ("pair", "kept"),
    [(("gradient", "update"), 1), (("update", "gradient"), 0), (("update", "between"), 0)],
)
def test_other_direction_is_orthogonal_to_the_update(tmp_path, taken, pair, kept):
    a, b = Linear().state_dict(), Linear().state_dict()
    between = (a, b) if "between" in pair else None
    monitor = LandscapeMonitor(directions=pair, between=between, resolution=3, **SETTINGS)
    watch = Watch()
    train(Linear, regression, [monitor, watch], tmp_path, **F64)
    assert monitor.failed == 0
    for step, axes in taken:
        expected = watch.steps[step - 1]["layer.weight"]
        torch.testing.assert_close(
            axes[kept].vector["layer.weight"], expected, rtol=1e-9, atol=1e-15
        )
        cosine = inner(axes[0].vector, axes[1].vector)
        assert cosine == pytest.approx(0.0, abs=1e-9 * norm(axes[0].vector) * norm(axes[1].vector))


# -- the path -------------------------------------------------------------------------------------


def test_path_lies_in_its_principal_plane(tmp_path, taken):
    watch = Watch()
    monitor = LandscapeMonitor(directions="pca", resolution=(5, 4), line_resolution=5, **SETTINGS)
    run = train(Linear, regression, [monitor, watch], tmp_path, **F64, max_epochs=9)
    assert monitor.failed == 0
    planes = slices(tmp_path, "plane")
    assert len(planes) == monitor.measured > 5
    for plane, (step, axes) in zip(planes, taken, strict=True):
        path = plane.metadata["path"]
        assert path["steps"][0] == 0
        assert len(path["steps"]) <= 16
        points = np.array(path["coordinates"])
        for axis, values in zip(plane.coordinates, points.T, strict=True):
            assert axis[0] < min(values.min(), 0.0)
            assert axis[-1] > max(values.max(), 0.0)
        if axes[1].kind == "pca":
            first, second = path["explained"]
            assert 1.0 + 1e-9 >= first + second >= first >= second
            assert plane.metadata["norms"] == pytest.approx([1.0, 1.0])
        # Against the weights as another callback saw them.
        now = [*watch.weights, dict(run.trainer.lightning_module.named_parameters())][step]
        for at, point, residual in zip(path["steps"], points, path["residuals"], strict=True):
            on_plane = {
                n: w.detach() + sum(c * a.vector[n] for c, a in zip(point, axes, strict=True))
                for n, w in now.items()
            }
            off = norm({n: t - watch.weights[at][n] if at < len(watch.weights) else t - now[n]
                        for n, t in on_plane.items()})  # fmt: skip
            assert off == pytest.approx(residual, abs=1e-7)
    for (_, before), (_, after) in itertools.pairwise(taken):
        for a, b in zip(before, after, strict=True):
            if a.kind == b.kind == "pca":
                assert inner(a.vector, b.vector) > 0


def test_straight_path_gets_a_random_second_direction(tmp_path, taken):
    monitor = LandscapeMonitor(directions="pca", resolution=3, **SETTINGS)
    with pytest.warns(UserWarning, match="straight line so far"):
        train(lambda: Valley(0.05), ones, [monitor], tmp_path)
    assert monitor.failed == 0
    for _, (x, y) in taken:
        assert (x.kind, y.kind) == ("pca", "random")
        assert y.span[1] - y.span[0] == pytest.approx(x.span[1] - x.span[0])


def test_explicit_span_is_used(tmp_path, taken):
    for number, directions in enumerate(("pca", "update", "random")):
        monitor = LandscapeMonitor(directions=directions, span=(-0.5, 2), resolution=3, **SETTINGS)
        train(Linear, regression, [monitor], tmp_path / str(number))
    assert {axis.span for _, axes in taken for axis in axes} == {(-0.5, 2)}


@pytest.mark.parametrize("directions", ["random", "gradient", ("eigenvectors", "pca")])
def test_path_with_any_second_direction(tmp_path, directions):
    monitor = LandscapeMonitor(directions=directions, trajectory=True, resolution=3, **SETTINGS)
    train(Linear, regression, [monitor], tmp_path, max_epochs=20)
    assert monitor.failed == 0
    for plane in slices(tmp_path, "plane"):
        path = plane.metadata["path"]
        assert len(path["steps"]) == len(path["coordinates"]) <= 16
        assert all(r <= d * (1 + 1e-9) for r, d in zip(path["residuals"], path["distances"]))  # noqa: B905
    assert monitor._path is None  # released
    assert not hasattr(monitor.state_dict(), "path")


@pytest.mark.parametrize("directions", ["pca", "update", ("update", "pca"), "between"])
def test_training_is_bitwise_equal(tmp_path, directions):
    class Noisy(Linear):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def callbacks():
        between = (Noisy().state_dict(), Noisy().state_dict()) if directions == "between" else None
        torch.manual_seed(1)
        return [
            LandscapeMonitor(
                directions=directions, between=between, trajectory=True, resolution=3,
                validation_probe=regression(20, 20), **SETTINGS,
            )
        ]  # fmt: skip

    plain = train(Noisy, regression, [], tmp_path / "plain", max_epochs=6)
    watched = train(Noisy, regression, callbacks(), tmp_path / "watched", max_epochs=6)
    assert watched.trainer.callbacks[0].failed == 0
    assert differences(plain.state, watched.state) == []


@pytest.mark.parametrize("directions", ["pca", "update", "between", ("eigenvectors", "pca")])
def test_resumed_run_has_the_same_slices(tmp_path, directions):
    between = (Linear().state_dict(), Linear().state_dict()) if directions == "between" else None

    def monitor():
        return LandscapeMonitor(
            directions=directions, between=between, resolution=3, line_resolution=3, **SETTINGS
        )

    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(
        Linear, regression, [monitor(), saver], tmp_path / "a", max_epochs=3,
        enable_checkpointing=True,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint.stat().st_size < 10_000
    resumed = monitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Linear, regression, [resumed], tmp_path / "b", max_epochs=6, ckpt_path=checkpoint)
    assert resumed.failed == 0
    assert len(resumed.history) >= 4
    restarts = [w for w in caught if "starts again" in str(w.message)]
    assert len(restarts) == ("pca" in directions)
    if restarts:
        assert slices(tmp_path / "b", "plane")[0].metadata["path"]["steps"][0] == 9


def test_no_path_under_fsdp2(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_landscape.callbacks.landscape.is_sharded", lambda module: True)
    monitor = LandscapeMonitor(trajectory=True, resolution=3, **SETTINGS)
    with pytest.warns(UserWarning, match="not available under FSDP2"):
        train(Linear, regression, [monitor], tmp_path)
    assert monitor.failed == 0
    assert all("path" not in plane.metadata for plane in slices(tmp_path, "plane"))


def test_out_of_memory_for_copies_ends_only_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Trajectory, "add", full)
    monitor = LandscapeMonitor(directions="pca", resolution=3, **SETTINGS)
    with pytest.warns(UserWarning, match="could not be copied: no room"):
        train(Linear, regression, [monitor], tmp_path)
    assert (monitor.failed, monitor.measured) == (0, 3)


def test_time_of_copies_counts_as_measuring(tmp_path, monkeypatch):
    charged = []
    add_time = Stopwatch.add
    monkeypatch.setattr(Stopwatch, "add", lambda self, s: (charged.append(s), add_time(self, s)))
    add = Trajectory.add
    monkeypatch.setattr(Trajectory, "add", lambda *a: (time.sleep(0.02), add(*a)))
    monitor = LandscapeMonitor(trajectory=True, resolution=3, every_n_train_steps=1000)
    train(Linear, regression, [monitor], tmp_path)
    assert sum(0.02 <= s < 0.2 for s in charged) >= 7  # at the start and after each of 6 steps


# -- between two checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dicts", "files", "lightning"])
def test_between(tmp_path, how, taken):
    torch.manual_seed(5)
    a, b = Linear().state_dict(), Linear().state_dict()
    between = (a, b)
    if how != "dicts":
        between = (tmp_path / "a.pt", str(tmp_path / "b.pt"))
        for state, path in zip((a, b), between, strict=True):
            torch.save(state if how == "files" else {"state_dict": state, "epoch": 1}, path)
    monitor = LandscapeMonitor(directions="between", between=between, resolution=3, **SETTINGS)
    train(Linear, regression, [monitor], tmp_path / "run", **F64)
    assert monitor.failed == 0
    expected = b["layer.weight"].double() - a["layer.weight"].double()
    for _, (x, y) in taken:
        torch.testing.assert_close(x.vector["layer.weight"], expected)
        assert x.fixed
        assert norm(y.vector) == pytest.approx(norm(x.vector))
    assert slices(tmp_path / "run", "plane")[-1].metadata["fixed"] == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), r"between\[1\]=...\): it has no parameter 'layer.weight'"),
        (lambda s: s.update({"layer.weight": torch.ones(2)}), r"has shape \(2,\), expected \(1, 5"),
        (lambda s: s["layer.weight"].zero_(), r"the distance of the two is 0.0"),
        (lambda s: s["layer.weight"].fill_(math.nan), r"the distance of the two is nan"),
    ],
)
def test_invalid_checkpoints_raise_before_training(tmp_path, change, message):
    a, b = ({"layer.weight": torch.zeros(1, 5)} for _ in range(2))
    change(b)
    monitor = LandscapeMonitor(directions="between", between=(a, b))
    with pytest.raises(ValueError, match=message):
        train(Linear, regression, [monitor], tmp_path)


class Boom:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_files_are_read_safely(tmp_path):
    torch.save({"layer.weight": Boom()}, tmp_path / "a.pt")
    pair = (tmp_path / "a.pt", Linear().state_dict())
    with pytest.raises(ValueError, match=r"between\[0\]=...\): .*cannot be read safely"):
        train(Linear, regression, [LandscapeMonitor(directions="between", between=pair)], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": "between"}, "expected both 'between' among the directions"),
        ({"between": ({}, {})}, "expected both 'between' among the directions"),
        ({"directions": "between", "between": ({},)}, "expected two checkpoint files or state"),
        ({"directions": "between", "between": "ab"}, "expected two checkpoint files or state"),
        ({"directions": "between", "between": (3, {})}, "expected two checkpoint files or state"),
        ({"directions": "between", "between": ("none.pt", {})}, r"\[0\]='none.pt'\): no such file"),
        ({"seeds": 1}, r"seeds=1\): expected an integer >= 2"),
        ({"seeds": 3, "directions": "pca"}, r"seeds=3\): expected directions='random'"),
        ({"validation_probe": Probe()}, "expected one with a source"),
        ({"directions": "path"}, "'update' or 'pca' or 'between'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LandscapeMonitor(**arguments)


# -- a second probe, more seeds -------------------------------------------------------------------


class Dropped(Linear):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1, bias=False))


@pytest.mark.parametrize("as_probe", [True, False])
def test_validation_loss_at_the_same_points(tmp_path, as_probe, taken):
    data = regression(40, 40)
    x, y = (t.double() for t in data.dataset.tensors)
    source = Probe(data) if as_probe else data
    monitor = LandscapeMonitor(
        directions="update", validation_probe=source, resolution=(4, 3), line_resolution=5,
        **SETTINGS,
    )  # fmt: skip
    watch = Watch()
    train(Dropped, regression, [monitor, watch], tmp_path, **F64)
    assert monitor.failed == 0

    def loss(weights):  # without dropout
        return float((x @ weights.flatten() - y.flatten()).square().mean())

    step, axes = taken[0]
    now = watch.weights[step]["layer.1.weight"]
    line, plane = slices(tmp_path, "line-1")[0], slices(tmp_path, "plane")[0]
    dx, dy = (axis.vector["layer.1.weight"] for axis in axes)
    for piece in (line, plane):
        known = piece.metadata["validation"]
        assert (known["probe_samples"], known["probe_mode"]) == (40, "eval")
        assert known["center_loss"] == pytest.approx(loss(now))
        assert abs(piece.center_loss / known["center_loss"] - 1) > 1e-3  # the other one has dropout
    expected = [loss(now + a * dx) for a in line.coordinates[0]]
    assert line.metadata["validation"]["losses"] == pytest.approx(expected)
    for row, b in zip(plane.metadata["validation"]["losses"], plane.coordinates[1], strict=True):
        assert row == pytest.approx([loss(now + a * dx + b * dy) for a in plane.coordinates[0]])


def test_band_of_seeds(tmp_path):
    monitor = LandscapeMonitor(seeds=4, resolution=3, line_resolution=5, **SETTINGS)
    train(Linear, regression, [monitor], tmp_path)
    lines = [slices(tmp_path, f"line-{number}") for number in range(1, 5)]
    assert [len(found) for found in lines] == [monitor.measured] * 4
    assert len({tuple(found[0].losses) for found in lines}) == 4
    assert monitor.forwards == 9 + 4 * 5


def test_zero_biases_and_fresh_batch_norm(tmp_path):
    class Fresh(Linear):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            nn.init.zeros_(self.layer[0].bias)

    for directions in ("random", "update", "pca"):
        monitor = LandscapeMonitor(
            directions=directions, trajectory=True, validation_probe=regression(20, 20),
            resolution=(4, 3), line_resolution=4, **SETTINGS,
        )  # fmt: skip
        train(Fresh, regression, [monitor], tmp_path / directions)
        assert monitor.failed == 0
        for plane in slices(tmp_path / directions, "plane"):
            assert plane.losses.shape == (3, 4)
            assert np.isfinite(plane.losses).all()


def test_weights_that_are_nan(tmp_path):
    class Broken(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step >= 3 else loss

    for directions in ("pca", "update"):
        monitor = LandscapeMonitor(
            directions=directions, trajectory=True, resolution=3, line_resolution=3, **SETTINGS
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(Broken, regression, [monitor], tmp_path / directions)
        assert monitor.failed == 0
        assert np.isnan(slices(tmp_path / directions, "plane")[-1].losses).all()
