"""The scale of loss differences that all frames of one film share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import SymLogNorm

from lightning_landscape.figures.data import (
    HUGE,
    ROUNDING,
    centred,
    check_slice,
    nonzero_magnitudes,
)

if TYPE_CHECKING:
    from lightning_landscape.geometry.slices import Slice

# Outliers extend the scale to at most this many times the median difference.
OUTLIER = 30.0


@dataclass(frozen=True)
class ColorScale:
    """A symmetric scale for ``loss - loss at the weights``: linear near zero, logarithmic beyond.

    Made from the first frame and used for all later ones, it gives a colour (or a height) the same
    meaning throughout a run, so that films do not flicker.

    Args:
        linthresh: the scale is linear between -linthresh and linthresh. Positive.
        limit: the scale ends at -limit and limit; values beyond are drawn at the end, which is then
            labelled ``"> limit"``. At least linthresh.

    Raises:
        ValueError: if not 0 < linthresh <= limit < inf.

    Example:
        >>> ColorScale(linthresh=0.01, limit=2.0).ticks()
        [-2.0, -0.1, -0.01, 0.0, 0.01, 0.1, 2.0]
    """

    linthresh: float
    limit: float

    def __post_init__(self) -> None:
        message = (
            f"ColorScale(linthresh={self.linthresh!r}, limit={self.limit!r}): expected finite "
            "numbers with 0 < linthresh <= limit"
        )
        if any(isinstance(end, (bool, str, type(None))) for end in (self.linthresh, self.limit)):
            raise TypeError(message)
        if not 0 < self.linthresh <= self.limit < math.inf:
            raise ValueError(message)

    @classmethod
    def from_slice(cls, slice: Slice) -> ColorScale:
        """Chooses the scale of a film from its first frame.

        The limit is 4 times the largest difference in the frame, because surfaces become steeper
        during training, or the loss at the weights if that is larger (up to 100 times the largest
        difference), because far from a trained network the loss returns to about its initial value.
        It is rounded up to 1, 2 or 5 times a power of ten.

        Args:
            slice: the first frame, a line or a plane. Non-finite losses are ignored, and outliers
                (over 30 times the median difference) do not extend the scale. On a flat surface the
                scale is that of the loss itself, or 1 if there is none.
        """
        return cls._chosen(slice, film=True)

    @classmethod
    def _chosen(cls, slice: Slice, film: bool) -> ColorScale:
        """Chooses a scale, with room for later frames if it is for a film."""
        check_slice("ColorScale.from_slice(slice=...)", slice)
        difference, reference = centred(slice)
        size = nonzero_magnitudes(difference)
        largest = min(float(size.max()), OUTLIER * float(np.median(size))) if size.size else 0.0
        reach = max(4 * largest, min(abs(reference), 100 * largest)) if film else largest
        if largest <= ROUNDING * abs(reference):
            reach = abs(reference) or 1.0
        limit = round_up(max(reach, 1 / HUGE))
        low = float(np.quantile(size, 0.1)) if size.size else 0.0
        return cls(linthresh=round_up(float(np.clip(low, limit / 5000, limit / 20))), limit=limit)

    @classmethod
    def for_one(cls, slice: Slice) -> ColorScale:
        """Chooses the scale of a single picture, without room for later frames."""
        return cls._chosen(slice, film=False)

    def to_dict(self) -> dict[str, float]:
        """Returns a dict of plain floats, for a checkpoint."""
        return {"linthresh": float(self.linthresh), "limit": float(self.limit)}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> ColorScale:
        """Returns the scale of a dict made by ``to_dict``.

        Raises:
            ValueError: if a key is missing or the numbers are not a scale.
        """
        if not isinstance(values, Mapping) or not {"linthresh", "limit"} <= set(values):
            raise ValueError(
                f"ColorScale.from_dict(values={values!r}): expected the keys 'linthresh' and "
                "'limit', as to_dict returns them"
            )
        return cls(linthresh=float(values["linthresh"]), limit=float(values["limit"]))

    def norm(self) -> SymLogNorm:
        """Returns the matplotlib norm of this scale."""
        return SymLogNorm(
            self.linthresh, linscale=0.5, vmin=-self.limit, vmax=self.limit, base=10, clip=False
        )

    def ticks(self) -> list[float]:
        """Returns both ends, zero, and powers of ten between them, as far as labels fit."""
        first = math.ceil(math.log10(self.linthresh) - 1e-9)
        last = math.ceil(math.log10(self.limit / 3) - 1e-9)
        powers = [float(f"1e{exponent}") for exponent in range(first, last)]
        powers = powers[:: 1 + len(powers) // 4]
        positive = [*powers, float(self.limit)]
        return [-value for value in reversed(positive)] + [0.0] + positive


def round_up(value: float) -> float:
    """Returns the next number of the form 1, 2 or 5 times a power of ten, at or above a value > 0.

    Example:
        >>> round_up(0.37), round_up(1.0), round_up(620.0)
        (0.5, 1.0, 1000.0)
    """
    exponent = math.floor(math.log10(value))
    for candidate in (f"1e{exponent}", f"2e{exponent}", f"5e{exponent}"):
        if value <= float(candidate) * (1 + 1e-9):
            return float(candidate)
    return float(f"1e{exponent + 1}")
