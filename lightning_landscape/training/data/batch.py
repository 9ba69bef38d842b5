"""Batches as ``training_step`` takes them: size, copies, splitting and concatenation.

Concatenation saves overhead: with a batch size of 32, a probe of 512 examples is sixteen batches,
and a product runs sixteen times as many kernels as on one batch of all examples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_PLAIN_TYPES = (int, float, complex, str, bytes, type(None))


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """One batch as ``training_step`` gets it, on the device, with its index and its size."""

    batch: Any
    index: int
    size: int

    @classmethod
    def copy_of(cls, batch: Any, index: int) -> ProbeBatch:
        """A copy that shares no tensor with ``batch``."""
        return cls(clone_batch(batch), index, batch_size(batch))


class NotConcatenable(Exception):
    """The batches differ in structure, or contain an object that cannot be concatenated."""


def clone_batch(batch: Any) -> Any:
    """A copy of ``batch`` with copies of its tensors; other leaves are shared."""
    return _map_tensors(batch, lambda tensor: tensor.detach().clone())


def cut_batch(batch: ProbeBatch, most: int) -> list[ProbeBatch]:
    """Split a batch into pieces of at most ``most`` examples; empty if it cannot be split.

    Tensors whose first dimension is the batch size are split along it, everything else is shared.
    The caller must compare the losses: the pieces need not give the same loss.
    """
    starts = range(0, batch.size, most)
    found = False

    def piece(start: int, tensor: Tensor) -> Tensor:
        nonlocal found
        if tensor.layout != torch.strided or tensor.ndim == 0 or len(tensor) != batch.size:
            return tensor
        found = True
        return tensor[start : start + most]

    try:
        batches = [_map_tensors(batch.batch, partial(piece, s), _refuse) for s in starts]
    except _NotCuttable:
        return []
    sizes = [min(most, batch.size - start) for start in starts]
    cut = [ProbeBatch(b, batch.index, n) for b, n in zip(batches, sizes, strict=True)]
    return cut if found else []


def split_in_proportion(sizes: Sequence[int], count: int) -> list[int]:
    """Split ``count`` examples in proportion to the ``sizes`` of processes; at least 1 each.

    Example:
        >>> split_in_proportion([256, 256], 390)
        [195, 195]
        >>> split_in_proportion([8, 5], 13), split_in_proportion([0, 40], 20)
        ([8, 5], [1, 20])
    """
    total, before, taken = sum(sizes), 0, []
    for size in sizes:
        taken.append((before + size) * count // total - before * count // total)
        before += size
    return [max(part, 1) for part in taken]


def first_examples(batches: Sequence[ProbeBatch], count: int) -> list[ProbeBatch]:
    """The first ``count`` examples; if a batch cannot be split, the batches before it.

    At least one batch.
    """
    taken: list[ProbeBatch] = []
    for batch in batches:
        missing = count - sum(b.size for b in taken)
        if batch.size <= missing:
            taken.append(batch)
            continue
        pieces = cut_batch(batch, missing) if missing > 0 else []
        return taken + (pieces[:1] if pieces or taken else [batch])
    return taken


class _NotCuttable(Exception):
    """A batch whose parts depend on one another: of a graph library, or a packed sequence."""


def _refuse(value: Any) -> Any:
    raise _NotCuttable


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the first tensor that has a dimension.

    The attribute ``num_graphs`` or ``batch_size`` takes precedence; 1 if there is neither.
    """
    return _stated_size(batch) or next(iter(_lengths(batch)), 1)


def doubtful_sizes(batch: Any) -> list[int]:
    """The lengths of the tensors, if they differ and no attribute states the size."""
    if _stated_size(batch):
        return []
    lengths = list(dict.fromkeys(_lengths(batch)))
    return lengths if len(lengths) > 1 else []


def _stated_size(batch: Any) -> int | None:
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        if isinstance(size, int) and not isinstance(size, bool):
            return max(size, 1)
    return None


def _lengths(batch: Any) -> list[int]:
    return [len(t) for t in tensors_in(batch) if t.ndim > 0 and len(t) > 0]


def tensors_in(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(batch, collect)
    yield from found


def _map_tensors(
    value: Any,
    function: Callable[[Tensor], Tensor],
    indivisible: Callable[[Any], Any] = copy.deepcopy,
) -> Any:
    """A copy of ``value`` with ``function`` applied to all tensors in its containers.

    ``indivisible`` is applied to objects that manage their tensors themselves.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence) and indivisible is not copy.deepcopy:
        return indivisible(value)
    if isinstance(value, Mapping):
        mapped = {key: _map_tensors(item, function, indivisible) for key, item in value.items()}
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return mapped
        rebuilt = copy.copy(value)  # OrderedDict, BatchEncoding, ...: keep their other attributes
        rebuilt.update(mapped)
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, function, indivisible) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function, indivisible) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            item = _map_tensors(getattr(value, field.name), function, indivisible)
            object.__setattr__(record, field.name, item)
        return record
    if hasattr(value, "__dict__") and hasattr(value, "to"):
        return indivisible(value)  # e.g. of a graph library, which Lightning moves with .to()
    return value


# -- concatenation ----------------------------------------------------------------------------


def concat_batches(batches: Sequence[ProbeBatch]) -> ProbeBatch:
    """One batch of all examples, with the index of the first; it shares no tensor with them.

    Tensors (and lists of plain values) whose length is the batch size are concatenated; all else
    must be equal.  The caller must compare the losses, which need not be the same.

    Raises:
        NotConcatenable: different structures, shapes or types; packed sequences, graphs.
    """
    sizes = [batch.size for batch in batches]
    merged = _concat([batch.batch for batch in batches], sizes)
    return ProbeBatch(merged, batches[0].index, sum(sizes))


def _concat(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotConcatenable
    if isinstance(first, Tensor):
        return _concat_tensors(values, sizes)
    if isinstance(first, PackedSequence):
        raise NotConcatenable
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise NotConcatenable
        merged = {key: _concat([value[key] for value in values], sizes) for key in first}
        if not isinstance(first, MutableMapping) or type(first) is dict:
            return merged
        rebuilt = copy.copy(first)
        rebuilt.update(merged)
        return rebuilt
    if isinstance(first, (list, tuple)):
        lengths = [len(value) for value in values]
        plain = all(isinstance(item, _PLAIN_TYPES) for value in values for item in value)
        if isinstance(first, list) and plain and lengths == list(sizes):
            return [item for value in values for item in value]
        if len(set(lengths)) > 1:
            raise NotConcatenable
        items = [_concat(parts, sizes) for parts in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        record: Any = copy.copy(first)
        for field in dataclasses.fields(first):
            part = _concat([getattr(value, field.name) for value in values], sizes)
            object.__setattr__(record, field.name, part)
        return record
    if isinstance(first, _PLAIN_TYPES) and all(value == first for value in values):
        return first
    raise NotConcatenable


def _concat_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    if any(t.layout != torch.strided or t.dtype != first.dtype for t in tensors):
        raise NotConcatenable
    if all(t.ndim > 0 and len(t) == size for t, size in zip(tensors, sizes, strict=True)):
        if any(t.shape[1:] != first.shape[1:] for t in tensors):
            raise NotConcatenable  # e.g. sequences padded to another length
        return torch.cat([t.detach() for t in tensors])
    if all(torch.equal(t, first) for t in tensors):
        return first.detach().clone()
    raise NotConcatenable
