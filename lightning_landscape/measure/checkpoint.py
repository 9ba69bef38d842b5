"""Reads a Lightning checkpoint safely, and builds the module and the data for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.training.data.probe import why_unreadable

_MODULE, _DATA = "hyper_parameters", "datamodule_hyper_parameters"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read with ``weights_only=True``, or is not a Trainer's checkpoint.
    """
    owner = f"measure(checkpoint={str(path)!r})"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{owner}: no such file; expected a checkpoint saved by a Trainer")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many types
        raise ValueError(
            f"{owner}: it cannot be read safely ({why_unreadable(error)}); pass classes "
            f"in it that you trust to torch.serialization.add_safe_globals([...])"
        ) from error
    required = {"state_dict", "loops", "epoch", "global_step"}
    if not isinstance(content, dict) or not required <= content.keys():
        raise ValueError(
            f"{owner}: it is not a checkpoint of a Trainer, which holds {sorted(required)}; for "
            f"other files load the weights yourself and pass the module: measure(module, data)"
        )
    return content


def is_complete(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it holds optimizers and schedulers, not only the weights."""
    return "optimizer_states" in checkpoint and "lr_schedulers" in checkpoint


def step_of(checkpoint: Mapping[str, Any], module: Any) -> int:
    """The number of batches that stepped: the label of these weights during training.

    Lightning increments its counter after the hooks at the end of a batch, and after a validation
    that follows it.  Checkpoints saved there have a processed batch in an unfinished epoch.
    """
    fit = checkpoint["loops"]["fit_loop"]
    counter = int(fit["epoch_loop.state_dict"]["_batches_that_stepped"])
    epoch, batch = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]["total"]
    within = epoch["processed"] < epoch["started"] and 0 < batch["ready"] == batch["processed"]
    step = counter + int(within)
    # With gradient accumulation the last batch may not have stepped.
    return min(step, int(checkpoint["global_step"])) if module.automatic_optimization else step


def build_module(module: Any, checkpoint: Mapping[str, Any] | None, init: dict[str, Any]) -> Any:
    """``module``, or an instance if it is a class.

    Raises:
        TypeError: it is neither, or arguments are missing.
    """
    if isinstance(module, type) and _is_lightning(module, "LightningModule"):
        return _build("module", module, (checkpoint or {}).get(_MODULE, {}), init)
    if not _is_lightning(type(module), "LightningModule"):
        raise TypeError(f"measure(module={module!r:.80}): expected a LightningModule or its class")
    if init:
        raise TypeError(
            f"measure(init={init!r:.80}): only used if module is a class; pass the class, or leave "
            f"init out"
        )
    return module


def build_data(data: Any, checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    """``data`` as keyword arguments of ``Trainer.fit``.

    Raises:
        TypeError: it has a wrong type.
    """
    if isinstance(data, type) and _is_lightning(data, "LightningDataModule"):
        return {"datamodule": _build("data", data, (checkpoint or {}).get(_DATA, {}), {})}
    if data is None:
        return {}
    if _is_lightning(type(data), "LightningDataModule"):
        return {"datamodule": data}
    if isinstance(data, list) and data and not any(isinstance(item, DataLoader) for item in data):
        batches: Any = data
        return {"train_dataloaders": DataLoader(batches, batch_size=None)}  # without collating
    if inspect.isroutine(data):
        return build_data(data(), checkpoint)
    no_loader = isinstance(data, (dict, tuple, str, torch.Tensor, Dataset))
    if no_loader or not hasattr(data, "__iter__"):
        raise TypeError(
            f"measure(data={data!r:.80}): expected a DataLoader, a list of batches, a "
            f"LightningDataModule or its class, or a function that returns one of these"
        )
    return {"train_dataloaders": data}


def _build(argument: str, kind: Any, saved: Any, init: dict[str, Any]) -> Any:
    """An instance of ``kind`` from the saved hyper-parameters that it accepts."""
    parameters = inspect.signature(kind).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        saved = {name: value for name, value in saved.items() if name in parameters}
    try:
        inspect.signature(kind).bind(**{**saved, **init})
    except TypeError as error:
        raise TypeError(
            f"measure({argument}={kind.__qualname__}): it cannot be built from the "
            f"hyper-parameters in the checkpoint, {sorted(saved)}, and init={init!r:.80}: {error}; "
            f"pass init={{...}} (--init name=value), or the object instead of its class"
        ) from error
    return kind(**{**saved, **init})


def _is_lightning(kind: type, name: str) -> bool:
    """Whether ``kind`` is a Lightning class; by name, because there are two packages."""
    return any(
        base.__name__ == name and base.__module__.startswith(("pytorch_lightning.", "lightning."))
        for base in kind.__mro__
    )
