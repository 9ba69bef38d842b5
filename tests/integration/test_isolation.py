"""Training ends in bitwise the same state with callbacks as without.

`make mutations` removes the guards one by one and checks that these tests fail.
"""

from __future__ import annotations

import collections
import random
from unittest.mock import Mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
)
from tests.runs import differences, train


class Scorer:
    """A loss object that holds the module's bound ``log``."""

    def __init__(self, log):
        self.log = log

    def __call__(self, outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        self.log("scored", loss, on_step=True, on_epoch=True)
        return loss


class Everything(pl.LightningModule):
    """Every kind of state a training_step can have, in one module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection([MulticlassAccuracy(3, top_k=2), MulticlassAUROC(3)])
        self.register_buffer("queue", torch.zeros(8, 6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.ema = 1.0
        self.average = torch.full((3,), 0.5)
        self.outputs = []
        self.recent = collections.deque(maxlen=3)
        self.counts = {"steps": 0, "nested": {"losses": []}}
        self.noise = torch.Generator().manual_seed(3)
        self.numpy_noise = np.random.default_rng(4)
        self.order = set()
        self.scorer = Scorer(self.log)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        noise = torch.randn(inputs.shape, generator=self.noise).to(inputs.device)
        inputs.add_(0.01 * noise)  # edits its batch
        inputs = inputs + 0.01 * float(np.random.rand()) + 0.01 * random.random()  # noqa: NPY002
        inputs = inputs + 0.01 * float(self.numpy_noise.normal())
        outputs = self.net(inputs) * self.average.clone().to(inputs.device)
        loss = self.scorer(outputs, targets) * self.ema
        self.ema = 0.95 * self.ema + 0.05 * float(loss.detach())  # a float that scales the loss
        self.average.mul_(0.99).add_(0.01)  # a plain tensor, changed in place
        self.queue = torch.cat([self.queue[1:], inputs.detach()[:1]])  # a buffer that is rebound
        self.seen += len(targets)
        self.outputs.append(outputs)  # holds a graph
        self.recent.append(batch_idx)
        self.order.add(batch_idx)
        self.counts["steps"] += 1
        self.counts["nested"]["losses"].append(float(loss.detach()))
        self.accuracy(outputs, targets)
        self.metrics.update(outputs.softmax(1), targets)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return {"loss": loss, "extra": outputs.detach()}

    def on_train_epoch_end(self):
        self.log_dict(self.metrics.compute())
        self.metrics.reset()
        self.outputs.clear()

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(inputs), targets))

    def train_dataloader(self):
        return DataLoader(data(), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(data(), batch_size=16)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(88, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3].argmax(1)))


def held_out() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8)


def monitors(mode: str = "train", **extra) -> list[pl.Callback]:
    common = {
        "every_n_train_steps": 2,
        "max_overhead": None,
        "probe_samples": 24,
        "probe_mode": mode,
        **extra,
    }
    return [
        HessianMonitor(**common),
        SharpnessMonitor(**common),
        LandscapeMonitor(resolution=3, line_resolution=3, **common),
        LandscapeMonitor(
            name="top", directions="eigenvectors", resolution=2, line_resolution=2, **common
        ),
        GeneralizationMonitor(validation_probe=held_out(), **common),
        InterpolationMonitor(resolution=3, blocks=True, **common),
    ]


SETTINGS = {"accumulate_grad_batches": 3, "max_epochs": 3, "gradient_clip_val": 1.0}


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return train(Everything, None, root=tmp_path_factory.mktemp("without"), **SETTINGS).state


@pytest.mark.pictures
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bitwise_equal(without, tmp_path, mode):
    callbacks = monitors(mode)
    run = train(Everything, None, callbacks, tmp_path, **SETTINGS)
    assert differences(without, run.state) == []
    assert [c.measured > 2 for c in callbacks] == [True] * 6
    assert [c.failed for c in callbacks] == [0] * 6
    for row in callbacks[0].history:
        assert np.isfinite(row["hessian/top_eigenvalue"])


def test_values_repeat_at_the_same_weights(tmp_path):
    """Each evaluation starts from the same state, so a stateful noisy loss has a Hessian."""
    first, second = (
        HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=24),
        SharpnessMonitor(
            every_n_train_steps=2, max_overhead=None, probe_samples=24, probe_mode="train", name="b"
        ),
    )
    with pytest.warns() as caught:
        train(Everything, None, [first, second], tmp_path, **SETTINGS)
    assert not [w for w in caught if "two evaluations" in str(w.message)]


@pytest.mark.pictures
def test_bitwise_equal_when_a_measurement_raises_half_way(without, tmp_path):
    """The probe's loss fails on its fifth evaluation, with the weights moved."""

    calls = Mock()  # isolation leaves mocks alone

    class Fails(Everything):
        def training_step(self, batch, batch_idx):
            if self._current_fx_name == "training_step" and self.log.__name__ == "_log_nothing":
                calls()
                if calls.call_count % 30 == 5:
                    self.ema = 100.0
                    raise RuntimeError("half way")
            return super().training_step(batch, batch_idx)

    with pytest.warns(match="a measurement failed .*half way"):
        run = train(Fails, None, monitors(), tmp_path, **SETTINGS)
    assert differences(without, run.state) == []


def test_gradients_in_flight_are_kept(tmp_path):
    """`.grad` is the same object with the same content, and None stays None."""
    kept: list[dict[str, Tensor | None]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept.append({n: p.grad for n, p in pl_module.named_parameters()})

    before, after = Watch(), Watch()
    train(Everything, None, [before, *monitors(), after], tmp_path, **SETTINGS)
    for first, second in zip(kept[::2], kept[1::2], strict=True):
        assert all(first[name] is second[name] for name in first)


class Meddles(pl.LightningModule):
    """A training_step that changes flags, attributes and gradients."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.ones(3))  # not trained by the optimizer

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        self.gate.requires_grad_(batch_idx % 2 == 0)
        setattr(self, f"seen_{batch_idx}", len(targets))
        self.layer.weight.square().sum().backward()
        return nn.functional.cross_entropy(self.layer(inputs) * self.gate, targets)

    def train_dataloader(self):
        return DataLoader(data(), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


@pytest.mark.parametrize("batches", [3, 4])
def test_flags_attributes_and_gradients_of_its_own(tmp_path, batches):
    """The run ends within an epoch: the probe contains batches not yet used for training."""
    loader = DataLoader(data(), batch_size=8)
    ahead = list(loader)[4:7]
    settings = {"max_epochs": 1, "limit_train_batches": batches, "accumulate_grad_batches": 2}
    without = train(Meddles, None, root=tmp_path / "a", **settings).state
    run = train(Meddles, None, monitors(probe=ahead), tmp_path / "b", **settings)
    assert differences(without, run.state) == []
    assert run.trainer.callbacks[0].measured >= 1
    assert run.trainer.callbacks[0].failed == 0
