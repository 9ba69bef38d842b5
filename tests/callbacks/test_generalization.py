"""Losses on two probes, compared with loops over copies of the batches in float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import GeneralizationMonitor, Probe, SharpnessEarlyStopping
from lightning_landscape.training.batch_mean import batch_mean
from lightning_landscape.training.data.batch import ProbeBatch, first_examples, split_in_proportion
from tests.runs import differences, train
from tests.small import Linear, regression
from tests.training.test_hooks import Recording, of_every_batch

F64 = {"precision": "64-true"}
EVERY = {"every_n_train_steps": 1, "max_overhead": None}


def held_out(examples: int = 50, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(examples, 5, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + 0.3), batch_size=batch_size)


class Validated(Linear):
    """Validation batches are of other examples; dropout is off in eval mode."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.layer = nn.Sequential(nn.Dropout(0.4), nn.Linear(5, 1, bias=False))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.layer(batch[0]), batch[1]))

    def val_dataloader(self):
        return held_out()


class Watch(pl.Callback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self.weights[step] = next(p.detach().clone() for p in pl_module.parameters()).flatten()


def per_batch(loader, weights, examples, function):
    """``(examples, function(error))`` of each batch up to so many examples."""
    x, y = (t.double()[:examples] for t in loader.dataset.tensors)
    errors = (x @ weights - y.flatten()).split(loader.batch_size)
    return [(len(e), float(function(e))) for e in errors]


def weighted(pairs):
    return sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)


def stderr(pairs):
    """NumPy's for batches of one size; otherwise the formula of the docstring."""
    n, x = np.array(pairs).T
    mean = np.average(x, weights=n)
    if len(set(n)) == 1:
        return x.std(ddof=1) / math.sqrt(len(x))
    return math.sqrt(len(n) / (len(n) - 1) * np.sum((n / n.sum()) ** 2 * (x - mean) ** 2))


def absolute(pl_module, batch):
    return {"mae": (pl_module.layer(batch[0]) - batch[1]).abs().mean()}


@pytest.mark.parametrize(
    ("train_size", "val_size", "samples"),
    [((60, 20), (50, 8), 512), ((60, 20), (80, 16), 512), ((60, 20), (64, 20), 40)],
)
def test_values(tmp_path, train_size, val_size, samples):
    """The larger probe is cut to the size of the smaller; both in eval mode, dropout off."""
    watch = Watch()
    monitor = GeneralizationMonitor(
        validation_probe=held_out(*val_size), probe_samples=samples, metric_fn=absolute, **EVERY
    )
    train(Validated, lambda: regression(*train_size), [monitor, watch], tmp_path, **F64)
    assert monitor.failed == 0
    assert len(monitor.history) >= 4
    count = min(train_size[0], val_size[0], samples)
    for row in monitor.history:
        w = watch.weights[row["step"]]
        losses = {}
        for part, loader in (
            ("train", regression(*train_size)),
            ("val", held_out(*val_size)),
        ):
            losses[part] = per_batch(loader, w, count, lambda e: e.square().mean())
            expected = weighted(losses[part])
            assert row[f"generalization/{part}_loss"] == pytest.approx(expected, rel=1e-12)
            mae = weighted(per_batch(loader, w, count, lambda e: e.abs().mean()))
            assert row[f"generalization/{part}_mae"] == pytest.approx(mae, rel=1e-12)
        for name in ("loss", "mae"):
            gap = row[f"generalization/val_{name}"] - row[f"generalization/train_{name}"]
            assert row["generalization/gap" + (f"_{name}" if name == "mae" else "")] == gap
        error = math.hypot(stderr(losses["train"]), stderr(losses["val"]))
        assert row["generalization/gap_stderr"] == pytest.approx(error, rel=1e-9)
        assert (row["probe_samples"], row["validation_samples"]) == (count, count)
        assert row["probe_mode"] == "eval"


def test_summed_loss_is_a_mean_per_example(tmp_path):
    def run(reduction):
        monitor = GeneralizationMonitor(
            loss_reduction=reduction, validation_probe=held_out(), **EVERY
        )
        make = lambda: Validated(lr=0.0, reduction=reduction)  # noqa: E731
        train(make, regression, [monitor], tmp_path / reduction, **F64)
        return [row["generalization/gap"] for row in monitor.history]

    assert run("sum") == pytest.approx(run("mean"), rel=1e-12)


def test_train_mode_has_dropout(tmp_path):
    modes = [
        GeneralizationMonitor(name=mode, probe_mode=mode, validation_probe=held_out(), **EVERY)
        for mode in ("eval", "train")
    ]
    train(Validated, regression, modes, tmp_path)
    for one, other in zip(*(m.history for m in modes), strict=True):
        for part in ("train_loss", "val_loss"):
            assert one[f"generalization/eval/{part}"] != other[f"generalization/train/{part}"]


