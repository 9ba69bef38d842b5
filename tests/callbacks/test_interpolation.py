"""InterpolationMonitor in real runs, compared with explicit copies of the weights."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor, InterpolationMonitor, SharpnessEarlyStopping, Slice
from lightning_landscape.callbacks.reference import Reference
from lightning_landscape.measure import measure
from tests.integration.test_resume import resume
from tests.runs import differences, train
from tests.small import Linear, regression
from tests.training.clock import Timed

EXACTLY = {"every_n_train_steps": 5, "max_overhead": None}
X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)


class Kept(Linear):
    """A nonlinear network that copies its weights at the start, each epoch and each step."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr)
        self.layer = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.seen: dict[str, dict[str, torch.Tensor]] = {}

    def keep(self, when: str) -> None:
        self.seen[when] = {n: p.detach().clone() for n, p in self.named_parameters()}

    def on_train_start(self):
        self.keep("start")

    def on_train_epoch_start(self):
        self.keep(f"epoch {self.current_epoch}")

    def on_train_batch_end(self, *_):
        self.keep(f"step {self.trainer.global_step}")


def loss_of(module: pl.LightningModule, weights, batch=(X, Y)) -> float:
    made = copy.deepcopy(module).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(weights[name])
        return float(made.training_step(tuple(t.double() for t in batch), 0))


def between(one, other, t):
    return {n: (1 - t) * one[n].double() + t * other[n].double() for n in one}


def barrier_of(losses) -> float:
    t = np.linspace(0, 1, len(losses))
    return max(0.0, float((losses - ((1 - t) * losses[0] + t * losses[-1])).max()))


def run(monitor, tmp_path, module=None, callbacks=(), **settings):
    made = []

    def make():
        made.append(module or Kept())
        return made[-1]

    train(make, regression, [monitor, *callbacks], tmp_path, **{"max_epochs": 4, **settings})
    return made[-1]


@pytest.mark.parametrize("reference", ["initial", "last_epoch", "state dict", "file"])
def test_values_are_those_of_explicit_copies(tmp_path, reference):
    torch.manual_seed(5)
    given = Kept()
    own = given.state_dict()
    if reference == "state dict":
        wanted = own
    elif reference == "file":
        wanted = tmp_path / "given.ckpt"
        torch.save({"state_dict": own}, wanted)
    else:
        wanted = reference
    monitor = InterpolationMonitor(reference=wanted, probe=(X, Y), resolution=5, **EXACTLY)
    module = run(monitor, tmp_path)
    rows = monitor.history
    assert [row["step"] for row in rows] == [1, 5, 10, 12]
    for row in rows:
        now = module.seen[f"step {row['step']}"]
        start = {"initial": module.seen["start"]}.get(reference, own)
        if reference == "last_epoch":
            start = module.seen[f"epoch {min(row['epoch'], 3)}"]
        losses = np.array([loss_of(module, between(start, now, t)) for t in np.linspace(0, 1, 5)])
        assert row["interpolation/barrier"] == pytest.approx(barrier_of(losses), abs=2e-6)
        assert row["interpolation/reference_loss"] == pytest.approx(losses[0], rel=2e-6)
        apart = math.sqrt(sum(float((now[n] - start[n]).square().sum()) for n in now))
        assert row["interpolation/distance"] == pytest.approx(apart, rel=1e-5)
        line = Slice.load(tmp_path / "landscape" / f"interpolation-line-step{row['step']:08d}.npz")
        np.testing.assert_allclose(line.losses, losses, rtol=2e-6)
        assert "(1-t) L(reference)" in row["barrier_definition"]


def test_other_probes_and_blocks(tmp_path):
    other = (X[:7] * 2, Y[:7])
    monitor = InterpolationMonitor(
        probe=(X, Y), other_probes={"old": other}, blocks=True, resolution=3, **EXACTLY
    )
    module = run(monitor, tmp_path)
    start = module.seen["start"]
    for row in monitor.history:
        now = module.seen[f"step {row['step']}"]
        losses = np.array([loss_of(module, between(start, now, t), other) for t in (0.0, 0.5, 1.0)])
        assert row["interpolation/old_loss"] == pytest.approx(losses[-1], rel=2e-6)
        assert row["interpolation/old_rise"] == pytest.approx(losses[-1] - losses[0], abs=5e-6)
        assert row["interpolation/old_barrier"] == pytest.approx(barrier_of(losses), abs=2e-6)
        parts = [row[f"interpolation/distance/layer.{i}"] for i in (0, 2)]
        assert math.hypot(*parts) == pytest.approx(row["interpolation/distance"])
        moved = (now["layer.0.weight"] - start["layer.0.weight"]).norm().item()
        bias = (now["layer.0.bias"] - start["layer.0.bias"]).norm().item()
        assert parts[0] == pytest.approx(math.hypot(moved, bias), rel=1e-5)


