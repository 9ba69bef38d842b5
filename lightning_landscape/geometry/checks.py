"""Wrong arguments, refused where they are given: the message quotes the call and what to pass.

``said`` is the class that was called, or empty: then the argument stands alone.  Numbers may be of
any kind that Python converts (NumPy's, a tensor with one entry), but neither text nor truth values,
which Python would take for 0 and 1.
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


def quoted(said: str, argument: str, value: object) -> str:
    """``said(argument=value)``."""
    return f"{said}({argument}={shown(value)})" if said else f"{argument}={shown(value)}"


def check_choice(said: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{quoted(said, argument, value)}: expected {choices}")


def check_flags(said: str, **flags: object) -> None:
    """Raise unless all are True or False: ``"no"`` and ``"false"`` would count as true."""
    for argument, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{quoted(said, argument, value)}: expected True or False")


def check_count(said: str, argument: str, value: Any, least: int = 1, or_else: str = "") -> int:
    """``value`` as a plain integer; raises unless it is one, ``least`` or more.

    ``or_else`` ends the message, with what else may be passed.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(
            f"{quoted(said, argument, value)}: expected an integer >= {least}{or_else}"
        )
    return count


def check_count_or_zero(said: str, argument: str, value: Any) -> int:
    """``value`` as a plain integer; raises unless it is one, 2 or more, or 0 for none."""
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0
    return check_count(said, argument, value, 2, ", or 0")


def check_blocks(said: str, blocks: object) -> None:
    """Raise unless ``blocks`` is True, False or a mapping from parameter name to block."""
    named = isinstance(blocks, Mapping) and all(
        isinstance(word, str) for pair in blocks.items() for word in pair
    )
    if not named and not isinstance(blocks, bool):
        raise TypeError(
            f"{quoted(said, 'blocks', blocks)}: expected True, False or a mapping from parameter "
            f"name to block, such as module_blocks returns"
        )


def check_block_names(said: str, blocks: object, names: Sequence[str]) -> None:
    """Raise where ``blocks`` is a mapping from what is no name."""
    unknown = [name for name in blocks if name not in names] if isinstance(blocks, Mapping) else []
    if unknown:
        raise ValueError(
            f"{quoted(said, 'blocks', blocks)}: there is no parameter {unknown[0]!r}; expected "
            f"names among {few(names)}"
        )


def check_number(
    said: str, argument: str, value: object, expected: str, fits: Callable[[float], bool]
) -> None:
    """Raise unless ``value`` is a number that ``fits``; NaN fits no comparison."""
    try:
        number = _number(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{quoted(said, argument, value)}: expected {expected}") from None
    if not fits(number):
        raise ValueError(f"{quoted(said, argument, value)}: expected {expected}")


def check_span(said: str, argument: str, span: Any, or_else: str = "") -> None:
    """Raise unless ``span`` is two finite numbers, the smaller first."""
    message = (
        f"{quoted(said, argument, span)}: expected two finite numbers, the smaller first{or_else}"
    )
    try:
        ends = [_number(end) for end in span]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(message) from None
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError(message)


def _number(value: Any) -> float:
    """``value`` as a float; what is none raises one of several errors."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError
    try:
        return float(value)
    except OverflowError:  # an integer with more digits than floats hold
        return math.inf if value > 0 else -math.inf


def check_callable(
    said: str, argument: str, value: object, expected: str, arguments: int | None = None
) -> None:
    """Raise unless ``value`` can be called, with so many arguments where the number is given."""
    fits = callable(value)
    if fits and arguments is not None:
        try:
            inspect.signature(cast("Callable[..., Any]", value)).bind(*[None] * arguments)
        except TypeError:
            fits = False
        except ValueError:  # it does not tell what it takes
            pass
    if not fits:
        raise TypeError(f"{quoted(said, argument, value)}: expected {expected}")


def check_mapping(said: str, argument: str, value: object, expected: str) -> None:
    """Raise unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{quoted(said, argument, value)}: expected {expected}")


def check_path(said: str, argument: str, value: object, expected: str) -> None:
    """Raise unless ``value`` is the name of a file or a directory."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{quoted(said, argument, value)}: expected {expected}")


def check_objective(objective: object, *needed: str) -> None:
    """Raise unless it has what an ``Objective`` has, as far as that is needed."""
    if isinstance(objective, type) or not all(hasattr(objective, name) for name in needed):
        raise TypeError(
            f"{quoted('', 'objective', objective)}: expected an Objective, e.g. "
            f"Objective(loss_fn, dict(model.named_parameters()))"
        )


def few(names: Iterable[object]) -> str:
    """The first of them, and how many more there are."""
    known = list(names)
    return f"{known[:4]}" + (f" and {len(known) - 4} more" if len(known) > 4 else "")


def check_metadata(metadata: object, said: str = "") -> None:
    """Raise unless it can be kept, and saved, in a slice."""
    if metadata is not None:
        check_mapping(said, "metadata", metadata, "a mapping of plain values, or None")
