"""What an object holds and where: the edges along which :class:`Graph` walks."""

from __future__ import annotations

import builtins
import collections
import functools
import types
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_landscape.training.isolation import places
from lightning_landscape.training.isolation.entered import ATOMIC
from lightning_landscape.training.isolation.places import Kind

# The value, the kind of the place where it is stored, its holder and its key.
Edge = tuple[Any, Kind, Any, Any]

_BUILTINS = frozenset(dir(builtins))


# Attributes of a DataLoader that draw random numbers, or call the user's code.
OF_LOADERS = ("dataset", "generator", "sampler", "batch_sampler", "collate_fn", "worker_init_fn")


def of_datasets(name: str, item: Any) -> bool:
    """What is entered of a data set: all but the data, i.e. tensors, arrays and containers."""
    if isinstance(item, (list, tuple, set, collections.deque, dict)):
        values = item.values() if isinstance(item, dict) else item
        return without_state(values) or all(isinstance(value, Dataset) for value in values)
    return not isinstance(item, (Tensor, np.ndarray))


def fixed(holder: object, label: str) -> tuple[Kind, Any, Any]:
    """The place of something that cannot be replaced."""
    return places.FIXED, holder, label


def edges_to(items: Iterable[tuple[Any, Any]], kind: Kind, holder: Any) -> list[Edge]:
    """Edges to those of the values that may have state."""
    return [(value, kind, holder, key) for key, value in items if type(value) not in ATOMIC]


def members(value: Collection[Any]) -> list[Edge]:
    """Edges to the members of a set or a tuple."""
    return [] if without_state(value) else edges_to(enumerate(value), places.ELEMENT, value)


def script_values(module: Any) -> dict[str, Any]:
    """The buffers and attributes of a TorchScript module, without its parameters."""
    names = {*module._concrete_type.get_attributes(), *module._buffers.keys()}
    names -= {"training", "_is_full_backward_hook", *module._parameters.keys()}
    return {name: module._c.getattr(name) for name in names if module._c.hasattr(name)}


def without_state(values: Collection[Any]) -> bool:
    """Whether none of the values has state."""
    return set(map(type, values)) <= ATOMIC


@functools.cache
def slots_of(kind: Any) -> tuple[types.MemberDescriptorType, ...]:
    """The descriptors of a class's slots, private ones too."""
    found = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            name = f"_{base.__name__.lstrip('_')}{name}" if _is_private(name) else name
            slot = base.__dict__.get(name)
            if isinstance(slot, types.MemberDescriptorType):
                found.append(slot)
    return tuple(found)


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


@functools.cache
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names of global variables and attributes that the code of a function uses."""
    inner = [
        name for c in code.co_consts if isinstance(c, types.CodeType) for name in global_names(c)
    ]
    names = (name for name in code.co_names if name not in _BUILTINS)
    return tuple(dict.fromkeys([*names, *inner]))
