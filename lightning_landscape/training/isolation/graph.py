"""The walk over everything that ``training_step`` can reach, from the module and its Trainer.

Each object is visited once.  What it holds gets a snapshot; tensors, sets, iterators and objects
that reach outside the process get the places where they are stored, so that others can stand in.
"""

from __future__ import annotations

import array
import collections
import functools
import gc
import math
import re
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation import places
from lightning_landscape.training.isolation.edges import (
    OF_LOADERS,
    Edge,
    edges_to,
    fixed,
    global_names,
    members,
    of_datasets,
    script_values,
    slots_of,
    without_state,
)
from lightning_landscape.training.isolation.entered import ATOMIC, enters, is_atomic, is_user_code
from lightning_landscape.training.isolation.iterators import (
    Recorder,
    Recordings,
    copy_iterator,
    is_iterator,
)
from lightning_landscape.training.isolation.places import Kind, Place
from lightning_landscape.training.isolation.reachable import Flags
from lightning_landscape.training.isolation.snapshots import (
    ClassAttributes,
    Elements,
    Entries,
    FreedTensor,
    Items,
    Members,
    Numbers,
    ScriptAttributes,
    Snapshot,
    Values,
    WeakItems,
    state_of,
)
from lightning_landscape.training.isolation.stand_ins import (
    ExternalTypes,
    IteratorCopy,
    LazyHooks,
    Recorded,
    SetCopy,
    Silenced,
    StandIn,
    UncachedCalls,
    is_cached_function,
)
from lightning_landscape.training.isolation.tensors import is_freed, is_plain


