"""Copies of single objects' state: whether it has changed since, and how it is restored.

Each keeps the object and what it held.  Contents of containers are compared by identity: what is
inside has a snapshot of its own.
"""

from __future__ import annotations

import array
import collections
import ctypes
import io
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_landscape.training.isolation.places import CLASS_ATTRIBUTE, MISSING, Kind
from lightning_landscape.training.isolation.tensors import is_freed, overwrite, same_bits


class Snapshot(Protocol):
    """The state of one object, ``value``."""

    value: Any

    def changed(self) -> bool:
        """Whether the object's state differs from the copy."""
        ...

    def restore(self) -> bool:
        """Restore the state; False if that is impossible."""
        ...


def _identical(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


class Items:
    """The keys and values of a dict, in order."""

    def __init__(self, value: dict[Any, Any]) -> None:
        self.value = value
        ordered = isinstance(value, collections.OrderedDict)
        self._type: Any = collections.OrderedDict if ordered else dict
        self._keys, self._values = list(self._type.keys(value)), list(self._type.values(value))

    def changed(self) -> bool:
        return not (
            _identical(list(self._type.keys(self.value)), self._keys)
            and _identical(list(self._type.values(self.value)), self._values)
        )

    def restore(self) -> bool:
        self._type.clear(self.value)
        for key, item in zip(self._keys, self._values, strict=True):
            self._type.__setitem__(self.value, key, item)
        return True


class Elements:
    """The elements of a list or a deque."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._type: Any = list if isinstance(value, list) else collections.deque
        self._elements = list(self._type.__iter__(value))

    def changed(self) -> bool:
        return not _identical(list(self._type.__iter__(self.value)), self._elements)

    def restore(self) -> bool:
        self._type.clear(self.value)
        self._type.extend(self.value, self._elements)
        return True


class Members:
    """The members of a set.  Evaluations use copies: writing can change the order of iteration."""

    def __init__(self, value: set[Any]) -> None:
        self.value = value
        self._members = list(set.__iter__(value))

    def changed(self) -> bool:
        return not _identical(list(set.__iter__(self.value)), self._members)

    def restore(self) -> bool:
        members = set(self._members)
        set.intersection_update(self.value, members)
        set.update(self.value, members)
        if self.changed():
            set.clear(self.value)
            set.update(self.value, self._members)
        return not self.changed()


class WeakItems:
    """The live items of a weak dictionary or a weak set."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._items = self._now()

    def _now(self) -> list[Any]:
        if isinstance(self.value, weakref.WeakSet):
            return list(self.value)
        return [part for pair in self.value.items() for part in pair]

    def changed(self) -> bool:
        return not _identical(self._now(), self._items)

    def restore(self) -> bool:
        self.value.clear()
        if isinstance(self.value, weakref.WeakSet):
            self.value.update(self._items)
        else:
            self.value.update(zip(self._items[::2], self._items[1::2], strict=True))
        return not self.changed()


class Numbers:
    """The content of an ``array.array`` or a ``bytearray``."""

    def __init__(self, value: array.array[Any] | bytearray) -> None:
        self.value: Any = value
        self._content = value[:]

    def changed(self) -> bool:
        return bool(self.value.__len__() != len(self._content)) or bytes(self.value) != bytes(
            self._content
        )

    def restore(self) -> bool:
        self.value[:] = self._content
        return True


class Entries:
    """The entries of a NumPy array."""

    def __init__(self, value: np.ndarray[Any, Any]) -> None:
        self.value = value
        self._entries = value.copy()

    def changed(self) -> bool:
        if self.value.shape != self._entries.shape:
            return True
        if self.value.dtype == object:
            return not _identical(self.value.ravel().tolist(), self._entries.ravel().tolist())
        return self.value.tobytes() != self._entries.tobytes()

    def restore(self) -> bool:
        if self.value.shape != self._entries.shape:
            self.value.resize(self._entries.shape, refcheck=False)
        self.value[...] = self._entries
        return True


class TensorContent:
    """The content of a tensor and its storage."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._data = value.data
        self._content = value.detach().clone()

    def changed(self) -> bool:
        return not same_bits(self.value, self._content)

    def restore(self) -> bool:
        # Only where it was changed: writing invalidates a graph that the user retains.
        if self.value.layout == torch.strided and self.value.data_ptr() != self._data.data_ptr():
            self.value.data = self._data  # rebound by `.data = ...`
        overwrite(self.value, self._content)
        return True


class FreedTensor:
    """A tensor whose memory is freed: it is freed again if an evaluation has allocated it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._size = value.untyped_storage().nbytes()

    def changed(self) -> bool:
        return not is_freed(self.value)

    def restore(self) -> bool:
        memory: Any = self.value.untyped_storage()
        memory.resize_(self._size)
        return True


class TensorVersion:
    """Whether a large tensor outside the module is written to; it cannot be restored."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._version, self._pointer = value._version, value.data_ptr()

    def changed(self) -> bool:
        return (self.value._version, self.value.data_ptr()) != (self._version, self._pointer)

    def restore(self) -> bool:
        return False


class NoGradients:
    """That no ``.grad`` is set: an evaluation with a backward of its own sets some."""

    def __init__(self, value: Sequence[Tensor]) -> None:
        self.value = value

    def changed(self) -> bool:
        return any(tensor.grad is not None for tensor in self.value)

    def restore(self) -> bool:
        for tensor in self.value:
            tensor.grad = None
        return True


class Values:
    """What the places ``keys`` of one object hold; not those of a dict or a list."""

    def __init__(self, value: Any, kind: Kind, keys: Iterable[Any]) -> None:
        self.value = value
        self._kind = kind
        self._saved = [(key, kind.get(value, key)) for key in keys]

    def changed(self) -> bool:
        return any(self._kind.get(self.value, key) is not item for key, item in self._saved)

    def restore(self) -> bool:
        for key, item in self._saved:
            if self._kind.get(self.value, key) is item:
                continue
            if item is MISSING:
                self._kind.delete(self.value, key)
            else:
                self._kind.put(self.value, key, item)
        return True


class ClassAttributes(Values):
    """The attributes of a class, also those that are added."""

    def __init__(self, value: type) -> None:
        super().__init__(value, CLASS_ATTRIBUTE, list(vars(value)))

    def changed(self) -> bool:
        return len(vars(self.value)) != len(self._saved) or super().changed()

    def restore(self) -> bool:
        for added in vars(self.value).keys() - {key for key, _ in self._saved}:
            type.__delattr__(self.value, added)
        return super().restore()


class ScriptAttributes:
    """The attributes of a TorchScript module that are not tensors: numbers, lists, dicts."""

    def __init__(self, value: Any, names: Iterable[str]) -> None:
        self.value = value  # the C++ module, which returns a new copy at each access
        self._saved = {name: value.getattr(name) for name in names}

    def changed(self) -> bool:
        return any(not same(self.value.getattr(n), saved) for n, saved in self._saved.items())

    def restore(self) -> bool:
        for name, saved in self._saved.items():
            if not same(self.value.getattr(name), saved):
                self.value.setattr(name, saved)
        return not self.changed()


class State:
    """State that an object gives and takes as a whole: random generators, Python's protocols."""

    def __init__(
        self, value: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], object]
    ) -> None:
        self.value = value
        self._get, self._put = get, put
        self._state = get(value)

    def changed(self) -> bool:
        return not same(self._get(self.value), self._state)

    def restore(self) -> bool:
        self._put(self.value, self._state)
        return True


