"""The range of losses that the pictures of a run share, and the colours of planes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from lightning_landscape.figures.data import (
    HUGE,
    ROUNDING,
    center_of,
    check_slice,
    losses_of,
)
from lightning_landscape.geometry.checks import check_flags, check_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# Outliers extend a range to at most this many times the median difference from the loss at the
# weights.
OUTLIER, _OUTLIER_OF_PLANES = 30.0, 1000.0
# The colours of a live run: decades below the highest loss of its first plane.
_DECADES = 3
# The part of the colour map at either end for losses beyond the limits of a live run.
_ROOM = 0.15
# Bands of colour between the limits, and at most in one picture.
_BANDS, _MOST_BANDS = 24, 60


@dataclass(frozen=True)
class LossLimits:
    """The range of losses that the pictures of a run share.

    Lines: the ends of the loss axis.  Planes: the place in the colour map is linear in the
    logarithm of the loss from ``low`` to ``high``.  Beyond them it approaches the end of the colour
    map, so that a loss has the same colour in all pictures, however far the loss falls.

    Args:
        low: the lower end; above 0 for planes.
        high: the upper end, above ``low``.
        excess: for planes with losses that are not positive: the values are those above the lowest
            sampled loss of each plane.
        room: the part of the colour map at either end for losses beyond the limits.

    Raises:
        ValueError: if not -inf < low < high < inf.

    Example:
        >>> limits = LossLimits(low=0.01, high=10.0, room=0.1)
        >>> limits.color([0.01, 10.0, 100.0]).round(2).tolist()
        [0.1, 0.9, 0.97]
    """

    low: float
    high: float
    excess: bool = False
    room: float = 0.0

    def __post_init__(self) -> None:
        message = (
            f"LossLimits(low={self.low!r}, high={self.high!r}): expected finite numbers with "
            f"low < high"
        )
        if any(isinstance(end, (bool, str, type(None))) for end in (self.low, self.high)):
            raise TypeError(message)
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(message)
        check_flags("LossLimits", excess=self.excess)
        expected = "a part of the colour map from 0 to below 0.5"
        check_number("LossLimits", "room", self.room, expected, lambda x: 0.0 <= x < 0.5)

    # -- how they are chosen ---------------------------------------------------------------------

    @classmethod
    def from_slice(cls, slice: Slice) -> LossLimits:
        """Chooses the limits of a live run from its first picture; see ``widened``.

        Line: from 0, or the lowest loss if that is below 0 or above half of the highest, to the
        highest loss.  Plane: three decades below the highest loss, which is rounded up to 1, 2 or 5
        times a power of ten.  Losses that are not finite and outliers (over 30 times the median
        difference from the loss at the weights) are ignored.
        """
        check_slice("LossLimits.from_slice(slice=...)", slice)
        if len(slice.coordinates) == 1:
            return cls.for_film([slice])
        _, high, excess = _range_of_planes([slice])
        high = round_up(high)
        return cls(high / 10**_DECADES, high, excess, _ROOM)

    @classmethod
    def for_film(cls, film: Sequence[Slice]) -> LossLimits:
        """Chooses limits that contain the losses of all slices, apart from outliers.

        Lines over 30 times as high as the median one are outliers too, and planes over 1000 times:
        those of a run that has diverged would hide all others.
        """
        if len(film[0].coordinates) == 1:
            ends = [_range(losses_of(line), center_of(line)) for line in film]
            return cls(*_axis(*_joined(ends, OUTLIER)))
        low, high, excess = _range_of_planes(film)
        if high < 10 * low:  # the steps of the ladder are too coarse
            margin = 1.0 + 0.02 * (high / low - 1.0)
            margin = margin if margin > 1.0 + ROUNDING else 2.0  # flat
            return cls(low / margin, high * margin, excess)
        return cls(max(round_down(low), round_up(high) * 1e-12), round_up(high), excess)

    def widened(self, slice: Slice) -> LossLimits:
        """The limits for the next picture of a live run.

        Lines: widened to contain its losses, never narrowed, unless they are over 30 times as high.
        Planes: the same, because colours must not change; others only at the first loss that is not
        positive.
        """
        if len(slice.coordinates) == 2:
            positive = self.excess or not bool((losses_of(slice) <= 0).any())
            return self if positive else LossLimits.from_slice(slice)
        other = LossLimits.for_film([slice])
        if other.high > OUTLIER * abs(self.high):
            return self
        return LossLimits(*_axis(min(self.low, other.low), max(self.high, other.high)))

    # -- checkpoints -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, float | bool]:
        """Returns a dict of plain values, for a checkpoint."""
        ends = {"low": float(self.low), "high": float(self.high), "room": float(self.room)}
        return {**ends, "excess": bool(self.excess)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LossLimits:
        """Returns the limits of a dict made by ``to_dict``.

        Raises:
            ValueError: if a key is missing or the numbers are not limits.
        """
        if not isinstance(values, Mapping) or not {"low", "high", "excess", "room"} <= set(values):
            raise ValueError(
                f"LossLimits.from_dict(values={values!r}): expected the keys 'low', 'high', "
                "'excess' and 'room', as to_dict returns them"
            )
        low, high, room = (float(values[key]) for key in ("low", "high", "room"))
        return cls(low, high, bool(values["excess"]), room)

    # -- the colours of planes ---------------------------------------------------------------------

    def values(self, slice: Slice) -> NDArray[Any]:
        """Returns what is drawn: the losses, or those above the lowest; NaN if not finite."""
        losses = losses_of(slice)
        return above_lowest(losses) if self.excess else losses

    def color(self, values: Any) -> NDArray[Any]:
        """Returns the place in the colour map, from 0 to 1; increasing in the value."""
        ratio = np.asarray(values, dtype=np.float64) / self.low
        place = np.log(np.maximum(ratio, 1e-300)) / math.log(self.high / self.low)
        if not self.room:
            return place.clip(0.0, 1.0)
        slope = (1 - 2 * self.room) / self.room  # no kink at the limits
        below = self.room / (1 - slope * np.minimum(place, 0.0))
        above = 1 - self.room / (1 + slope * np.maximum(place - 1, 0.0))
        inside = self.room + (1 - 2 * self.room) * place
        return np.where(place < 0, below, np.where(place > 1, above, inside))

    def shown(self, film: Sequence[Slice]) -> tuple[float, float]:
        """Returns the ends of the colour bar: of these limits and of a film, without outliers."""
        ranges = [_positive_range(plane, self.excess) for plane in film]
        low, high = _joined(ranges, _OUTLIER_OF_PLANES)
        low = max(round_down(low), self.low * 1e-3) if low < self.low else self.low
        high = min(round_up(high), self.high * 1e3) if high > self.high else self.high
        return low, high

    def norm(self) -> Normalize:
        """Returns the matplotlib norm of these colours."""
        return _Norm(self)

    def bands(self, low: float, high: float) -> NDArray[Any]:
        """Returns the borders of the bands of colour that contain ``low`` to ``high``.

        A geometric sequence through both limits, without what has the colour of an end.
        """
        span, beyond = self.high / self.low, 3 if self.room else 0
        low, high = (
            min(max(end, self.low / span**beyond), self.high * span**beyond) for end in (low, high)
        )
        step = math.log(span) / _BANDS
        first, last = (math.log(end / self.low) / step for end in (low, high))
        every = max(1, math.ceil((last - first) / _MOST_BANDS))
        first, last = math.floor(first / every), math.ceil(last / every + 1e-9)
        numbers = np.arange(first, max(last, first + 1) + 1) * every
        borders: NDArray[Any] = self.low * np.exp(step * numbers)
        return borders


class _Norm(Normalize):
    """The place of a value in the colour map."""

    def __init__(self, limits: LossLimits) -> None:
        super().__init__(limits.low, limits.high)
        self.limits = limits

    def __call__(self, value: Any, clip: bool | None = None) -> Any:
        masked = np.ma.masked_invalid(value)
        return np.ma.array(self.limits.color(masked.filled(1.0)), mask=masked.mask)

    def inverse(self, value: Any) -> Any:
        """Not needed: the colour bar is drawn on an axis of its own."""
        raise NotImplementedError


def above_lowest(losses: NDArray[Any]) -> NDArray[Any]:
    """Returns the losses minus the lowest finite one."""
    finite = losses[np.isfinite(losses)]
    return losses - (finite.min() if finite.size else 0.0)


def isolines(low: float, high: float, most: int = 8) -> list[float]:
    """Returns round levels between two values: 1, 2, 5 times powers of ten, or evenly spaced.

    The latter if the values span less than a decade or are not positive.

    Example:
        >>> isolines(0.03, 4.0), isolines(20.0, 30.0)
        ([0.05, 0.1, 0.2, 0.5, 1.0, 2.0], [22.0, 24.0, 26.0, 28.0])
    """
    if not low < high:
        return []
    if low <= 0 or high < 10 * low:
        found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(level) for level in found if low < level < high]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits, every in (("125", 1), ("13", 1), ("1", 1), ("1", 2), ("1", 5)):
        powers = [exponent for exponent in range(first, last + 1) if exponent % every == 0]
        levels = [float(f"{digit}e{exponent}") for exponent in powers for digit in digits]
        levels = [level for level in levels if low < level < high]
        if len(levels) <= most:
            break
    return levels


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


def round_down(value: float) -> float:
    """Returns the next number of the form 1, 2 or 5 times a power of ten, at or below a value > 0.

    Example:
        >>> round_down(0.37), round_down(1.0), round_down(620.0)
        (0.2, 1.0, 500.0)
    """
    return float(f"{1 / round_up(1 / value):.0e}")  # the ladder of reciprocals is the same


def _range(values: NDArray[Any], reference: float) -> tuple[float, float]:
    """Returns the lowest and the highest value without outliers; NaN if there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    low, high = float(finite.min()), float(finite.max())
    reference = reference if math.isfinite(reference) else low
    size = np.abs(finite - reference)
    bound = OUTLIER * float(np.median(size[size > 0])) if (size > 0).any() else 0.0
    return max(low, min(reference - bound, high)), min(high, max(reference + bound, low))


