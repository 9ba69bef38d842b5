"""Ensembles: which networks are worth averaging, and which weights may be?

    python examples/ensemble.py [--logdir runs/ensemble] [--seeds 5] [--picture FILE]

Five runs of one network on MNIST-1D, from five seeds.  Two kinds of four networks each:

- *snapshots*: the weights of one run after 900, 1000, 1100 and 1200 steps, at a constant rate;
- *seeds*: the last weights of four runs, once without each of the five.

For every pair ``InterpolationMonitor(reference=...)`` measures the loss barrier on the straight
line between the two.  It is compared with the share of held-out examples on which they disagree,
the gain of an ensemble (the mean of the predicted probabilities) over the mean of its members, and
the performance of the average of their weights (``torch.optim.swa_utils.AveragedModel``, as in
stochastic weight averaging; there is no BatchNorm whose statistics would have to be re-estimated).

What the numbers show: here averaging weights works if and only if there is no barrier between them;
ensembles gain more if networks disagree more, which is across barriers.  And no barrier does not
mean equal predictions: two snapshots differ on a quarter of the examples.

What they do not show: that barriers remain once the symmetries of a network are taken out (its
units may be permuted: Entezari et al. 2022), or whether an ensemble is worth four trainings.  The
sets of four seeds share members, so they spread less than new seeds would.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from tools import Claims, as_batch, fit, mnist1d, quiet, save_sheet, spread, table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_landscape import InterpolationMonitor, Slice
from lightning_landscape.figures import LossLimits, barrier_matrix_figure, plane_figure
from lightning_landscape.measure import measure

SNAPSHOTS = (900, 1000, 1100, 1200)
Pairs = Mapping[str, list[list[float]]]  # kind of four -> a list of values for every set
GUESSING = math.log(10)  # the loss of ten equal probabilities


class Classifier(pl.LightningModule):
    """Two hidden layers of 128 ReLU units; SGD with momentum at a constant rate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Snapshots(pl.Callback):
    """Copies of the weights after some of the steps."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in SNAPSHOTS:
            self.taken.append({k: v.detach().clone() for k, v in module.state_dict().items()})


def train(seed: int, logdir: Path) -> list[Classifier]:
    """One run; its snapshots, as networks."""
    pl.seed_everything(seed, verbose=False)
    snapshots = Snapshots()
    module = Classifier()
    fit(
        module, mnist1d()[0], callbacks=[snapshots], logdir=logdir, name=f"seed{seed}",
        steps=SNAPSHOTS[-1], seed=seed,
    )  # fmt: skip
    networks = []
    for weights in snapshots.taken:
        networks.append(Classifier())
        networks[-1].load_state_dict(weights)
    return networks


def barriers(networks: Sequence[Classifier], probe: Any, logdir: Path) -> NDArray[np.float64]:
    """Pairwise barriers of the loss on the probe: symmetric, zeros on the diagonal."""
    matrix = np.zeros((len(networks), len(networks)))
    for i, network in enumerate(networks[:-1]):
        others = range(i + 1, len(networks))
        monitors = [
            InterpolationMonitor(reference=networks[j].state_dict(), name=f"to{j}", probe=probe)
            for j in others
        ]
        found = measure(network, [probe], callbacks=monitors, logdir=logdir, progress=False)
        for j in others:
            matrix[i, j] = matrix[j, i] = found.values[f"interpolation/to{j}/barrier"]
    return matrix


def probabilities(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.softmax(network(inputs), 1)


def scored(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and cross entropy of predicted probabilities."""
    right = (predicted.argmax(1) == targets).float().mean()
    return float(right), float(nn.functional.nll_loss(predicted.log(), targets))


def disagreement(networks: Sequence[Classifier], inputs: Tensor) -> NDArray[np.float64]:
    """Pairwise share of the examples for which two networks predict different classes."""
    predicted = torch.stack([probabilities(network, inputs).argmax(1) for network in networks])
    return (predicted[:, None] != predicted[None]).double().mean(2).numpy()


@dataclass
class Group:
    """Four networks: alone, as an ensemble, and as one network of averaged weights."""

    members: list[tuple[float, float]]  # accuracy, loss
    ensemble: tuple[float, float]
    averaged: tuple[float, float]

    @property
    def alone(self) -> tuple[float, float]:
        """The mean over the members."""
        accuracies, losses = zip(*self.members, strict=True)
        return statistics.mean(accuracies), statistics.mean(losses)

    @property
    def gain(self) -> tuple[float, float]:
        """Accuracy won and loss saved by the ensemble."""
        return self.ensemble[0] - self.alone[0], self.alone[1] - self.ensemble[1]


def judged(networks: Sequence[Classifier], held_out: tuple[Tensor, ...]) -> Group:
    """Four networks on examples that were held out."""
    inputs, targets = held_out
    averaged = AveragedModel(networks[0])
    for network in networks:
        averaged.update_parameters(network)
    predicted = [probabilities(network, inputs) for network in networks]
    return Group(
        [scored(one, targets) for one in predicted],
        scored(torch.stack(predicted).mean(0), targets),
        scored(probabilities(averaged, inputs), targets),
    )


