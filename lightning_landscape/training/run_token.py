"""Identifies a run: all fits of one Trainer with one module."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

# Trainer -> the module of its last fit, and the token of that run.
_RUNS: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], str]] = weakref.WeakKeyDictionary()


def run_token(trainer: Any, pl_module: Any) -> str:
    """A string that is the same for all fits of one Trainer with one module, and for no other.

    Callbacks that store it can be copied and pickled.
    """
    known = _RUNS.get(trainer)
    if known is None or known[0]() is not pl_module:
        known = _RUNS[trainer] = weakref.ref(pl_module), uuid.uuid4().hex
    return known[1]
