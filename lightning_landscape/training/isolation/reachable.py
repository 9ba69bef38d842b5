"""What ``training_step`` can reach through its Trainer."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer

from lightning_landscape.training.isolation.entered import enters, is_atomic


def reachable_through(trainer: Trainer) -> dict[str, Any]:
    """Objects by name: optimizers, schedulers, callbacks, the data module, counters, flags.

    Not the loggers, which are replaced while measuring, nor progress bars and our own callbacks.
    """
    found: dict[str, Any] = {"trainer.optimizers": trainer.optimizers}
    for number, config in enumerate(trainer.lr_scheduler_configs):
        found[f"trainer.lr_scheduler_configs[{number}]"] = vars(config)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found["trainer.callbacks"] = callbacks
    for number, callback in enumerate(callbacks):
        if _is_of(callback, "lightning_landscape") or _is_progress_bar(callback):
            continue
        # As an object only if its class is the user's; not if it has a thread.
        by_lightning = type(callback).__module__.startswith(("pytorch_lightning.", "lightning."))
        if by_lightning or enters(callback):
            found[f"trainer.callbacks[{number}]"] = vars(callback) if by_lightning else callback
    datamodule: Any = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        found["trainer.datamodule"] = datamodule
    found["trainer"] = Flags(vars(trainer))
    loop: Any = trainer.fit_loop
    epoch = loop.epoch_loop
    loops = {
        "trainer.fit_loop": loop,
        "trainer.fit_loop.epoch_loop": epoch,
        "trainer.fit_loop.epoch_loop.automatic_optimization": epoch.automatic_optimization,
        "trainer.fit_loop.epoch_loop.manual_optimization": epoch.manual_optimization,
    }
    for name, part in loops.items():
        found[name] = Flags(vars(part))
        found |= _progress(part, name)
    return found


class Flags:
    """The numbers, flags and texts among an object's attributes; the others are not entered."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.names = [name for name, value in attributes.items() if is_atomic(value)]


def _progress(holder: Any, name: str) -> dict[str, Any]:
    """The counters of a loop, also nested ones."""
    found: dict[str, Any] = {}
    for key, value in vars(holder).items():
        if type(value).__module__.endswith("loops.progress"):
            found[f"{name}.{key}"] = Flags(vars(value))
            found |= _progress(value, f"{name}.{key}")
    return found


def _is_of(value: object, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(value).__mro__)


def _is_progress_bar(callback: object) -> bool:
    return any(kind.__name__ == "ProgressBar" for kind in type(callback).__mro__)
