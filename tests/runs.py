"""Train a module for a few steps and record everything by which two runs are compared."""

from __future__ import annotations

import collections
import hashlib
import random
import struct
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn, optim
from torch.utils import data as torch_data

from lightning_landscape import read_history


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


def rows_of(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a ``history.jsonl`` as callbacks hold them: without the id of the run."""
    return [{k: v for k, v in row.items() if k != "run"} for row in read_history(path)]


# Where runs train; the whole of `pytest --device` is in here.
DEVICE: dict[str, Any] = {"accelerator": "cpu"}

OURS = ("hessian/", "sharpness/", "landscape/", "generalization/", "interpolation/")


@dataclass
class Outcome:
    """The result of a run, without the values that our callbacks log."""

    state: dict[str, Any] = field(default_factory=dict)
    trainer: Any = None
    logger: Any = None


def train(
    make_module: Callable[[], pl.LightningModule],
    data: Any,
    callbacks: Sequence[pl.Callback] = (),
    root: Path | str = ".",
    seed: int = 1,
    before_fit: Callable[[pl.Trainer, pl.LightningModule, Any], object] | None = None,
    ckpt_path: Path | str | None = None,
    **settings: Any,
) -> Outcome:
    """One seeded run; ``data`` is a loader, a datamodule or a function making one."""
    pl.seed_everything(seed, verbose=False)
    module = make_module()
    logger = MemoryLogger()
    trainer = pl.Trainer(
        **{
            **DEVICE,
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
        feed = data() if callable(data) else data
        if before_fit is not None:
            before_fit(trainer, module, feed)
        trainer.fit(module, feed, ckpt_path=ckpt_path)
    return Outcome(state_of(trainer, trainer.lightning_module, logger), trainer, logger)


def state_of(trainer: pl.Trainer, module: pl.LightningModule, logger: MemoryLogger) -> dict:
    """Everything that must be equal in two runs."""
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "gradients": {n: p.grad for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in module.named_buffers()},
        "modes": {n: m.training for n, m in module.named_modules()},
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "scaler": trainer.precision_plugin.state_dict(),
        "counters": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "callbacks": [vars(c) for c in trainer.callbacks if not _ours(c)],
        "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],  # noqa: NPY002
        "rng of devices": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "logged": [
            (step, {k: v for k, v in row.items() if not k.startswith(OURS)})
            for step, row in logger.rows
            if any(not k.startswith(OURS) for k in row)
        ],
        "callback_metrics": {
            k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith(OURS)
        },
        "attributes": {name: _attributes(m) for name, m in module.named_modules()},
    }


def _ours(callback: pl.Callback) -> bool:
    return any(c.__module__.startswith("lightning_landscape") for c in type(callback).__mro__)


# Compared on their own, or the trainer's.
_NOT_ATTRIBUTES = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")
_NOT_ATTRIBUTES += ("_torchdynamo_wrapper_id",)  # an address


def _attributes(module: nn.Module) -> dict[str, Any]:
    """All that a submodule holds; its hooks without their keys, which are numbered globally."""
    return {
        key: list(value.values()) if "_hooks" in key and isinstance(value, dict) else value
        for key, value in vars(module).items()
        if key not in _NOT_ATTRIBUTES
    }


class DataOrder(pl.Callback):
    """Keeps a checksum of every training batch, as passed to training_step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        digest = hashlib.sha256()
        _digest(batch, digest.update)
        self.seen.append(digest.hexdigest())


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode() + _bits(value).cpu().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(str(key).encode())
            _digest(item, update)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, update)
    elif hasattr(value, "__dict__"):
        _digest(vars(value), update)
    else:
        update(repr(value).encode())


# Of these two runs have their own, and what matters in them is compared elsewhere.
_ELSEWHERE = (
    pl.Trainer,
    Logger,
    optim.Optimizer,
    optim.lr_scheduler.LRScheduler,
    torch_data.DataLoader,
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def differences(a: Any, b: Any, path: str = "", seen: set[int] | None = None) -> list[str]:
    """Where two nested structures differ, bit for bit; other objects by their attributes."""
    seen = set() if seen is None else seen

    def inside(x: Any, y: Any, name: object) -> list[str]:
        return differences(x, y, f"{path}/{name}", seen)

    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} against {type(b).__name__}"]
    if isinstance(a, (int, str, bytes, complex, type(None), torch.dtype, torch.device, Path)):
        return [] if a == b else [path]
    if isinstance(a, float):
        return [] if struct.pack("d", a) == struct.pack("d", b) else [path]
    if isinstance(a, Tensor):
        return [] if _same_tensor(a, b) else [path]
    if isinstance(a, np.ndarray):
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return [] if same else [path]
    if isinstance(a, _ELSEWHERE) or id(a) in seen:
        return []
    seen.add(id(a))
    if isinstance(a, Mapping):
        if len(a) != len(b) or (all(isinstance(k, _PLAIN) for k in a) and list(a) != list(b)):
            return [f"{path}: keys {list(map(str, a))} against {list(map(str, b))}"]
        pairs = zip(a.items(), b.items(), strict=True)
        return [d for (key, x), (_, y) in pairs for d in inside(x, y, key)]
    if isinstance(a, (list, tuple, collections.deque)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} against {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in inside(x, y, i)]
    if isinstance(a, nn.Module):
        tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (a, b)]
        return inside(*tensors, "tensors")
    if isinstance(a, torch.Generator):
        return inside(a.get_state(), b.get_state(), "state")
    if isinstance(a, np.random.Generator):
        return inside(a.bit_generator.state, b.bit_generator.state, "state")
    if isinstance(a, random.Random):
        return inside(a.getstate(), b.getstate(), "state")
    if isinstance(a, weakref.ref):
        return inside(a(), b(), "referent")
    if isinstance(a, _FUNCTIONS):
        return inside(a.__qualname__, b.__qualname__, "function")
    if hasattr(a, "__dict__"):
        return inside(vars(a), vars(b), type(a).__name__)
    return [] if a == b else [f"{path}: {a!r} against {b!r}"]


_PLAIN = (str, int, float, tuple)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.is_sparse or b.is_sparse:
        return a.layout == b.layout and all(
            _same_tensor(x, y)
            for x, y in ((a._indices(), b._indices()), (a._values(), b._values()))
        )
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.requires_grad == b.requires_grad
        and torch.equal(_bits(a), _bits(b))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
