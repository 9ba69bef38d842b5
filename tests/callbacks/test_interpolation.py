"""InterpolationMonitor in real runs, against explicit copies of the weights."""

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

from lightning_landscape import InterpolationMonitor, SharpnessEarlyStopping, Slice
from tests.integration.test_resume import resume
from tests.runs import differences, train
from tests.small import Linear, regression

EXACTLY = {"every_n_train_steps": 5, "max_overhead": None}
X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)


class Kept(Linear):
    """A curved network that remembers its weights at the start, each epoch and each step."""

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
    assert [row["step"] for row in rows] == [1, 6, 11, 12]
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


def test_the_plane_through_a_third(tmp_path):
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


def test_it_stops_a_run(tmp_path):
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
    """Right with re-estimation: as torch's ``update_bn`` on copies.  Another number without."""
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


def test_a_sum_is_that_of_one_batch(tmp_path):
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


# -- nothing changes, and a resumed run goes on ---------------------------------------------------


@pytest.mark.parametrize("make", [Kept, Normed])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_is_the_same_bit_for_bit(tmp_path, make, mode):
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


def test_a_resumed_run_has_the_same_reference(tmp_path):
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
def test_without_its_file_a_new_series_starts_and_that_is_said(tmp_path, damage):
    _, checkpoint = begun(tmp_path)
    path = tmp_path / "a" / "landscape" / "interpolation-reference.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        torch.save({n: p + 1 for n, p in torch.load(path, weights_only=True).items()}, path)
    else:
        path.write_bytes(b"no")
    later = monitors()
    words = {"missing": "missing", "other": "other data", "garbage": "cannot be read"}[damage]
    with pytest.warns(UserWarning, match=f"(?s)reference of the run before.*{words}.*new series"):
        resume(checkpoint, later, tmp_path / "b", Kept)
    assert later[0].history[0]["interpolation/distance"] < 1.0
    assert later[0].failed == 0


# -- any module -----------------------------------------------------------------------------------


def test_manual_optimisation_and_dict_batches(tmp_path):
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


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolution": 1}, ValueError, r"resolution=1\): expected an integer >= 2"),
        ({"plane_resolution": 0}, ValueError, r"plane_resolution=0\)"),
        ({"blocks": 3}, TypeError, r"blocks=3\): expected True, False or a mapping"),
        ({"reference": 3}, TypeError, r"reference=3\): expected 'initial', 'last_epoch', a check"),
        ({"reference": "first"}, FileNotFoundError, r"reference='first'\): no such file; or 'ini"),
        ({"third": "gone.ckpt"}, FileNotFoundError, r"third='gone.ckpt'\): no such file"),
        ({"third": 1.0}, TypeError, r"third=1.0\): expected a checkpoint file or a state dict"),
        (
            {"other_probes": [X]},
            TypeError,
            r"(?s)other_probes=.*\): expected a mapping from name to",
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
        ({}, r"reference=...\): 'layer.0.weight' has shape None, expected \(6, 5\)"),
        ({"layer.0.weight": torch.zeros(2)}, r"has shape \(2,\), expected \(6, 5\); it holds"),
    ],
)
def test_a_reference_of_another_network_ends_the_run_before_training(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        run(InterpolationMonitor(reference=state), tmp_path)
