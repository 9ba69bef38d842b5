"""Train a module for a few steps and keep everything that two runs can be compared by."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor


class MemoryLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def values(self, key: str) -> list[tuple[int | None, float]]:
        """``(step, value)`` of one key, in the order logged."""
        return [(step, row[key]) for step, row in self.rows if key in row]


OURS = ("hessian/", "sharpness/", "landscape/")


@dataclass
class Outcome:
    """What a run left behind, without what our callbacks log."""

    state: dict[str, Any] = field(default_factory=dict)
    trainer: Any = None
    logger: Any = None


def train(
    make_module: Callable[[], pl.LightningModule],
    data: Any,
    callbacks: Sequence[pl.Callback] = (),
    root: Path | str = ".",
    seed: int = 1,
    **settings: Any,
) -> Outcome:
    """One seeded run on the CPU; ``data`` is a loader, a datamodule or a function making one."""
    pl.seed_everything(seed, verbose=False)
    module = make_module()
    logger = MemoryLogger()
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": logger,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            **settings,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*number of training batches.*")
        trainer.fit(module, data() if callable(data) else data)
    return Outcome(state_of(trainer, module, logger), trainer, logger)


def state_of(trainer: pl.Trainer, module: pl.LightningModule, logger: MemoryLogger) -> dict:
    """Everything two runs must agree on."""
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "gradients": {n: p.grad for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "modes": [m.training for m in module.modules()],
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "rng": [random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()],  # noqa: NPY002
        "logged": [
            (step, {k: v for k, v in row.items() if not k.startswith(OURS)})
            for step, row in logger.rows
            if any(not k.startswith(OURS) for k in row)
        ],
        "callback_metrics": {
            k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith(OURS)
        },
        "attributes": {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in ("prepare_data_per_node", "log", "log_dict")
        },
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, bit for bit; NaN equals NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
            and torch.equal(a.isnan(), b.isnan())
        )
        return [] if same else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} against {len(b)} entries"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return []
    if type(a) is not type(b):
        return [path]
    if isinstance(a, (int, float, str, bool, type(None), set)):
        return [] if a == b else [path]
    return []  # objects of other kinds are compared through their tensors elsewhere
