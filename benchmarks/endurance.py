"""A long run with a measurement at every step: what grows, and what does not.

    make bench-endurance

A small network, all scalars at each step, pictures at every hundredth, TensorBoard and CSV.  Prints
a table with a column for each third of the run: time and work of a step, the process's memory, what
is alive in it, and what was written, by kind of file.  Only the rows of ``callback.history`` are
meant to grow, up to 10,000 a callback.

Lightning's ``CSVLogger`` appends what was logged since its last flush; only when a new key turns up
it reads and rewrites its file.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import table
from benchmarks.memory import resident
from benchmarks.runs import mlp
from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
)

KINDS = {
    "events.out": "event file",
    ".csv": "metrics.csv",
    ".jsonl": "history.jsonl",
    ".npz": "npz files",
}


WARM_UP = 10


class Classifier(pl.LightningModule):
    """Ten classes of random points, which can be trained for any number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp([16, 32, 10], nn.Tanh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        EVALUATIONS[0] += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


# Calls of training_step; not an attribute of the module, which a measurement would restore.
EVALUATIONS = [0]


@dataclass
class State:
    """The state at one step."""

    resident: int
    rows: int  # of the history: how many, and their bytes
    held: int
    tensors: int
    objects: int  # tracked by Python's garbage collector, without rows
    checkpoint: int
    bytes: Counter[str]  # by kind of file
    files: Counter[str]


class Watch(pl.Callback):
    """Records the monitors after each step; they must precede it in the list."""

    def __init__(self, monitors: Sequence[Any], steps: int, folder: Path) -> None:
        self.monitors, self.folder = monitors, folder
        # Not from the start: one-time work is done in the first steps.
        self.bounds = [WARM_UP + (steps - WARM_UP) * part // 3 for part in range(4)]
        self.states: list[State] = []
        self.each: list[tuple[int, float, float, int]] = []
        self.before = (time.process_time(), 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        products = float(trainer.callback_metrics["hessian/hvps"])
        seconds, evaluations = self.before
        # Processor time: a busy machine does not look like a run that grows slower.
        seconds, evaluations = time.process_time() - seconds, EVALUATIONS[0] - evaluations
        self.each.append((step, seconds, products, evaluations))
        if step in self.bounds:
            self.states.append(self._now(trainer))
        self.before = (time.process_time(), EVALUATIONS[0])

    def _now(self, trainer: pl.Trainer) -> State:
        for logger in trainer.loggers:
            logger.save()
        gc.collect()
        memory = resident()  # before anything here takes some
        rows = [m._bookkeeping.history.rows() for m in self.monitors]
        known = sum(map(gc.is_tracked, (part for own in rows for r in own for part in _parts(r))))
        alive = gc.get_objects()
        saved = io.BytesIO()
        torch.save({m.state_key: m.state_dict() for m in self.monitors}, saved)
        sizes: Counter[str] = Counter()
        files: Counter[str] = Counter()
        for path in self.folder.rglob("*"):
            if path.is_file():
                kind = next((name for part, name in KINDS.items() if part in path.name), "others")
                sizes[kind] += path.stat().st_size
                files[kind] += 1
        return State(
            memory,
            sum(map(len, rows)),
            round(sum(map(_size, rows))),
            sum(issubclass(type(thing), Tensor) for thing in alive),
            len(alive) - known,
            len(saved.getvalue()),
            sizes,
            files,
        )

    def report(self) -> str:
        """The table."""
        pairs = list(itertools.pairwise(self.states))
        steps = list(itertools.pairwise(self.bounds))

        def of_steps(which: int, form: str, times: float = 1.0) -> list[str]:
            parts = [
                [entry[which] for entry in self.each if low < entry[0] <= high]
                for low, high in steps
            ]
            return [f"{times * statistics.median(part):{form}}" for part in parts]

        def of_states(form: str, value: Callable[[State], float]) -> list[str]:
            return [f"{value(after):{form}}" for _, after in pairs]

        def a_step(form: str, value: Callable[[State], float]) -> list[str]:
            return [
                f"{(value(after) - value(before)) / (high - low):{form}}"
                for (before, after), (low, high) in zip(pairs, steps, strict=True)
            ]

        kinds = sorted(self.states[-1].bytes)
        rows = [
            ["processor time of a step, ms, median", *of_steps(1, ".2f", 1e3)],
            ["Hessian-vector products, median", *of_steps(2, ".0f")],
            ["evaluations of the loss, median", *of_steps(3, ".0f")],
            ["resident memory, MB, at its end", *of_states(".1f", lambda s: s.resident / 1e6)],
            ["rows of history", *of_states(",d", lambda s: s.rows)],
            ["their size, MB", *of_states(".1f", lambda s: s.held / 1e6)],
            ["live tensors", *of_states(",d", lambda s: s.tensors)],
            ["live objects", *of_states(",d", lambda s: s.objects)],
            ["state in a checkpoint, bytes", *of_states(",d", lambda s: s.checkpoint)],
        ]
        for kind in kinds:
            rows.append([f"bytes a step: {kind}", *a_step(",.0f", lambda s, k=kind: s.bytes[k])])
        rows.append(["files", *of_states(",d", lambda s: s.files.total())])
        head = ["", *(f"steps {low + 1} to {high}" for low, high in steps)]
        return table("A measurement at every step", head, rows)


def _parts(row: dict[str, Any]) -> list[Any]:
    return [row, *row, *row.values()]


def _size(rows: list[dict[str, Any]]) -> float:
    """Bytes, reckoned from the last hundred: what these share is counted once."""
    last = rows[-100:]
    parts = {id(part): part for row in last for part in _parts(row)}
    return len(rows) * sum(map(sys.getsizeof, parts.values())) / max(len(last), 1)


def run(steps: int, pictures: int) -> Watch:
    """``steps`` steps; pictures at every so many of them, or none with 0."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(512, 16), torch.randint(0, 10, (512,)))
    validation = DataLoader(data, batch_size=256)
    each: dict[str, Any] = {"max_overhead": None, "probe": data[:256]}
    scalar = {"every_n_train_steps": 1, **each}
    drawn = {"every_n_train_steps": pictures, **each}
    monitors: list[Any] = [
        HessianMonitor(**scalar),
        SharpnessMonitor(**scalar),
        GeneralizationMonitor(validation_probe=validation, **scalar),
    ]
    if pictures:
        monitors += [LandscapeMonitor(**drawn), InterpolationMonitor(**drawn)]
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", threshold=10.0, action="warn")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        watch = Watch(monitors, steps, folder)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=[TensorBoardLogger(root, "board", ""), CSVLogger(root, "csv", "")],
            callbacks=[*monitors, stopper, watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=100, help="steps between them; 0: none")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(run(options.steps, options.pictures).report())


if __name__ == "__main__":
    main()
