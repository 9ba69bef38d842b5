"""Which parameters are measured."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.training.isolation.sharding import Whole


def measured_parameters(
    trainer: Trainer,
    pl_module: LightningModule,
    patterns: Sequence[str] | None,
    whole: Whole,
) -> dict[str, Tensor]:
    """The trainable parameters that an optimizer holds, of those the ones that ``patterns`` name.

    Raises:
        ValueError: no parameter is left.
    """
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained: dict[str, Tensor] = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and id(whole.trained(parameter)) in held
    }
    if patterns is None:
        return trained
    chosen = {
        name: parameter
        for name, parameter in trained.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise ValueError(
            f"parameters={list(patterns)!r} matches none of the trained parameters: expected glob "
            f"patterns over names such as {list(trained)[:4]}"
        )
    return chosen
