"""Argument checks whose messages quote the argument and say what to pass instead.

``owner`` is the class or function that was called, or empty to leave it out of the message;
``expected`` describes the valid values.  Numbers may be of any type that Python converts (NumPy
scalars, one-element tensors), but not strings or bools.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np


def shown(value: object) -> str:
    """``repr(value)`` on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def quoted(owner: str, argument: str, value: object) -> str:
    """``owner(argument=value)``, for error messages."""
    return f"{owner}({argument}={shown(value)})" if owner else f"{argument}={shown(value)}"


def check_choice(owner: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{quoted(owner, argument, value)}: expected {choices}")


def check_flags(owner: str, **flags: object) -> None:
    """Raise unless all are True or False; strings such as ``"no"`` would count as true."""
    for argument, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{quoted(owner, argument, value)}: expected True or False")


def check_count(owner: str, argument: str, value: Any, least: int = 1, or_else: str = "") -> int:
    """``value`` as an ``int``; raises unless it is an integer >= ``least``.

    ``or_else`` is appended to the message, to name other valid values.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(
            f"{quoted(owner, argument, value)}: expected an integer >= {least}{or_else}"
        )
    return count


def check_count_or_zero(owner: str, argument: str, value: Any) -> int:
    """``value`` as an ``int``; raises unless it is an integer >= 2, or 0."""
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0
    return check_count(owner, argument, value, 2, ", or 0")


def check_blocks(owner: str, blocks: object) -> None:
    """Raise unless ``blocks`` is True, False or a mapping from parameter name to block."""
    named = isinstance(blocks, Mapping) and all(
        isinstance(word, str) for pair in blocks.items() for word in pair
    )
    if not named and not isinstance(blocks, bool):
        raise TypeError(
            f"{quoted(owner, 'blocks', blocks)}: expected True, False or a mapping from parameter "
            f"name to block, such as module_blocks returns"
        )


def check_block_names(owner: str, blocks: object, names: Sequence[str]) -> None:
    """Raise if ``blocks`` is a mapping with a key that is not in ``names``."""
    unknown = [name for name in blocks if name not in names] if isinstance(blocks, Mapping) else []
    if unknown:
        raise ValueError(
            f"{quoted(owner, 'blocks', blocks)}: there is no parameter {unknown[0]!r}; expected "
            f"names among {few(names)}"
        )


def check_number(
    owner: str, argument: str, value: object, expected: str, valid: Callable[[float], bool]
) -> None:
    """Raise unless ``value`` is a number and ``valid(value)``; NaN fails every comparison."""
    try:
        number = _number(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{quoted(owner, argument, value)}: expected {expected}") from None
    if not valid(number):
        raise ValueError(f"{quoted(owner, argument, value)}: expected {expected}")


def check_span(owner: str, argument: str, span: Any, or_else: str = "") -> None:
    """Raise unless ``span`` is two finite numbers, the smaller first."""
    message = (
        f"{quoted(owner, argument, span)}: expected two finite numbers, the smaller first{or_else}"
    )
    try:
        ends = [_number(end) for end in span]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(message) from None
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError(message)


def _number(value: Any) -> float:
    """``value`` as a float; raises TypeError, ValueError or RuntimeError if it is not a number."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf if value > 0 else -math.inf


def check_callable(
    owner: str, argument: str, value: object, expected: str, arguments: int | None = None
) -> None:
    """Raise unless ``value`` is callable, with ``arguments`` positional arguments if given."""
    valid = callable(value)
    if valid and arguments is not None:
        try:
            inspect.signature(cast("Callable[..., Any]", value)).bind(*[None] * arguments)
        except TypeError:
            valid = False
        except ValueError:  # it has no signature, e.g. some builtins
            pass
    if not valid:
        raise TypeError(f"{quoted(owner, argument, value)}: expected {expected}")


def check_mapping(owner: str, argument: str, value: object, expected: str) -> None:
    """Raise unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{quoted(owner, argument, value)}: expected {expected}")


def check_path(owner: str, argument: str, value: object, expected: str) -> None:
    """Raise unless ``value`` is a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{quoted(owner, argument, value)}: expected {expected}")


def check_objective(objective: object, *needed: str) -> None:
    """Raise unless it has the ``needed`` attributes of an ``Objective``."""
    if isinstance(objective, type) or not all(hasattr(objective, name) for name in needed):
        raise TypeError(
            f"{quoted('', 'objective', objective)}: expected an Objective, e.g. "
            f"Objective(loss_fn, dict(model.named_parameters()))"
        )


def few(names: Iterable[object]) -> str:
    """The first four names, and how many more there are."""
    known = list(names)
    return f"{known[:4]}" + (f" and {len(known) - 4} more" if len(known) > 4 else "")


def check_metadata(metadata: object, owner: str = "") -> None:
    """Raise unless it is a mapping or None."""
    if metadata is not None:
        check_mapping(owner, "metadata", metadata, "a mapping of plain values, or None")
