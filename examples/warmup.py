"""Warm-up, a rate that is too large, and the alarm that comes before the loss does.

    python examples/warmup.py [--logdir runs/warmup] [--seeds 5]

One network, whose weights begin too large, on MNIST-1D, by SGD with momentum, five seeds each:

- ``no warm-up``: rate 0.2 from the first step.  The surface is many times too sharp for it there.
- ``warm-up``: the same rate, reached in 100 steps.  The network has moved to a flatter place by then.
- ``too large``: rate 0.5, reached as slowly.  It goes well for a while.

The ratio to the edge of stability is measured on a fixed probe and on the batch just used, critical
sharpness beside it.  The alarm is ``SharpnessEarlyStopping(action="warn")`` on the batch's ratio:
above 1 twice in a row.  A run is lost at the step after which its training loss never again comes
below that of guessing.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tools import Claims, as_batch, fit, mnist1d, quiet, spread, table
from torch import Tensor, nn

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, SharpnessMonitor

STEPS = 240
EVERY = 3
WARM_UP = 100  # steps
GUESSING = math.log(10)  # the loss of ten equal probabilities
SETTINGS = {"no warm-up": (0.2, 0), "warm-up": (0.2, WARM_UP), "too large": (0.5, WARM_UP)}


class Classifier(pl.LightningModule):
    """Four hidden layers of 100 ReLU units, the weights 1.4 times as large as He et al. say."""

    def __init__(self, rate: float, warm_up: int) -> None:
        super().__init__()
        self.rate, self.warm_up = rate, warm_up
        widths = [40, 100, 100, 100, 100, 10]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            linear = nn.Linear(before, after)
            nn.init.normal_(linear.weight, std=1.4 * math.sqrt(2 / before))
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        warm = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


@dataclass
class Run:
    """What one training came to."""

    losses: list[float]
    ratios: list[dict[str, Any]]  # rows of HessianMonitor
    critical: list[dict[str, Any]]  # rows of SharpnessMonitor
    alarm: int | None

    @property
    def smooth(self) -> list[float]:
        """The mean loss of the last 20 batches, from the 20th on."""
        return [sum(self.losses[i : i + 20]) / 20 for i in range(len(self.losses) - 19)]

    @property
    def lost(self) -> int | None:
        """The step after which the smoothed loss is never below guessing; None: it ends below."""
        below = [i for i, loss in enumerate(self.smooth) if loss < 0.97 * GUESSING]
        last = below[-1] + 20 if below else 0
        return None if last == len(self.losses) else last

    def first(self, key: str) -> float:
        """Of the ratios, the first one measured."""
        return float(self.ratios[0][key])


def train(name: str, seed: int, logdir: Path) -> Run:
    """One run, watched."""
    rate, warm_up = SETTINGS[name]
    data, _ = mnist1d()
    common: dict[str, Any] = {
        "every_n_train_steps": EVERY,
        "max_overhead": None,
        "probe": tuple(part[:512] for part in as_batch(data)),
    }
    hessian = HessianMonitor(batch_edge_ratio=True, **common)
    sharpness = SharpnessMonitor(critical=True, **common)
    alarm = SharpnessEarlyStopping(
        "hessian/batch_edge_ratio", threshold=1.0, patience=2, action="warn"
    )
    pl.seed_everything(seed, verbose=False)
    module = Classifier(rate, warm_up)
    fit(
        module,
        data,
        callbacks=[hessian, sharpness, alarm],
        logdir=logdir,
        name=f"{name.replace(' ', '-')}/seed{seed}",
        steps=STEPS,
        seed=seed,
    )
    return Run(module.losses, hessian.history, sharpness.history, alarm.stopped_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/warmup"))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    quiet()
    runs = {
        name: [train(name, seed, given.logdir) for seed in range(given.seeds)] for name in SETTINGS
    }
    rows = []
    for name, found in runs.items():
        rows.append(
            [
                name,
                spread([run.first("hessian/edge_ratio") for run in found], 2),
                spread([run.smooth[-1] for run in found], 3),
                ", ".join("-" if run.alarm is None else str(run.alarm) for run in found),
                ", ".join("-" if run.lost is None else str(run.lost) for run in found),
            ]
        )
    head = ["setting", "edge ratio after step 1", "last loss", "alarm at step", "lost at step"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