def _range_of_planes(film: Sequence[Slice]) -> tuple[float, float, bool]:
    """Returns the range of what is drawn, and whether that is the excess over the lowest loss."""
    excess = any(bool((losses_of(plane) <= 0).any()) for plane in film)
    ranges = [_positive_range(plane, excess) for plane in film]
    low, high = _joined(ranges, _OUTLIER_OF_PLANES)
    return (low, high, excess) if low <= high else (1e-3, 1.0, excess)


def _positive_range(plane: Slice, excess: bool) -> tuple[float, float]:
    """Returns the range of what a plane shows, without what has no logarithm."""
    losses, center = losses_of(plane), center_of(plane)
    values = above_lowest(losses) if excess else losses
    shift = float(np.nanmin(losses - values)) if np.isfinite(losses).any() else 0.0
    return _range(np.where(values > 1 / HUGE, values, np.nan), center - shift)


def _joined(ranges: Sequence[tuple[float, float]], outlier: float) -> tuple[float, float]:
    """Returns the range that contains all those which are neither NaN nor much above the median."""
    known = [(low, high) for low, high in ranges if low <= high]
    if not known:
        return math.nan, math.nan
    highs = sorted(high for _, high in known)
    most = outlier * abs(highs[(len(highs) - 1) // 2])
    kept = [(low, high) for low, high in known if high <= most] or known
    return min(low for low, _ in kept), max(high for _, high in kept)


def _axis(low: float, high: float) -> tuple[float, float]:
    """Returns the ends of a linear axis: from 0 unless that would hide the curves."""
    if not low <= high:
        return 0.0, 1.0
    if high - low <= ROUNDING * max(abs(low), abs(high)):  # flat
        half = 0.5 * max(abs(low), abs(high)) or 0.5
        return low - half, high + half
    return (0.0 if 0 < low <= high / 2 else low), high
