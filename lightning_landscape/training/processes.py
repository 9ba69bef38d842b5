"""Communication between the processes of a run; none waits for one that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch import distributed as dist

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.interrupts import is_interrupt

_Result = TypeVar("_Result")


class SyncError(OtherRankError):
    """A status exchange in which one process reported a failure; raised on all processes."""


class Processes:
    """The processes of a run, which must all call the same methods in the same order.

    They exchange their status (:meth:`sync_status`) before they exchange data.  A process that has
    failed since the last exchange takes part in it too, so that the others do not wait for its
    data.  With one process nothing is communicated.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.count = trainer.world_size
        self.rank = trainer.global_rank
        self._status: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of tensors to communicate; the CPU with one process."""
        return torch.device("cpu") if self.count == 1 else self._trainer.strategy.root_device

    def sync_status(self, *, failed: bool = False, done: bool = False, size: int = 0) -> None:
        """Raise unless no process failed and all are about to do the same.

        Raises:
            SyncError: on all processes, including the one that failed.
        """
        if self.count == 1:
            return
        if self._status is None:  # allocated once: after an out-of-memory error it may not fit
            device = self._trainer.strategy.root_device
            self._status = torch.zeros(5, dtype=torch.int64, device=device)
        self._status.copy_(torch.tensor([failed, done, -int(done), size, -size]))
        dist.all_reduce(self._status, op=dist.ReduceOp.MAX)
        failures, most_done, least_done, largest, smallest = self._status.tolist()
        if failures:
            raise SyncError("it failed on another process")
        if most_done != -least_done or largest != -smallest:
            raise SyncError(
                "the processes took different branches, e.g. after unequal floating-point results"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same on all."""
        if self.count == 1:
            return tensor
        total = tensor.clone()  # before the exchange, because this may run out of memory
        self.sync_status(size=total.numel())
        dist.all_reduce(total)
        return total

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` of every process, by rank; its shape must be the same on all."""
        if self.count == 1:
            return [tensor]
        rows = tensor.new_zeros(self.count, *tensor.shape)
        rows[self.rank] = tensor
        return list(self.sum(rows).unbind())

    def total(self, count: int) -> int:
        """``count`` added up over processes."""
        if self.count == 1:
            return count
        device = self._trainer.strategy.root_device
        return int(self.sum(torch.tensor(count, dtype=torch.int64, device=device)).item())

    def run_on_all_ranks(self, compute: Callable[[], _Result]) -> _Result:
        """Call ``compute`` on all processes; if it fails on one, raise on all.

        Raises:
            OtherRankError: another process failed.  That process raises its own error.
        """
        try:
            result = compute()
        except SyncError:
            raise  # all processes have it
        except BaseException as error:
            if is_interrupt(error):
                raise
            with contextlib.suppress(SyncError):
                self.sync_status(failed=True)
            raise
        self.sync_status(done=True)
        return result
