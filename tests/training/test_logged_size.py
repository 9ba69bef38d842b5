"""The number of examples in a batch is the logged batch size, not the length of a tensor."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_landscape import GeneralizationMonitor, HessianMonitor
from lightning_landscape.geometry import batches
from tests.runs import differences, train
from tests.small import Linear, regression

SIZES = [(3, 2, 4), (1, 5), (2, 2, 1, 3), (6, 1)]  # atoms of each molecule, by batch


def molecules(position, seed=0):
    """Atoms, the molecule of each, and a target for each molecule."""
    generator = torch.Generator().manual_seed(seed + position)
    sizes = torch.tensor(SIZES[position])
    atoms = torch.randn(int(sizes.sum()), 4, generator=generator)
    return atoms, torch.repeat_interleave(sizes), torch.randn(len(sizes), 1, generator=generator)


BATCHES = [molecules(position) for position in range(len(SIZES))]


EXAMPLES = [len(sizes) for sizes in SIZES]
ATOMS = [sum(sizes) for sizes in SIZES]
HELD_OUT = [molecules(position, seed=10) for position in reversed(range(len(SIZES)))]


def pooled(atoms, index, count):
    return torch.zeros(count, 4, dtype=atoms.dtype).index_add(0, index, atoms)


class Molecules(pl.LightningModule):
    """A linear model of sums over atoms: the Hessian of a batch is 2 S'S / molecules."""

    logs_size = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)

    def training_step(self, batch, batch_idx):
        atoms, index, target = batch
        output = self.layer(pooled(atoms, index, len(target)))
        loss = nn.functional.mse_loss(output, target)
        self.log("loss", loss, batch_size=len(target) if self.logs_size else None)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Silent(Molecules):
    logs_size = False


def loader():
    return DataLoader(BATCHES, batch_size=None)


def exact(weights):
    """The top eigenvalue of the mean of the batches with these weights."""
    total = torch.zeros(4, 4, dtype=torch.float64)
    for (atoms, index, target), weight in zip(BATCHES, weights, strict=True):
        sums = pooled(atoms.double(), index, len(target))
        total += weight * 2 * sums.T @ sums / len(target)
    return float(torch.linalg.eigvalsh(total / sum(weights))[-1])


@pytest.mark.parametrize("given", [False, True], ids=["captured", "given"])
def test_logged_size_is_used(given, tmp_path):
    monitor = HessianMonitor(
        every_n_train_steps=2, max_overhead=None, tol=1e-4, rtol=0,
        **({"probe": BATCHES} if given else {"probe_samples": sum(EXAMPLES)}),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hessian: the tensors of a training batch")
        with_us = train(Molecules, loader, [monitor], tmp_path)
    plain = train(Molecules, loader, [], tmp_path / "plain")
    assert differences(plain.state, with_us.state) == []
    for row in monitor.history:
        assert row["probe_samples"] == sum(EXAMPLES)
        assert row["hessian/top_eigenvalue"] == pytest.approx(exact(EXAMPLES), rel=1e-3)


def test_different_lengths_warn(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, tol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match=r"lengths of \[9, 3\].* counts as 9 .*batch_size=\.\.\."):
        train(Silent, loader, [monitor], tmp_path)
    row = monitor.history[-1]
    assert row["probe_samples"] == sum(ATOMS)
    assert row["hessian/top_eigenvalue"] == pytest.approx(exact(ATOMS), rel=1e-3)


def test_different_lengths_in_a_given_probe_warn(tmp_path):
    monitor = HessianMonitor(
        every_n_train_steps=2, max_overhead=None, tol=1e-4, rtol=0, probe=BATCHES
    )
    with pytest.warns(UserWarning, match=r"lengths of \[9, 3\].* counts as 9 .*batch_size=\.\.\."):
        train(Silent, loader, [monitor], tmp_path)
    assert monitor.history[-1]["hessian/top_eigenvalue"] == pytest.approx(exact(ATOMS), rel=1e-3)


def test_resumed_run_counts_the_same_examples(tmp_path):
    """A given probe is read again, while other decisions are restored from the checkpoint."""
    begun, resumed = (
        HessianMonitor(every_n_train_steps=2, max_overhead=None, tol=1e-4, rtol=0, probe=BATCHES)
        for _ in range(2)
    )
    train(Molecules, loader, [begun], tmp_path).trainer.save_checkpoint(tmp_path / "saved.ckpt")
    more = {"max_epochs": 4, "ckpt_path": tmp_path / "saved.ckpt"}
    train(Molecules, loader, [resumed], tmp_path, **more)
    assert resumed.state_dict()["concat"] is False
    assert len(resumed.history) >= 3
    for row in resumed.history:
        assert row["probe_samples"] == sum(EXAMPLES)
        assert row["hessian/top_eigenvalue"] == pytest.approx(exact(EXAMPLES), rel=1e-3)


def test_size_of_a_piece_is_not_that_of_the_batch(tmp_path, monkeypatch):
    class Logged(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, batch_size=len(batch[0]))
            return loss

    monkeypatch.setattr(batches, "free_memory", lambda device: 10)
    given = [regression().dataset.tensors]
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, probe=given)
    with pytest.warns(UserWarning, match="does not fit into memory"):
        train(Logged, regression, [monitor], tmp_path)
    assert {row["probe_samples"] for row in monitor.history} == {60}


# -- validation ------------------------------------------------------------------------------------


