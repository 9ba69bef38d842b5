"""A callback starts again in a second Trainer and continues in a second fit of the same one."""

from __future__ import annotations

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessEarlyStopping,
    SharpnessMonitor,
)
from tests.small import Linear

EXACTLY = {"every_n_train_steps": 4, "max_overhead": None, "probe_samples": 16}


def fold(number):
    generator = torch.Generator().manual_seed(number)
    x = (1 + 2 * number) * torch.randn(64, 5, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def trainer(callbacks, folder, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        max_epochs=1, callbacks=callbacks, default_root_dir=folder, accelerator="cpu",
        **{"enable_checkpointing": False, **quiet, **settings},
    )  # fmt: skip


class Validated(Linear):
    def validation_step(self, batch, batch_idx):
        """Batches pass by."""


def fit(callbacks, number, folder, **settings):
    pl.seed_everything(number, verbose=False)
    loader = fold(number)
    trainer(callbacks, folder, **settings).fit(Validated(lr=1e-3), loader, loader)
    return callbacks


def everything():
    return [
        HessianMonitor(**EXACTLY),
        SharpnessMonitor(**EXACTLY),
        GeneralizationMonitor(**EXACTLY),
        InterpolationMonitor(**EXACTLY, resolution=2),
        LandscapeMonitor(**EXACTLY, resolution=3, line_resolution=0),
    ]


def test_second_trainer_equals_a_new_callback(tmp_path):
    reused = fit(everything(), 0, tmp_path / "0")
    assert all(m.measured > 0 for m in reused)
    first = [m.history for m in reused]
    fit(reused, 1, tmp_path / "1")
    fresh = fit(everything(), 1, tmp_path / "2")
    for one, other, before in zip(reused, fresh, first, strict=True):
        assert one.history == other.history
        assert one.history != before
        assert (one.measured, one.skipped, one.failed) == (len(other.history), 0, 0)
        assert one.state_dict().keys() == other.state_dict().keys()
    assert reused[-1].state_dict()["limits"] == fresh[-1].state_dict()["limits"]


def test_copied_callback_in_a_second_trainer(tmp_path):
    """As in cross-validation: copied after the first fold."""
    (used,) = fit([HessianMonitor(**EXACTLY)], 0, tmp_path / "0")
    (fresh,) = fit([HessianMonitor(**EXACTLY)], 1, tmp_path / "1")
    for number, copied in enumerate((copy.deepcopy(used), pickle.loads(pickle.dumps(used)))):
        assert copied.history == used.history
        fit([copied], 1, tmp_path / f"copy{number}")
        assert copied.history == fresh.history


def test_another_module_in_the_same_trainer_starts_again(tmp_path):
    monitor = HessianMonitor(**EXACTLY)
    same = trainer([monitor], tmp_path)
    same.fit(Linear(lr=1e-3), fold(0))
    same.fit_loop.epoch_progress.reset()
    same.fit_loop.max_epochs = 1
    same.fit(Linear(lr=1e-3), fold(1))
    x = fold(1).dataset.tensors[0][:16].double()
    expected = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(expected, rel=1e-2)


def test_second_fit_of_the_same_trainer_and_module_continues(tmp_path):
    monitor, module = HessianMonitor(**EXACTLY), Linear(lr=1e-3)
    same = trainer([monitor], tmp_path)
    same.fit(module, fold(0))
    rows, probe = monitor.history, monitor.loss.probe
    same.fit_loop.max_epochs = 2
    same.fit(module, fold(0))
    assert monitor.loss.probe is probe
    assert monitor.history[: len(rows)] == rows
    assert len(monitor.history) > len(rows)


def test_resumed_run_continues(tmp_path):
    first = HessianMonitor(**EXACTLY)
    fit([first], 0, tmp_path, enable_checkpointing=True)
    (path,) = tmp_path.rglob("*.ckpt")
    probe = first.loss.probe.fingerprint()
    again = trainer([first], tmp_path)
    again.fit_loop.max_epochs = 2
    again.fit(Validated(lr=1e-3), fold(0), fold(0), ckpt_path=path)
    assert first.loss.probe.fingerprint() == probe
    assert first.history[0]["step"] < 8 < first.history[-1]["step"]


def test_given_probe_is_shared_by_all_runs(tmp_path):
    x = torch.randn(10, 5)
    shared = Probe((x, x.sum(1, keepdim=True)))
    monitor = HessianMonitor(**EXACTLY, probe=shared)
    fit([monitor], 0, tmp_path / "0")
    batches = shared.batches
    fit([monitor], 1, tmp_path / "1")
    assert monitor.loss.probe is shared
    assert shared.batches is batches


def test_probe_from_an_iterator_is_kept(tmp_path):
    x = torch.randn(10, 5)
    monitor = HessianMonitor(**EXACTLY, probe=iter([(x, x.sum(1, keepdim=True))]))
    fit([monitor], 0, tmp_path / "0")
    fit([monitor], 1, tmp_path / "1")
    assert [row["probe_samples"] for row in monitor.history] == [10] * len(monitor.history)


def test_early_stopping_starts_again_and_ignores_other_runs(tmp_path):
    monitor = HessianMonitor(**EXACTLY)
    stopper = SharpnessEarlyStopping("hessian/top_eigenvalue", 0.0, patience=2)
    fit([monitor, stopper], 0, tmp_path / "0")
    assert stopper.stopped_step is not None
    fit([monitor], 1, tmp_path / "1")
    assert [row["step"] for row in monitor.history] == [2, 4, 8]  # not stopped
    fit([monitor, stopper], 1, tmp_path / "2")
    assert (stopper.stopped_step, len(monitor.history)) == (4, 2)
