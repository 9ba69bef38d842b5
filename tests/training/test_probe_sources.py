"""Reading a given probe does not change the random numbers of training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, Subset

from lightning_landscape import HessianMonitor
from tests.constructs.base import Construct, dataset
from tests.runs import DataOrder, differences, train


class Noisy(Dataset):
    """Draws from its own and from the global generators, and counts items."""

    def __init__(self):
        self.data = dataset(64)
        self.numpy, self.python = np.random.default_rng(1), random.Random(1)
        self.read: list[int] = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, label = self.data[index]
        self.read.append(index)
        scale = 1 + self.numpy.random() + self.python.random() + float(torch.rand(()))
        return inputs * np.float32(scale + 0.001 * len(self.read)), label


class Rotating(Sampler):
    """Starts at another index each time it is iterated."""

    def __init__(self):
        self.times = 0

    def __len__(self):
        return 64

    def __iter__(self):
        self.times += 1
        return iter([(i + 5 * self.times) % 64 for i in range(64)])


class RotatingBatches(Rotating):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(torch.tensor(list(super().__iter__())).split(8))


def seeded():
    return torch.Generator().manual_seed(3)


LOADERS = {
    "a generator": lambda: DataLoader(dataset(), 8, shuffle=True, generator=seeded()),
    "a sampler's generator": lambda: DataLoader(
        dataset(), 8, sampler=RandomSampler(dataset(), generator=seeded())
    ),
    "a sampler that counts": lambda: DataLoader(dataset(), 8, sampler=Rotating()),
    "a generator beside a sampler": lambda: DataLoader(
        dataset(), 8, sampler=range(64), generator=seeded()
    ),
    "a batch sampler that counts": lambda: DataLoader(dataset(), batch_sampler=RotatingBatches()),
    "a data set with random sources": lambda: DataLoader(Noisy(), 8, shuffle=True),
    "a subset of it": lambda: DataLoader(Subset(Noisy(), range(40)), 8, shuffle=True),
    "the global generator": lambda: DataLoader(dataset(), 8, shuffle=True),
}


class Transfers(Construct):
    """hooks that draw when a batch is transferred"""

    def start(self):
        self.noise = seeded()
        self.transferred = 0

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.transferred += 1
        return [batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.noise), batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * (1 + 0.01 * self.transferred), batch[1]]


@pytest.mark.parametrize("kind", LOADERS)
def test_training_gets_the_same_batches(kind, tmp_path):
    states = []
    for watched in (False, True):
        loader, order = LOADERS[kind](), DataOrder()
        callbacks = [order]
        if watched:
            monitor = HessianMonitor(
                probe=loader, probe_samples=24, every_n_train_steps=5, max_overhead=None
            )
            callbacks.append(monitor)
        run = train(Transfers, loader, callbacks, tmp_path / str(watched))
        del run.state["callbacks"]
        drawn = None if loader.generator is None else loader.generator.get_state()
        states.append({**run.state, "order": order.seen, "generator": drawn})
    assert differences(*states) == []
    assert monitor.measured >= 2


class Stream(torch.utils.data.IterableDataset):
    """Returns the same generator each time, which training reads too."""

    def __init__(self):
        self.batches = ((torch.randn(6), i % 3) for i in range(10**6))

    def __iter__(self):
        return self.batches


def test_source_shared_with_training_raises(tmp_path):
    loader = DataLoader(Stream(), batch_size=8)
    monitor = HessianMonitor(probe=loader, probe_samples=24)
    with pytest.raises(ValueError, match=r"cannot be read without drawing .*pass probe="):
        train(Transfers, loader, [monitor], tmp_path, limit_train_batches=3)
    first, _ = next(loader.dataset.batches)
    assert first.shape == (6,)
