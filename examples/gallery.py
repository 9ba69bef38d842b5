"""Every kind of picture, from real runs on scikit-learn's handwritten digits: about a minute.

    python examples/gallery.py [--out runs/gallery] [--readme docs/gallery]

Four runs:

1. ``sgd``: full-batch gradient descent, which goes to the edge of stability and stays there.
2. ``adam``: the same network from the same start under Adam; then once more, now that its last
   weights are known, for the pictures between the two optimizers' solutions.
3. ``with`` and 4. ``without``: a convolutional network of 18 layers, with skip connections and
   without, from the same start.

The callbacks measure and save slices beside the logs; ``lightning_landscape.figures`` draws them
here, each on a scale of its own.  ``--readme`` writes smaller copies of six.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor, LandscapeMonitor, Slice
from lightning_landscape.figures import (
    density_figure,
    density_film_figure,
    eigenvalue_figure,
    figure_to_image,
    filmstrip_figure,
    line_figure,
    plane_figure,
)
from lightning_landscape.geometry import SpectralDensity

STEPS = 1000
ADAM_STEPS = 300
DEEP_STEPS = 400
# Measure exactly on schedule, whatever it costs.  In a run of your own leave this out.
EXACTLY: dict[str, Any] = {"max_overhead": None}

# File -> one sentence, in the order of the index.
PICTURES = {
    "line-gradient": "The loss along its own gradient: downhill is to the left, and not far.",
    "line-eigenvectors": "The two sharpest directions: their curvature bounds the step size.",
    "line-update": "The optimizer's last step: where it began, where it ended, the lowest point.",
    "line-random-band": "Twenty random directions: their median, and the range that they span.",
    "line-between": "From SGD's weights, at -1, to Adam's, at 0: a low barrier lies between.",
    "plane-random": "Two random directions, filter-normalised: a smooth bowl.",
    "plane-eigenvectors": "The two sharpest directions at once: as steep along the second.",
    "plane-pca": "The plane in which the weights moved, their path, validation loss as lines.",
    "plane-between": "SGD's weights (-1, 0) and Adam's (0, 0) on one plane: two pits in a basin.",
    "filmstrip": "The valley across the top eigenvector, nine times: its walls close in.",
    "animation": "The same as an animation (GIF).",
    "eigenvalue-sgd": "Sharpness climbs to 2/lr and stays: the edge of stability.",
    "eigenvalue-adam": "Adam's edge: 38/lr on the preconditioned Hessian.",
    "density": "All eigenvalues at the end: a bulk near zero, some far out.",
    "density-over-time": "The same over training: the outliers leave the bulk.",
    "skip-connections": "18 layers with and without skip connections, on one scale: much the same.",
}
README = (
    "eigenvalue-sgd",
    "filmstrip",
    "plane-pca",
    "line-update",
    "density-over-time",
    "skip-connections",
)


def digits(first: int, last: int) -> TensorDataset:
    """Some of scikit-learn's 8x8 scans, centred and scaled, with one-hot targets."""
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / (inputs - inputs.mean(0)).std()
    targets = nn.functional.one_hot(torch.tensor(labels), 10).float()
    return TensorDataset(inputs[first:last], targets[first:last])


class Classifier(pl.LightningModule):
    """Any network that gives ten scores."""

    def __init__(self, net: nn.Module, optimizer: str, learning_rate: float, loss: str) -> None:
        super().__init__()
        self.net = net
        self.loss, self.optimizer, self.learning_rate = loss, optimizer, learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.net(inputs)
        if self.loss == "squared":
            return 0.5 * (outputs - targets).square().sum(1).mean()
        return nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.optimizer)
        return kind(self.parameters(), lr=self.learning_rate)


