"""Running statistics of BatchNorm that belong to the weights as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def reestimate_batch_norm(module: nn.Module, forward: Callable[[], object]) -> None:
    """Replace running statistics by those of what ``forward`` sends through ``module``.

    Running statistics are an average over the weights that training passed through.  Anywhere else,
    between two networks say, they are wrong, and a loss in eval mode says nothing.

    Args:
        module: its BatchNorm layers that are in train mode get the cumulative mean over all their
            calls, each call with the same weight; the others, and ``momentum``, stay as they are.
        forward: evaluates the module on some batches; no gradients are recorded.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization,
    UAI 2018 (the same as ``torch.optim.swa_utils.update_bn``).
    """
    norms = [norm for norm in running_norms(module) if norm.training]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative mean
        with torch.no_grad():
            forward()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
