"""A batch as ``training_step`` takes it: its size, copies, pieces, and several as one.

With 32 examples a step a probe of 512 is sixteen batches, and most of a product on it is sixteen
times the same overhead.  One batch of all examples takes a few large kernels instead.
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

_PLAIN = (int, float, complex, str, bytes, type(None))


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """One batch as ``training_step`` gets it, on the device, with its index and example count."""

    batch: Any
    index: int
    size: int

    @classmethod
    def copy_of(cls, batch: Any, index: int) -> ProbeBatch:
        """A copy that shares no tensor with ``batch``."""
        return cls(clone_batch(batch), index, batch_size(batch))


class NotConcatenable(Exception):
    """Batches that differ in what they hold, or whose parts refer to one another."""


def clone_batch(batch: Any) -> Any:
    """A copy of ``batch`` that shares no tensor with it; other leaves are shared."""
    return _map_tensors(batch, lambda tensor: tensor.detach().clone())


def cut_batch(held: ProbeBatch, most: int) -> list[ProbeBatch]:
    """``held`` in pieces of at most ``most`` examples; nothing where it cannot be cut.

    Tensors as long as the batch has examples are cut along their first dimension, everything else
    is shared.  Whether the pieces mean what the whole does is for their losses to say.
    """
    starts = range(0, held.size, most)
    found = False

    def piece(start: int, tensor: Tensor) -> Tensor:
        nonlocal found
        if tensor.layout != torch.strided or tensor.ndim == 0 or len(tensor) != held.size:
            return tensor
        found = True
        return tensor[start : start + most]

    try:
        batches = [_map_tensors(held.batch, partial(piece, s), _refuse) for s in starts]
    except _NotCuttable:
        return []
    sizes = [min(most, held.size - start) for start in starts]
    cut = [ProbeBatch(b, held.index, n) for b, n in zip(batches, sizes, strict=True)]
    return cut if found else []


def first_examples(batches: Sequence[ProbeBatch], count: int) -> list[ProbeBatch]:
    """The first ``count`` examples; where a batch cannot be cut, the whole ones before it.

    One batch at least.
    """
    taken: list[ProbeBatch] = []
    for held in batches:
        left = count - sum(batch.size for batch in taken)
        if held.size <= left:
            taken.append(held)
            continue
        pieces = cut_batch(held, left) if left > 0 else []
        return taken + (pieces[:1] if pieces or taken else [held])
    return taken


class _NotCuttable(Exception):
    """A batch whose parts refer to one another: a graph library's, packed sequences."""


def _refuse(value: Any) -> Any:
    raise _NotCuttable


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the first tensor with a dimension, as in Lightning.

    Objects with a ``num_graphs`` or ``batch_size`` attribute say it themselves; 1 where nothing
    tells.
    """
    for name in ("num_graphs", "batch_size"):
        stated = getattr(batch, name, None)
        if isinstance(stated, int) and not isinstance(stated, bool):
            return max(stated, 1)
    for tensor in tensors_in(batch):
        if tensor.ndim > 0 and len(tensor) > 0:
            return len(tensor)
    return 1


def tensors_in(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(batch, note)
    yield from found


def _map_tensors(
    value: Any,
    function: Callable[[Tensor], Tensor],
    indivisible: Callable[[Any], Any] = copy.deepcopy,
) -> Any:
    """``value`` rebuilt with ``function`` applied to its tensors, whatever they sit in.

    ``indivisible`` is applied to objects that know themselves how their tensors belong together.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence) and indivisible is not copy.deepcopy:
        return indivisible(value)
    if isinstance(value, Mapping):
        mapped = {key: _map_tensors(item, function, indivisible) for key, item in value.items()}
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return mapped
        rebuilt = copy.copy(value)  # OrderedDict, BatchEncoding, ...: keep what else they hold
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
        return indivisible(value)  # a graph library's batch, which Lightning moves with .to()
    return value


# -- several as one ---------------------------------------------------------------------------


def concat_batches(batches: Sequence[ProbeBatch]) -> ProbeBatch:
    """One batch of all examples, with the first one's index; it shares no tensor with them.

    Tensors (and lists of plain values) as long as their batch has examples are put one after the
    other, all else must be equal.  Whether the whole means what the batches do is for their losses
    to say.

    Raises:
        NotConcatenable: other structures, shapes or types; packed sequences, graphs.
    """
    sizes = [held.size for held in batches]
    merged = _concat([held.batch for held in batches], sizes)
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
        plain = all(isinstance(item, _PLAIN) for value in values for item in value)
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
    if isinstance(first, _PLAIN) and all(value == first for value in values):
        return first
    raise NotConcatenable


def _concat_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    if any(t.layout != torch.strided or t.dtype != first.dtype for t in tensors):
        raise NotConcatenable
    if all(t.ndim > 0 and len(t) == size for t, size in zip(tensors, sizes, strict=True)):
        if any(t.shape[1:] != first.shape[1:] for t in tensors):
            raise NotConcatenable  # sequences padded to another length, say
        return torch.cat([t.detach() for t in tensors])
    if all(torch.equal(t, first) for t in tensors):
        whole: Tensor = clone_batch(first)
        return whole
    raise NotConcatenable