@pytest.mark.pictures
def test_plane_through_a_third_point(tmp_path):
    torch.manual_seed(8)
    third = Kept().state_dict()
    monitor = InterpolationMonitor(
        probe=(X, Y), third=third, plane_resolution=3, resolution=2, **EXACTLY
    )
    run(monitor, tmp_path)
    plane = Slice.load(tmp_path / "landscape" / "interpolation-plane-step00000012.npz")
    assert [p["name"] for p in plane.metadata["points"]] == ["now", "the start", "third"]
    assert (tmp_path / "landscape" / "interpolation-plane-step00000012.png").exists()
    assert (tmp_path / "landscape" / "interpolation-line-step00000012.png").exists()


def test_early_stopping_on_the_barrier(tmp_path):
    monitor = InterpolationMonitor(
        probe=(X, Y), other_probes={"far": (X, -Y)}, resolution=2, **EXACTLY
    )
    stopper = SharpnessEarlyStopping("interpolation/far_rise", 1e-3, patience=1)
    run(monitor, tmp_path, callbacks=[stopper], max_epochs=50)
    assert stopper.stopped_step == next(
        row["step"] for row in monitor.history if row["interpolation/far_rise"] > 1e-3
    )


# -- BatchNorm ------------------------------------------------------------------------------------


class Normed(Kept):
    def __init__(self, lr: float = 0.3):
        super().__init__(lr)
        self.layer = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("reestimate", [True, False])
def test_statistics_on_the_way(tmp_path, reestimate):
    """With re-estimation the values are those of ``update_bn`` on copies; without, they differ."""
    batches = [(X[:12], Y[:12]), (X[12:], Y[12:])]
    monitor = InterpolationMonitor(
        probe=batches,
        probe_mode="eval",
        resolution=5,
        reestimate_batch_norm=reestimate,
        **EXACTLY,
    )
    module = run(monitor, tmp_path, Normed(), max_epochs=20)
    start, now = module.seen["start"], module.seen["step 60"]
    losses = []
    for t in np.linspace(0, 1, 5):
        made = copy.deepcopy(module).double()
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(between(start, now, t)[name])
        update_bn([x.double() for x, _ in batches], made.layer)
        made.eval()
        with torch.no_grad():
            parts = [made.training_step((x.double(), y.double()), 0) for x, y in batches]
        losses.append(float(sum(parts)) / 2)
    line = Slice.load(tmp_path / "landscape" / "interpolation-line-step00000060.npz")
    if reestimate:
        np.testing.assert_allclose(line.losses, losses, rtol=1e-5)
        assert line.metadata["batch_norm"] == "re-estimated"
    else:
        assert np.abs(line.losses[1:-1] / losses[1:-1] - 1).max() > 0.05


