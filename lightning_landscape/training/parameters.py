"""Which parameters are measured."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.training.isolation.sharding import UnshardedParameters


def measured_parameters(
    trainer: Trainer,
    pl_module: LightningModule,
    patterns: Sequence[str] | None,
    unsharded: UnshardedParameters,
) -> dict[str, Tensor]:
    """The parameters that an optimizer trains and whose names match ``patterns`` (``None``: all).

    Raises:
        ValueError: no parameter is left.
    """
    optimized = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained: dict[str, Tensor] = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and id(unsharded.shard_of(parameter)) in optimized
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
