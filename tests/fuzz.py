"""Random trainings: networks, batches, Trainers and callbacks drawn by hypothesis.

A :class:`Recipe` holds plain values only, so that a failure prints one that can be pasted into a
test, and makes the same run again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
)
from lightning_landscape.training.monitor import Monitor

CLASSES = 3


def profile(examples: int, **more: Any) -> settings:
    """``examples`` that are the same every time; with ``LANDSCAPE_FUZZ=10`` ten times as many,
    new ones every time."""
    times = float(os.environ.get("LANDSCAPE_FUZZ", "0"))
    return settings(
        max_examples=int(examples * times) if times else examples,
        derandomize=not times,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )


# -- networks --------------------------------------------------------------------------------------

# What an input looks like -> its shape without the batch, and the layers that take it.
SHAPES = {"table": (6,), "image": (2, 5, 5), "series": (4, 6), "tokens": (4,)}
_ANYWHERE = ("relu", "gelu", "tanh", "silu", "dropout", "layer_norm", "residual")
MENU = {
    "table": (*_ANYWHERE, "linear", "batch_norm", "group_norm", "tied", "same"),
    "image": (*_ANYWHERE, "conv", "batch_norm", "group_norm"),
    "series": (*_ANYWHERE, "linear", "conv", "lstm", "gru", "attention"),
}
MENU["tokens"] = MENU["series"]


class Wrapped(nn.Module):
    """A layer in the place it is given: a shortcut, channels second, the sequence of a tuple."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shortcut":
            return x + self.layer(x)
        if self.how == "channels second":
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "attention":
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)[0]


def _layer(name: str, shape: tuple[int, ...], before: list[nn.Module]) -> nn.Module:
    """A layer that keeps the shape."""
    channels = shape[0] if len(shape) == 3 else shape[-1]
    mixing = nn.Conv2d(channels, channels, 3, padding=1) if len(shape) == 3 else None
    linears = [m for m in before if isinstance(m, nn.Linear)]
    if name in ("tied", "same") and linears:  # a weight in two layers, a layer in two places
        if name == "same":
            return linears[-1]
        tied = nn.Linear(channels, channels)
        tied.weight = linears[-1].weight
        return tied
    if name == "conv" and mixing is None:
        return Wrapped(nn.Conv1d(channels, channels, 3, padding=1), "channels second")
    made: dict[str, Any] = {
        "linear": lambda: mixing or nn.Linear(channels, channels),
        "conv": lambda: mixing,
        "residual": lambda: Wrapped(mixing or nn.Linear(channels, channels), "shortcut"),
        "batch_norm": lambda: (nn.BatchNorm2d if mixing else nn.BatchNorm1d)(channels),
        "group_norm": lambda: nn.GroupNorm(2, channels),
        "layer_norm": lambda: nn.LayerNorm(shape),
        "dropout": lambda: nn.Dropout(0.3),
        "lstm": lambda: Wrapped(nn.LSTM(channels, channels, batch_first=True), "first of tuple"),
        "gru": lambda: Wrapped(nn.GRU(channels, channels, batch_first=True), "first of tuple"),
        "attention": lambda: Wrapped(
            nn.MultiheadAttention(channels, 2, dropout=0.1, batch_first=True), "attention"
        ),
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "tanh": nn.Tanh,
        "silu": nn.SiLU,
    }
    return made.get(name, made["linear"])()


# -- batches ---------------------------------------------------------------------------------------


class Named(NamedTuple):
    inputs: Tensor
    targets: Tensor
    note: str


@dataclass
class Record:
    inputs: Tensor
    targets: Tensor
    notes: list[str] = field(default_factory=list)
    weight: float | None = None


# name -> (pack, unpack)
BATCHES: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "nested": (
        lambda x, y: {"in": [{"x": x}, None], "meta": (y, ["a"] * len(y), {"epoch": 3})},
        lambda b: (b["in"][0]["x"], b["meta"][0]),
    ),
    "named tuple": (lambda x, y: Named(x, y, "note"), lambda b: (b.inputs, b.targets)),
    "dataclass": (lambda x, y: Record(x, y, ["a"]), lambda b: (b.inputs, b.targets)),
    "extras": (
        lambda x, y: (["id"] * len(y), x, 7, y, 0.5, None, torch.tensor(2.0)),
        lambda b: (b[1], b[3]),
    ),
}


# -- recipes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One training, in plain values."""

    inputs: str
    layers: tuple[str, ...]
    batch: str
    optimizer: str
    trainer: dict[str, Any]
    monitors: tuple[tuple[str, dict[str, Any]], ...]
    frozen: int | None = None  # which layer
    unused: bool = False  # a parameter without a gradient
    loss: str = "cross_entropy"
    sizes: tuple[int, int] = (4, 24)  # of a batch, of the data
    scheduler: str = "none"
    callbacks_first: bool = True
    seed: int = 0