def test_summed_loss_is_that_of_one_batch(tmp_path):
    class Summed(Normed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * len(batch[0])

    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    found = []
    for module, reduction in ((Normed(0.01), "mean"), (Summed(0.01 / 20), "sum")):
        monitor = InterpolationMonitor(
            probe=batches, probe_mode="eval", loss_reduction=reduction, resolution=3, **EXACTLY
        )
        torch.manual_seed(0)
        for layer in module.layer:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        run(monitor, tmp_path / reduction, module)
        found.append(monitor.history[0]["interpolation/reference_loss"])
    assert found[1] == pytest.approx(24 * found[0], rel=1e-5)


# -- isolation and resuming -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [Kept, Normed])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_is_bitwise_equal(tmp_path, make, mode):
    plain = train(make, regression, [], tmp_path / "plain", max_epochs=4)
    callbacks = [
        InterpolationMonitor(
            probe_mode=mode, other_probes={"o": (X, Y)}, blocks=True, resolution=3, **EXACTLY
        ),
        InterpolationMonitor(
            name="epoch", reference="last_epoch", resolution=2, every_n_epochs=1, **EXACTLY
        ),
    ]
    watched = train(make, regression, callbacks, tmp_path / "watched", max_epochs=4)
    assert all(callback.failed == 0 and callback.measured >= 3 for callback in callbacks)
    assert not differences(plain.state, watched.state)


def monitors():
    return [InterpolationMonitor(probe=(X, Y), resolution=3, **EXACTLY)]


def begun(tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    first = monitors()
    train(
        Kept, regression, [*first, saver], tmp_path / "a", max_epochs=3, enable_checkpointing=True
    )
    return first[0], tmp_path / "checkpoints" / "last.ckpt"


def test_resumed_run_has_the_same_reference(tmp_path):
    whole = monitors()
    train(Kept, regression, whole, tmp_path / "whole", max_epochs=6)
    _, checkpoint = begun(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    (state,) = [v for k, v in content["callbacks"].items() if "InterpolationMonitor" in k]
    assert set(state["reference"]) == {"file", "hash"}  # no weights in it
    later = monitors()
    resume(checkpoint, later, tmp_path / "b", Kept)
    rows = {row["step"]: row for row in whole[0].history}
    assert later[0].history
    for row in later[0].history:
        for key in ("barrier", "distance", "reference_loss"):
            name = f"interpolation/{key}"
            assert row[name] == rows[row["step"]][name]


@pytest.mark.parametrize("damage", ["missing", "other", "garbage"])
def test_new_series_and_warning_without_the_reference_file(tmp_path, damage):
    _, checkpoint = begun(tmp_path)
    path = tmp_path / "a" / "landscape" / "interpolation-reference.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        torch.save({n: p + 1 for n, p in torch.load(path, weights_only=True).items()}, path)
    else:
        path.write_bytes(b"no")
    later = monitors()
    reason = {"missing": "missing", "other": "other data", "garbage": "cannot be read"}[damage]
    with pytest.warns(UserWarning, match=f"(?s)reference of the run before.*{reason}.*new series"):
        resume(checkpoint, later, tmp_path / "b", Kept)
    assert later[0].history[0]["interpolation/distance"] < 1.0
    assert later[0].failed == 0


# -- any module -----------------------------------------------------------------------------------


def test_manual_optimization_and_dict_batches(tmp_path):
    class Manual(Kept):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_fn(self, batch))
            optimizer.step()

    def loss_fn(module, batch):
        return module.loss(module.layer(batch["x"]), batch["y"])

    def data():
        rows = [{"x": x, "y": y} for x, y in TensorDataset(X, Y)]
        return DataLoader(rows, batch_size=8)

    monitor = InterpolationMonitor(loss_fn=loss_fn, resolution=3, **EXACTLY)
    train(Manual, data, [monitor], tmp_path, max_epochs=4)
    assert monitor.failed == 0
    assert monitor.history[-1]["interpolation/distance"] > 0
    with pytest.raises(MisconfigurationException, match="loss_fn"):
        train(Manual, data, [InterpolationMonitor()], tmp_path / "b", max_epochs=1)


# -- references ---------------------------------------------------------------------------------


def distance(one, other) -> float:
    return math.sqrt(sum(float((one[n].double() - other[n].double()).square().sum()) for n in one))


@pytest.mark.parametrize("argument", ["reference", "third"])
def test_state_dict_of_the_live_module_is_copied(tmp_path, argument):
    """``module.state_dict()`` holds the live tensors, which change; also in a second fit."""
    module = Kept()
    given = {n: p.clone() for n, p in module.state_dict().items()}
    torch.manual_seed(3)
    more = {} if argument == "reference" else {"reference": Kept().state_dict()}
    monitor = InterpolationMonitor(
        **more, **{argument: module.state_dict()}, probe=(X, Y), resolution=2, plane_resolution=2,
        **EXACTLY,
    )  # fmt: skip
    for fit in range(2):
        run(monitor, tmp_path / str(fit), module)
        now = module.seen["step 12"]
        if argument == "reference":
            far = monitor.history[-1]["interpolation/distance"]
        else:
            path = tmp_path / str(fit) / "landscape" / "interpolation-plane-step00000012.npz"
            place = Slice.load(path).metadata["points"][2]
            far = math.hypot(place["x"], place["y"])
        assert far == pytest.approx(distance(given, now), rel=1e-5)
        assert far > 0.1


def test_parameters_unfrozen_later(tmp_path):
    """The reference contains them from the start, so the distance includes all their changes."""

    class Unfreezes(Kept):
        def __init__(self):
            super().__init__()
            self.layer[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer[2].parameters(), lr=0.05)

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            if self.current_epoch == 1:
                self.layer[0].requires_grad_(True)
                self.optimizers().add_param_group({"params": list(self.layer[0].parameters())})

    monitor = InterpolationMonitor(probe=(X, Y), resolution=3, blocks=True, **EXACTLY)
    module = run(monitor, tmp_path, Unfreezes())
    assert (monitor.failed, len(monitor.history)) == (0, 4)
    start, now = module.seen["start"], module.seen["step 12"]
    row = monitor.history[-1]
    assert row["interpolation/distance"] == pytest.approx(distance(start, now), rel=1e-5)
    assert row["interpolation/reference_loss"] == pytest.approx(loss_of(module, start), rel=2e-6)
    first = {n: p for n, p in start.items() if n.startswith("layer.0")}
    assert row["interpolation/distance/layer.0"] == pytest.approx(distance(first, now), rel=1e-5)
    assert "interpolation/distance/layer.0" not in monitor.history[0]


def test_probe_and_monitor_of_one_name_have_separate_files(tmp_path):
    monitors = [
        InterpolationMonitor(
            probe=(X, Y), other_probes={"old": (2 * X, Y)}, resolution=2, **EXACTLY
        ),
        InterpolationMonitor(name="old", probe=(X, Y), resolution=3, **EXACTLY),
    ]
    run(monitors[0], tmp_path, callbacks=monitors[1:])
    folder = tmp_path / "landscape"
    of_probe = Slice.load(folder / "interpolation-line-old-step00000012.npz")
    of_monitor = Slice.load(folder / "interpolation-old-line-step00000012.npz")
    assert (len(of_probe.losses), len(of_monitor.losses)) == (2, 3)
    row = monitors[0].history[-1]
    assert of_probe.center_loss == row["interpolation/old_loss"]


def test_three_points_on_a_line_lose_only_the_plane(tmp_path):
    module = Kept()
    monitor = InterpolationMonitor(
        third=module.state_dict(), probe=(X, Y), resolution=3, plane_resolution=2, **EXACTLY
    )
    with pytest.warns(UserWarning, match="a plane was left out: .*lie on one line") as caught:
        run(monitor, tmp_path, module)
    assert sum("a plane was left out" in str(w.message) for w in caught) == 1
    assert (monitor.failed, len(monitor.history)) == (0, 4)
    assert not list((tmp_path / "landscape").glob("*plane*"))


def test_last_epoch_after_a_resume_within_an_epoch(tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=5, save_top_k=-1)
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    train(Kept, regression, [last_epoch(), saver], tmp_path / "a", **settings)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*step=5.ckpt")
    later, module = last_epoch(), Kept()
    with pytest.warns(UserWarning, match="epoch: this fit resumes in the middle of an epoch"):
        resume(checkpoint, [later], tmp_path / "b", lambda: module, max_epochs=4)
    rows = {row["step"]: row for row in later.history}
    for step, when in ((6, "start"), (8, "epoch 2"), (12, "epoch 3")):
        far = distance(module.seen[when], module.seen[f"step {step}"])
        assert rows[step]["interpolation/epoch/distance"] == pytest.approx(far, rel=1e-5)


def last_epoch():
    return InterpolationMonitor(
        name="epoch", reference="last_epoch", probe=(X, Y), resolution=2, every_n_train_steps=1,
        max_overhead=None,
    )  # fmt: skip


def test_training_continues_if_the_copy_fails(tmp_path, monkeypatch):
    """The copy of epoch 1 fails: nothing is measured in that epoch."""
    takes, take = [], Reference.copy_from

    def full(self, params):
        takes.append(len(takes))
        if len(takes) == 3:  # at the start of the fit, then of each epoch
            raise MemoryError("no room")
        take(self, params)

    monkeypatch.setattr(Reference, "copy_from", full)
    monitor = last_epoch()
    with pytest.warns(UserWarning, match="could not be copied: no room") as caught:
        run(monitor, tmp_path)
    messages = [str(w.message) for w in caught]
    assert any("there is no copy of the weights of the reference" in text for text in messages)
    assert {row["epoch"] for row in monitor.history} == {0}
    assert (monitor.failed, monitor.disabled) == (3, True)


def test_invalid_loss_is_reported_with_statistics_re_estimated(tmp_path):
    monitor = InterpolationMonitor(
        loss_fn=lambda *_: {"a": 1.0}, probe=(X, Y), probe_mode="eval", resolution=2, **EXACTLY
    )
    with pytest.warns(UserWarning, match="loss_fn returned dict: expected a scalar tensor"):
        run(monitor, tmp_path, Normed())


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_are_not_re_estimated(tmp_path, frozen):
    """A layer that trains in eval mode keeps its statistics: the loss is that of the module.

    Without freezing, the loss with re-estimated statistics differs from it.
    """

    class Frozen(Normed):
        def __init__(self):
            super().__init__()
            self.layer[1].running_mean.fill_(0.5)  # of a training before
            self.layer[1].running_var.fill_(3.0)

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.layer[1].train(not frozen)

    class Plain(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            modes = [(m, m.training) for m in pl_module.modules()]
            pl_module.eval()
            with torch.no_grad():
                self.loss = float(pl_module.training_step((X, Y), 0))
            for m, training in modes:
                m.training = training

    plain = Plain()
    monitor = InterpolationMonitor(probe=(X, Y), probe_mode="eval", resolution=2, **EXACTLY)
    run(monitor, tmp_path, Frozen(), callbacks=[plain])
    assert (monitor.history[-1]["center_loss"] == pytest.approx(plain.loss, rel=1e-6)) is frozen


# -- finished models ------------------------------------------------------------------------------


def test_initial_reference_of_a_finished_model_raises(tmp_path):
    with (
        pytest.warns(UserWarning, match="no reference='initial': no training has led to these"),
        pytest.raises(RuntimeError, match="nothing could be measured"),
    ):
        measure(
            Kept(), regression(), callbacks=[InterpolationMonitor()], logdir=tmp_path,
            progress=False,
        )  # fmt: skip


def test_checkpoint_gives_the_values_of_the_run(tmp_path):
    """Also with ``"initial"``, whose file the checkpoint names, and with a given state dict."""
    first, checkpoint = begun(tmp_path)
    found = measure(
        Kept(), regression(), checkpoint=checkpoint, callbacks=monitors(), logdir=tmp_path / "m",
        progress=False,
    )  # fmt: skip
    live = next(row for row in first.history if row["step"] == found.step)
    for key in ("barrier", "distance", "reference_loss"):
        assert found.values[f"interpolation/{key}"] == live[f"interpolation/{key}"]
    assert found.values["interpolation/distance"] > 0.1


# -- the budget -----------------------------------------------------------------------------------


@pytest.mark.short_runs
def test_planes_are_postponed_and_lines_are_not(tmp_path, monkeypatch, clock):
    """Scalars are measured at once; planes wait for the budget, and the last one is reduced to fit.

    12 steps of 1 s have a budget of 12 s; a line takes .15 s, the plane of full size 11.4 s.
    """
    torch.manual_seed(8)
    third = Kept().state_dict()
    Timed(monkeypatch, clock, {}, evaluation=0.05)
    common = {"probe": (X, Y), "every_n_train_steps": 1, "resolution": 3}
    line = InterpolationMonitor(name="line", **common)
    plane = InterpolationMonitor(name="plane", third=third, **common)
    run(plane, tmp_path, callbacks=[line])
    assert [row["step"] for row in line.history] == list(range(1, 13))
    assert [row["step"] for row in plane.history] == [12]
    assert plane.reduced_resolution == "11 x 11 of 15 x 15 points"
    drawn = Slice.load(tmp_path / "landscape" / "interpolation-plane-plane-step00000012.npz")
    assert drawn.losses.shape == (11, 11)


@pytest.mark.parametrize(
    ("forwards", "fits", "size", "coarse"),
    [
        (None, True, 15, ""),
        (1000, True, 15, ""),
        (247, True, 15, ""),  # 2 lines of 11 points and 225
        (246, True, 13, "13 x 13 of 15 x 15 points"),
        (143, True, 11, "11 x 11 of 15 x 15 points"),
        (142, False, 15, ""),
        (0, False, 15, ""),
    ],
)
def test_plane_is_reduced_to_fit_the_budget(forwards, fits, size, coarse):
    monitor = InterpolationMonitor(third=Kept().state_dict(), other_probes={"o": (X, Y)})
    assert monitor.fit_to_budget(forwards) == fits
    assert (monitor._plane_size, monitor.reduced_resolution) == (size, coarse)
    assert monitor.forwards == 247
    small = InterpolationMonitor(third=Kept().state_dict(), plane_resolution=4)
    assert not small.fit_to_budget(0)
    assert small.reduced_resolution == ""
    assert small.fit_to_budget(small.forwards)
    alone = InterpolationMonitor()
    assert alone.fit_to_budget(forwards) == (forwards != 0)
    assert (alone.reduced_resolution, alone.forwards, alone.draws) == ("", 11, False)


def test_reduced_plane_is_noted(tmp_path):
    torch.manual_seed(8)

    class Poor(InterpolationMonitor):
        def fit_to_budget(self, forwards):
            return super().fit_to_budget(130)

    monitor = Poor(third=Kept().state_dict(), probe=(X, Y), resolution=2, **EXACTLY)
    run(monitor, tmp_path, max_epochs=1)
    plane = Slice.load(tmp_path / "landscape" / "interpolation-plane-step00000003.npz")
    assert plane.losses.shape == (11, 11)
    assert plane.metadata["coarse"] == {"wanted": [15, 15], "taken": [11, 11]}


def test_time_of_the_copy_counts_as_measuring(tmp_path, monkeypatch):
    """Measured by a clock that only the copy advances."""
    take, clock, spent = Reference.copy_from, [0.0], []

    def slow(self, params):
        take(self, params)
        clock[0] += 100.0

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            spent.append(monitor._session.run.costs.time.spent)

    monkeypatch.setattr(Reference, "copy_from", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monitor = last_epoch()
    run(monitor, tmp_path, callbacks=[Watch()], max_epochs=3)
    assert np.diff(spent).tolist() == pytest.approx([100.0, 100.0], abs=1e-3)  # hooks, too


def test_two_references_and_a_hessian_monitor(tmp_path):
    """Three callbacks share a round; each has its own keys."""
    callbacks = [
        InterpolationMonitor(probe=(X, Y), resolution=2, **EXACTLY),
        InterpolationMonitor(
            name="epoch", reference="last_epoch", probe=(X, Y), resolution=2, **EXACTLY
        ),
        HessianMonitor(probe=(X, Y), max_hvps=5, **EXACTLY),
    ]
    module = run(callbacks[0], tmp_path, callbacks=callbacks[1:])
    rows = [callback.history[-1] for callback in callbacks]
    now = module.seen["step 12"]
    for row, prefix, when in ((rows[0], "", "start"), (rows[1], "/epoch", "epoch 3")):
        far = distance(module.seen[when], now)
        assert row[f"interpolation{prefix}/distance"] == pytest.approx(far, rel=1e-5)
    assert rows[2]["hessian/top_eigenvalue"] > 0


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolution": 1}, ValueError, r"resolution=1\): expected an integer >= 2"),
        ({"plane_resolution": 0}, ValueError, r"plane_resolution=0\)"),
        ({"blocks": 3}, TypeError, r"blocks=3\): expected True, False or a mapping"),
        ({"reference": 3}, TypeError, r"reference=3\): expected 'initial', 'last_epoch', a check"),
        (
            {"reference": "first"},
            FileNotFoundError,
            r"reference='first'\): no such file; expected 'ini",
        ),
        ({"third": "gone.ckpt"}, FileNotFoundError, r"third='gone.ckpt'\): no such file"),
        ({"third": 1.0}, TypeError, r"third=1.0\): expected a checkpoint file or a state dict"),
        (
            {"other_probes": [X]},
            TypeError,
            r"(?s)other_probes=.*\): expected a mapping from name to",
        ),
        (
            {"other_probes": {"reference": X}},
            ValueError,
            r"other_probes=\{'reference': ...\}\): expected a word, no '/', and not 'reference'",
        ),
        ({"other_probes": {"a/b": X}}, ValueError, r"other_probes=\{'a/b': ...\}\): expected a w"),
        (
            {"other_probes": {"old": None}},
            ValueError,
            r"other_probes=\{'old': ...\}\): expected data, not None",
        ),
    ],
)
def test_messages(arguments, error, message):
    with pytest.raises(error, match=r"(?s)InterpolationMonitor\(" + message.removeprefix("(?s)")):
        InterpolationMonitor(**arguments)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {},
            r"reference=...\) holds no parameter 'layer.0.weight', 'layer.0.bias', .*nothing",
        ),
        (
            {**Kept().state_dict(), "layer.0.weight": torch.zeros(2)},
            r"'\] has shape \(2,\): expected \(6, 5\)",
        ),
    ],
)
def test_reference_of_another_network_raises_before_training(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        run(InterpolationMonitor(reference=state), tmp_path)
