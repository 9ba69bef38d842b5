"""What can go wrong while a loss is evaluated, and how it is told apart."""

from __future__ import annotations

import traceback

import torch

# How kinds of memory other than CUDA's say that they are full: they raise plain RuntimeErrors.
_FULL = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class OtherRankError(RuntimeError):
    """Another process failed while computing its share; this one gives up with it."""


class OtherRankOutOfMemory(OtherRankError):
    """The memory was not enough on another process."""


class NoDoubleBackward(RuntimeError):
    """The loss cannot be differentiated twice."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OtherRankOutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def clear_frames(error: BaseException) -> None:
    """Free what the frames of ``error`` hold, a graph say; its text and its place remain."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
