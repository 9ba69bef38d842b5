"""What stands in for an object during an evaluation, because the object must not be touched."""

from __future__ import annotations

import collections
import functools
import gc
import io
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_landscape.training.isolation.errors import NotYetError, TouchedError
from lightning_landscape.training.isolation.iterators import Recordings, Replay, copy_iterator
from lightning_landscape.training.isolation.places import Place

_SMALL_SET = 10_000  # members


class StandIn:
    """Takes the place of ``original`` at ``places`` during an evaluation.

    Attributes:
        always: in every evaluation; otherwise where the first one of its kind touched it.
    """

    always = True

    def __init__(self, original: Any, path: Callable[[], str]) -> None:
        self.original = original
        self.places: list[Place] = []
        self.path = path

    def make(self, index: int) -> Any:
        """The object to use in an evaluation of the probe's batch ``index``."""
        raise NotImplementedError

    def touched(self, made: Any) -> bool:
        """Whether the evaluation has changed what :meth:`make` returned."""
        return True


class SetCopy(StandIn):
    """A copy of a set: writing to it could change the order in which the set is iterated."""

    @property
    def always(self) -> bool:  # type: ignore[override]
        """Of all but large sets, because another batch may add other members."""
        return len(self.original) <= _SMALL_SET

    def make(self, index: int) -> Any:
        """A copy, which is iterated in the order of the original until it is written to."""
        if type(self.original) is set:
            return _OrderedCopy(self.original)
        if isinstance(self.original, weakref.WeakSet):
            return self.original.copy()
        made = self.original.__new__(type(self.original))  # its __init__ may take anything
        set.update(made, self.original)
        made.__dict__.update(self.original.__dict__)
        return made

    def touched(self, made: Any) -> bool:
        """Whether members were added or removed."""
        return bool(made != self.original)


class _OrderedCopy(set[Any]):
    """A copy of a set with the order of the original, which a copy need not have."""

    def __init__(self, original: set[Any]) -> None:
        super().__init__(original)
        self._order: list[Any] | None = list(original)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self._order is None else iter(self._order)

    def __reduce__(self) -> Any:
        return set, (list(self),)


def _writing(name: str) -> Callable[..., Any]:
    method = getattr(set, name)

    def write(self: _OrderedCopy, *args: Any) -> Any:
        result = method(self, *args)
        order = self._order
        if order is not None and not (len(self) == len(order) and self.issuperset(order)):
            self._order = None
        return result

    return write


for _name in (
    *("add", "discard", "remove", "pop", "clear", "update", "difference_update"),
    *("intersection_update", "symmetric_difference_update"),
    *("__ior__", "__iand__", "__isub__", "__ixor__"),
):
    setattr(_OrderedCopy, _name, _writing(_name))


class IteratorCopy(StandIn):
    """A copy of a simple iterator."""

    def make(self, index: int) -> Any:
        """A copy that starts where training is."""
        return copy_iterator(self.original)


class Recorded(StandIn):
    """What training has drawn before, in the place of an iterator that cannot be copied."""

    def __init__(self, original: Any, path: Callable[[], str], recordings: Recordings) -> None:
        super().__init__(original, path)
        self._recordings = recordings

    def make(self, index: int) -> Any:
        """Starts with another item for each of the probe's batches."""
        path = self.path()
        return Replay(self.original, self._recordings.items[path], index, path)


class Discarding(StandIn):
    """A file or a writer of logs: what an evaluation writes is discarded, reading is refused."""

    def make(self, index: int) -> Any:
        """An object whose methods do nothing."""
        return _Silent(self.original, self.path())


class TableCopy(StandIn):
    """A copy of a pandas object, whose content is not in attributes."""

    always = False

    def make(self, index: int) -> Any:
        """A copy with copies of the data."""
        return self.original.copy()

    def touched(self, made: Any) -> bool:
        """Whether the copy differs."""
        return not self.original.equals(made)


class Silenced(StandIn):
    """A logger of the Trainer that the module holds itself."""

    def __init__(self, original: Any, path: Callable[[], str], silent: Any) -> None:
        super().__init__(original, path)
        self._silent = silent

    def make(self, index: int) -> Any:
        """The logger that ``self.logger`` gives while measuring."""
        return self._silent


class Refused(StandIn):
    """A queue or a connection, which another thread or process may use at the same time."""

    def make(self, index: int) -> Any:
        """An object whose attributes and methods raise."""
        return _Guard(self.path())


class UncachedCalls(StandIn):
    """A function with ``lru_cache``: known results are read, new ones are not kept.

    They are read beside the function, which would note that they were used just now.
    """

    def make(self, index: int) -> Any:
        """A function with a cache of its own for one evaluation."""
        cached, (known, separator) = self.original, _known_results(self.original)
        function, typed = cached.__wrapped__, cached.cache_parameters()["typed"]
        new: dict[Any, Any] = {}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            key: Any = functools._make_key(args, kwargs, typed, separator)
            if isinstance(key, list):
                key = tuple(key)
            if key in known:
                return known[key]
            if key not in new:
                new[key] = function(*args, **kwargs)
            return new[key]

        call.cache_info = cached.cache_info  # type: ignore[attr-defined]
        call.cache_clear = new.clear  # type: ignore[attr-defined]
        call.cache_parameters = cached.cache_parameters  # type: ignore[attr-defined]
        return call


