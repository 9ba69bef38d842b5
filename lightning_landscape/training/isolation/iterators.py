"""Iterators that training_step draws from: an evaluation must not consume what training reads next.

A simple iterator is copied for each evaluation.  One that cannot be copied (of a ``DataLoader``, a
generator) is recorded: the first items that *training* draws from it are kept, and evaluations
read those again.  Nothing is ever drawn for an evaluation, so that random sources, worker processes
and prefetched batches behave as without callbacks.
"""

from __future__ import annotations

import collections
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_landscape.training.data.batch import clone_batch
from lightning_landscape.training.isolation.errors import NotYetError, TouchedError
from lightning_landscape.training.isolation.places import Place

# Items of an iterator that are kept; evaluations of the probe's i-th batch begin with the i-th.
RECORDED_ITEMS = 16
# An evaluation that reads more items loops over an iterator that never ends here.
_MOST_READ = 1000

_MODULES = ("builtins", "itertools", "_collections", "collections", "array", "_csv")
_END = StopIteration
# The arguments of these contain other iterators, which are copied with them.
_COMPOSED = (
    *(zip, map, filter, enumerate, reversed, itertools.accumulate, itertools.combinations),
    *(itertools.compress, itertools.count, itertools.cycle, itertools.chain, itertools.dropwhile),
    *(itertools.filterfalse, itertools.islice, itertools.permutations, itertools.product),
    *(itertools.repeat, itertools.starmap, itertools.takewhile, itertools.zip_longest),
)


def is_iterator(value: object) -> bool:
    """Whether ``value`` is an iterator of the interpreter, of a DataLoader or of Lightning.

    One of a class written in Python is restored like any other object.
    """
    kind = type(value)
    if not _advances(kind):
        return False
    if kind is types.GeneratorType or kind.__module__ in _MODULES:
        return True
    if kind.__module__.partition(".")[0] in ("pytorch_lightning", "lightning"):
        return True
    loader = sys.modules.get("torch.utils.data.dataloader")
    return loader is not None and isinstance(value, loader._BaseDataLoaderIter)


def copy_iterator(value: Any) -> Any | None:
    """A copy that starts where ``value`` is; None if it cannot be copied."""
    try:
        return _copy(value)
    except TypeError:  # it contains something that has no copy, or Python offers none
        return None


def _copy(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, types.GeneratorType) or kind.__module__ not in _MODULES:
        raise TypeError
    function, arguments, *state = value.__reduce__()
    if kind in _COMPOSED:
        arguments, state = _copies(arguments), list(_copies(tuple(state)))
    elif function not in (iter, reversed) or any(map(_advances, {*map(type, arguments[0])})):
        raise TypeError
    # Otherwise over a built-in container, which is shared with the copy.
    copied = function(*arguments)
    if state and state[0] is not None:
        copied.__setstate__(state[0])
    return copied


def _advances(kind: type) -> bool:
    return hasattr(kind, "__next__")


def _copies(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """``parts`` with copies of the iterators in them."""
    copied: list[Any] = []
    for part in parts:
        if isinstance(part, tuple):
            copied.append(_copies(part))
        elif _advances(type(part)):
            copied.append(_copy(part))
        else:  # a list: what a cycle has seen so far
            copied.append(list(part) if isinstance(part, list) else part)
    return tuple(copied)


class Recorder:
    """Takes the place of an iterator while training: keeps a copy of each item that is drawn."""

    def __init__(self, iterator: Any, items: list[Any]) -> None:
        self.iterator = iterator
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        iter(self.iterator)  # some start anew
        return self

    def __next__(self) -> Any:
        return self._record(self.iterator.__next__)

    def send(self, value: Any) -> Any:
        """As the generator's."""
        return self._record(lambda: self.iterator.send(value))

    def _record(self, draw: Callable[[], Any]) -> Any:
        try:
            item = draw()
        except StopIteration:
            self._keep(_END)
            raise
        self._keep(item)
        return item

    def _keep(self, item: Any) -> None:
        if len(self._items) < RECORDED_ITEMS:
            self._items.append(item if item is _END else clone_batch(item))

    def __len__(self) -> int:
        return len(self.iterator)

    def __bool__(self) -> bool:
        return bool(self.iterator)  # most iterators have no length

    def __getattr__(self, name: str) -> Any:
        if name == "iterator":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.iterator, name)


class Replay:
    """Takes the place of a recorded iterator in an evaluation."""

    def __init__(self, iterator: Any, items: list[Any], start: int, path: str) -> None:
        self._iterator = iterator
        self._items = items
        self._read = start
        self._last = start + _MOST_READ
        self._path = path

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._items:
            raise NotYetError(
                f"training has drawn nothing from {self._path} since it was found, so that an "
                f"evaluation has nothing to read"
            )
        if self._read >= self._last:
            raise TouchedError(
                f"an evaluation read more than {_MOST_READ} items from {self._path}, which only "
                f"training can read; pass loss_fn=lambda pl_module, batch: ..., a loss without it"
            )
        item = self._items[self._read % len(self._items)]
        self._read += 1
        if item is _END:
            raise StopIteration
        return clone_batch(item)

    def send(self, value: Any) -> Any:
        """As the generator's."""
        return self.__next__()

    def close(self) -> None:
        """Nothing: the generator goes on."""

    def __len__(self) -> int:
        return len(self._iterator)

    def __bool__(self) -> bool:
        return bool(self._iterator)


class Recordings:
    """What training has drawn from the iterators of one run.

    Attributes:
        items: by path of the iterator, e.g. ``self.unlabelled``.
    """

    def __init__(self) -> None:
        self.items: collections.defaultdict[str, list[Any]] = collections.defaultdict(list)
        self._installed: list[tuple[Sequence[Place], Any, Any]] = []

    def recorder(self, iterator: Any, path: str) -> Any:
        """What training reads from now on: a recorder, or the iterator if enough is known."""
        complete = len(self.items[path]) >= RECORDED_ITEMS
        if isinstance(iterator, Recorder):
            return iterator.iterator if complete else iterator
        return iterator if complete else Recorder(iterator, self.items[path])

    def install(self, places: Sequence[Place], original: Any, recording: Any) -> None:
        """Let ``recording``, a recorder or a tuple with some, take the place of ``original``."""
        self._installed.append((places, original, recording))
        for place in places:
            place.put(recording)

    def remove(self) -> None:
        """Restore the iterators themselves."""
        for places, original, recording in reversed(self._installed):
            for place in places:
                if place.holds(recording):
                    place.put(original)
        self._installed.clear()
