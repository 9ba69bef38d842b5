"""Two processes with different numbers of validation batches: one gap, no deadlock."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_landscape import GeneralizationMonitor
from tests.integration.members import Mlp, Save, end_of, fsdp2
from tests.integration.processes import both, forks
from tests.runs import differences, train
from tests.small import Linear

pytestmark = [forks, pytest.mark.slow]
EVERY = {"every_n_train_steps": 1, "max_overhead": None}


def examples(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).double()
    return x, x.sum(1, keepdim=True) + 0.1 * seed


class Share(IterableDataset):
    """Batches of 4; the second process has fewer, or none."""

    def __init__(self, rank: int, batches: int) -> None:
        self.rank, self.batches = rank, batches

    def __iter__(self):
        x, y = examples(10 + self.rank)
        return iter(list(zip(x.split(4), y.split(4), strict=True))[: self.batches])


class Halves(Linear):
    """Each process trains on its own examples."""

    unlike = (5, 2)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*examples(self.global_rank)), batch_size=8)

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        rank = self.global_rank
        return DataLoader(Share(rank, self.unlike[rank]), batch_size=None)


def alone(weights, unlike, samples):
    """The losses by NumPy, from the weights and all examples that both processes hold."""
    w = weights.flatten().numpy()
    share = math.ceil(samples / 2)
    val = []
    for rank, batches in enumerate(unlike):
        x, y = (t.numpy() for t in examples(10 + rank))
        kept = min(batches, math.ceil(share / 4))
        val += [(x[4 * b : 4 * b + 4], y[4 * b : 4 * b + 4]) for b in range(kept)]
    wanted = sum(len(x) for x, _ in val)
    held = [min(40, math.ceil(share / 8) * 8)] * 2
    train_batches, total = [], sum(held)
    for rank, size in enumerate(held):
        before = rank * held[0]
        count = (before + size) * wanted // total - before * wanted // total
        x, y = (t.numpy()[:count] for t in examples(rank))
        train_batches += [(x[b : b + 8], y[b : b + 8]) for b in range(0, count, 8)]
    found = {}
    for part, batches in (("train", train_batches), ("val", val)):
        n = np.array([len(x) for x, _ in batches])
        losses = np.array([np.mean((x @ w - y[:, 0]) ** 2) for x, y in batches])
        mean = np.average(losses, weights=n)
        spread = len(n) / (len(n) - 1) * np.sum((n / n.sum()) ** 2 * (losses - mean) ** 2)
        found[part] = (mean, spread, n.sum())
    return found


@pytest.mark.parametrize("unlike", [(5, 2), (5, 5), (3, 0)])
def test_one_gap(tmp_path, unlike):
    samples = 32

    def work(rank):
        class Module(Halves):
            pass

        Module.unlike = unlike
        monitor = GeneralizationMonitor(probe_samples=samples, **EVERY)
        weights = {}

        class Watch(Save):
            def on_train_batch_end(self, trainer, pl_module, *_):
                weights[trainer.global_step] = pl_module.layer.weight.detach().clone()

        callbacks = [monitor, Watch(tmp_path)]
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(Module, None, callbacks, tmp_path, precision="64-true", **settings)
        return monitor.history, monitor.failed, weights

    (rows, failed, weights), (others, failed_too, _) = both(work)
    assert (failed, failed_too) == (0, 0)
    assert rows == others
    assert len(rows) >= 5
    for row in rows:
        expected = alone(weights[row["step"]], unlike, samples)
        for part, (mean, _, _) in expected.items():
            assert row[f"generalization/{part}_loss"] == pytest.approx(mean, rel=1e-12)
        spread = sum(spread for _, spread, _ in expected.values())
        assert row["generalization/gap_stderr"] == pytest.approx(math.sqrt(spread), rel=1e-9)
        sizes = (row["probe_samples"], row["validation_samples"])
        assert sizes == tuple(size for _, _, size in expected.values())
        assert sizes[0] == sizes[1]


def test_error_on_one_process_does_not_block_the_other(tmp_path):
    def work(rank):
        def loss(pl_module, batch):
            if rank == 1 and pl_module.global_step % 3 == 0:
                raise ZeroDivisionError
            return pl_module.loss(pl_module.layer(batch[0]), batch[1])

        monitor = GeneralizationMonitor(
            loss_fn=loss, metric_fn=lambda m, b: {"x": loss(m, b)}, probe_samples=16, **EVERY
        )
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(Halves, None, [monitor], tmp_path, precision="64-true", **settings)
        return [row["step"] for row in monitor.history], monitor.failed

    (steps, failed), (others, failed_too) = both(work)
    assert steps == others
    assert failed == failed_too == 3
    assert steps == [1, 2, 4, 5, 7, 8, 10]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_training_is_bitwise_equal(name, tmp_path):
    """Captured from a module's own validation loop, with BatchNorm-free layers and a metric."""

    def work(rank):
        def run(callbacks):
            strategy = fsdp2() if name == "fsdp2" else name
            return end_of(Mlp, callbacks, tmp_path, strategy=strategy, devices=2)

        monitor = GeneralizationMonitor(probe_samples=16, **EVERY)
        return run([]), run([monitor]), monitor.measured

    for without, with_ours, measured in both(work):
        assert differences(without, with_ours) == []
        assert measured >= 3


def test_resumed_on_both(tmp_path):
    """Each process loads its own share."""

    def work(rank):
        def run(monitor, folder, **more):
            settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return train(
                    Halves, None, [monitor], tmp_path / folder, precision="64-true", **settings,
                    **more,
                )  # fmt: skip

        first, resumed = (GeneralizationMonitor(probe_samples=32, **EVERY) for _ in range(2))
        run(first, "a").trainer.save_checkpoint(tmp_path / "saved.ckpt")
        run(resumed, "b", max_epochs=3, ckpt_path=tmp_path / "saved.ckpt")
        prints = [m._validation.fingerprint() for m in (first, resumed)]
        return prints, len(resumed.history), [b.size for b in resumed._validation.batches]

    found = both(work)
    for (before, after), rows, _ in found:
        assert before == after
        assert rows == 5
    assert found[0][0] != found[1][0]
    assert [sizes for _, _, sizes in found] == [[4] * 4, [4] * 2]