class LazyHooks(StandIn):
    """The hooks of a lazy module: the first evaluation must not be what initializes it."""

    def make(self, index: int) -> Any:
        """The same hooks after one that raises."""

        def not_yet(*args: Any) -> None:
            raise NotYetError(
                f"the loss uses {self.path().removesuffix('._forward_pre_hooks')}, whose "
                f"parameters training has yet to initialize"
            )

        return collections.OrderedDict([(-1, not_yet), *self.original.items()])


def is_cached_function(value: object) -> bool:
    """Whether ``value`` is a function with ``functools.lru_cache`` or ``functools.cache``."""
    return isinstance(value, functools._lru_cache_wrapper)


def _known_results(cached: Any) -> tuple[dict[Any, Any], tuple[object, ...]]:
    """The results that the function keeps, and what stands in their keys before keyword arguments.

    They have no names in Python.
    """
    parts = gc.get_referents(cached)
    own = cached.__dict__
    at = max(i for i, part in enumerate(parts) if type(part) is dict and part is not own)
    cache = parts[at]
    separator = tuple(part for part in parts[at:] if type(part) is object)
    if cached.cache_parameters()["maxsize"] is None:
        return cache, separator
    # Of a bounded one it holds links without attributes, but keys and results are listed before it,
    # with the type of the links in between.
    types = {type(link) for link in cache.values()}
    listed = [part for part in parts[:at] if not any(part is link for link in types)]
    listed = listed[len(listed) - 2 * len(cache) :]
    return dict(zip(listed[::2], listed[1::2], strict=True)), separator


# Methods of files and writers that neither read nor write.
_HARMLESS = ("tell", "fileno", "isatty", "readable", "seekable", "writable", "get_logdir")


class _Silent:
    """A file or a writer of which nothing is read, and to which nothing is written."""

    def __init__(self, original: Any, path: str) -> None:
        self._original, self._path = original, path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        if not callable(value) or name in _HARMLESS:
            return value
        if name.startswith(("read", "recv", "seek", "detach", "peek")):
            return functools.partial(_refuse, self._path)
        return _discard_text if name == "write" else _discard

    def __iter__(self) -> Any:
        _refuse(self._path)

    def __next__(self) -> Any:
        _refuse(self._path)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _discard(*args: Any, **kwargs: Any) -> None:
    """In the place of a method that writes."""


def _discard_text(text: Any) -> int:
    return len(text)


class _Guard:
    """Raises on every use."""

    def __init__(self, path: str) -> None:
        self.__dict__["_path"] = path

    def __getattr__(self, name: str) -> Any:
        _refuse(self.__dict__["_path"])

    def __setattr__(self, name: str, value: object) -> None:
        _refuse(self.__dict__["_path"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse(self.__dict__["_path"])

    def __iter__(self) -> Any:
        _refuse(self.__dict__["_path"])

    def __next__(self) -> Any:
        _refuse(self.__dict__["_path"])

    def __enter__(self) -> Any:
        _refuse(self.__dict__["_path"])

    def __exit__(self, *error: object) -> None:
        pass


def _refuse(path: str, *args: Any, **kwargs: Any) -> Any:
    raise TouchedError(
        f"the loss uses {path}, which only training may use; nothing was changed. Pass "
        f"loss_fn=lambda pl_module, batch: ..., a loss without it"
    )


# (module, class): looked up only among the modules that are imported already.
_WRITERS = (
    ("torch.utils.tensorboard.writer", "SummaryWriter"),
    ("tensorboardX.writer", "SummaryWriter"),
    ("wandb.sdk.wandb_run", "Run"),
    ("tempfile", "_TemporaryFileWrapper"),
    ("codecs", "StreamReaderWriter"),
    ("zipfile", "ZipFile"),
    ("tarfile", "TarFile"),
)
_TABLES = (("pandas", "DataFrame"), ("pandas", "Series"))
_REFUSED = (
    ("queue", "Queue"),
    ("queue", "SimpleQueue"),
    ("_queue", "SimpleQueue"),
    ("multiprocessing.queues", "Queue"),
    ("multiprocessing.queues", "SimpleQueue"),
    ("multiprocessing.connection", "_ConnectionBase"),
    ("multiprocessing.managers", "BaseProxy"),
    ("socket", "socket"),
    ("sqlite3", "Connection"),
    ("sqlite3", "Cursor"),
    ("subprocess", "Popen"),
    ("mmap", "mmap"),
)


def _classes(names: Sequence[tuple[str, str]]) -> tuple[type, ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if isinstance(kind, type))


class ExternalTypes:
    """Classes of objects that reach outside the process, as far as they are imported."""

    def __init__(self) -> None:
        self._writers, self._refused = _classes(_WRITERS), _classes(_REFUSED)
        self._tables = _classes(_TABLES)
        csv: Any = sys.modules.get("_csv")
        self._csv: Any = getattr(csv, "writer", None) and type(csv.writer(io.StringIO()))

    def stand_in(self, value: object, path: Callable[[], str]) -> StandIn | None:
        """What stands in for ``value``; None if it is no such object."""
        if isinstance(value, io.IOBase):
            return None if isinstance(value, (io.StringIO, io.BytesIO)) else Discarding(value, path)
        if (self._csv is not None and type(value) is self._csv) or isinstance(value, self._writers):
            return Discarding(value, path)
        if isinstance(value, self._tables):
            return TableCopy(value, path)
        return Refused(value, path) if isinstance(value, self._refused) else None
