"""Two processes: the same numbers as one with all the data, the same weights as without us."""

from __future__ import annotations

import json
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_landscape import SharpnessEarlyStopping, landscape_callbacks
from tests.runs import train
from tests.small import Linear, regression

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


class Sharded(Linear):
    """Each process takes every second example, in order."""

    def train_dataloader(self):
        data = regression().dataset
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=20 // world, sampler=sampler)


class Save(pl.Callback):
    """The parent of a fork sees only files."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.layer.weight.detach(), self.path)


FORK = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


def run(root, callbacks, **settings):
    root.mkdir(parents=True, exist_ok=True)
    train(Sharded, None, [*callbacks, Save(root / "weight.pt")], root, logger=False, **settings)
    path = root / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return torch.load(root / "weight.pt"), rows


def ours(**extra):
    return landscape_callbacks(every_n_train_steps=2, max_overhead=None, **extra)


def test_numbers_and_weights(tmp_path):
    plain, _ = run(tmp_path / "plain", [], **FORK)
    two, forked = run(tmp_path / "two", ours(), **FORK)
    _, alone = run(tmp_path / "one", ours())
    assert torch.equal(plain, two)
    assert [row["step"] for row in forked] == [row["step"] for row in alone]
    assert len(forked) >= 6
    for a, b in zip(forked, alone, strict=True):
        assert a["probe_samples"] == b["probe_samples"] == 60
        for key in a:
            if key in ("hessian/top_eigenvalue", "hessian/edge_ratio"):
                assert a[key] == pytest.approx(b[key], rel=1e-6)
            elif key.startswith("sharpness/") or key == "center_loss":
                assert a[key] == pytest.approx(b[key], rel=1e-5)


def test_stopping_stops_both(tmp_path):
    stopper = SharpnessEarlyStopping("sharpness/gradient_norm", 0.0, patience=2)
    _, rows = run(tmp_path / "stop", [stopper, *ours()], max_epochs=50, **FORK)
    assert max(row["step"] for row in rows) == 5  # measured at 3 and 5; nobody waits for ever


def test_a_fault_on_one_process_ends_the_measurement_on_both(tmp_path):
    class Faulty(Sharded):
        def training_step(self, batch, batch_idx):
            measuring = getattr(self.log, "__name__", "") == "_log_nothing"
            if measuring and self.trainer.global_rank == 1:
                raise RuntimeError("only here")
            return super().training_step(batch, batch_idx)

    (tmp_path / "plain").mkdir()
    plain, _ = run(tmp_path / "plain", [], **FORK)
    (tmp_path / "fault").mkdir()
    train(
        Faulty, None, [*ours(), Save(tmp_path / "fault" / "weight.pt")], tmp_path / "fault",
        logger=False, **FORK,
    )  # fmt: skip
    assert torch.equal(plain, torch.load(tmp_path / "fault" / "weight.pt"))
    assert not (tmp_path / "fault" / "history.jsonl").exists()
