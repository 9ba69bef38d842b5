"""What the processes of one run do together, so that none waits for one that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch import distributed as dist

from lightning_landscape.geometry.errors import OtherRankError

_Result = TypeVar("_Result")


class PartedError(OtherRankError):
    """The processes met, found that one of them failed, and all of them know it."""


class Processes:
    """The processes of a run, which must all call the same methods in the same order.

    Before each exchange of data they :meth:`meet` and tell one another how they are.  A process
    that fails anywhere between two exchanges goes to that meeting as well, so that the others are
    told instead of waiting for its data.  With one process nothing is sent.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.count = trainer.world_size
        self.rank = trainer.global_rank
        self._said: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where tensors are that are to be sent; with one process nothing is."""
        return torch.device("cpu") if self.count == 1 else self._trainer.strategy.root_device

    def meet(self, *, failed: bool = False, done: bool = False, size: int = 0) -> None:
        """Go on only if nobody failed and all are about to do the same.

        Raises:
            PartedError: on all processes, this one too if it is the one that failed.
        """
        if self.count == 1:
            return
        if self._said is None:  # kept: after an out of memory there may be no room for it
            device = self._trainer.strategy.root_device
            self._said = torch.zeros(5, dtype=torch.int64, device=device)
        self._said.copy_(torch.tensor([failed, done, -int(done), size, -size]))
        dist.all_reduce(self._said, op=dist.ReduceOp.MAX)
        failures, most_done, least_done, largest, smallest = self._said.tolist()
        if failures:
            raise PartedError("it failed on another process")
        if most_done != -least_done or largest != -smallest:
            raise PartedError("the processes went different ways, e.g. after unequal arithmetic")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same on all."""
        if self.count == 1:
            return tensor
        total = tensor.clone()  # before the meeting: there may be no room for it
        self.meet(size=total.numel())
        dist.all_reduce(total)
        return total

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` of every process in their order, of the same shape on all."""
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

    def together(self, compute: Callable[[], _Result]) -> _Result:
        """``compute()`` on all processes; where it fails on one it fails on all.

        Raises:
            OtherRankError: another process failed.  The one that did raises its own error.
        """
        try:
            result = compute()
        except PartedError:
            raise  # the others know
        except Exception:
            with contextlib.suppress(PartedError):
                self.meet(failed=True)
            raise
        self.meet(done=True)
        return result
