"""Shared by the examples: real data, short runs, claims that are checked."""

from __future__ import annotations

import functools
import logging
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

TRAINED = 1200  # of the 1797 scans; the others are held out


def digits(images: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 8x8 scans of handwritten digits, scaled: for training, and held out."""
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    inputs = (inputs - inputs.mean()) / inputs.std()
    if images:
        inputs = inputs.view(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    # The scans are sorted by writer: shuffled, so that all writers are in both parts.
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    return (
        TensorDataset(inputs[:TRAINED], targets[:TRAINED]),
        TensorDataset(inputs[TRAINED:], targets[TRAINED:]),
    )


@functools.cache  # a second and more
def mnist1d() -> tuple[TensorDataset, TensorDataset]:
    """MNIST-1D (Greydanus 2020): digits as curves of 40 points, made by its own generator."""
    from mnist1d.data import get_dataset_args, make_dataset

    with isolate_rng():  # the generator seeds everything
        made = make_dataset(get_dataset_args())
    parts = []
    for end in ("", "_test"):
        inputs = torch.tensor(made[f"x{end}"], dtype=torch.float32)
        parts.append(TensorDataset(inputs, torch.tensor(made[f"y{end}"])))
    return parts[0], parts[1]


def only(data: TensorDataset, classes: Sequence[int]) -> Subset[tuple[Tensor, ...]]:
    """The examples of some classes."""
    kept = torch.isin(data.tensors[1], torch.tensor(list(classes)))
    return Subset(data, kept.nonzero().flatten().tolist())


def as_batch(data: TensorDataset | Subset[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """All examples as one batch."""
    return tuple(next(iter(DataLoader(data, batch_size=len(data)))))


def accuracy(module: nn.Module, data: TensorDataset | Subset[tuple[Tensor, ...]]) -> float:
    """The share of examples whose class has the largest output, in eval mode."""
    inputs, targets = as_batch(data)
    training = module.training
    module.eval()
    with torch.no_grad():
        right = (module(inputs).argmax(1) == targets).float().mean()
    module.train(training)
    return float(right)


def fit(
    module: pl.LightningModule,
    data: TensorDataset | Subset[tuple[Tensor, ...]],
    *,
    callbacks: Sequence[pl.Callback],
    logdir: Path,
    name: str,
    steps: int,
    seed: int,
    batch_size: int = 64,
) -> pl.Trainer:
    """One run on the CPU; the order of the batches follows from ``seed``."""
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps * _optimizer_steps(module),
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=name, version=""),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


def _optimizer_steps(module: pl.LightningModule) -> int:
    """Optimizer steps a batch: Lightning's ``max_steps`` counts them, with SAM there are two."""
    return int(getattr(module, "optimizer_steps_per_batch", 1))


def quiet() -> None:
    """Suppress Lightning's hints."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (lowest to highest)``."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, as wide as they need to be."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def save_sheet(figures: Sequence[Figure], path: Path, columns: int = 2, width: int = 1100) -> None:
    """Write figures as one PNG of ``width`` pixels at most, ``columns`` side by side."""
    from lightning_landscape.figures import figure_to_image

    pictures = [Image.fromarray(figure_to_image(figure)) for figure in figures]
    wide = max(picture.width for picture in pictures)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (wide * min(columns, len(pictures)), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * wide, sum(heights[:number])))
    sheet.thumbnail((width, sheet.height), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)
    print(f"\nWrote {path}")


class Claims:
    """Sentences about numbers that have just been measured, and whether they hold."""

    def __init__(self) -> None:
        self._broken = 0
        print("\nClaims:")

    def __call__(self, sentence: str, holds: bool) -> None:
        """Print it; remember if it does not hold."""
        self._broken += not holds
        print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {sentence}")

    def end(self) -> None:
        """End the program, with an error if a claim did not hold."""
        if self._broken:
            sys.exit(f"{self._broken} of the claims above did not hold in this run")
