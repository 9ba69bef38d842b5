"""Train a classifier on real digits at the edge of stability, with all callbacks.

    python examples/digits.py [--logdir runs/digits] [--picture FILE]

Two runs of full-batch gradient descent on scikit-learn's handwritten digits.

1. ``watch``: learning rate 0.2.  The top eigenvalue of the Hessian rises to 2/lr = 10 and then
   stays there: the edge of stability (Cohen et al., ICLR 2021).  All four callbacks are on.
2. ``stop``: the same run again, ended by ``SharpnessEarlyStopping`` once three measurements in a
   row are above 90 % of the edge.

Every callback gets ``max_overhead=None``: the exact schedule, so that the picture is complete.  In
a run of your own leave that out, and measuring takes at most 5 % of the training time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.training.monitor import Monitor

LEARNING_RATE = 0.2
STEPS = 2000


def digits() -> TensorDataset:
    """The first 500 of scikit-learn's 8x8 scans, centred and scaled, with one-hot targets."""
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    inputs = inputs - inputs.mean(0)
    inputs = inputs / inputs.std()
    targets = nn.functional.one_hot(torch.tensor(labels), 10).float()
    return TensorDataset(inputs[:500], targets[:500])


class Classifier(pl.LightningModule):
    """Two hidden layers of 64 tanh units, trained by plain gradient descent on squared error."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.net(inputs)
        loss = 0.5 * (outputs - targets).square().sum(1).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def train(logdir: Path, name: str, callbacks: list[pl.Callback]) -> tuple[pl.Trainer, float]:
    """One run of full-batch gradient descent; returns the Trainer and the seconds it took."""
    pl.seed_everything(0)
    data = digits()
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=name),
        callbacks=callbacks,
        log_every_n_steps=20,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(Classifier(LEARNING_RATE), DataLoader(data, batch_size=len(data)))
    return trainer, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/digits"))
    parser.add_argument("--picture", type=Path, help="write the picture of the documentation here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*number of training batches.*|.*LeafSpec.*")

    # max_overhead=None: measure exactly on schedule, whatever it costs, for complete pictures.
    exactly = {"max_overhead": None}
    hessian = HessianMonitor(every_n_train_steps=20, **exactly)
    sharpness = SharpnessMonitor(every_n_train_steps=20, **exactly)
    # A unit step along the top eigenvector raises the loss by lambda/2 = 5 at the edge: zoom in.
    surface = LandscapeMonitor(every_n_train_steps=400, **exactly)
    steepest = LandscapeMonitor(
        every_n_train_steps=400, directions="eigenvectors", span=(-0.5, 0.5), name="top", **exactly
    )
    monitors = [hessian, sharpness, surface, steepest]
    watched, seconds = train(arguments.logdir, "watch", [*monitors])
    report(monitors, seconds)

    # ---- the same run, stopped ----
    again = HessianMonitor(every_n_train_steps=20, **exactly)
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", threshold=0.9, patience=3)
    stopped, _ = train(arguments.logdir, "stop", [again, stopper])
    print(
        f"\nSecond run: {stopped.global_step} of {STEPS} steps, stopped at step "
        f"{stopper.stopped_step}: {stopper.stopping_reason}."
    )

    if arguments.picture:
        draw(watched, hessian, arguments.picture)
    command = f"tensorboard --logdir {arguments.logdir} --samples_per_plugin images=100"
    print(f"\nThe charts and the slices:\n\n    {command}\n")


def report(monitors: list[Monitor], seconds: float) -> None:
    """The closing table."""
    rows = monitors[0].history
    peak = max(rows, key=lambda row: row["hessian/top_eigenvalue"])
    late = rows[int(0.6 * len(rows)) :]
    mean_ratio = sum(row["hessian/edge_ratio"] for row in late) / len(late)
    spent = sum(monitor.seconds_spent for monitor in monitors)
    print(f"\nFirst run: {STEPS} steps of gradient descent, learning rate {LEARNING_RATE}")
    for label, value in (
        ("measurements", ", ".join(f"{m.prefix} {m.measured}" for m in monitors)),
        ("the optimizer's edge, 2/lr", f"{rows[-1]['hessian/edge']:.3g}"),
        (
            "peak top eigenvalue",
            f"{peak['hessian/top_eigenvalue']:.2f} at step {peak['step']}",
        ),
        ("mean edge ratio, last 40 %", f"{mean_ratio:.3f}"),
        ("last edge ratio", f"{rows[-1]['hessian/edge_ratio']:.3f}"),
        ("time spent measuring", f"{spent:.1f} s of {seconds:.1f} s ({spent / seconds:.0%})"),
    ):
        print(f"  {label:28}{value}")


def draw(trainer: pl.Trainer, hessian: HessianMonitor, path: Path) -> None:
    """The eigenvalue and its edge, and the sharpest plane at the start and at the end."""
    from PIL import Image

    from lightning_landscape.figures import (
        LossLimits,
        eigenvalue_figure,
        figure_to_image,
        plane_figure,
    )

    saved = sorted((Path(trainer.log_dir or "") / "landscape").glob("landscape-top-plane-*.npz"))
    first, last = Slice.load(saved[0]), Slice.load(saved[-1])
    limits = LossLimits.for_film([first, last])
    pictures = [
        Image.fromarray(figure_to_image(figure))
        for figure in (
            eigenvalue_figure(hessian.history),
            plane_figure(first, limits=limits),
            plane_figure(last, limits=limits),
        )
    ]
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width
    sheet.save(path, optimize=True)
    print(f"\nWrote {path}")


if __name__ == "__main__":
    main()
