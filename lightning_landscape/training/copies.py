"""Copies of what a step is about to change, for those that measure it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytorch_lightning import Trainer
from torch import Tensor


@dataclass
class Before:
    """The weights before a step, as the optimizers hold them, or why there are none."""

    weights: dict[int, Tensor] = field(default_factory=dict)  # id of a parameter -> its copy
    rates: dict[int, float] = field(default_factory=dict)  # and its learning rate
    fault: Exception | None = None


def copied(trainer: Trainer) -> Before:
    """Of shards only the own ones: nothing is sent."""
    held = [(p, g) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    weights = {id(p): p for p, _ in held}
    return Before(
        {key: p.detach().clone() for key, p in weights.items()},
        # Read here: a scheduler may change them before the batch ends.
        {id(p): float(g["lr"]) for p, g in held},
    )
