"""Callbacks from the environment variable ``LIGHTNING_LANDSCAPE``, for scripts without ours.

Every Trainer of both Lightning packages calls the entry point.  ``1`` adds
:func:`~lightning_landscape.landscape_callbacks`, a path the callbacks of a YAML file.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

import lightning_landscape
from lightning_landscape.training.lightning_packages import (
    CALLBACKS,
    MISCONFIGURATIONS,
    Callback,
)
from lightning_landscape.training.monitor import Monitor

VARIABLE = "LIGHTNING_LANDSCAPE"
_ON = ("1", "true", "on", "yes")
_EXPECTED = "1 for landscape_callbacks(), the path of a YAML file with callbacks, or 0"


class FromEnvironment(Callback):
    """First of the callbacks that the variable adds; it removes the others, with a warning.

    If the Trainer has measuring callbacks of its own, or if they cannot measure its module.
    """

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__()
        self.ours = [callback for callback in callbacks if isinstance(callback, Callback)]
        for callback in self.ours:
            callback._origin = VARIABLE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide before the others are set up."""
        if stage != "fit":
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
        if all(monitor in self.ours for monitor in monitors):
            self._check(trainer, lambda monitor: monitor._check_fit(trainer, pl_module))
            return
        self._remove(trainer)
        rank_zero_warn(
            f"{VARIABLE}: the Trainer has measuring callbacks of its own, and no others are added "
            f"to them"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same after ``configure_model``."""
        self._check(trainer, lambda monitor: monitor.on_fit_start(trainer, pl_module))

    def _check(self, trainer: Trainer, check: Callable[[Monitor], None]) -> None:
        try:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if callback in self.ours and isinstance(callback, Monitor):
                    check(callback)
        except MISCONFIGURATIONS as error:
            self._remove(trainer)
            rank_zero_warn(f"{VARIABLE}: nothing is measured. {error}")

    def _remove(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # In place: Lightning is iterating over this list, and those removed come later in it.
        callbacks[:] = [c for c in callbacks if c not in self.ours]


def callbacks(value: str) -> list[Any]:
    """The callbacks that ``value`` of the variable stands for.

    Raises:
        ValueError: ``value`` is neither a switch nor the path of a file, or the file does not hold
            callbacks; the message names the entry.
    """
    if value.lower() in _ON:
        chosen: list[Any] = lightning_landscape.landscape_callbacks()
    else:
        chosen = _read(Path(value).expanduser())
    return [FromEnvironment(chosen), *chosen] if chosen else []


def _read(path: Path) -> list[Any]:
    owner = f"{VARIABLE}={str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{owner}: there is no such file; expected {_EXPECTED}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{owner}: not a YAML file: {error}") from error
    if isinstance(content, Mapping) and set(content) == {"callbacks"}:
        content = content["callbacks"]
    if not isinstance(content, list):
        raise ValueError(
            f"{owner}: expected a list of callbacks, each a name or class_path with init_args, as "
            f"in the trainer.callbacks of a LightningCLI"
        )
    found: list[Any] = []
    for number, entry in enumerate(content, 1):
        made = _make(f"{owner}, entry {number}", entry)
        found += made if isinstance(made, list) else [made]
    return found


def _make(owner: str, entry: object) -> Any:
    if isinstance(entry, str):
        entry = {"class_path": entry}
    keys = {"class_path", "init_args"}
    if not isinstance(entry, Mapping) or "class_path" not in entry or set(entry) - keys:
        raise ValueError(
            f"{owner}: expected a name, or a mapping with class_path and init_args, got {entry!r}"
        )
    name, arguments = str(entry["class_path"]), entry.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{owner}: expected a mapping as init_args of {name}, got {arguments!r}")
    try:
        made = _named(name)(**arguments)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"{owner}: {error}") from error
    for callback in made if isinstance(made, list) else [made]:
        if not isinstance(callback, CALLBACKS):
            raise ValueError(f"{owner}: {name} makes a {type(callback).__name__}, not a callback")
    return made


def _named(name: str) -> Any:
    """The class or function; a name without a module is one of this package."""
    module, _, attribute = name.rpartition(".")
    if not module and attribute not in lightning_landscape.__all__:
        near = difflib.get_close_matches(attribute, lightning_landscape.__all__, 1)
        raise ValueError(
            f"class_path {name!r} is no name of lightning_landscape"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return getattr(importlib.import_module(module or "lightning_landscape"), attribute)
