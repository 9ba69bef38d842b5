"""Counts and steps in words."""

from __future__ import annotations

import math

from lightning_landscape.figures.labels import number


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "time"), counted(2, "time")
        ('1 time', '2 times')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def steps_text(first: int, last: int) -> str:
    """One step, or the range from the first to the last.

    Example:
        >>> steps_text(3, 3), steps_text(3, 9)
        ('step 3', 'steps 3 to 9')
    """
    return f"step {first}" if first == last else f"steps {first} to {last}"


def value_text(value: float) -> str:
    """A value with four significant digits."""
    return number(value, 4) if math.isfinite(value) else "not finite"
