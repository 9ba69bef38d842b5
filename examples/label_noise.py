"""What sharpness shows about overfitting and what it does not: clean labels and noisy ones.

    python examples/label_noise.py [--logdir DIR] [--seeds 3] [--picture FILE]

One network on 8x8 digits by SGD with momentum, trained until it fits all its examples: with
the original labels, and with 40 % of the training labels replaced at random.  Three seeds each,
with different noise for each.  The held-out examples keep their labels.

What it shows: noise keeps the surface sharp for long (the median over the run), and the gap wide.
What it does not: the highest value along the run is as high with clean labels; and within a run the
eigenvalue falls, because the training loss does, while the gap still grows.  Sharpness is to be
compared at one training loss or over a run, and is no substitute for held-out examples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from tools import Claims, as_batch, digits, fit, quiet, save_sheet, spread, table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_landscape import GeneralizationMonitor, HessianMonitor, SharpnessMonitor

STEPS = 2000
EVERY = 50
NOISE = {"clean": 0.0, "noisy": 0.4}

Row = dict[str, Any]


def with_noise(data: TensorDataset, share: float, seed: int) -> TensorDataset:
    """The data with a share of the labels replaced by random ones (one in ten of them is right)."""
    inputs, labels = data.tensors
    draw = torch.Generator().manual_seed(seed)
    changed = torch.rand(len(labels), generator=draw) < share
    drawn = torch.randint(0, 10, labels.shape, generator=draw)
    return TensorDataset(inputs, torch.where(changed, drawn, labels))


class Classifier(pl.LightningModule):
    """Two hidden layers of 128 ReLU units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def mistakes(module: Classifier, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The share of examples that get another label than their own."""
    return {"error": (module.net(batch[0]).argmax(1) != batch[1]).float().mean()}


def train(name: str, seed: int, logdir: Path) -> list[Row]:
    """One run; a row for each step that was measured, with the values of all monitors."""
    data, held_out = digits()
    data = with_noise(data, NOISE[name], seed)
    common: dict[str, Any] = {
        "every_n_train_steps": EVERY,
        "max_overhead": None,
        "probe": tuple(part[:512] for part in as_batch(data)),
    }
    unseen = tuple(part[:512] for part in as_batch(held_out))
    monitors = [
        HessianMonitor(**common),
        SharpnessMonitor(**common),
        GeneralizationMonitor(validation_probe=unseen, metric_fn=mistakes, **common),
    ]
    pl.seed_everything(seed, verbose=False)
    fit(
        Classifier(),
        data,
        callbacks=monitors,
        logdir=logdir,
        name=f"{name}/seed{seed}",
        steps=STEPS,
        seed=seed,
    )
    histories = [monitor.history for monitor in monitors]
    return [first | second | third for first, second, third in zip(*histories, strict=True)]


SHARP, SAM, GAP = "hessian/top_eigenvalue", "sharpness/sam", "generalization/gap"
VALIDATION = "generalization/val_loss"
COLUMNS = {
    "train loss": "generalization/train_loss",
    "validation loss": VALIDATION,
    "gap": GAP,
    "validation error": "generalization/val_error",
    "top eigenvalue": SHARP,
    "SAM sharpness": SAM,
}


def sharpest(run: list[Row]) -> Row:
    """Where the top eigenvalue is highest along the run."""
    return max(run, key=lambda row: float(row[SHARP]))


def usual(run: list[Row]) -> float:
    """The median of the top eigenvalue along the run."""
    return median(row[SHARP] for row in run)


def check(runs: dict[str, list[list[Row]]]) -> None:
    """Check what the numbers show, and what they do not."""
    clean, noisy = runs["clean"], runs["noisy"]
    claim = Claims()

    def peaks(found: list[list[Row]]) -> list[float]:
        return [sharpest(run)[SHARP] for run in found]

    def ends(found: list[list[Row]], key: str) -> list[float]:
        return [run[-1][key] for run in found]

    claim(
        "over the run (median) the top eigenvalue is at least 3 times as high with noisy labels, "
        "in every run",
        min(map(usual, noisy)) > 3 * max(map(usual, clean)),
    )
    claim(
        "its peak does not indicate the noise: it is not twice as high (medians)",
        median(peaks(noisy)) < 2 * median(peaks(clean)),
    )
    claim(
        "the gap ends at least three times as wide with noisy labels, in every run",
        min(ends(noisy, GAP)) > 3 * max(ends(clean, GAP)),
    )
    claim(
        "within each noisy run the eigenvalue falls to less than a third of its peak while the gap "
        "continues to grow by .2 or more",
        all(
            run[-1][SHARP] < sharpest(run)[SHARP] / 3 and run[-1][GAP] > sharpest(run)[GAP] + 0.2
            for run in noisy
        ),
    )
    claim(
        "at the end the noisy network, its labels known by heart, has a lower eigenvalue than the "
        "clean one had at its peak, in every pair of runs",
        1.2 * max(ends(noisy, SHARP)) < min(peaks(clean)),
    )
    claim(
        "and a lower SAM sharpness than before it had learned anything",
        all(1.5 * run[-1][SAM] < run[0][SAM] for run in noisy),
    )
    claim(
        "validation loss is lowest before the eigenvalue is highest, in every noisy run: a falling "
        "eigenvalue comes too late to stop by",
        all(
            min(run, key=lambda row: float(row[VALIDATION]))["step"] < sharpest(run)["step"]
            for run in noisy
        ),
    )
    claim.end()


def draw(runs: dict[str, list[list[Row]]], path: Path) -> None:
    """The top eigenvalue and the gap over training."""
    from lightning_landscape.figures import curves_figure

    histories = {f"{name} {i}": run for name, found in runs.items() for i, run in enumerate(found)}
    groups = {run: f"{run.split()[0]} labels" for run in histories}
    save_sheet([curves_figure(histories, key, groups=groups) for key in (SHARP, GAP)], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/label_noise"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="draw gap and eigenvalue over training here")
    given = parser.parse_args()
    quiet()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = {name: [train(name, seed, given.logdir) for seed in seeds] for name in NOISE}
    rows = [
        [name, when, *(spread([row[key] for row in at(found)]) for key in COLUMNS.values())]
        for name, found in runs.items()
        for when, at in (
            ("sharpest", lambda found: [sharpest(run) for run in found]),
            ("end", lambda found: [run[-1] for run in found]),
        )
    ]
    print(table(["labels", "when", *COLUMNS], rows))
    check(runs)
    if given.picture:
        draw(runs, given.picture)


if __name__ == "__main__":
    main()