class Graph:
    """All state that is reachable from ``roots``.

    Attributes:
        snapshots: of containers, objects, arrays and generators.
        tensors: by id, with the places where each is stored; no parameters.
        parameters: by id, registered in a module or not, with their places.
        stand_ins: by id of the original.
        tuples: by id, with their places: those that contain a tensor or another original.
        modules: all modules.
    """

    def __init__(self, recordings: Recordings, silent: Mapping[int, Any]) -> None:
        """``silent``: what stands in for the loggers, by their ids."""
        self.snapshots: list[Snapshot] = []
        self.tensors: dict[int, tuple[Tensor, list[Place]]] = {}
        self.parameters: dict[int, tuple[nn.Parameter, list[Place]]] = {}
        self.stand_ins: dict[int, StandIn] = {}
        self.tuples: dict[int, tuple[tuple[Any, ...], list[Place]]] = {}
        self.modules: list[nn.Module] = []
        self._recordings = recordings
        self._silent = silent
        self._external = ExternalTypes()
        self._seen: dict[int, Any] = {}  # keeps the objects, so that ids stay theirs
        # id -> id of the holder, and the kind of place and the key of which the path is made.
        self._origin: dict[int, tuple[int, Kind, Any]] = {}
        self._most = math.inf  # elements and bytes of what is entered
        self._ordinary: set[type] = set()  # types for which nothing stands in

    def walk(self, roots: Mapping[str, object], *, beside: bool = False) -> None:
        """Visit everything that can be reached from ``roots`` and was not visited before.

        ``beside``: they are not the module's, and large containers and arrays are not entered.
        """
        self._most = _MOST_BESIDE if beside else math.inf
        collects = gc.isenabled()
        gc.disable()  # it would look at everything that is found, again and again
        try:
            self._visit([(v, places.FIXED, None, name) for name, v in roots.items()])
        finally:
            if collects:
                gc.enable()

    def _visit(self, pending: list[Edge]) -> None:
        while pending:
            value, kind, holder, key = pending.pop()
            if type(value) in ATOMIC:
                continue
            known = id(value) in self._seen
            if not known:
                self._origin[id(value)] = id(holder), kind, key
            try:
                if type(value) not in _PLAIN_CONTAINERS and (
                    self._replaced(value, Place(kind, holder, key)) or is_atomic(value)
                ):
                    continue
                if not known:
                    self._seen[id(value)] = value
                    pending.extend(self._expand(value))
            except Exception as error:  # of a property, or of a proxy without its object
                reraise_interrupt(error)  # the object is not entered

    def path(self, value: object) -> str:
        """Where ``value`` was found, as Python would write it."""
        labels: list[str] = []
        key = id(value)
        while key in self._origin and len(labels) < 50:
            key, kind, name = self._origin[key]
            labels.append(kind.label(name))
        path = "".join(reversed(labels))
        return re.sub(r"\._(?:modules|buffers|parameters)\['(\w+)'\]", r".\1", path)

    def release(self) -> None:
        """Drop everything: stand-ins refer to their graph, and would keep it until a collection."""
        for found in (self.snapshots, self.modules):
            found.clear()
        for known in (self.tensors, self.parameters, self.stand_ins, self.tuples, self._seen):
            known.clear()

    def with_copies(self, value: Any, made: Mapping[int, object]) -> Any:
        """What stands in for ``value``; a tuple with the stand-ins of what it contains."""
        if id(value) in made:
            return made[id(value)]
        if id(value) not in self.tuples:
            return value
        items = [self.with_copies(item, made) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return tuple.__new__(type(value), items)

    # -- values that others stand in for ---------------------------------------------------------

    def _replaced(self, value: Any, place: Place) -> bool:
        """Note the place if something stands in for ``value``; whether it is then left alone."""
        key = id(value)
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, tuple):
            if without_state(value):
                return True
            self.tuples.setdefault(key, (value, []))[1].append(place)
            return False
        if key in self.stand_ins:
            self.stand_ins[key].places.append(place)
            return True
        if type(value) in self._ordinary and key not in self._silent:
            return False
        stand_in = self._stand_in(value)
        if stand_in is None:
            if not is_cached_function(value):
                self._ordinary.add(type(value))
            return False
        self._seen[key] = value
        stand_in.places.append(place)
        self.stand_ins[key] = stand_in
        if isinstance(value, (set, weakref.WeakSet)):
            self.snapshots.append(Members(value) if isinstance(value, set) else WeakItems(value))
            self._visit(members(value) + self._attributes(value))
        elif isinstance(stand_in, UncachedCalls):
            self._visit([(value.__wrapped__, *fixed(value, ""))])
        return True

    def _tensor(self, tensor: Tensor, place: Place) -> bool:
        if isinstance(tensor, nn.Parameter):
            self.parameters.setdefault(id(tensor), (tensor, []))[1].append(place)
        elif is_plain(tensor):
            self.tensors.setdefault(id(tensor), (tensor, []))[1].append(place)
        elif is_freed(tensor):
            self.snapshots.append(FreedTensor(tensor))
        # The attributes of the tensor itself.
        return id(tensor) in self._seen or not tensor.__dict__

    def _stand_in(self, value: Any) -> StandIn | None:
        path = functools.partial(self.path, value)
        if isinstance(value, (set, weakref.WeakSet)):
            return SetCopy(value, path)
        if isinstance(value, Recorder) or is_iterator(value):
            if not isinstance(value, Recorder) and copy_iterator(value) is not None:
                return IteratorCopy(value, path)
            return Recorded(value, path, self._recordings)
        if is_cached_function(value):
            return UncachedCalls(value, path) if is_user_code(value.__module__) else None
        if id(value) in self._silent:
            return Silenced(value, path, self._silent[id(value)])
        return self._external.stand_in(value, path)

    # -- what an object holds --------------------------------------------------------------------

    def _expand(self, value: Any) -> Iterable[Edge]:
        """Take snapshots of one object; gives what it holds."""
        if type(value) in _PLAIN_CONTAINERS:
            return self._content(value)
        if isinstance(value, Flags):
            self.snapshots.append(Values(value.attributes, places.ITEM, value.names))
            self._origin[id(value.attributes)] = id(value), places.FIXED, ""
            return []
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            return [(value.__self__, *fixed(value, ""))]  # a bound method of a list, a generator
        if isinstance(value, types.MethodType):
            return [(value.__self__, *fixed(value, "")), (value.__func__, *fixed(value, ""))]
        if isinstance(value, _WRAPPERS):
            parts = (getattr(value, name, None) for name in _WRAPPED)
            return [(part, *fixed(value, "")) for part in parts if part is not None]
        if isinstance(value, weakref.ref):
            return [(value(), *fixed(value, "()"))]
        if isinstance(value, types.MappingProxyType):
            return [(part, *fixed(value, "")) for part in gc.get_referents(value)]
        state = state_of(value)
        if state is not None:
            self.snapshots.append(state)
            if isinstance(value, np.random.BitGenerator):
                return [(value.seed_seq, *fixed(value, ".seed_seq"))]
        elif not enters(value) and not isinstance(value, _CONTAINERS):
            return []
        edges = self._content(value)
        if isinstance(value, Dataset):
            edges += self._shallow(value, of_datasets)
        elif isinstance(value, DataLoader):
            edges += self._shallow(value, lambda name, item: name in OF_LOADERS)
        elif enters(value):
            edges += self._attributes(value)
        return edges

    def _content(self, value: Any) -> list[Edge]:
        """What a built-in container, an array or a generator holds."""
        if isinstance(value, dict):
            self.snapshots.append(Items(value))
            if len(value) > self._most:
                return []
            edges = edges_to(dict.items(value), places.ITEM, value)
            if not without_state(dict.keys(value)):
                edges += [(k, places.KEY, value, k) for k in dict.keys(value)]
            return edges
        if isinstance(value, (list, collections.deque)):
            self.snapshots.append(Elements(value))
            if len(value) > self._most or without_state(value):
                return []
            return edges_to(enumerate(value), places.ITEM, value)
        if isinstance(value, (tuple, frozenset)):
            return members(value)
        if isinstance(value, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
            self.snapshots.append(WeakItems(value))
            return [
                (part, *fixed(value, f"[{k!r:.40}]")) for k, v in value.items() for part in (k, v)
            ]
        if isinstance(value, (bytearray, array.array)):
            self.snapshots.append(Numbers(value))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes <= self._most * _BYTES_BESIDE:
                self.snapshots.append(Entries(value))
            if value.dtype == object:
                return edges_to(enumerate(value.flat), places.ITEM, value)
        elif isinstance(value, functools.partial):
            return [(p, *fixed(value, "")) for p in (value.func, value.args, value.keywords)]
        elif isinstance(value, np.random.Generator):
            return [(value.bit_generator, *fixed(value, ".bit_generator"))]
        return []

    def _attributes(self, value: Any) -> list[Edge]:
        """The ``__dict__``, the slots and the class of an object."""
        edges: list[Edge] = []
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and not isinstance(value, _WEAK):
            self.snapshots.append(Items(attributes))
            edges += edges_to(attributes.items(), places.ATTRIBUTE, attributes)
            self._origin[id(attributes)] = id(value), places.FIXED, ""
        kind: Any = type(value)
        if slots := slots_of(kind):
            self.snapshots.append(Values(value, places.SLOT, slots))
            found = [(places.SLOT.get(value, s), places.SLOT, value, s) for s in slots]
            edges += [edge for edge in found if edge[0] is not places.MISSING]
        if isinstance(value, nn.Module):
            self.modules.append(value)
            if any(p is not None and is_lazy(p) for p in value._parameters.values()):
                hooks = value._forward_pre_hooks
                lazy = LazyHooks(hooks, functools.partial(self.path, hooks))
                lazy.places.append(Place(places.ATTRIBUTE, attributes, "_forward_pre_hooks"))
                self.stand_ins[id(hooks)] = lazy
            if isinstance(value, torch.jit.ScriptModule) and hasattr(value, "_c"):
                edges += self._script(value)
        if is_user_code(kind.__module__):
            edges.append((kind, *fixed(value, ".__class__")))
        return edges

    def _shallow(self, value: Any, chosen: Callable[[str, Any], bool]) -> list[Edge]:
        """Attributes of a data set or a loader: all are restored, few are entered."""
        attributes: dict[str, Any] = value.__dict__
        self.snapshots.append(Items(attributes))
        self._origin[id(attributes)] = id(value), places.FIXED, ""
        return [
            (item, places.ATTRIBUTE, attributes, name)
            for name, item in attributes.items()
            if chosen(name, item)
        ]

    def _script(self, module: Any) -> list[Edge]:
        """The buffers and attributes of a TorchScript module, which live in C++."""
        script, values = module._c, script_values(module)
        others = [name for name, value in values.items() if not isinstance(value, Tensor)]
        self.snapshots.append(ScriptAttributes(script, others))
        self._origin[id(script)] = id(module), places.FIXED, ""
        self._seen[id(script)] = script
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._seen.update((id(tensor), tensor) for tensor in tensors.values())
        edges: list[Edge] = [
            (tensor, places.SCRIPT_ATTRIBUTE, script, name) for name, tensor in tensors.items()
        ]
        edges += [(m, *fixed(module, f".{n}")) for n, m in module.named_children()]
        return edges + [
            (p, *fixed(module, f".{n}")) for n, p in module.named_parameters(recurse=False)
        ]

    def _function(self, function: types.FunctionType) -> list[Edge]:
        """Closure, default arguments, attributes, and the global variables that it names."""
        if not is_user_code(function.__module__ or ""):
            return []
        kind, names = places.FUNCTION_ATTRIBUTE, ["__defaults__", "__kwdefaults__"]
        self.snapshots.append(Values(function, kind, names))
        edges: list[Edge] = [(getattr(function, name), kind, function, name) for name in names]
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            content = places.CELL.get(cell, None)
            if content is not places.MISSING:
                self.snapshots.append(Values(cell, places.CELL, [None]))
                self._origin[id(cell)] = id(function), places.FIXED, f"<{variable}>"
                edges.append((content, places.CELL, cell, None))
        edges.append((function.__dict__, *fixed(function, "")))
        if is_user_code(function.__globals__.get("__name__", "")):
            edges += self._globals(function)
        return edges

    def _globals(self, function: types.FunctionType) -> list[Edge]:
        variables = function.__globals__
        names = global_names(function.__code__)
        if names:
            self.snapshots.append(Values(variables, places.ITEM, names))
        self._origin.setdefault(id(variables), (0, places.FIXED, variables.get("__name__", "")))
        return [
            (variables[name], places.ATTRIBUTE, variables, name)
            for name in names
            if name in variables
        ]

    def _class(self, kind: type) -> list[Edge]:
        """The attributes of a class of the user's code, and of its bases."""
        if not is_user_code(kind.__module__):
            return []
        self.snapshots.append(ClassAttributes(kind))
        bases: list[Edge] = [(base, *fixed(kind, "")) for base in kind.__bases__]
        return edges_to(vars(kind).items(), places.CLASS_ATTRIBUTE, kind) + bases


_PLAIN_CONTAINERS = frozenset({dict, list, collections.OrderedDict, collections.deque})
# Of the Trainer's callbacks and data module: elements of a container, bytes of an array for each.
_MOST_BESIDE, _BYTES_BESIDE = 10_000, 100
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque, np.ndarray)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_WRAPPERS = (property, staticmethod, classmethod, functools.cached_property)
_WRAPPED = ("fget", "fset", "__func__", "func")
