"""A full GPU, and constant memory."""

from __future__ import annotations

import gc

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from lightning_landscape.geometry.memory import free_memory
from tests.gpu.test_runs import ON_GPU, Module, data
from tests.runs import differences, train

pytestmark = pytest.mark.gpu

MEGABYTE = 2**20
WIDTH, DEPTH = 256, 24


class Deep(pl.LightningModule):
    """A graph of some 50 kB an example."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def examples(count: int) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(count, WIDTH), torch.arange(count) % 4)


@pytest.fixture
def room():
    """``room(bytes)`` limits the device memory of this process."""
    total = torch.cuda.get_device_properties(0).total_memory

    def allow(size: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0))

    yield allow
    allow(total)


def measured(tmp_path):
    probe = tuple(examples(8192).tensors)
    common = {"every_n_train_steps": 6, "max_overhead": None, "probe": probe}
    ours = [
        HessianMonitor(probe_samples=8192, **common),
        SharpnessMonitor(probe_samples=8192, **common),
        LandscapeMonitor(probe_samples=8192, resolution=3, line_resolution=3, **common),
    ]
    run = train(Deep, DataLoader(examples(192), batch_size=16), ours, tmp_path, **ON_GPU)
    return ours, run


def test_probe_that_does_not_fit_into_memory(tmp_path, room, recwarn):
    """As a whole it takes gigabytes; with little memory the values and weights are the same."""
    free, truth = measured(tmp_path / "a")
    without = train(
        Deep, DataLoader(examples(192), batch_size=16), [], tmp_path / "b", **ON_GPU
    ).state
    assert differences(without, truth.state) == []
    del truth
    gc.collect()
    recwarn.clear()
    room(torch.cuda.memory_allocated() + 700 * MEGABYTE)
    full, run = measured(tmp_path / "c")
    assert differences(without, run.state) == []
    assert [m.failed for m in full] == [0, 0, 0], [str(w.message) for w in recwarn]
    assert [str(w.message) for w in recwarn if "in pieces" in str(w.message)]
    for ours, expected in zip(full, free, strict=True):
        assert len(ours.history) == len(expected.history) > 2
        for row, whole in zip(ours.history, expected.history, strict=True):
            for key in ("hessian/top_eigenvalue", "sharpness/sam"):
                if key in whole:
                    assert row[key] == pytest.approx(whole[key], rel=1e-2)


def test_not_enough_memory_for_any_measurement(tmp_path, room, recwarn):
    """Measuring stops with a warning, and training continues."""
    without = train(
        Deep, DataLoader(examples(192), batch_size=16), [], tmp_path / "b", **ON_GPU
    ).state
    gc.collect()
    # Training itself takes some 60 MB, half of them cuBLAS's; a basis takes 28 times the weights.
    room(torch.cuda.memory_allocated() + 100 * MEGABYTE)
    ours, run = measured(tmp_path / "c")
    assert differences(without, run.state) == []
    messages = " ".join(str(w.message) for w in recwarn)
    assert all(m.failed for m in ours if not m.history), messages
    assert "memory" in messages


def test_free_memory_includes_cached_memory():
    device = torch.device("cuda", torch.cuda.current_device())
    before = free_memory(device)
    held = torch.empty(256 * MEGABYTE, dtype=torch.uint8, device=device)
    assert before - free_memory(device) == pytest.approx(256 * MEGABYTE, abs=64 * MEGABYTE)
    del held  # stays with the allocator
    assert free_memory(device) == pytest.approx(before, abs=64 * MEGABYTE)


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """The same number of bytes after 300 measurements as after 80."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step % 20 == 0:
                gc.collect()
                seen.append(torch.cuda.memory_allocated())

    settings = {**ON_GPU, "max_epochs": -1, "max_steps": 300}
    common = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 32}
    ours = [HessianMonitor(**common), SharpnessMonitor(**common)]
    train(lambda: Module("images"), lambda: data("images"), [*ours, Watch()], tmp_path, **settings)
    assert ours[0].measured >= 299
    assert max(seen[5:]) <= max(seen[1:5])