def state_of(value: object) -> State | None:
    """A snapshot of an object that gives and takes its state; None for all others."""
    if isinstance(value, torch.Generator):
        return State(value, torch.Generator.get_state, torch.Generator.set_state)
    if isinstance(value, random.SystemRandom):
        return None  # the operating system's: it has no state
    if isinstance(value, random.Random):
        return State(value, lambda source: source.getstate(), lambda s, state: s.setstate(state))
    if isinstance(value, np.random.RandomState):
        return State(value, lambda source: source.get_state(), lambda s, x: s.set_state(x))
    if isinstance(value, np.random.BitGenerator):
        return State(value, lambda bits: bits.state, lambda bits, x: setattr(bits, "state", x))
    if isinstance(value, np.random.SeedSequence):  # counts the generators that were spawned
        return State(value, _seed_state, lambda seeds, state: seeds.__setstate_cython__(state))
    if isinstance(value, ctypes._SimpleCData) or type(value).__name__ == "Synchronized":
        return State(value, lambda shared: shared.value, lambda s, x: setattr(s, "value", x))
    if isinstance(value, ctypes.Array) or type(value).__name__ == "SynchronizedArray":
        return State(value, lambda shared: shared[:], lambda s, x: s.__setitem__(slice(None), x))
    if isinstance(value, (io.StringIO, io.BytesIO)):
        return None if value.closed else State(value, _buffer_state, _set_buffer_state)
    return None


def _seed_state(seeds: Any) -> Any:
    reduced = seeds.__reduce__()
    return reduced[2] if len(reduced) > 2 and reduced[2] is not None else reduced[1][2]


def _buffer_state(buffer: Any) -> Any:
    return buffer.getvalue(), buffer.tell()


def _set_buffer_state(buffer: Any, state: Any) -> None:
    content, position = state
    buffer.seek(0)
    buffer.truncate()
    buffer.write(content)
    buffer.seek(position)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and same_bits(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)