def pairs(matrix: NDArray[np.float64]) -> list[float]:
    """The values above the diagonal."""
    return [float(value) for value in matrix[np.triu_indices(len(matrix), 1)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/ensemble"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="write the picture of the documentation here")
    given = parser.parse_args()
    quiet()
    data, unseen = mnist1d()
    held_out = as_batch(unseen)
    probe = tuple(part[:512] for part in as_batch(data))
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    runs = [train(seed, given.logdir) for seed in seeds]
    last = [run[-1] for run in runs]
    fours = [list(four) for four in itertools.combinations(last, len(SNAPSHOTS))]
    groups = {
        "snapshots": [judged(run, held_out) for run in runs],
        "seeds": [judged(four, held_out) for four in fours],
    }
    between = {
        "snapshots": [pairs(barriers(run, probe, given.logdir)) for run in runs],
        "seeds": [pairs(barriers(last, probe, given.logdir))],
    }
    differ = {
        "snapshots": [pairs(disagreement(run, held_out[0])) for run in runs],
        "seeds": [pairs(disagreement(last, held_out[0]))],
    }
    print(f"{given.seeds} runs, median (lowest to highest), on examples that were held out\n")
    report(groups, between, differ)
    claims = check(groups, between, differ)
    if given.picture:
        draw(runs, probe, held_out[0], given.logdir, given.picture)
    claims.end()


def draw(
    runs: Sequence[Sequence[Classifier]], probe: Any, inputs: Tensor, logdir: Path, path: Path
) -> None:
    """Barriers, disagreements and planes, of the first run's snapshots and of the other runs."""
    shown = [*runs[0], *(run[-1] for run in runs[1:5])]
    names = [f"A {step}" for step in SNAPSHOTS] + list("BCDE"[: len(shown) - len(SNAPSHOTS)])
    of_snapshots, of_seeds = (
        plane(dict(zip(names, shown, strict=True)), chosen, probe, logdir)
        for chosen in (names[1:4], names[3:6])
    )
    limits = LossLimits.for_film([of_snapshots, of_seeds])
    figures = [
        barrier_matrix_figure(barriers(shown, probe, logdir), names, title="Loss barrier"),
        barrier_matrix_figure(disagreement(shown, inputs), names, title="Disagreement"),
        plane_figure(of_snapshots, limits=limits),
        plane_figure(of_seeds, limits=limits),
    ]
    save_sheet(figures, path)


def plane(
    networks: Mapping[str, Classifier], chosen: Sequence[str], probe: Any, logdir: Path
) -> Slice:
    """The plane through three networks."""
    now, second, third = (networks[name] for name in chosen)
    monitor = InterpolationMonitor(
        reference=second.state_dict(), third=third.state_dict(), probe=probe, plane_resolution=25
    )
    found = measure(now, [probe], callbacks=[monitor], logdir=logdir, progress=False)
    (file,) = (found.log_dir / "landscape").glob("interpolation-plane-*.npz")
    loaded = Slice.load(file)
    # The measurement has neither names nor steps.
    loaded.metadata["step"] = SNAPSHOTS[min(list(networks).index(chosen[0]), len(SNAPSHOTS) - 1)]
    loaded.metadata["directions"] = [f"{chosen[0]} to {name}" for name in chosen[1:]]
    for point, name in zip(loaded.metadata["points"], chosen, strict=True):
        point["name"] = name
    return loaded


def report(groups: Mapping[str, list[Group]], between: Pairs, differ: Pairs) -> None:
    """The two tables."""
    rows = [
        [name, *(spread(list(itertools.chain(*values[name])), 2) for values in (between, differ))]
        for name in groups
    ]
    print(table(["pairs of", "barrier of the training loss", "disagreement"], rows), "\n")
    rows = []
    for which, what in enumerate(("accuracy", "loss")):
        for name, found in groups.items():
            kinds = [[g.alone, g.ensemble, g.averaged] for g in found]
            cells = [spread([kind[i][which] for kind in kinds], 3) for i in range(3)]
            rows.append([f"{what}, {name}", *cells])
    print(table(["four", "alone (mean)", "ensemble", "averaged weights"], rows))


def check(groups: Mapping[str, list[Group]], between: Pairs, differ: Pairs) -> Claims:
    """Check the claims, run by run."""
    snapshots, seeds = groups["snapshots"], groups["seeds"]
    claims = Claims()
    claims(
        "no two snapshots of a run have a barrier above 0.05, all pairs of seeds one above 1",
        max(map(max, between["snapshots"])) < 0.05 and min(between["seeds"][0]) > 1.0,
    )
    of_seeds = statistics.median(differ["seeds"][0])
    claims(
        "the median pair of seeds disagrees more often than that of every run's snapshots",
        all(statistics.median(run) < of_seeds - 0.01 for run in differ["snapshots"]),
    )
    claims(
        "no barrier does not mean the same answers: all snapshots disagree on a tenth or more",
        min(map(min, differ["snapshots"])) > 0.1,
    )
    gains = [
        [statistics.median(g.gain[i] for g in found) for i in (0, 1)]
        for found in (seeds, snapshots)
    ]
    claims(
        "seeds gain more as an ensemble than snapshots do, at the median: in accuracy "
        f"{gains[0][0]:.3f} against {gains[1][0]:.3f}, in loss {gains[0][1]:.2f} against "
        f"{gains[1][1]:.2f}",
        gains[0][0] > gains[1][0] + 0.005 and gains[0][1] > gains[1][1] + 0.05,
    )
    claims(
        "averaged weights of snapshots are as accurate as their ensemble (within 0.03), and better "
        "than a member, at the cost of one network; their loss is higher, by less than 0.15",
        all(
            abs(g.averaged[0] - g.ensemble[0]) < 0.03
            and g.averaged[0] > g.alone[0]
            and g.averaged[1] < min(g.alone[1], g.ensemble[1] + 0.15)
            for g in snapshots
        ),
    )
    claims(
        f"averaged weights of seeds are worse than guessing: loss above ln 10 = {GUESSING:.2f}",
        all(g.averaged[1] > GUESSING for g in seeds),
    )
    return claims


if __name__ == "__main__":
    main()
