"""How skip connections and width change the loss surface of a network of 30 layers.

    python examples/compare_architectures.py [--logdir DIR] [--seeds 3] [--picture FILE]

Convolutions and ReLU, 8x8 digits, with a skip connection around each pair of convolutions and
without, with 4 channels and with 16; three seeds each.  There is no BatchNorm: with it, and with 18
layers, both kinds look alike (``gallery.py``).

On one pair of random directions, filter-normalised as in Li et al. (2018), the share of the grid's
rows and columns is counted on which the loss bends downwards somewhere: a convex surface has none.
The ratio of the smallest (negative) eigenvalue of the Hessian to the largest one measures the same
for all directions at once, at the weights themselves: 0 is convex.

Not shown: the rise of the loss on a plane does not distinguish the kinds for all seeds, nor does
the ratio of eigenvalues once the network is trained.  And none of this shows that a smooth surface
is the cause: a chain of 30 layers multiplies what each of them does, which bends the surface and
hinders training, both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from tools import Claims, accuracy, as_batch, digits, fit, quiet, save_sheet, spread, table
from torch import Tensor, nn

from lightning_landscape import HessianMonitor, LandscapeMonitor, Slice

HALF = 120  # steps: measured after the first, after as many more, and at the end
BLOCKS = 14  # of two convolutions
WIDTHS = {"1x": 4, "4x": 16}  # channels
NETWORKS = [(skip, width) for width in WIDTHS for skip in (False, True)]
FLAT = 1e-2  # a bend of less than this share of the row's range does not count: it may be rounding


class Block(nn.Module):
    """Two convolutions; beside a skip connection scaled down, so that sums stay bounded."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return nn.functional.relu(inputs + outputs / BLOCKS**0.5 if self.skip else outputs)


class Classifier(pl.LightningModule):
    """A convolution, the blocks, a linear layer; weights as He et al. (2015) say."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, stride=2),
            nn.ReLU(),
            *(Block(channels, skip) for _ in range(BLOCKS)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 10),
        )
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@dataclass
class Run:
    """The results of one training run."""

    accuracy: float
    curvature: Sequence[dict[str, Any]]  # rows of HessianMonitor: start, middle, end
    planes: Sequence[Slice]  # start, end

    def ratio(self, when: int) -> float:
        """How far from convex the surface is at the weights: ``|smallest| / largest``."""
        row = self.curvature[when]
        return float(-row["hessian/min_eigenvalue"] / row["hessian/top_eigenvalue"])

    def bent(self, when: int) -> float:
        """The share of the plane's rows and columns on which the loss bends downwards."""
        losses = self.planes[when].losses
        rows = [*losses, *losses.T]
        bent = [float(np.diff(row, 2).min()) < -FLAT * float(np.ptp(row)) for row in rows]
        return sum(bent) / len(bent)

    @property
    def rise(self) -> float:
        """How far the loss rises on the last plane."""
        plane = self.planes[-1]
        return float(plane.losses.max()) - plane.center_loss


def train(skip: bool, width: str, seed: int, logdir: Path) -> Run:
    """One run with callbacks."""
    data, held_out = digits(images=True)
    common: dict[str, Any] = {
        "max_overhead": None,
        "probe": tuple(part[:128] for part in as_batch(data)),
    }
    # The smallest eigenvalue is some hundred times smaller than the largest one, to which ``tol``
    # relates: it is computed more accurately than usual.  Ratios below some .005 are still not
    # resolved.
    hessian = HessianMonitor(
        every_n_train_steps=HALF, min_eigenvalue=True, tol=5e-3, rtol=0, max_hvps=100, **common
    )
    surface = LandscapeMonitor(
        every_n_train_steps=2 * HALF, span=(-0.5, 0.5), resolution=11, line_resolution=0, **common
    )
    pl.seed_everything(seed, verbose=False)
    module = Classifier(WIDTHS[width], skip)
    trainer = fit(
        module,
        data,
        callbacks=[hessian, surface],
        logdir=logdir,
        name=f"{'skip' if skip else 'plain'}-{width}/seed{seed}",
        steps=2 * HALF + 1,
        seed=seed,
        batch_size=32,
    )
    saved = sorted((Path(trainer.log_dir or "") / "landscape").glob("landscape-plane-*.npz"))
    return Run(accuracy(module, held_out), hessian.history, [Slice.load(path) for path in saved])


def check(runs: dict[tuple[bool, str], list[Run]]) -> None:
    """Check what the numbers show, and what they do not."""
    claim = Claims()
    narrow, narrow_skip, wide, wide_skip = (
        runs[skip, width] for width in WIDTHS for skip in (False, True)
    )
    claim(
        "4x wide, every run with skip connections is .1 more accurate than any run without",
        min(run.accuracy for run in wide_skip) > max(run.accuracy for run in wide) + 0.1,
    )
    claim(
        "and than any narrow run with them: width helps where the network can be trained",
        min(run.accuracy for run in wide_skip) > max(run.accuracy for run in narrow_skip) + 0.1,
    )
    claim(
        "narrow, at the start, every run without skips has a tenth of its rows more bent than any "
        "with them",
        min(run.bent(0) for run in narrow) > max(run.bent(0) for run in narrow_skip) + 0.1,
    )
    claim(
        "4x wide, at the end, less than half as many rows are bent with skips (medians)",
        median(run.bent(1) for run in wide_skip) < median(run.bent(1) for run in wide) / 2,
    )
    claim(
        "at the start |min|/max is 1.3 times as large without skips, at both widths (medians)",
        all(
            median(run.ratio(0) for run in without) > 1.3 * median(run.ratio(0) for run in skip)
            for without, skip in ((narrow, narrow_skip), (wide, wide_skip))
        ),
    )
    claim(
        "4x wide, at the end, it no longer distinguishes them: below .1 in all runs, both kinds",
        max(run.ratio(2) for run in wide + wide_skip) < 0.1,
    )
    claim.end()


def draw(runs: dict[tuple[bool, str], list[Run]], path: Path) -> None:
    """The last planes of the first seed, on one scale."""
    from lightning_landscape.figures import filmstrip_figure

    names = [f"{'skips' if skip else 'no skips'}, {width}" for skip, width in runs]
    planes = [found[0].planes[-1] for found in runs.values()]
    save_sheet([filmstrip_figure(planes, names=names)], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/compare_architectures"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="draw the last planes of the first seed here")
    given = parser.parse_args()
    quiet()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = {
        network: [train(*network, seed, given.logdir) for seed in seeds] for network in NETWORKS
    }
    names = {
        (skip, width): f"{'with' if skip else 'without'} skips, {width}" for skip, width in runs
    }
    rows = [
        [
            names[network],
            spread([run.bent(0) for run in found], 2),
            spread([run.bent(1) for run in found], 2),
            spread([run.rise for run in found], 2),
            *(spread([run.ratio(when) for run in found], 2) for when in range(3)),
            spread([run.accuracy for run in found], 2),
        ]
        for network, found in runs.items()
    ]
    head = ["network", "bent rows, start", "bent rows, end", "rise, end"]
    head += [f"|min|/max, {when}" for when in ("start", "middle", "end")] + ["held-out accuracy"]
    print(table(head, rows))
    check(runs)
    if given.picture:
        draw(runs, given.picture)


if __name__ == "__main__":
    main()
