"""The usual callbacks in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_landscape.callbacks.early_stopping import SharpnessEarlyStopping
from lightning_landscape.callbacks.generalization import GeneralizationMonitor
from lightning_landscape.callbacks.hessian import HessianMonitor
from lightning_landscape.callbacks.interpolation import InterpolationMonitor
from lightning_landscape.callbacks.landscape import LandscapeMonitor
from lightning_landscape.callbacks.sharpness import SharpnessMonitor
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
    quoted,
)
from lightning_landscape.training.data.probe import Source, check_source, probe_of
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.schedule import EveryNSteps

MonitorName = Literal["hessian", "sharpness", "landscape", "interpolation", "generalization"]
_MONITORS: Mapping[str, type[Monitor]] = {
    "hessian": HessianMonitor,
    "sharpness": SharpnessMonitor,
    "landscape": LandscapeMonitor,
    "interpolation": InterpolationMonitor,
    "generalization": GeneralizationMonitor,
}


class Callbacks(list[Any]):
    """A list of callbacks, which explains itself where Lightning takes it for a callback."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"landscape_callbacks() returns a list, which has no attribute {name!r}: pass "
            f"callbacks=landscape_callbacks(), or beside other callbacks "
            f"callbacks=[*landscape_callbacks(), ...]"
        )


def landscape_callbacks(
    *,
    monitors: Sequence[MonitorName] = ("hessian", "sharpness", "landscape"),
    every_n_train_steps: EveryNSteps = "auto",
    every_n_epochs: int | None = None,
    max_overhead: float | None = 0.05,
    grace_seconds: float = 30.0,
    probe: Source = None,
    probe_samples: int = 512,
    probe_mode: ProbeMode = "train",
    loss_fn: UserLoss | None = None,
    loss_reduction: LossReduction = "mean",
    save_probe: bool = True,
    stop_above: float | None = None,
    patience: int = 3,
) -> list[Any]:
    """``HessianMonitor``, ``SharpnessMonitor`` and ``LandscapeMonitor``, or others, on one probe.

    Args:
        monitors: which callbacks: ``"hessian"``, ``"sharpness"``, ``"landscape"``,
            ``"interpolation"``, ``"generalization"``.
        every_n_train_steps: measure when the probe is complete, and then at multiples of this
            number of steps.  ``"auto"``: about 50 times in the run, every 100 steps if its length
            is unknown.  ``None``: epochs only.
        every_n_epochs: measure at the last batch of every n-th epoch, with ``"auto"`` only there.
        max_overhead: largest share of the training time that all of them together may
            take; measurements are spread over the run accordingly.  ``None``: no limit, exactly on
            schedule.
        grace_seconds: a short run may become up to twice as long, or 10 s longer if that is more,
            but not by more than these seconds.
        probe: the data, see ``HessianMonitor``; ``None``: the first training batches are kept.
        probe_samples: number of examples to keep, over all processes.
        probe_mode: ``"train"`` or ``"eval"``; ``GeneralizationMonitor`` always measures in eval
            mode.
        loss_fn: ``loss_fn(pl_module, batch)`` instead of ``training_step``.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples.
        save_probe: write the kept batches beside the logs, see ``HessianMonitor``.
        stop_above: stop the run when ``hessian/edge_ratio`` is above this at ``patience``
            measurements in a row; ``None``: never.
        patience: see ``stop_above``.

    Raises:
        ValueError: a value is out of range, ``monitors`` has an unknown or repeated name, or
            ``stop_above`` is given and ``"hessian"`` is not among them.
        TypeError: an argument has a wrong type.

    Example::

        trainer = Trainer(callbacks=landscape_callbacks())
        trainer = Trainer(callbacks=landscape_callbacks(monitors=["hessian"], stop_above=2.0))
    """
    owner = "landscape_callbacks"
    if isinstance(monitors, str) or not isinstance(monitors, Sequence) or not monitors:
        raise TypeError(
            f"{quoted(owner, 'monitors', monitors)}: expected a sequence of names, e.g. "
            f"['hessian', 'sharpness']"
        )
    for number, name in enumerate(monitors):
        check_choice(owner, f"monitors[{number}]", name, list(_MONITORS))
    if len(set(monitors)) < len(monitors):
        raise ValueError(f"{quoted(owner, 'monitors', monitors)}: expected each name once")
    check_source(owner, "probe", probe)
    check_count(owner, "probe_samples", probe_samples)
    check_count(owner, "patience", patience)
    check_flags(owner, save_probe=save_probe)
    if stop_above is not None:
        expected = "a finite number, the edge ratio above which to stop, or None"
        check_number(owner, "stop_above", stop_above, expected, math.isfinite)
        if "hessian" not in monitors:
            raise ValueError(
                f"{quoted(owner, 'stop_above', stop_above)}: it needs hessian/edge_ratio; pass "
                f"monitors=['hessian', ...] with it, or stop_above=None"
            )
    shared = probe_of(probe, probe_samples)
    common: dict[str, Any] = {
        "every_n_train_steps": every_n_train_steps,
        "every_n_epochs": every_n_epochs,
        "max_overhead": max_overhead,
        "grace_seconds": grace_seconds,
        "probe": shared,
        "probe_samples": probe_samples,
        "probe_mode": probe_mode,
        "loss_fn": loss_fn,
        "loss_reduction": loss_reduction,
        "save_probe": save_probe,
    }
    callbacks = Callbacks()
    for name in monitors:
        mode = {"probe_mode": "eval"} if name == "generalization" else {}
        callbacks.append(_MONITORS[name](**{**common, **mode}))
    if stop_above is not None:
        callbacks.append(
            SharpnessEarlyStopping("hessian/edge_ratio", stop_above, patience=patience)
        )
    return callbacks
