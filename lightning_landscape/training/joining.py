"""Several batches as one: a few large kernels instead of many small ones.

With 32 examples a step a probe of 512 is sixteen batches, and most of what a product on it takes is
sixteen times the same overhead.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_landscape.training.probe import ProbeBatch, clone_batch

_PLAIN = (int, float, complex, str, bytes, type(None))


class NotJoinable(Exception):
    """Batches that differ in what they hold, or whose parts refer to one another."""


def join_batches(batches: Sequence[ProbeBatch]) -> ProbeBatch:
    """One batch of all examples, with the first one's index; it shares no tensor with them.

    Tensors (and lists of plain values) as long as their batch has examples are put one after the
    other, all else must be equal.  Whether the whole means what the batches do is for their losses
    to say.

    Raises:
        NotJoinable: other structures, shapes or types; packed sequences, a graph library's batches.
    """
    sizes = [held.size for held in batches]
    joined = _join([held.batch for held in batches], sizes)
    return ProbeBatch(joined, batches[0].index, sum(sizes))


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotJoinable
    if isinstance(first, Tensor):
        return _join_tensors(values, sizes)
    if isinstance(first, PackedSequence):
        raise NotJoinable
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise NotJoinable
        joined = {key: _join([value[key] for value in values], sizes) for key in first}
        if not isinstance(first, MutableMapping) or type(first) is dict:
            return joined
        rebuilt = copy.copy(first)
        rebuilt.update(joined)
        return rebuilt
    if isinstance(first, (list, tuple)):
        lengths = [len(value) for value in values]
        plain = all(isinstance(item, _PLAIN) for value in values for item in value)
        if isinstance(first, list) and plain and lengths == list(sizes):
            return [item for value in values for item in value]
        if len(set(lengths)) > 1:
            raise NotJoinable
        items = [_join(parts, sizes) for parts in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        record: Any = copy.copy(first)
        for field in dataclasses.fields(first):
            part = _join([getattr(value, field.name) for value in values], sizes)
            object.__setattr__(record, field.name, part)
        return record
    if isinstance(first, _PLAIN) and all(value == first for value in values):
        return first
    raise NotJoinable


def _join_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    if any(t.layout != torch.strided or t.dtype != first.dtype for t in tensors):
        raise NotJoinable
    if all(t.ndim > 0 and len(t) == size for t, size in zip(tensors, sizes, strict=True)):
        if any(t.shape[1:] != first.shape[1:] for t in tensors):
            raise NotJoinable  # sequences padded to another length, say
        return torch.cat([t.detach() for t in tensors])
    if all(torch.equal(t, first) for t in tensors):
        whole: Tensor = clone_batch(first)
        return whole
    raise NotJoinable
