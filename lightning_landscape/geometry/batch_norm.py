"""Re-estimate the running statistics of BatchNorm for the current weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_landscape.geometry.checks import check_callable, quoted


def tracking_batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def reestimate_batch_norm(module: nn.Module, forward: Callable[[], object]) -> None:
    """Replace running statistics by those of the data that ``forward`` sends through ``module``.

    Running statistics are an average along the training trajectory.  For other weights, e.g.
    between two networks, they are wrong, and a loss in eval mode is meaningless.

    Args:
        module: evaluated in train mode; a module in eval mode is switched for that as a whole.  If
            it is in train mode already, layers in eval mode count as frozen and keep their
            statistics.  Every other BatchNorm layer gets the cumulative mean over all its calls,
            with equal weight per call.  Modes and ``momentum`` are restored.
        forward: evaluates the module on some batches; no gradients are recorded.

    Source: Izmailov et al., Averaging weights leads to wider optima and better generalization,
    UAI 2018 (the same as ``torch.optim.swa_utils.update_bn``).

    Example:
        >>> net = nn.BatchNorm1d(1).eval()
        >>> reestimate_batch_norm(net, lambda: [net(torch.full((4, 1), x)) for x in (2.0, 6.0)])
        >>> net.running_mean.item(), net.training
        (4.0, False)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{quoted('', 'module', module)}: expected a torch.nn.Module")
    check_callable("", "forward", forward, "a function () that evaluates the module on batches")
    modes = [(m, m.training) for m in module.modules()]
    momenta: list[tuple[_BatchNorm, float | None]] = []
    try:
        if not module.training:
            module.train()
        for norm in tracking_batch_norms(module):
            if norm.training:
                momenta.append((norm, norm.momentum))
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative mean
        with torch.no_grad():
            forward()
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for m, training in modes:
            m.training = training