def two_layers() -> nn.Module:
    """Two hidden layers of 64 tanh units."""
    pl.seed_everything(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


class Block(nn.Module):
    """Two convolutions with BatchNorm, with or without a skip connection around them."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return nn.functional.relu(x + y if self.skip else y)


def deep(skip: bool, blocks: int = 8, channels: int = 8) -> nn.Module:
    """18 layers: one convolution, eight blocks of two, one linear layer."""
    pl.seed_everything(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(Block(channels, skip) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def fit(
    out: Path,
    name: str,
    module: pl.LightningModule,
    loader: DataLoader[Any],
    steps: int,
    callbacks: list[pl.Callback],
) -> Path:
    """Train; return the folder where the callbacks put what they measured."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(out / "logs", name=name),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return Path(trainer.log_dir or "") / "landscape"


def last(folder: Path, stem: str) -> Slice:
    """The slice of the last step."""
    return Slice.load(sorted(folder.glob(f"landscape-{stem}-step*.npz"))[-1])


def monitor(steps: int, directions: Any, name: str, **settings: Any) -> LandscapeMonitor:
    """A LandscapeMonitor on the exact schedule."""
    return LandscapeMonitor(
        every_n_train_steps=steps, directions=directions, name=name, **EXACTLY, **settings
    )


def descent(out: Path) -> tuple[dict[str, Figure], Path, dict[str, Tensor]]:
    """Full-batch gradient descent: most of the pictures."""
    data = digits(0, 500)
    once = STEPS - STEPS // 4  # at the edge, and once more at the end
    hessian = HessianMonitor(every_n_train_steps=10, **EXACTLY)
    spectrum = HessianMonitor(every_n_train_steps=50, density_samples=6, name="all", **EXACTLY)
    module = Classifier(two_layers(), "SGD", 0.2, "squared")
    folder = fit(
        out,
        "sgd",
        module,
        DataLoader(data, batch_size=len(data)),
        STEPS,
        [
            hessian,
            spectrum,
            monitor(
                STEPS // 8,
                ("eigenvectors", "random"),
                "valley",
                span=(-0.6, 0.6),
                resolution=(31, 9),
            ),
            monitor(once, "eigenvectors", "top", span=(-0.6, 0.6), resolution=25),
            monitor(once, "random", "random", seeds=20, resolution=25),
            monitor(once, "gradient", "gradient", span=(-0.6, 0.6), resolution=0),
            monitor(once, "update", "update", resolution=0),
            monitor(
                once,
                "pca",
                "path",
                resolution=25,
                validation_probe=DataLoader(digits(500, 1000), batch_size=500),
            ),
        ],
    )
    densities = {
        int(path.stem.rpartition("step")[2]): SpectralDensity.load(path)
        for path in sorted(folder.glob("hessian-all-density-*.npz"))
    }
    final = max(densities)
    label = {"probe_samples": len(data), "probe_mode": "train"}
    random = [last(folder, f"random-line-{number}") for number in range(1, 21)]
    figures = {
        "line-gradient": line_figure(last(folder, "gradient-line-1")),
        "line-eigenvectors": line_figure([last(folder, f"top-line-{n}") for n in (1, 2)]),
        "line-update": line_figure(last(folder, "update-line-1")),
        "line-random-band": line_figure(random, band=True),
        "plane-random": plane_figure(last(folder, "random-plane")),
        "plane-eigenvectors": plane_figure(last(folder, "top-plane")),
        "plane-pca": plane_figure(last(folder, "path-plane")),
        "filmstrip": filmstrip_figure(
            [Slice.load(path) for path in sorted(folder.glob("landscape-valley-plane-*.npz"))]
        ),
        "eigenvalue-sgd": eigenvalue_figure(hessian.history),
        "density": density_figure(densities[final], metadata={"step": final, **label}),
        "density-over-time": density_film_figure(densities, metadata=label),
    }
    return figures, folder / "landscape-valley-plane.gif", copy.deepcopy(module.state_dict())


def adam(out: Path, other: dict[str, Tensor]) -> dict[str, Figure]:
    """Adam from the same start, and what lies between its weights and the ``other`` ones."""
    data = digits(0, 500)
    loader = DataLoader(data, batch_size=len(data))
    hessian = HessianMonitor(every_n_train_steps=5, **EXACTLY)
    module = Classifier(two_layers(), "Adam", 5e-3, "squared")
    fit(out, "adam", module, loader, ADAM_STEPS, [hessian])
    # The same run: it ends in the same weights, at 0, and the other ones are at -1.
    way = monitor(
        ADAM_STEPS,
        "between",
        "between",
        between=(other, copy.deepcopy(module.state_dict())),
        span=(-1.4, 0.6),
        resolution=25,
        line_resolution=41,
        validation_probe=DataLoader(digits(500, 1000), batch_size=500),
    )
    folder = fit(
        out,
        "between",
        Classifier(two_layers(), "Adam", 5e-3, "squared"),
        loader,
        ADAM_STEPS,
        [way],
    )
    return {
        "eigenvalue-adam": eigenvalue_figure(hessian.history),
        "line-between": line_figure(last(folder, "between-line-1")),
        "plane-between": plane_figure(last(folder, "between-plane")),
    }


def skips(out: Path) -> dict[str, Figure]:
    """A deep network with skip connections and without."""
    planes = []
    for skip in (True, False):
        data = digits(0, 1000)
        pl.seed_everything(0)
        folder = fit(
            out,
            "with" if skip else "without",
            Classifier(deep(skip), "Adam", 3e-3, "cross entropy"),
            DataLoader(data, batch_size=100, shuffle=True),
            DEEP_STEPS,
            [
                monitor(
                    DEEP_STEPS,
                    "random",
                    "skip",
                    resolution=21,
                    line_resolution=0,
                    probe_samples=300,
                )
            ],
        )
        planes.append(last(folder, "skip-plane"))
    return {"skip-connections": filmstrip_figure(planes, names=["with skips", "without skips"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--readme", type=Path, help="write six smaller copies into this folder")
    arguments = parser.parse_args()
    out: Path = arguments.out
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    figures, film, solution = descent(out)
    figures |= adam(out, solution)
    figures |= skips(out)
    for name, sentence in PICTURES.items():
        path = out / f"{name}.png"
        if name in figures:
            Image.fromarray(figure_to_image(figures[name])).save(path)
        else:
            path = path.with_suffix(".gif")
            shutil.copyfile(film, path)
        print(f"{path.name:24}{sentence}")
    if arguments.readme:
        arguments.readme.mkdir(parents=True, exist_ok=True)
        for name in README:
            small(figures[name], arguments.readme / f"{name}.png")
    print(f"\n{len(PICTURES)} pictures in {out}, {time.perf_counter() - started:.0f} s")


def small(figure: Figure, path: Path, width: int = 400) -> None:
    """A copy of that many pixels across, in 256 colours."""
    picture = Image.fromarray(figure_to_image(figure))
    height = round(picture.height * width / picture.width)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