def test_one_batch_has_no_standard_error(tmp_path):
    monitor = GeneralizationMonitor(validation_probe=held_out(30, 30), **EVERY)
    run = train(Validated, regression, [monitor], tmp_path)
    assert all("generalization/gap_stderr" not in row for row in monitor.history)
    assert "generalization/gap" in run.trainer.callback_metrics


def test_batches_that_cannot_be_cut(tmp_path):
    class Packed(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch["x"].data).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def batch(size, seed):
        torch.manual_seed(seed)
        packed = pack_sequence([torch.randn(3, 2) for _ in range(size)])
        return {"n": torch.zeros(size), "x": packed}

    batches = [batch(4, i) for i in range(3)]
    monitor = GeneralizationMonitor(
        probe=batches, validation_probe=[batch(5, 7), batch(5, 8)], **EVERY
    )
    with pytest.warns(match=r"those of 8 training and 10 validation examples: .* cannot be cut"):
        train(Packed, lambda: DataLoader(batches, batch_size=None), [monitor], tmp_path)
    assert monitor.failed == 0


# -- capturing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sanity", "samples", "first", "kept"),
    [
        (2, 16, 1, 16),  # the sanity check has enough examples
        (2, 20, 4, 24),  # not enough: from the first validation, without duplicates
        (0, 16, 4, 16),
        (0, 512, 4, 50),  # all of it
    ],
)
def test_capture(tmp_path, sanity, samples, first, kept):
    monitor = GeneralizationMonitor(probe_samples=samples, **EVERY)
    profiler = Recording()
    train(
        Validated, regression, [monitor], tmp_path, num_sanity_val_steps=sanity, profiler=profiler,
        max_epochs=3,
    )  # fmt: skip
    assert monitor.failed == 0
    expected = first if samples < 21 else max(first, 3)
    assert monitor.history[0]["step"] == expected
    held = monitor._validation.batches
    assert [b.index for b in held] == list(range(len(held)))
    x = torch.cat([b.batch[0] for b in held])
    assert torch.equal(x, held_out().dataset.tensors[0][:kept])
    # Lightning does not call the hook once the probe is complete.
    calls = of_every_batch(profiler, monitor)
    assert calls["on_validation_batch_start"] == len(held) + (sanity if first > 1 else 0)


def test_fit_that_ends_with_its_first_validation(tmp_path):
    monitor = GeneralizationMonitor(max_overhead=1e-9)
    run = train(Validated, regression, [monitor], tmp_path, max_epochs=1, num_sanity_val_steps=0)
    assert [row["step"] for row in monitor.history] == [3]
    assert [step for step, _ in run.logger.values("generalization/gap")] == [3]


def test_first_of_several_loaders_is_used(tmp_path):
    class Two(Validated):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def val_dataloader(self):
            return [held_out(8, 8), regression(40, 8)]

    monitor = GeneralizationMonitor(**EVERY)
    train(Two, regression, [monitor], tmp_path)
    assert monitor._validation.size == 8


def test_without_a_validation_loop(tmp_path):
    monitor = GeneralizationMonitor(**EVERY)
    with pytest.warns(match=r"no validation loop .*; pass validation_probe=") as caught:
        train(Linear, regression, [monitor], tmp_path)
    assert sum("no validation loop" in str(w.message) for w in caught) == 1
    assert monitor.history == []
    train(Validated, regression, [monitor], tmp_path)  # another fit has one
    assert len(monitor.history) >= 2


def test_validate_captures_nothing(tmp_path):
    monitor = GeneralizationMonitor(**EVERY)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.validate(Validated(), verbose=False)
    assert monitor._validation.batches == []


def test_out_of_memory_for_a_batch_does_not_end_the_run(tmp_path, monkeypatch):
    monitor = GeneralizationMonitor(**EVERY)

    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(monitor._validation, "offer", full)
    with pytest.warns(match="a validation batch could not be copied .no room"):
        run = train(Validated, regression, [monitor], tmp_path)
    assert run.trainer.global_step == 6
    assert monitor.history == []


def test_validation_batches_of_another_kind(tmp_path):
    class Other(Validated):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return DataLoader(torch.ones(8, 3), batch_size=4)

    with pytest.warns(match="generalization: a measurement failed .*loss_fn=lambda"):
        run = train(Other, regression, [GeneralizationMonitor(**EVERY)], tmp_path)
    assert run.trainer.global_step == 6


# -- modules --------------------------------------------------------------------------------------