class Validated(Molecules):
    """``validation_step`` logs the number of molecules, or only ``training_step`` does."""

    validation_logs_size = True

    def loss_of(self, batch):
        atoms, index, target = batch
        return nn.functional.mse_loss(self.layer(pooled(atoms, index, len(target))), target)

    def validation_step(self, batch, batch_idx):
        size = len(batch[2]) if self.validation_logs_size else None
        self.log("val_loss", self.loss_of(batch), batch_size=size)

    def val_dataloader(self):
        return DataLoader(HELD_OUT, batch_size=None)


class OnlyInTraining(Validated):
    validation_logs_size = False


class OnlyInValidation(Validated):
    logs_size = False


class Nowhere(OnlyInTraining):
    logs_size = False


class Graph:
    """A batch as graph libraries make it."""

    def __init__(self, atoms, index, target):
        self.atoms, self.index, self.target = atoms, index, target

    @property
    def num_graphs(self):
        return len(self.target)

    def to(self, *args, **kwargs):
        return Graph(*(part.to(*args, **kwargs) for part in vars(self).values()))


class OfGraphs(Nowhere):
    """Logs nothing in validation, where Lightning itself would need the size."""

    def training_step(self, graph, batch_idx):
        return super().training_step(tuple(vars(graph).values()), batch_idx)

    def validation_step(self, graph, batch_idx):
        self.loss_of(tuple(vars(graph).values()))

    def val_dataloader(self):
        return DataLoader([Graph(*batch) for batch in HELD_OUT], batch_size=None)


class Weights(pl.Callback):
    def __init__(self):
        self.at = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.at[trainer.global_step] = pl_module.layer.weight.detach().double().flatten()


def loss_at(weights, held, sizes):
    """The mean over batches with these weights."""
    losses = [
        float((pooled(atoms.double(), index, len(target)) @ weights - target[:, 0]).square().mean())
        for atoms, index, target in held
    ]
    return sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)


def fit_validated(module, tmp_path, **arguments):
    """A run that must equal one without callbacks; returns rows, and messages about sizes."""

    def data():
        whole = [Graph(*batch) for batch in BATCHES] if module is OfGraphs else BATCHES
        return DataLoader(whole, batch_size=None)

    monitor = GeneralizationMonitor(every_n_train_steps=1, max_overhead=None, **arguments)
    weights = Weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_us = train(module, data, [weights, monitor], tmp_path, max_epochs=3)
    plain = train(module, data, [Weights()], tmp_path / "plain", max_epochs=3)
    assert differences(plain.state, with_us.state) == []
    assert monitor.failed == 0
    assert len(monitor.history) >= 8
    messages = [str(w.message) for w in caught if "have lengths of" in str(w.message)]
    return monitor.history, weights.at, messages


def check(rows, weights, train_sizes, val_sizes):
    for row in rows:
        of_val = loss_at(weights[row["step"]], HELD_OUT, val_sizes)
        of_train = loss_at(weights[row["step"]], BATCHES, train_sizes)
        assert row["generalization/val_loss"] == pytest.approx(of_val, rel=1e-5)
        assert row["generalization/train_loss"] == pytest.approx(of_train, rel=1e-5)
        assert (row["probe_samples"], row["validation_samples"]) == (sum(EXAMPLES), sum(EXAMPLES))


@pytest.mark.parametrize("module", [Validated, OnlyInTraining, OfGraphs])
def test_captured_validation_batches(module, tmp_path):
    rows, weights, messages = fit_validated(module, tmp_path)
    assert messages == []
    check(rows, weights, EXAMPLES, EXAMPLES[::-1])


@pytest.mark.parametrize("module", [Validated, OnlyInTraining])
def test_given_validation_batches(module, tmp_path):
    """``validation_step`` does not get them: the size is that in ``training_step``."""
    rows, weights, messages = fit_validated(
        module, tmp_path, validation_probe=HELD_OUT, probe=BATCHES
    )
    assert messages == []
    check(rows, weights, EXAMPLES, EXAMPLES[::-1])


def test_size_logged_in_validation_step_only(tmp_path):
    """It is used for validation batches; for training batches there is a warning."""
    rows, weights, (message,) = fit_validated(OnlyInValidation, tmp_path, probe_samples=11)
    assert "the tensors of a training batch have lengths of [9, 3]: it counts as 9" in message
    assert {row["validation_samples"] for row in rows} == {sum(EXAMPLES)}
    # The capture of 11 examples ends after two batches of 9 and 6 atoms, and after all molecules.
    for row in rows:
        of_val = loss_at(weights[row["step"]], HELD_OUT, EXAMPLES[::-1])
        assert row["generalization/val_loss"] == pytest.approx(of_val, rel=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["captured", "given"])
def test_ambiguous_sizes_of_validation_batches(given, tmp_path):
    arguments = {"validation_probe": HELD_OUT} if given else {}
    rows, weights, messages = fit_validated(Nowhere, tmp_path, **arguments)
    assert len(messages) == 2
    assert "the tensors of a training batch have lengths of [9, 3]" in messages[0]
    assert (
        "the tensors of a batch of the probe have lengths of [7, 2]: it counts as 7" in messages[1]
    )
    for row in rows:
        of_val = loss_at(weights[row["step"]], HELD_OUT, ATOMS[::-1])
        assert row["generalization/val_loss"] == pytest.approx(of_val, rel=1e-5)
        assert row["validation_samples"] == sum(ATOMS)
