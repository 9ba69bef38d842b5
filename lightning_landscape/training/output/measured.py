"""The result of one measurement, and its validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_landscape.geometry.checks import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.figures.surface import Surface


@dataclass
class Measured:
    """The result of one measurement.

    Attributes:
        values: scalars under their full keys, for all loggers and the history.
        facts: plain values for the history only.
        before: scalars of the weights before the last step.
        pictures: tag -> a function that draws it.
        files: file name -> a function that writes it.
        surfaces: tag -> a function that makes a 3D surface.
        drawings: tag or file name -> the cost of a picture or a file of the whole run, in units of
            one ordinary picture; 1 if missing.
        unconverged: keys of values that no stopper and no other callback should act on.
    """

    values: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    surfaces: dict[str, Callable[[], Surface]] = field(default_factory=dict)
    drawings: dict[str, float] = field(default_factory=dict)
    unconverged: set[str] = field(default_factory=set)


def validated(measured: object, prefix: str) -> Measured:
    """``measured`` with plain numbers for values, if the callback ``prefix`` may return it.

    Raises:
        TypeError: not a ``Measured``, or a value that is not a number.
        ValueError: a key that does not begin with the prefix.
    """
    if not isinstance(measured, Measured):
        raise TypeError(
            f"{prefix}: measure returned {shown(measured)}: expected a Measured, e.g. "
            f"Measured({{self.key('norm'): 1.0}})"
        )
    for part in ("values", "before"):
        numbers = {k: _number(k, v, part, prefix) for k, v in getattr(measured, part).items()}
        setattr(measured, part, numbers)
    for part in ("pictures", "surfaces"):
        for key in getattr(measured, part):
            _check_key(key, part, prefix)
    return measured


def _number(key: object, value: Any, part: str, prefix: str) -> float:
    _check_key(key, part, prefix)
    several = getattr(value, "numel", lambda: 1)() != 1
    if isinstance(value, (str, bytes)) or several:
        raise TypeError(
            f"Measured({part}={{{key!r}: {shown(value)}}}): expected a number, e.g. float(...)"
        )
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Measured({part}={{{key!r}: {shown(value)}}}): expected a number, e.g. float(...)"
        ) from error


def _check_key(key: object, part: str, prefix: str) -> None:
    if not isinstance(key, str) or not key.startswith(f"{prefix}/"):
        raise ValueError(
            f"Measured({part}={{{key!r}: ...}}): expected a key that begins with '{prefix}/', as "
            f"self.key({key!r}) gives it"
        )
