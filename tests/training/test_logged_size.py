"""The number of examples in a batch is what the module says, not the length of a tensor."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_landscape import HessianMonitor
from tests.runs import differences, train

SIZES = [(3, 2, 4), (1, 5), (2, 2, 1, 3), (6, 1)]  # atoms of each molecule, by batch


def molecules(position):
    """Atoms, the molecule of each, and a target for each molecule."""
    generator = torch.Generator().manual_seed(position)
    sizes = torch.tensor(SIZES[position])
    atoms = torch.randn(int(sizes.sum()), 4, generator=generator)
    return atoms, torch.repeat_interleave(sizes), torch.randn(len(sizes), 1, generator=generator)


BATCHES = [molecules(position) for position in range(len(SIZES))]


EXAMPLES = [len(sizes) for sizes in SIZES]


def pooled(atoms, index, count):
    return torch.zeros(count, 4, dtype=atoms.dtype).index_add(0, index, atoms)


class Molecules(pl.LightningModule):
    """A linear model of sums over atoms: the Hessian of a batch is 2 S'S / molecules."""

    says_size = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)

    def training_step(self, batch, batch_idx):
        atoms, index, target = batch
        output = self.layer(pooled(atoms, index, len(target)))
        loss = nn.functional.mse_loss(output, target)
        self.log("loss", loss, batch_size=len(target) if self.says_size else None)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Silent(Molecules):
    says_size = False


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
def test_the_size_that_is_logged(given, tmp_path):
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


def test_lengths_that_differ_are_said(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, tol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match=r"lengths of \[9, 3\].* counts as 9 .*batch_size=\.\.\."):
        train(Silent, loader, [monitor], tmp_path)
    atoms = [sum(sizes) for sizes in SIZES]
    row = monitor.history[-1]
    assert row["probe_samples"] == sum(atoms)
    assert row["hessian/top_eigenvalue"] == pytest.approx(exact(atoms), rel=1e-3)
