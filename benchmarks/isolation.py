"""The cost of isolating one measurement, in forwards of the probe.

``python -m benchmarks.isolation``.  A measurement of fifty evaluations is isolated without
evaluating anything, in the middle of training, and compared with a forward of a probe of 512
examples in the same process.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_landscape.training.isolation.isolated import Isolation, isolated

EVALUATIONS = 50
REPEATS = 5


class Classifier(pl.LightningModule):
    """Cross entropy of a network."""

    def __init__(self, net: nn.Module, state: Any = None) -> None:
        super().__init__()
        self.net = net
        self.state = state

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def deep() -> Classifier:
    """One hundred blocks of a linear layer, BatchNorm and an activation."""
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(100)]
    return Classifier(nn.Sequential(*blocks, nn.Linear(64, 10)))


def plain_network() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10),
    )  # fmt: skip


def numbers() -> Classifier:
    """A list and a dict of 500,000 numbers each."""
    table = {i: float(i) for i in range(500_000)}
    return Classifier(plain_network(), [list(table.values()), table])


def objects() -> Classifier:
    """100,000 lists of ten numbers."""
    return Classifier(plain_network(), [[float(i)] * 10 for i in range(100_000)])


MODULES: dict[str, Callable[[], Classifier]] = {
    "100 layers": deep,
    "a convolutional network": lambda: Classifier(plain_network()),
    "1,000,000 numbers": numbers,
    "100,000 lists": objects,
}


class Timing(pl.Callback):
    """Times an isolation without evaluations, and forwards, after the third step."""

    def __init__(self) -> None:
        self.isolation: list[float] = []
        self.forward: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        if trainer.global_step != 3:
            return
        # Earlier versions have no such argument.
        known = "kind" in inspect.signature(Isolation.evaluation).parameters
        options: Any = {"kind": "loss"} if known else {}
        batch = torch.randn(512, 64), torch.randint(10, (512,))
        for _ in range(REPEATS):
            started = time.perf_counter()
            with isolated(trainer, pl_module) as isolation:
                for _ in range(EVALUATIONS):
                    with isolation.evaluation(0, **options):
                        pass
            self.isolation.append(time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(5):
                pl_module.training_step(batch, 0)
            self.forward.append((time.perf_counter() - started) / 5)


def main() -> None:
    """Print one row for each module."""
    torch.set_num_threads(1)
    print(f"{'module':<26}{'isolation':>12}{'forward':>12}{'in forwards':>14}")
    for name, make in MODULES.items():
        timing = Timing()
        data = torch.utils.data.TensorDataset(torch.randn(64, 64), torch.randint(10, (64,)))
        trainer = pl.Trainer(
            max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[timing], accelerator="cpu",
        )  # fmt: skip
        trainer.fit(make(), torch.utils.data.DataLoader(data, batch_size=16))
        cost, forward = statistics.median(timing.isolation), statistics.median(timing.forward)
        milliseconds = f"{1000 * cost:>9.1f} ms{1000 * forward:>9.2f} ms"
        print(f"{name:<26}{milliseconds}{cost / forward:>14.1f}")


if __name__ == "__main__":
    main()
