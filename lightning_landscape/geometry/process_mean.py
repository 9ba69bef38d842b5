"""Means over processes that each hold a share of the batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_landscape.geometry.errors import (
    NoDoubleBackward,
    OtherRankError,
    OtherRankOutOfMemory,
    out_of_memory,
)

# What all processes raise when one of them fails in this way; the first kind that occurs wins.
_OTHER_RANK: dict[str, Exception] = {
    "failed": OtherRankError("another process failed while computing its share"),
    "out of memory": OtherRankOutOfMemory("another process ran out of memory"),
    "unsupported": NoDoubleBackward("on another process"),
}


class ProcessMean:
    """``sum over processes of compute() / sum of weights``.

    A single reduction carries the sum, the weight and the status of each process, so that no
    process waits for one that failed, and all raise the same error.

    Args:
        reduce: sums a tensor over processes and returns the same result on all; None for a single
            process.
        weight: total weight of this process's share.
        device: device of the reduced tensor.
    """

    def __init__(
        self, reduce: Callable[[Tensor], Tensor] | None, weight: float, device: torch.device
    ) -> None:
        self._reduce = reduce
        self._weight = weight
        self._device = device

    def mean(self, compute: Callable[[], Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """The mean; ``compute`` returns a new tensor of shape ``(size,)`` and type ``dtype``."""
        if self._reduce is None:
            return compute().div_(self._weight)
        fault: Exception | None = None
        try:
            total = compute()
        except Exception as error:  # every process must reach the reduction below
            fault, total = error, torch.zeros(size, dtype=dtype, device=self._device)
        kind = _kind(fault)
        status = [
            self._weight if kind is None else 0.0,
            *(float(kind == k) for k in _OTHER_RANK),
        ]
        carried = torch.cat([total.to(self._device), total.new_tensor(status).to(self._device)])
        carried = self._reduce(carried)
        weight, *ranks = carried[-len(status) :].tolist()
        try:
            for worst, count in zip(_OTHER_RANK, ranks, strict=True):
                if count:
                    other = _OTHER_RANK[worst]
                    raise fault if fault and kind == worst else type(other)(*other.args)
        finally:
            fault = None  # its traceback refers to this frame, which refers to the graph
        mean: Tensor = carried[: -len(status)] / weight
        return mean

    def any(self, compute: Callable[[], bool]) -> bool:
        """Whether ``compute()`` is true on any process."""
        if self._reduce is None:
            return compute()

        def flag() -> Tensor:
            return torch.full((1,), float(compute()), device=self._device)

        return bool(self.mean(flag, 1, torch.float32) > 0)


def _kind(fault: Exception | None) -> str | None:
    if fault is None:
        return None
    if isinstance(fault, NoDoubleBackward):
        return "unsupported"
    return "out of memory" if out_of_memory(fault) else "failed"
