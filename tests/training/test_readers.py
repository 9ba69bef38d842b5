"""Callbacks and schedulers of Lightning that monitor keys of this package."""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, SharpnessMonitor
from tests.runs import train
from tests.small import Linear, regression

KEY = "hessian/top_eigenvalue"


def checkpoint(folder, **settings):
    return ModelCheckpoint(
        folder,
        monitor=KEY,
        save_top_k=-1,
        filename="{step}",
        auto_insert_metric_name=False,
        **settings,
    )


def named(saved):
    """Step in the name -> value of the monitored key, of all that were saved."""
    return {int(path.rsplit("/", 1)[1][:-5]): float(v) for path, v in saved.best_k_models.items()}


def values(monitor):
    return {row["step"]: row[KEY] for row in monitor.history}


class WithValidation(Linear):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx))


def fit(module, callbacks, folder, **settings):
    """Fit on three batches an epoch, with validation; returns the warnings of our callbacks."""
    pl.seed_everything(0, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            **{
                "max_epochs": 4,
                "callbacks": callbacks,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accelerator": "cpu",
                "default_root_dir": folder,
                **settings,
            }
        )
        trainer.fit(module, regression(), regression())
    return [str(w.message) for w in caught if str(w.message).startswith(("hessian", "sharpness"))]


@pytest.mark.parametrize("schedule", [{"max_overhead": None}, {}], ids=["exact", "budget"])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_train_steps": 4}, [4, 8, 12]),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, [3, 6, 9, 12]),
        ({"every_n_epochs": 2, "save_on_train_epoch_end": True}, [6, 12]),
        ({}, [3, 6, 9, 12]),  # at the end of the validation
    ],
)
def test_checkpoint_name_contains_the_value_of_its_step(tmp_path, schedule, settings, steps):
    monitor = HessianMonitor(every_n_train_steps=5, **schedule)
    saved = checkpoint(tmp_path / "saved", **settings)
    messages = fit(WithValidation(), [monitor, saved], tmp_path)
    assert messages == []
    measured = values(monitor)
    assert sorted(named(saved)) == steps
    for step, value in named(saved).items():
        assert value == pytest.approx(measured[step], rel=1e-6)
    assert {5, 10} <= set(measured)  # its own schedule


def test_validation_within_an_epoch(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe=regression())
    saved = checkpoint(tmp_path / "saved")
    assert fit(WithValidation(), [monitor, saved], tmp_path, val_check_interval=2) == []
    assert sorted(named(saved)) == [2, 5, 8, 11]
    for step, value in named(saved).items():
        assert value == pytest.approx(values(monitor)[step], rel=1e-6)


def test_early_stopping_reads_new_values(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    stopper = EarlyStopping(KEY, patience=1, min_delta=1e9)  # nothing is an improvement
    assert fit(WithValidation(), [monitor, stopper], tmp_path) == []
    assert stopper.stopped_epoch == 1
    assert list(values(monitor)) == [3, 6]
    assert float(stopper.best_score) == pytest.approx(values(monitor)[3], rel=1e-6)


class WithPlateau(Linear):
    interval, strict, frequency = "epoch", True, 1

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        settings = {name: getattr(self, name) for name in ("interval", "strict", "frequency")}
        return [optimizer], [{"scheduler": scheduler, "monitor": KEY, **settings}]


def test_scheduler_reads_new_values(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    train(WithPlateau, regression, [monitor], tmp_path, max_epochs=4)
    assert list(values(monitor)) == [3, 6, 9, 12]


def test_scheduler_that_reads_at_every_step_raises(tmp_path):
    class ByStep(WithPlateau):
        interval = "step"

    with pytest.raises(MisconfigurationException, match="interval='step': Lightning reads"):
        train(ByStep, regression, [HessianMonitor()], tmp_path, max_epochs=1)
    ByStep.strict = False  # the value of the last measurement
    monitor = HessianMonitor()
    train(ByStep, regression, [monitor], tmp_path, max_epochs=2)
    assert monitor.measured > 0


def test_key_that_is_read_before_the_probe_is_complete(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=100, probe_samples=60)
    saved = checkpoint(tmp_path / "saved", every_n_train_steps=2)
    (message,) = fit(WithValidation(), [monitor, saved], tmp_path)
    assert "the probe holds 40 examples instead of 60, because ModelCheckpoint" in message
    assert sorted(named(saved)) == [2, 4, 6, 8, 10, 12]
    assert monitor.history[0]["probe_samples"] == 40


@pytest.mark.short_runs
def test_stale_value_warns(tmp_path, monkeypatch):
    """The first value is always measured; no budget is left for others."""
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=1e-9, grace_seconds=0.0)
    saved = checkpoint(tmp_path / "saved", every_n_train_steps=3)
    messages = fit(WithValidation(), [monitor, saved], tmp_path)
    assert list(values(monitor)) == [3]
    stale = [m for m in messages if "ModelCheckpoint(monitor='hessian/top_eigenvalue') reads" in m]
    assert len(stale) == 1
    assert "at step 6 that belongs to step 3, because none could be measured" in stale[0]
    assert "SharpnessEarlyStopping" in stale[0]


def test_checkpoint_by_time_interval_warns(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None)
    saved = checkpoint(tmp_path / "saved", train_time_interval=timedelta(hours=1))
    (message,) = fit(WithValidation(), [monitor, saved], tmp_path)
    assert "ModelCheckpoint(monitor='hessian/top_eigenvalue') reads values by the clock" in message


class Watch(pl.Callback):
    """Keeps the key in ``callback_metrics`` after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(float(trainer.callback_metrics.get(KEY, float("nan"))))


def test_values_that_have_not_converged_are_ignored(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None, max_hvps=1, tol=1e-9, rtol=0)
    stopper = SharpnessEarlyStopping(KEY, threshold=0.0, patience=1)
    watch = Watch()
    messages = fit(WithValidation(), [monitor, stopper, watch], tmp_path)
    assert len(monitor.history) == 10  # the whole fit
    for row in monitor.history:
        assert not row["converged"]
        assert KEY in row
        assert KEY in row["unconverged"]
    assert all(value != value for value in watch.seen)
    assert any("stopped at max_hvps=1" in message for message in messages)
    assert any("got 0 values" in message for message in messages)


def test_first_value_that_is_read_is_always_set(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None, max_hvps=1, tol=1e-9, rtol=0)
    saved = checkpoint(tmp_path / "saved", every_n_train_steps=3)
    messages = fit(WithValidation(), [monitor, saved], tmp_path)
    assert any(
        "the first value of hessian/top_eigenvalue that is read has not" in m for m in messages
    )
    assert any("reads a value at step 6 that belongs to step 3" in m for m in messages)
    first = monitor.history[0]
    assert list(named(saved).values()) == pytest.approx([first[KEY]] * 4, rel=1e-6)


def test_keys_of_the_module_are_ignored(tmp_path):
    saved = ModelCheckpoint(tmp_path / "saved", monitor="val_loss")
    monitor = SharpnessMonitor(every_n_train_steps=100, max_overhead=None)
    assert fit(WithValidation(), [monitor, saved], tmp_path) == []
    assert [row["step"] for row in monitor.history] == [3]
