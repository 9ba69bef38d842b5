"""A probe's batches are evaluated as one only if that is the same loss."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from tests.oracles import arguments
from tests.runs import train
from tests.small import Linear, regression


class Watched(Linear):
    """Records the number of examples of each evaluation of the probe."""

    seen = Mock()  # isolation restores all other state

    def training_step(self, batch, batch_idx):
        if getattr(self.log, "__name__", "") == "_log_nothing":
            Watched.seen(len(batch[0]))
        return super().training_step(batch, batch_idx)


class Normalised(Watched):
    """Linear regression with BatchNorm: an example's loss depends on the rest of its batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))


class OfTwenty(Watched):
    """Accepts only batches of 20."""

    def training_step(self, batch, batch_idx):
        return super().training_step([part.reshape(20, -1) for part in batch], batch_idx)


def sizes(module, monitors, tmp_path) -> list[int]:
    Watched.seen.reset_mock()
    train(module, regression, monitors, tmp_path, max_epochs=1)
    assert all(monitor.failed == 0 and monitor.measured == 1 for monitor in monitors)
    return arguments(Watched.seen)


def test_batches_are_evaluated_as_one(tmp_path):
    monitor = HessianMonitor(max_overhead=None)
    seen = sizes(Watched, [monitor], tmp_path)
    # Twice per batch, to check determinism; compared once at other weights; then as one.
    assert seen[:6] == [20] * 6
    assert seen.count(20) == 13  # one more to count the bytes of a graph, twice three to compare
    assert set(seen[-3:]) == {60}
    x, _ = regression().dataset.tensors
    exact = torch.linalg.eigvalsh(2 * x.double().T @ x.double() / 60)[-1]
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(float(exact), rel=1e-5)


def test_batches_of_a_summed_loss(tmp_path):
    def summed():
        return Watched(lr=1e-4, reduction="sum")

    monitor = HessianMonitor(max_overhead=None, loss_reduction="sum")
    assert 60 in sizes(summed, [monitor], tmp_path)
    x, _ = regression().dataset.tensors
    exact = torch.linalg.eigvalsh(2 * x.double().T @ x.double())[-1]
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("module", [Normalised, OfTwenty])
def test_batches_that_are_another_loss_together_are_kept_separate(module, tmp_path):
    seen = sizes(module, [LandscapeMonitor(max_overhead=None, resolution=3)], tmp_path)
    assert seen[-30:] == [20] * 30


def test_batch_norm_in_eval_mode_is_evaluated_as_one(tmp_path):
    monitor = LandscapeMonitor(max_overhead=None, resolution=3, probe_mode="eval")
    assert sizes(Normalised, [monitor], tmp_path)[-10:] == [60] * 10


def test_worst_case_per_batch_keeps_batches_separate(tmp_path):
    monitor = SharpnessMonitor(max_overhead=None, worst_case=True, per_batch=True)
    assert set(sizes(Watched, [monitor], tmp_path)) == {20}


@pytest.mark.parametrize("free", [None, 10])
def test_batches_are_kept_separate_without_known_memory(free, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_landscape.geometry.batches.free_memory", lambda device: free)
    seen = sizes(Watched, [HessianMonitor(max_overhead=None)], tmp_path)
    assert set(seen) == {20}


def test_batches_of_different_types_are_kept_separate(tmp_path):
    batches = [(torch.ones(4, 5), torch.ones(4, 1)), (torch.ones(4, 5).double(), torch.ones(4, 1))]

    class Mixed(Watched):
        def training_step(self, batch, batch_idx):
            return super().training_step([part.float() for part in batch], batch_idx)

    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe=batches)
    assert set(sizes(Mixed, [monitor], tmp_path)) == {4}


class ZeroHead(Linear):
    """Zero weights and targets of +-1: all examples have the same loss, but not its gradient."""

    def __init__(self):
        super().__init__(lr=0.0)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        squares = (self.layer(x) - x[:, :1].sign()).square()
        kept = (x[:, 1:2] > 0).float()
        return (kept * squares).sum() / kept.sum()


def test_equal_losses_at_the_start_are_not_decisive(tmp_path):
    probe = list(regression())
    monitor = HessianMonitor(
        every_n_train_steps=1, max_overhead=None, tol=1e-4, rtol=0, probe=probe
    )
    train(ZeroHead, regression, [monitor], tmp_path)
    hessian = torch.zeros(5, 5, dtype=torch.float64)
    for x, _ in probe:
        masked = x[x[:, 1] > 0].double()
        hessian += 2 * masked.T @ masked / len(masked) / len(probe)
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    values = [row["hessian/top_eigenvalue"] for row in monitor.history]
    assert values == pytest.approx([exact] * len(values), rel=1e-3)


class Scheduled(pl.LightningModule):
    """A mean over examples, and from step 6 a mean over the examples that are not masked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1, bias=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        squares = (self.layer(x) - y).square()
        kept = (x[:, :1] > 0).float()
        weight = 1.0 if self.global_step >= 6 else 0.0
        return squares.mean() + weight * (kept * squares).sum() / kept.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_loss_that_stops_being_that_of_one_batch(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None, tol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="a new series starts; the earlier rows .* superseded"):
        train(Scheduled, regression, [monitor], tmp_path, max_epochs=8)
    x = regression().dataset.tensors[0].double()
    hessian = 2 * x.T @ x / len(x)
    early = float(torch.linalg.eigvalsh(hessian)[-1])
    for piece in x.split(20):
        masked = piece[piece[:, 0] > 0]
        hessian = hessian + 2 * masked.T @ masked / len(masked) / 3
    late = float(torch.linalg.eigvalsh(hessian)[-1])
    rows = {row["step"]: row for row in monitor.history}
    assert rows[4]["hessian/top_eigenvalue"] == pytest.approx(early, rel=1e-3)
    assert rows[24]["hessian/top_eigenvalue"] == pytest.approx(late, rel=1e-3)
    renewed = min(step for step, row in rows.items() if row.get("series") == 2)
    assert all(row.get("superseded", False) is (step < renewed) for step, row in rows.items())
    values = [row["hessian/top_eigenvalue"] for step, row in rows.items() if step >= renewed]
    assert values == pytest.approx([late] * len(values), rel=1e-3)
