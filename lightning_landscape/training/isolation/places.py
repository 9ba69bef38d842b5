"""Where a value is stored, so that another can stand in for it during an evaluation."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MISSING: Any = object()  # what a place holds that does not exist


class Kind(NamedTuple):
    """How values of one kind of place are read and written."""

    get: Callable[[Any, Any], Any]
    put: Callable[[Any, Any, Any], None]
    delete: Callable[[Any, Any], None]
    label: Callable[[Any], str]


class Place(NamedTuple):
    """A key of a dict, an index of a list, a slot, the cell of a closure, ..."""

    kind: Kind
    holder: Any
    key: Any

    def holds(self, value: object) -> bool:
        """Whether ``value`` is stored here now."""
        return self.kind.get(self.holder, self.key) is value

    def put(self, value: object) -> None:
        """Store ``value`` here; nothing if a list has become too short."""
        self.kind.put(self.holder, self.key, value)


def _get_item(holder: Any, key: Any) -> Any:
    if isinstance(holder, dict):
        return dict.get(holder, key, MISSING)
    if isinstance(holder, np.ndarray):
        return holder.flat[key]
    return holder[key] if key < len(holder) else MISSING


def _put_item(holder: Any, key: Any, value: Any) -> None:
    # The methods of built-in types, because a subclass may do more than store the value.
    if isinstance(holder, dict):
        base = collections.OrderedDict if isinstance(holder, collections.OrderedDict) else dict
        base.__setitem__(holder, key, value)
    elif isinstance(holder, np.ndarray):
        holder.flat[key] = value
    elif key < len(holder):
        base_of = list if isinstance(holder, list) else collections.deque
        base_of.__setitem__(holder, key, value)


def _get_slot(holder: Any, key: types.MemberDescriptorType) -> Any:
    try:
        return key.__get__(holder)
    except AttributeError:
        return MISSING


def _get_cell(holder: types.CellType, key: None) -> Any:
    try:
        return holder.cell_contents
    except ValueError:
        return MISSING


def _put_cell(holder: types.CellType, key: None, value: Any) -> None:
    holder.cell_contents = value


def _delete_cell(holder: types.CellType, key: None) -> None:
    del holder.cell_contents


def _nothing(*args: Any) -> None:
    """Of places that cannot be written, such as a key of a dict."""


def _attribute(key: str) -> str:
    return f".{key}"


# A key of a dict, an index of a list or of a deque; the same of an object's __dict__.
ITEM = Kind(_get_item, _put_item, lambda o, key: dict.pop(o, key), lambda key: f"[{key!r:.40}]")
ATTRIBUTE = ITEM._replace(label=_attribute)
SLOT = Kind(
    _get_slot,
    lambda o, slot, value: slot.__set__(o, value),
    lambda o, slot: slot.__delete__(o),
    lambda slot: f".{slot.__name__}",
)
CELL = Kind(_get_cell, _put_cell, _delete_cell, lambda key: "")
# Of functions.
FUNCTION_ATTRIBUTE = Kind(getattr, setattr, delattr, _attribute)
CLASS_ATTRIBUTE = Kind(
    lambda cls, key: vars(cls).get(key, MISSING), type.__setattr__, type.__delattr__, _attribute
)
SCRIPT_ATTRIBUTE = Kind(
    lambda script, key: script.getattr(key),
    lambda script, key, value: script.setattr(key, value),
    _nothing,
    _attribute,
)
# Places that cannot be written.
KEY = Kind(lambda holder, key: MISSING, _nothing, _nothing, lambda key: f".key {key!r:.40}")
ELEMENT = Kind(lambda holder, key: MISSING, _nothing, _nothing, lambda key: f"[{key}]")
FIXED = Kind(lambda holder, key: MISSING, _nothing, _nothing, str)
UNWRITABLE = (FIXED, KEY, ELEMENT)
