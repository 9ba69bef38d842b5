"""Comparing optimizers by sharpness: SGD, momentum, Adam, AdamW and SAM on one network.

    python examples/choose_optimizer.py [--logdir runs/choose_optimizer] [--picture FILE]

The same network, the same digits, the same order of batches, three seeds each.  Compared at the end
of each run: the top eigenvalue, SAM sharpness, the gap between validation and training loss, the
accuracy on examples that were held out, and how near the run is to its optimizer's own edge of
stability, for Adam on the preconditioned Hessian.  SAM is a LightningModule with manual
optimisation.

It shows that SAM finds flatter minima than SGD at the same rate, and that Adam must be compared
with its own edge.  It does not rank optimizers: momentum ends flattest because its loss is nearly
zero, not because it is the best.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from tools import Claims, accuracy, as_batch, digits, fit, quiet, spread, table
from torch import Tensor, nn

from lightning_landscape import GeneralizationMonitor, HessianMonitor, SharpnessMonitor, compare

STEPS = 500

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-3),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1),
    "SAM": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
}


def loss_of(module: pl.LightningModule, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy: the training loss of all of them, and the measured loss."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Classifier(pl.LightningModule):
    """Two hidden layers of 128 ReLU units."""

    def __init__(self, optimizer: Optimizers) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        return loss_of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.net)


class SAM(Classifier):
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient from the worst point near by.

    Two gradients a step, so ``training_step`` steps by itself and the monitors get a ``loss_fn``.
    """

    def __init__(self, optimizer: Optimizers, rho: float = 0.1) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.rho = rho

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        params = list(self.parameters())
        gradient = torch.autograd.grad(loss_of(self, batch), params)
        length = torch.sqrt(sum((g.square().sum() for g in gradient), torch.zeros(())))
        held = [p.detach().clone() for p in params]
        with torch.no_grad():
            for parameter, slope in zip(params, gradient, strict=True):
                parameter.add_(slope, alpha=float(self.rho / (length + 1e-12)))
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        with torch.no_grad():
            for parameter, before in zip(params, held, strict=True):
                parameter.copy_(before)
        optimizer.step()


def measured(name: str, seed: int, logdir: Path) -> dict[str, float]:
    """Train once; return the last values of all measured keys."""
    train, held_out = digits()
    common = {"every_n_train_steps": 50, "max_overhead": None, "loss_fn": loss_of}
    # Every monitor on the same 512 examples, so that optimizers can be compared.
    probe = tuple(part[:512] for part in as_batch(train))
    unseen = tuple(part[:512] for part in as_batch(held_out))
    monitors = [
        HessianMonitor(probe=probe, **common),
        SharpnessMonitor(probe=probe, **common),
        GeneralizationMonitor(probe=probe, validation_probe=unseen, **common),
    ]
    pl.seed_everything(seed, verbose=False)
    module = (SAM if name == "SAM" else Classifier)(OPTIMIZERS[name])
    fit(
        module,
        train,
        callbacks=monitors,
        logdir=logdir,
        name=f"{name}/seed{seed}",
        steps=STEPS,
        seed=seed,
    )
    last: dict[str, float] = {"accuracy": accuracy(module, held_out)}
    for monitor in monitors:
        last |= monitor.history[-1]
    # The median of the last five: single values jump with the batch before them.
    rows = monitors[0].history[-5:]
    last["edge ratio"] = statistics.median(row["hessian/edge_ratio"] for row in rows)
    # As if Adam were plain SGD of the same rate.
    rate = module.trainer.optimizers[0].param_groups[0]["lr"]
    last["plain ratio"] = statistics.median(
        rate * row["hessian/top_eigenvalue"] / 2 for row in rows
    )
    return last


COLUMNS = {
    "top eigenvalue": "hessian/top_eigenvalue",
    "edge ratio": "edge ratio",
    "SAM sharpness": "sharpness/sam",
    "gap": "generalization/gap",
    "held-out accuracy": "accuracy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/choose_optimizer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="draw sharpness against the gap here")
    given = parser.parse_args()
    quiet()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = {name: [measured(name, seed, given.logdir) for seed in seeds] for name in OPTIMIZERS}
    rows = [
        [name, *(spread([run[key] for run in found]) for key in COLUMNS.values())]
        for name, found in runs.items()
    ]
    print(table(["optimizer", *COLUMNS], rows))
    judge(runs)
    if given.picture:
        draw(given.logdir, seeds, given.picture)


def judge(runs: dict[str, list[dict[str, float]]]) -> None:
    """Check the claims of this file, seed by seed."""
    claim = Claims()

    def each(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    top = "hessian/top_eigenvalue"
    ratios = [sam / sgd for sam, sgd in zip(each("SAM", top), each("SGD", top), strict=True)]
    claim(
        f"SAM ends flatter than SGD at the same rate: top eigenvalue {spread(ratios, 2)} of it",
        max(ratios) < 0.8,
    )
    plain = [
        own / as_sgd
        for own, as_sgd in zip(each("Adam", "edge ratio"), each("Adam", "plain ratio"), strict=True)
    ]
    claim(
        f"Adam's ratio to its own edge is {spread(plain, 2)} times what 2/lr would tell",
        min(plain) > 3.0,
    )
    flattest = all(
        run[top] < 0.5 * min(runs[other][index][top] for other in runs if other != "momentum")
        for index, run in enumerate(runs["momentum"])
    )
    gain = max(each("momentum", "accuracy")) - min(each("Adam", "accuracy"))
    claim(
        f"momentum is the flattest by far, and at most {gain:.3f} more accurate than Adam: no "
        f"ranking",
        flattest and gain < 0.02,
    )
    claim.end()


def draw(logdir: Path, seeds: range, path: Path) -> None:
    """Top eigenvalue against the gap, a colour for each optimizer."""
    logs = {
        f"{name}/seed{seed}": logdir / name / f"seed{seed}" for name in OPTIMIZERS for seed in seeds
    }
    pair = ("hessian/top_eigenvalue", "generalization/gap")
    found = compare(logs, keys=list(pair), group_by="/", points=[pair])
    found.figures[f"{pair[1]} against {pair[0]}"].savefig(path)


if __name__ == "__main__":
    main()