class Dicts(Validated):
    """Batches are dicts; BatchNorm; manual optimization."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(squared(self, batch))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", squared(self, batch))

    def val_dataloader(self):
        return dicts(held_out)


def squared(pl_module, batch):
    return (pl_module.layer(batch["x"]) - batch["y"]).square().mean()


def dicts(make):
    batches = [{"x": x, "y": y} for x, y in make()]
    return DataLoader(batches, batch_size=None)


def test_dicts_batch_norm_and_manual_optimization(tmp_path):
    class Copy(pl.Callback):
        """The losses in eval mode, computed with the module; restores the weights."""

        losses = {}  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.eval()
            with torch.no_grad():
                self.losses[trainer.global_step] = [
                    weighted([(len(b["x"]), float(squared(pl_module, b))) for b in dicts(make)])
                    for make in (regression, held_out)
                ]
            pl_module.train()

    monitor = GeneralizationMonitor(loss_fn=squared, probe_samples=512, **EVERY)
    plain = train(Dicts, lambda: dicts(regression), [], tmp_path / "plain")
    copy = Copy()
    watched = train(Dicts, lambda: dicts(regression), [monitor, copy], tmp_path / "watched")
    assert monitor.failed == 0
    assert differences(plain.state["parameters"], watched.state["parameters"]) == []
    assert differences(plain.state["buffers"], watched.state["buffers"]) == []
    for row in monitor.history:
        val = copy.losses[row["step"]][1]
        assert row["generalization/val_loss"] == pytest.approx(val, rel=1e-6)
    assert len(monitor.history) >= 2


def test_training_is_bitwise_equal(tmp_path):
    plain = train(Validated, regression, [], tmp_path / "plain", max_epochs=4)
    monitor = GeneralizationMonitor(metric_fn=absolute, **EVERY)
    watched = train(Validated, regression, [monitor], tmp_path / "watched", max_epochs=4)
    assert len(monitor.history) >= 9
    assert differences(plain.state, watched.state) == []


def test_loss_that_is_not_finite(tmp_path):
    def loss(pl_module, batch):
        return pl_module.layer(batch[0]).square().mean() * math.nan

    monitor = GeneralizationMonitor(loss_fn=loss, validation_probe=held_out(), **EVERY)
    train(Validated, regression, [monitor], tmp_path)
    assert monitor.failed == 0
    assert all(math.isnan(row["generalization/gap"]) for row in monitor.history)


# -- checkpoints and loggers ---------------------------------------------------------------------


def test_resumed_run_has_the_same_values(tmp_path):
    def monitor():
        return GeneralizationMonitor(every_n_train_steps=2, max_overhead=None)

    whole = monitor()
    train(Validated, regression, [whole], tmp_path / "whole", max_epochs=6)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(
        Validated, regression, [monitor(), saver], tmp_path / "a", max_epochs=3,
        enable_checkpointing=True,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint.stat().st_size < 10_000

    class Shifted(Validated):
        """With other validation examples, which the captured probe does not contain."""

        def val_dataloader(self):
            return held_out(16, 4)

    resumed = monitor()
    train(Shifted, regression, [resumed], tmp_path / "b", max_epochs=6, ckpt_path=checkpoint)
    own, expected = resumed._validation, whole._validation
    assert own.fingerprint() == expected.fingerprint()
    assert len(resumed.history) >= 3
    assert resumed.history[0]["step"] - whole.history[0]["step"] in range(2, 12, 2)
    (tmp_path / "a" / "landscape" / "validation-examples-512-rank0.pt").unlink()
    with pytest.warns(match="the validation probe of the run before could not be used: its file"):
        train(
            Shifted, regression, [recaptured := monitor()], tmp_path / "c", max_epochs=6,
            ckpt_path=checkpoint,
        )  # fmt: skip
    assert recaptured._validation.size == 16
    assert recaptured.history[0]["step"] > 12


def test_same_values_at_the_same_weights_after_a_resume(tmp_path):
    class Plain(Validated):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 1)

    def monitor():
        return GeneralizationMonitor(every_n_train_steps=2, max_overhead=None)

    whole, resumed = monitor(), monitor()
    train(Plain, regression, [whole], tmp_path / "whole", max_epochs=6)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    train(Plain, regression, [monitor(), saver], tmp_path / "a", **settings)
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(Plain, regression, [resumed], tmp_path / "b", max_epochs=6, ckpt_path=last)
    known = {row["step"]: row for row in whole.history}
    assert len(resumed.history) >= 4
    for row in resumed.history:
        assert row == known[row["step"]]


def test_loggers_charts_and_stopping(tmp_path):
    monitor = GeneralizationMonitor(validation_probe=held_out(), metric_fn=absolute, **EVERY)
    stopper = SharpnessEarlyStopping("generalization/val_mae", -1.0, patience=2)
    logger = TensorBoardLogger(tmp_path)
    train(Validated, regression, [monitor, stopper], tmp_path, logger=logger)
    assert stopper.stopped_step == 4
    events = b"".join(p.read_bytes() for p in tmp_path.rglob("events.out.tfevents.*"))
    for text in (
        b"generalization/gap_stderr",
        b"generalization/train_loss$",
        b"generalization/val_loss$",
        b"generalization/gap$",
    ):
        assert text in events
    assert monitor.owns("generalization/gap_mae")
    assert not GeneralizationMonitor().owns("generalization/gap_mae")


def test_one_idle_hook_per_batch(tmp_path):
    profiler = Recording()
    monitor = GeneralizationMonitor(every_n_train_steps=10**6, probe_samples=16)
    train(Validated, regression, [monitor], tmp_path, max_epochs=10, profiler=profiler)
    calls = Counter(of_every_batch(profiler, monitor))
    assert calls["on_train_batch_start"] == 1
    assert calls["on_validation_batch_start"] == 2  # of the sanity check
    assert callable(monitor.on_validation_batch_start)  # restored after the fit


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric_fn": 3}, TypeError, r"GeneralizationMonitor\(metric_fn=3\): expected a function"),
        (
            {"validation_probe": Probe()},
            ValueError,
            r"\(validation_probe=Probe\(\)\): expected one",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GeneralizationMonitor(**arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda batch: 3.0, "metric_fn returned float: expected a mapping such as"),
        (lambda batch: {}, "metric_fn returned dict: expected a mapping such as"),
        (lambda batch: {"a": batch[0]}, r"metric_fn returned 'a' of shape \(20, 5\): expected the"),
        (
            lambda batch: {"a" if len(batch[0]) == 20 else "b": 1.0},
            r"metric_fn returned \['b'\] for one batch and \['a'\] for another",
        ),
    ],
)
def test_bad_metrics(tmp_path, row, message):
    monitor = GeneralizationMonitor(
        metric_fn=lambda _, batch: row(batch), validation_probe=held_out(), **EVERY
    )
    with pytest.warns(match=message):
        train(Validated, regression, [monitor], tmp_path)
    assert monitor.failed == 3


# -- helper functions -----------------------------------------------------------------------------


def test_first_examples():
    def batch(size):
        return ProbeBatch(torch.zeros(size, 2), 0, size)

    whole = [batch(4), batch(4), batch(3)]
    for count in range(1, 12):
        taken = first_examples(whole, count)
        assert sum(b.size for b in taken) == count
        assert [len(b.batch) for b in taken] == [b.size for b in taken]
    assert first_examples(whole, 99) == whole
    solid = [ProbeBatch("text", 0, 4), ProbeBatch("text", 1, 4)]
    assert [len(first_examples(solid, count)) for count in (1, 4, 7, 8)] == [1, 1, 1, 2]


def test_shares_of_batches_add_up():
    generator = np.random.default_rng(0)
    for _ in range(200):
        sizes = generator.integers(3, 40, size=generator.integers(1, 6)).tolist()
        wanted = int(generator.integers(sum(sizes) // 2, sum(sizes) + 1))
        taken = split_in_proportion(sizes, wanted)
        assert sum(taken) == wanted
        assert all(0 < t <= s for t, s in zip(taken, sizes, strict=True))


def test_means_against_numpy():
    class One:
        count, rank, device = 1, 0, torch.device("cpu")

        @staticmethod
        def sum(tensor):
            return tensor

    x = np.random.default_rng(0).normal(size=7)
    found = batch_mean(x.tolist(), [5] * 7, One)
    assert found.value == pytest.approx(x.mean(), rel=1e-14)
    assert found.stderr == pytest.approx(x.std(ddof=1) / math.sqrt(7), rel=1e-12)
    assert (found.examples, found.batches) == (35, 7)
    n = [5, 5, 5, 5, 5, 5, 2]
    uneven = batch_mean(x.tolist(), n, One)
    assert uneven.value == pytest.approx(np.average(x, weights=n), rel=1e-14)
    assert uneven.stderr == pytest.approx(stderr(list(zip(n, x, strict=True))), rel=1e-12)
    assert math.isnan(batch_mean([1.0], [5], One).stderr)
    assert math.isnan(batch_mean([1.0, math.nan], [5, 5], One).value)
    # Close together and far from zero: no cancellation.
    near = (1e8 + x * 1e-3).tolist()
    expected = np.array(near).std(ddof=1) / math.sqrt(7)
    assert batch_mean(near, [5] * 7, One).stderr == pytest.approx(expected, rel=1e-6)
