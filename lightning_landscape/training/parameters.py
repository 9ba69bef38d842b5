"""Which parameters are measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.geometry.checks import few, quoted
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
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise ValueError(
            f"parameters={list(patterns)!r} matches none of the trained parameters: expected glob "
            f"patterns over names such as {list(trained)[:4]}"
        )
    return chosen


def patterns_of(owner: str, parameters: Any) -> list[str] | None:
    """``parameters`` as a list of patterns, or None."""
    if parameters is None:
        return None
    patterns = [parameters] if isinstance(parameters, str) else parameters
    is_list = isinstance(patterns, Iterable) and not isinstance(patterns, (bytes, Mapping))
    patterns = list(patterns) if is_list else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(
            f"{quoted(owner, 'parameters', parameters)}: expected glob patterns over parameter "
            f"names, e.g. ['encoder.*'], or None for all that an optimizer trains"
        )
    return patterns


def check_patterns(
    owner: str, patterns: Sequence[str], names: Sequence[str], warn: Callable[[str], None]
) -> None:
    """Raise if no pattern matches one of ``names``; ``warn`` if only some of them do not."""
    for pattern in patterns:
        if fnmatch.filter(names, pattern):
            continue
        problem = (
            f"{quoted(owner, 'parameters', list(patterns))}: no parameter matches {pattern!r}; "
            f"expected glob patterns over names such as {few(names)}"
        )
        if any(fnmatch.filter(names, other) for other in patterns):
            warn(problem)
        else:
            raise ValueError(problem)
