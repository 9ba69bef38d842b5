"""Means over the batches of all processes, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_landscape.training.processes import Processes


@dataclass(frozen=True)
class BatchMean:
    """A mean over batches, weighted by their numbers of examples.

    Attributes:
        value: ``m = sum_b n_b x_b / N``.
        stderr: ``sqrt(B / (B - 1) sum_b (n_b / N)^2 (x_b - m)^2)`` of ``B`` batches; for
            batches of equal size this is ``s / sqrt(B)``; NaN with one batch.
        examples: ``N = sum_b n_b``.
        batches: ``B``.
    """

    value: float
    stderr: float
    examples: int
    batches: int


def batch_mean(values: Sequence[float], sizes: Sequence[int], processes: Processes) -> BatchMean:
    """The mean of ``values``, one per batch of ``sizes`` examples; a process may have none.

    A collective call.  NaN if a value is NaN.
    """
    device = processes.device
    x = torch.tensor(values, dtype=torch.float64, device=device)
    n = torch.tensor(sizes, dtype=torch.float64, device=device)

    def gathered(tensor: Tensor, group: object = None) -> list[Tensor]:
        return processes.gathered(tensor)

    metric = MeanMetric(
        nan_strategy=math.nan,  # the other strategies drop NaN
        dist_sync_fn=gathered,  # torchmetrics' own would wait for a failed process
        distributed_available_fn=lambda: processes.count > 1,
    )
    metric.to(device).set_dtype(torch.float64)  # in place
    metric.update(x.clone(), weight=n.clone())  # update() modifies both if there is a NaN
    mean = metric.compute()
    sums = torch.stack([n.new_tensor(len(values)), n.sum(), (n * (x - mean)).square().sum()])
    batches, examples, squares = processes.sum(sums).tolist()
    variance = batches / (batches - 1) * squares / examples**2 if batches > 1 else math.nan
    return BatchMean(float(mean), math.sqrt(variance), int(examples), int(batches))
