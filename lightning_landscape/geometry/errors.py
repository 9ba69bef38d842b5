"""Errors of evaluating a loss, and how out of memory is recognized."""

from __future__ import annotations

import traceback

import torch

# Messages of plain RuntimeErrors that devices other than CUDA raise when out of memory.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class OtherRankError(RuntimeError):
    """Another process failed while computing its share, so all processes stop."""


class OtherRankOutOfMemory(OtherRankError):
    """Another process ran out of memory."""


class NoDoubleBackward(RuntimeError):
    """The loss cannot be differentiated twice."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device or the host is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OtherRankOutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def clear_frames(error: BaseException) -> None:
    """Free the local variables of the frames of ``error``, e.g. a graph; the traceback remains."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
