"""Fine-tuning: how far may the weights go before the old task is lost?

    python examples/fine_tune.py [--logdir runs/fine_tune] [--seeds 5] [--picture FILE]

One network learns the digits 0 to 4, then it is fine-tuned on the digits 5 to 9.  It has ten
outputs; a batch uses only those of its own task (the "task-incremental" setting), so that the new
task does not conflict with the old one in the outputs: forgetting happens in the shared layers.
From the same pretrained weights, for every seed:

- ``rate 0.005``, and ``rate 0.2``, forty times as much, measured every 5 steps;
- ``rate 0.2, stopped``: the same run, measured after every step, and ended by
  ``SharpnessEarlyStopping`` as soon as the loss of the old task has risen by more than 0.1.

``InterpolationMonitor(reference="initial")`` follows the straight line from the pretrained weights
to the weights now: the loss of both tasks on it, and the distance of each layer.  The old basin is
*left* at the first measurement where the old task's loss is more than 0.2 above that of the
pretrained weights (ln 5 = 1.6 is guessing), or where a barrier on the line is as high.

What the numbers show: at the small rate the new task is learnt and the old one kept; the large rate
leaves within 20 steps.  There is hardly a ridge between: no barrier at the end in the median run,
and a low one on the way in 2 of 16, while the old loss increases: its rise shows what the barrier
does not.  The stop saves the old task, with the new one learnt in part.

What they do not show: which layers cause the forgetting (only how far each one moved), what is best
between the two rates, or thresholds for other networks: both were chosen for this one.  Nor do they
hold if all ten outputs compete: then the new classes suppress the old ones at small rates too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tools import Claims, as_batch, digits, fit, only, quiet, save_sheet, spread, table
from torch import Tensor, nn

from lightning_landscape import InterpolationMonitor, SharpnessEarlyStopping, Slice
from lightning_landscape.figures import curves_figure, line_figure, points_figure

OLD, NEW = range(5), range(5, 10)
STEPS = 200
EVERY = 5
SMALL, LARGE = 0.005, 0.2
LEFT = 0.2  # nats
STOP = 0.1  # nats
CAREFUL, FAST = f"rate {SMALL}", f"rate {LARGE}"
STOPPED = f"{FAST}, stopped"
RISE, BARRIER = "interpolation/old_rise", "interpolation/old_barrier"


class Classifier(pl.LightningModule):
    """Two hidden layers of 128 ReLU units; SGD with momentum."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def outputs(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The network's outputs, without those of the other task."""
        inputs, targets = batch
        new_output = torch.arange(10, device=targets.device) >= len(OLD)
        others = (targets >= len(OLD))[:, None] != new_output
        outputs: Tensor = self.net(inputs).masked_fill(others, -1e9)
        return outputs

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.outputs(batch), batch[1])

    def accuracy(self, batch: tuple[Tensor, ...]) -> float:
        with torch.no_grad():
            return float((self.outputs(batch).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


@dataclass
class Run:
    """The results of one fine-tuning run, with accuracies on held-out scans."""

    rows: list[dict[str, Any]]
    line: Slice  # of the old task's loss, at the end
    old: float
    new: float
    steps: int

    @property
    def left(self) -> int | None:
        """The step at which the old basin was left, as defined above."""
        steps = (row["step"] for row in self.rows if max(row[RISE], row[BARRIER]) > LEFT)
        return next(steps, None)

    def highest(self, key: str) -> float:
        """Over the run."""
        return max(row[key] for row in self.rows)

    @property
    def moved(self) -> dict[str, float]:
        """Layer -> its distance from the pretrained weights, at the end."""
        start = "interpolation/distance/"
        return {key.removeprefix(start): row for key, row in self.rows[-1].items() if start in key}


def old_line(trainer: pl.Trainer) -> Slice:
    """The loss of the old task from the pretrained weights to those at the end of the fit."""
    name = f"interpolation-line-old-step{trainer.global_step:08d}.npz"
    return Slice.load(Path(trainer.log_dir or "") / "landscape" / name)


def fine_tuned(pretrained: Classifier, rate: float, seed: int, logdir: Path, stop: bool) -> Run:
    """One fine-tuning run from the same weights, with callbacks."""
    (old, new), (held_old, held_new) = (
        [as_batch(only(part, classes)) for classes in (OLD, NEW)] for part in digits()
    )
    monitor = InterpolationMonitor(
        reference="initial",
        probe=tuple(part[:512] for part in new),
        other_probes={"old": tuple(part[:512] for part in old)},
        blocks=True,
        every_n_train_steps=1 if stop else EVERY,
        max_overhead=None,
    )
    callbacks: list[pl.Callback] = [monitor]
    if stop:
        callbacks.append(SharpnessEarlyStopping(RISE, threshold=STOP, patience=1))
    module = copy.deepcopy(pretrained)
    module.rate = rate
    trainer = fit(
        module,
        only(digits()[0], NEW),
        callbacks=callbacks,
        logdir=logdir,
        name=f"{rate}{'-stopped' if stop else ''}/seed{seed}",
        steps=STEPS,
        seed=seed,
    )
    return Run(
        monitor.history,
        old_line(trainer),
        module.accuracy(held_old),
        module.accuracy(held_new),
        trainer.global_step,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/fine_tune"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    quiet()
    settings = {
        CAREFUL: (SMALL, False),
        FAST: (LARGE, False),
        STOPPED: (LARGE, True),
    }
    runs: dict[str, list[Run]] = {name: [] for name in settings}
    before: list[float] = []
    held_old = as_batch(only(digits()[1], OLD))
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        pl.seed_everything(seed, verbose=False)
        pretrained = Classifier()
        old = only(digits()[0], OLD)
        fit(
            pretrained, old, callbacks=[], logdir=given.logdir, name=f"pretrain/seed{seed}",
            steps=STEPS, seed=seed,
        )  # fmt: skip
        before.append(pretrained.accuracy(held_old))
        for name, (rate, stop) in settings.items():
            runs[name].append(fine_tuned(pretrained, rate, seed, given.logdir, stop))

    report(runs, before)
    claims = check(runs)
    if given.picture:
        draw(runs, given.picture)
    claims.end()


def report(runs: dict[str, list[Run]], before: list[float]) -> None:
    """The two tables."""
    print(f"{len(before)} seeds, median (lowest to highest), accuracy on scans that were held out")
    print(f"old task before fine-tuning: {spread(before)}\n")
    rows = []
    for name, found in runs.items():
        rows.append(
            [
                name,
                spread([run.old for run in found], 2),
                spread([run.new for run in found], 2),
                spread([run.rows[-1][RISE] for run in found], 2),
                spread([run.highest(BARRIER) for run in found], 2),
                ", ".join(str(run.left or "-") for run in found),
                ", ".join(str(run.steps) for run in found),
            ]
        )
    head = ["run", "old accuracy", "new accuracy", "old loss rose by", "highest barrier"]
    print(table([*head, "left at step", "steps"], rows))
    print("\nDistance from the pretrained weights at the end, by layer\n")
    layers = list(runs[CAREFUL][0].moved)
    rows = [
        [name, *(spread([run.moved[layer] for run in found], 2) for layer in layers)]
        for name, found in runs.items()
    ]
    print(table(["run", *layers], rows))


def check(runs: dict[str, list[Run]]) -> Claims:
    """Check the claims, seed by seed."""
    small, large, stopped = runs[CAREFUL], runs[FAST], runs[STOPPED]
    claims = Claims()
    claims(
        "the small rate never leaves the old basin, and learns the new task as well as the large "
        "one (within 0.05)",
        all(s.left is None and s.new > f.new - 0.05 for s, f in zip(small, large, strict=True)),
    )
    claims(
        "the large rate leaves it within 30 steps, and ends at least 0.1 lower on the old task",
        all(
            f.left is not None and f.left <= 30 and f.old < s.old - 0.1
            for s, f in zip(small, large, strict=True)
        ),
    )
    claims(
        "hardly a ridge is crossed: the large rate's highest barrier is below a fifth of its "
        "highest rise in every run, and none at the end (median): the rise is the better indicator",
        all(f.highest(BARRIER) < 0.2 * f.highest(RISE) for f in large)
        and statistics.median(f.rows[-1][BARRIER] for f in large) < 0.01,
    )
    claims(
        "the stop comes within 30 steps and saves old accuracy (0.05 or more)",
        all(s.steps <= 30 and s.old > f.old + 0.05 for s, f in zip(stopped, large, strict=True)),
    )
    claims(
        "but it is no substitute for the small rate, which learns more of the new task",
        all(s.new > t.new + 0.01 for s, t in zip(small, stopped, strict=True)),
    )
    return claims


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """How the old task's loss rises, and where the runs end."""
    histories = {f"{n}/{i}": run.rows for n, found in runs.items() for i, run in enumerate(found)}
    ends = {f"{n}/{i}": (r.new, r.old) for n, found in runs.items() for i, r in enumerate(found)}
    groups = {name: name.partition("/")[0] for name in histories}
    first = {name: runs[name][0].line for name in (CAREFUL, FAST)}
    figures = [
        curves_figure(histories, RISE, groups=groups),
        points_figure(
            ends, x="held-out accuracy/new task", y="held-out accuracy/old task", groups=groups
        ),
        line_figure(
            list(first.values()), names=[f"old task, {name}, first seed" for name in first]
        ),
        curves_figure(histories, "interpolation/distance/net.0", groups=groups),
    ]
    save_sheet(figures, path)


if __name__ == "__main__":
    main()