class Network(pl.LightningModule):
    """What a recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        shape = SHAPES[recipe.inputs]
        body: list[nn.Module] = []
        if recipe.inputs == "tokens":
            body.append(nn.Embedding(7, 6))
            shape = (4, 6)
        for name in recipe.layers:
            body.append(_layer(name, shape, body))
        self.body = nn.Sequential(*body)
        flat = int(torch.tensor(shape).prod())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(flat, CLASSES))
        if recipe.frozen is not None and recipe.frozen < len(body):
            body[recipe.frozen].requires_grad_(False)
        if recipe.unused:
            self.unused = nn.Parameter(torch.ones(3))

    def loss(self, batch: Any) -> Tensor:
        x, y = BATCHES[self.recipe.batch][1](batch)
        out = self.head(self.body(x))
        if self.recipe.loss == "mse":
            return F.mse_loss(out, F.one_hot(y, CLASSES).to(out))
        reduction = "sum" if self.recipe.loss == "summed" else "mean"
        return F.cross_entropy(out, y, reduction=reduction)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=self.recipe.sizes[0])
        return loss if self.recipe.seed % 2 else {"loss": loss, "extra": 1}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=self.recipe.sizes[0])

    def configure_optimizers(self) -> Any:
        name = self.recipe.optimizer
        params: Any = [p for p in self.parameters() if p.requires_grad]
        rate = 0.01 if self.recipe.loss == "summed" else 0.05
        made = {
            "sgd": lambda: torch.optim.SGD(params, lr=rate),
            "momentum": lambda: torch.optim.SGD(
                params, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-3
            ),
            "groups": lambda: torch.optim.SGD(
                [{"params": params[::2]}, {"params": params[1::2], "lr": rate / 2}], lr=rate
            ),
            "adam": lambda: torch.optim.Adam(params, lr=rate / 5),
            "adamw": lambda: torch.optim.AdamW(params, lr=rate / 5, amsgrad=True),
            "rmsprop": lambda: torch.optim.RMSprop(params, lr=rate / 10, momentum=0.5),
            "adagrad": lambda: torch.optim.Adagrad(params, lr=rate),
            "lbfgs": lambda: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
        }
        optimizer = made[name]()
        if self.recipe.scheduler == "none":
            return optimizer
        rule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": rule, "interval": self.recipe.scheduler}]

    # -- data, the same every time ---------------------------------------------------------------

    def batches(self, seed: int, shuffle: bool = False) -> DataLoader:
        size, examples = self.recipe.sizes
        generator = torch.Generator().manual_seed(seed)
        shape = SHAPES[self.recipe.inputs]
        x = torch.randn(examples, *shape, generator=generator)
        if self.recipe.inputs == "tokens":
            x = x.abs().mul(3).long().clamp(max=6)
        y = torch.randint(CLASSES, (examples,), generator=generator)
        if self.recipe.trainer.get("precision") == "64-true" and x.is_floating_point():
            x = x.double()

        def collate(rows: list[int]) -> Any:
            return BATCHES[self.recipe.batch][0](x[rows], y[rows])

        # BatchNorm takes no batch of one.
        return DataLoader(
            range(examples), size, shuffle=shuffle, collate_fn=collate, drop_last=True
        )

    def train_dataloader(self) -> DataLoader:
        return self.batches(5, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.batches(6)


KINDS: dict[str, type[Monitor]] = {
    "hessian": HessianMonitor,
    "sharpness": SharpnessMonitor,
    "landscape": LandscapeMonitor,
    "generalization": GeneralizationMonitor,
    "interpolation": InterpolationMonitor,
}


def monitors(recipe: Recipe) -> list[Monitor]:
    """Fresh callbacks; ``probe="given"`` and ``"one batch"`` stand for the validation data."""
    data = Network(recipe).batches(6)

    def option(key: str, value: Any) -> Any:
        if key.endswith("probe") and value == "given":
            return data
        if key.endswith("probe") and value == "list":
            return list(data)
        if key == "other_probes":
            return {"other": data}
        return value

    made = []
    for index, (kind, options) in enumerate(recipe.monitors):
        given = {key: option(key, value) for key, value in options.items()}
        made.append(KINDS[kind](name="abc"[index], **given))
    return made


_FLAG = st.booleans()
_COMMON = {
    "every_n_train_steps": st.sampled_from([1, 2, 3, None]),
    "every_n_epochs": st.just(1),
    "probe": st.sampled_from([None, None, "given", "list"]),
    "probe_samples": st.integers(1, 12),
    "probe_mode": st.sampled_from(["train", "eval"]),
    "parameters": st.sampled_from([None, None, "*weight", ["head.*"]]),
    "max_overhead": st.sampled_from([None, None, None, 0.05]),
    "prog_bar": _FLAG,
}
_ENGINE = {"engine": st.sampled_from(["auto", "auto", "finite_difference"])}
_OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "hessian": {
        **_ENGINE,
        "k": st.integers(1, 3),
        "method": st.sampled_from(["lanczos", "power"]),
        "max_hvps": st.integers(3, 6),
        "rtol": st.sampled_from([None, 0.0]),
        "min_eigenvalue": _FLAG,
        "trace_samples": st.sampled_from([0, 2]),
        "density_samples": st.sampled_from([0, 0, 0, 2]),
        "blocks": _FLAG,
        "batch_edge_ratio": _FLAG,
        "update_curvature": _FLAG,
    },
    "sharpness": {
        **_ENGINE,
        "adaptive": _FLAG,
        "worst_case": _FLAG,
        "worst_case_norm": st.sampled_from(["l2", "linf"]),
        "worst_case_steps": st.integers(1, 2),
        "per_batch": _FLAG,
        "average": _FLAG,
        "samples": st.just(2),
        "keskar": _FLAG,
        "critical": _FLAG,
    },
    "landscape": {
        "directions": st.one_of(
            st.sampled_from(["random", "eigenvectors", "gradient", "update", "pca"]),
            st.tuples(*[st.sampled_from(["random", "gradient", "update", "pca"])] * 2),
        ),
        "resolution": st.sampled_from([0, 2, (2, 3)]),
        "line_resolution": st.just(3),
        "span": st.sampled_from([None, (-0.3, 0.5)]),
        "surface": _FLAG,
        "trajectory": _FLAG,
        "validation_probe": st.sampled_from([None, "given"]),
    },
    "generalization": {"validation_probe": st.sampled_from(["given", "list", None])},
    "interpolation": {
        "reference": st.sampled_from(["initial", "last_epoch"]),
        "resolution": st.integers(2, 3),
        "reestimate_batch_norm": _FLAG,
        "blocks": _FLAG,
        "other_probes": st.sampled_from([None, "given"]),
    },
}
_TRAINER = {
    "max_epochs": st.integers(1, 2),
    "max_steps": st.sampled_from([-1, -1, -1, 1, 3]),
    "accumulate_grad_batches": st.integers(1, 3),
    "gradient_clip_val": st.sampled_from([None, None, 0.05, 10.0]),
    "gradient_clip_algorithm": st.sampled_from(["norm", "value"]),
    "limit_val_batches": st.sampled_from([0, 1, 1.0]),
    "val_check_interval": st.sampled_from([1.0, 2]),
    "num_sanity_val_steps": st.sampled_from([0, 2]),
    "precision": st.sampled_from(["32-true"] * 4 + ["64-true", "bf16-mixed"]),
    "deterministic": _FLAG,
}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any of them."""
    inputs = draw(st.sampled_from(sorted(SHAPES)))
    layers = draw(st.lists(st.sampled_from(MENU[inputs]), max_size=6))
    trainer = draw(st.fixed_dictionaries(_TRAINER))
    optimizer = draw(
        st.sampled_from(
            ["sgd", "momentum", "groups", "adam", "adamw", "rmsprop", "adagrad", "lbfgs"]
        )
    )
    kinds = draw(st.lists(st.sampled_from(sorted(_OPTIONS)), min_size=1, max_size=3))
    loss = draw(st.sampled_from(["cross_entropy", "mse", "summed"]))
    chosen = []
    for kind in kinds:
        options = draw(st.fixed_dictionaries({**_COMMON, **_OPTIONS[kind]}))
        if loss == "summed":
            options["loss_reduction"] = "sum"
        chosen.append((kind, options))
    return Recipe(
        inputs=inputs,
        layers=tuple(layers),
        batch=draw(st.sampled_from(sorted(BATCHES))),
        optimizer=optimizer,
        trainer=trainer,
        monitors=tuple(chosen),
        frozen=draw(st.one_of(st.none(), st.integers(0, 6))),
        unused=draw(_FLAG),
        loss=loss,
        sizes=draw(st.sampled_from([(4, 24), (3, 10), (8, 16), (2, 4)])),
        scheduler=draw(st.sampled_from(["none", "step", "epoch"])),
        callbacks_first=draw(_FLAG),
        seed=draw(st.integers(0, 3)),
    )
