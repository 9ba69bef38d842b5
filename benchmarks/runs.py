"""Training runs with known results, for the accuracy benchmark and the integration tests.

1. The edge of stability: full-batch training on digits, where the ratio settles at a known value.
2. Along minibatch training: the eigenvalue reported and ARPACK's at the same weights.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from mnist1d.data import get_dataset_args, make_dataset
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Module(pl.LightningModule):
    """A network, a loss, an optimizer."""

    def __init__(self, net: nn.Module, loss: Loss, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net, self.loss, self.make_optimizer = net, loss, make_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


def mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def fit(module: Module, data: Iterable[Any], steps: int, callbacks: list[pl.Callback]) -> None:
    """``steps`` steps on the CPU with a minimal Trainer."""
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*number of training batches.*")
        pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        ).fit(module, data)


# -- data, all of it offline ----------------------------------------------------------------------


def digits() -> Batch:
    """scikit-learn's 1797 scans: each pixel's mean taken off, then one scale for all."""
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    inputs = inputs - inputs.mean(0)
    return inputs / inputs.std(), torch.tensor(labels)


def mnist1d() -> Batch:
    """4000 one-dimensional digits, made by the package's generator (seed 42), not downloaded."""
    made = make_dataset(get_dataset_args())
    return torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])


DATA = {"digits": digits, "mnist1d": mnist1d}


# -- 1. the edge of stability ---------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeRow:
    """Full-batch training with one optimizer, and where the mean edge ratio then lies."""

    name: str
    make_optimizer: MakeOptimizer
    steps: int
    low: float
    high: float


# The ranges were measured over five seeds in plain torch.
EDGE_ROWS = [
    EdgeRow("SGD lr .4", lambda p: SGD(p, lr=0.4), 1500, 1.028, 1.033),
    EdgeRow("SGD lr .2", lambda p: SGD(p, lr=0.2), 2000, 1.001, 1.011),
    EdgeRow("momentum .9, lr .5", lambda p: SGD(p, lr=0.5, momentum=0.9), 1500, 0.971, 0.997),
    EdgeRow(
        "Nesterov .9, lr .15",
        lambda p: SGD(p, lr=0.15, momentum=0.9, nesterov=True),
        1500,
        1.005,
        1.008,
    ),
    EdgeRow("Adam lr 3e-3", lambda p: Adam(p, lr=3e-3), 1500, 0.998, 1.001),
    EdgeRow("RMSprop lr 2e-4", lambda p: RMSprop(p, lr=2e-4), 1500, 1.081, 1.086),
]


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def edge_ratios(make_optimizer: MakeOptimizer, steps: int, seed: int) -> dict[int, float]:
    """step -> ``hessian/edge_ratio`` along full-batch training on 500 digits."""
    pl.seed_everything(seed, verbose=False)
    inputs, labels = digits()
    batch = inputs[:500], nn.functional.one_hot(labels[:500], 10).float()
    monitor = HessianMonitor(every_n_train_steps=20, max_overhead=None, probe=batch)
    module = Module(mlp([64, 64, 64, 10], nn.Tanh), half_squared_error, make_optimizer)
    # The batch itself, repeated: collating 500 rows each time would take half of the run.
    fit(module, DataLoader([batch] * steps, batch_size=None), steps, [monitor])
    return {row["step"]: row["hessian/edge_ratio"] for row in monitor.history}


def late_mean(ratios: dict[int, float], steps: int) -> float:
    """The mean over the last 40 % of the steps: single points reach .95 to 1.09."""
    return statistics.fmean(ratio for step, ratio in ratios.items() if step > 0.6 * steps)


# -- 2. along minibatch training ------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """What one method reported, beside the reference."""

    errors: list[float]  # relative
    hvps: list[int]

    def __str__(self) -> str:
        return (
            f"{len(self.errors)} measurements: error {statistics.median(self.errors):.1e} at the "
            f"median, {max(self.errors):.1e} at worst; {statistics.median(self.hvps):g} HVPs at "
            f"the median, {max(self.hvps)} at most"
        )


class _Weights(pl.Callback):
    """Copies the weights after each measurement; must follow the monitors in the list."""

    def __init__(self, monitor: HessianMonitor) -> None:
        self.monitor = monitor
        self.at: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.fit_loop.total_batch_idx + 1  # counted here, not read from the record
        if self.monitor.history and self.monitor.history[-1]["step"] == step:
            self.at[step] = _flat(pl_module.net.parameters()).detach().clone()


def along_training(
    dataset: str,
    method: Literal["lanczos", "power"] = "lanczos",
    measurements: int = 40,
    every: int = 25,
) -> Series:
    """Minibatch SGD with momentum on a ReLU network of some 85 thousand parameters."""
    inputs, labels = DATA[dataset]()  # before the seed: the generator of mnist1d sets its own
    pl.seed_everything(0, verbose=False)
    probe = inputs[:512], labels[:512]
    # Power iteration has no cap on products, so that its errors are not due to the cap.
    monitor = HessianMonitor(
        every_n_train_steps=every, max_overhead=None, probe=probe, method=method, max_hvps=200
    )
    weights = _Weights(monitor)
    net = mlp([inputs.shape[1], 256, 256, 10], nn.ReLU)
    loss = nn.functional.cross_entropy
    module = Module(net, loss, lambda p: SGD(p, lr=0.02, momentum=0.9))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)
    fit(module, loader, 1 + (measurements - 1) * every, [monitor, weights])

    rows = monitor.history
    assert len(rows) == measurements
    assert [row["step"] for row in rows] == list(weights.at)
    truths = [top_by_arpack(net, loss, probe, w) for w in weights.at.values()]
    values = [row["hessian/top_eigenvalue"] for row in rows]
    errors = [abs(value / truth - 1) for value, truth in zip(values, truths, strict=True)]
    return Series(errors, [int(row["hessian/hvps"]) for row in rows])


def top_by_arpack(net: nn.Module, loss: Loss, batch: Batch, weights: Tensor) -> float:
    """The largest algebraic eigenvalue at ``weights``: float64, independent of this package."""
    twin = copy.deepcopy(net).double()
    nn.utils.vector_to_parameters(weights.double(), twin.parameters())
    params = list(twin.parameters())
    inputs, targets = batch
    value = loss(twin(inputs.double()), targets)
    gradient = _flat(torch.autograd.grad(value, params, create_graph=True))

    def product(vector: np.ndarray) -> np.ndarray:
        along = torch.from_numpy(vector).to(gradient.device)
        product = _flat(torch.autograd.grad(gradient, params, along, retain_graph=True))
        return product.cpu().numpy()

    operator = LinearOperator((len(weights),) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(weights))
    return float(eigsh(operator, 1, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)[0])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
