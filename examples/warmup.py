"""Warm-up, a learning rate that is too large, and an alarm before the loss diverges.

    python examples/warmup.py [--logdir runs/warmup] [--seeds 5] [--picture FILE]

One network, whose weights begin too large, on MNIST-1D, by SGD with momentum, five seeds each:

- ``no warm-up``: rate 0.2 from the first step.  The surface is several times too sharp for it.
- ``warm-up``: the same rate, reached in 100 steps.  By then the network is at a flatter place.
- ``too large``: rate 0.5, reached as slowly.  It goes well for a while.

The ratio to the edge of stability is measured on a fixed probe and on the batch just used, critical
sharpness beside it.  The alarm is ``SharpnessEarlyStopping(action="warn")`` on the batch's ratio:
above 1 at two steps in a row.  A run is lost at the step after which its training loss never again
comes below that of guessing.

It shows that the ratio indicates divergence before the loss does, if measured at every step.  It
does not show a threshold for other networks: single batches go above 1 in healthy runs too.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tools import Claims, as_batch, fit, mnist1d, quiet, spread, table
from torch import Tensor, nn

from lightning_landscape import (
    HessianMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    compare,
)

STEPS = 120
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
        for before, after in itertools.pairwise(widths):
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
    """The results of one training run."""

    losses: list[float]
    ratios: list[dict[str, Any]]  # rows of HessianMonitor
    critical: list[dict[str, Any]]  # rows of SharpnessMonitor

    @property
    def alarm(self) -> int | None:
        """The step of the first warning: the callback itself keeps the last one."""
        above = [not row["hessian/batch_edge_ratio"] <= 1.0 for row in self.ratios]
        pairs = zip(self.ratios[1:], itertools.pairwise(above), strict=True)
        return next((row["step"] for row, pair in pairs if all(pair)), None)

    @property
    def smooth(self) -> list[float]:
        """The mean loss of the last 20 batches, from the 20th on."""
        return [sum(self.losses[i : i + 20]) / 20 for i in range(len(self.losses) - 19)]

    @property
    def last(self) -> float:
        """The smoothed loss at the end, infinite where it is not a number."""
        return self.smooth[-1] if math.isfinite(self.smooth[-1]) else math.inf

    @property
    def lost(self) -> int | None:
        """The step after which the smoothed loss is never below guessing; None: it ends below."""
        below = [i for i, loss in enumerate(self.smooth) if loss < 0.97 * GUESSING]
        last = below[-1] + 20 if below else 0
        return None if last == len(self.losses) else last


def train(name: str, seed: int, logdir: Path) -> Run:
    """One run with callbacks."""
    rate, warm_up = SETTINGS[name]
    data, _ = mnist1d()
    common: dict[str, Any] = {
        "max_overhead": None,
        "probe": tuple(part[:128] for part in as_batch(data)),
    }
    hessian = HessianMonitor(every_n_train_steps=1, batch_edge_ratio=True, **common)
    sharpness = SharpnessMonitor(every_n_train_steps=20, critical=True, **common)
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
        name=f"{name}/seed{seed}",
        steps=STEPS,
        seed=seed,
    )
    return Run(module.losses, hessian.history, sharpness.history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/warmup"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="draw the ratios of all runs here")
    given = parser.parse_args()
    quiet()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = {name: [train(name, seed, given.logdir) for seed in seeds] for name in SETTINGS}
    rows = []
    for name, found in runs.items():
        rows.append(
            [
                name,
                spread([run.ratios[0]["hessian/edge_ratio"] for run in found], 2),
                spread([run.critical[0]["sharpness/critical"] for run in found], 2),
                spread([run.last for run in found], 3),
                ", ".join("-" if run.alarm is None else str(run.alarm) for run in found),
                ", ".join("-" if run.lost is None else str(run.lost) for run in found),
            ]
        )
    head = ["setting", "edge ratio at first", "critical sharpness", "last loss", "alarm", "lost at"]
    print(table(head, rows))
    judge(runs)
    if given.picture:
        draw(given.logdir, seeds, given.picture)


def judge(runs: dict[str, list[Run]]) -> None:
    """Check the claims of this file."""
    claim = Claims()
    without, warm, large = runs.values()
    least = min(run.ratios[0]["hessian/edge_ratio"] for run in without)
    best, worst = min(run.last for run in without), max(run.last for run in warm)
    claim(
        f"without warm-up every run begins beyond the edge, ratio {least:.1f} at least, and the "
        f"best of them ends at a loss of {best:.2f}; the worst with warm-up at {worst:.2f}",
        least > 1.5 and best > worst,
    )
    most = max(run.ratios[0]["hessian/edge_ratio"] for run in warm)
    claim(
        f"with warm-up every run begins below it: {most:.2f} at most, and none is lost",
        most < 0.5 and all(run.lost is None for run in warm),
    )
    ruined = [run for run in large if run.lost is not None]
    caught = [run for run in ruined if run.alarm is not None and run.alarm < run.lost]
    ahead = [run.lost - run.alarm for run in caught]
    claim(
        f"the alarm comes before the loss in {len(caught)} of the {len(ruined)} runs that a large "
        f"rate ruins, {spread(ahead, 3)} steps before",
        len(caught) >= 0.8 * len(ruined) > 0,
    )
    false = sum(run.alarm is not None for run in warm)
    claim(f"false alarms in {false} of {len(warm)} healthy runs", false <= 0.2 * len(warm))
    claim.end()


def draw(logdir: Path, seeds: range, path: Path) -> None:
    """The batch's ratio to the edge, all seeds of a setting in one colour."""
    logs = {
        f"{name}/seed{seed}": logdir / name / f"seed{seed}" for name in SETTINGS for seed in seeds
    }
    found = compare(logs, keys="hessian/batch_edge_ratio", group_by="/")
    found.figures["hessian/batch_edge_ratio"].savefig(path)


if __name__ == "__main__":
    main()
