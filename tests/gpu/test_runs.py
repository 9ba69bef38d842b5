"""Runs on a GPU end in bitwise the same weights, with kernels that only a GPU has."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from tests.gpu.networks import CLASSES, NETWORKS, Deep
from tests.runs import differences, train

pytestmark = pytest.mark.gpu

ON_GPU = {"accelerator": "gpu", "devices": 1, "deterministic": True, "max_epochs": 3}
ALL = {**NETWORKS, "lstm, dropout": Deep}
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Module(pl.LightningModule):
    """With dropout, so that the device's random numbers count."""

    def __init__(self, name: str, optimizer: Any = None, compiled: dict | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(ALL[name](), nn.Dropout(0.2))
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        if compiled is not None:
            self.net.compile(**compiled)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def data(name: str) -> DataLoader:
    torch.manual_seed(5)
    x = torch.randn(96, *ALL[name].shape)
    return DataLoader(TensorDataset(x, torch.arange(96) % CLASSES), batch_size=16, shuffle=True)


def monitors(**extra: Any) -> list[pl.Callback]:
    common = {"every_n_train_steps": 4, "max_overhead": None, "probe_samples": 32, **extra}
    return [
        HessianMonitor(trace_samples=2, min_eigenvalue=True, update_curvature=True, **common),
        SharpnessMonitor(critical=True, average=True, **common),
        LandscapeMonitor(resolution=5, line_resolution=5, **common),
    ]


def check(make, name, tmp_path, mode="train", **settings):
    def run(callbacks, folder):
        torch._dynamo.reset()  # what was compiled for another run's weights
        return train(make, lambda: data(name), callbacks, tmp_path / folder, **ON_GPU, **settings)

    without, again = run([], "a"), run([], "b")
    assert differences(without.state, again.state) == []  # otherwise runs are not reproducible
    ours = monitors(probe_mode=mode)
    found = run(ours, "c")
    assert differences(without.state, found.state) == []
    assert [m.failed for m in ours] == [0] * 3
    assert all(m.measured >= 4 for m in ours)
    for row in ours[0].history:
        assert math.isfinite(row["hessian/top_eigenvalue"])
        assert row["engine"] == "double_backward"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ALL)
def test_precisions(name, precision, mode, tmp_path):
    check(lambda: Module(name), name, tmp_path, mode, precision=precision)


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "capturable": lambda p: torch.optim.Adam(p, capturable=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind, tmp_path):
    check(lambda: Module("images", OPTIMIZERS[kind]), "images", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "attention"])
def test_compiled(name, tmp_path):
    check(lambda: Module(name, compiled={}), name, tmp_path)


def test_channels_last(tmp_path):
    def make():
        module = Module("images")
        module.net.to(memory_format=torch.channels_last)
        return module

    check(make, "images", tmp_path)


def test_random_state_of_the_device_is_restored(tmp_path):
    """Also if a measurement raises after it has drawn random numbers."""

    class Fails(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.log.__name__ == "_log_nothing":
                torch.randn(7, device="cuda")
                raise RuntimeError("half way")
            return loss

    without = train(lambda: Fails("dense"), lambda: data("dense"), [], tmp_path / "a", **ON_GPU)
    with pytest.warns(match="half way"):
        found = train(
            lambda: Fails("dense"), lambda: data("dense"), monitors(), tmp_path / "b", **ON_GPU
        )
    assert differences(without.state, found.state) == []
