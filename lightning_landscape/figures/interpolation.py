"""Values between the points of a plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Points along an axis after interpolation, about.
_FINE = 80
# Differences above this many times the median one are limited.
_OUTLIER = 30.0


def refined(
    x: NDArray[Any], y: NDArray[Any], values: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Returns finer coordinates, and the values on them by cubic Hermite interpolation.

    A quadratic is reproduced exactly.  For the slopes differences count as at most 30 times the
    median one, so that the surface beside an outlier stays what it was.  No value is outside of the
    range of the given ones.  NaN where the nearest given value is not finite.

    Args:
        x, y: coordinates, increasing, at least two each.
        values: ``values[j, i]`` belongs to ``(x[i], y[j])``.
    """
    known = np.isfinite(values)
    filled = values if known.all() else _filled(x, y, values, known)
    fine_x, fine_y = _between(x), _between(y)
    fine = _along(y, _along(x, filled.T, fine_x).T, fine_y)
    fine = fine.clip(filled.min(), filled.max())
    if not known.all():
        nearest = np.ix_(_nearest(y, fine_y), _nearest(x, fine_x))
        fine = np.where(known[nearest], fine, np.nan)
    return fine_x, fine_y, fine


def _between(at: NDArray[Any]) -> NDArray[Any]:
    """Returns the coordinates and equally many between each two of them."""
    steps = max(2, -(-_FINE // (len(at) - 1)))
    share = np.arange(steps) / steps
    inner = at[:-1, None] + np.diff(at)[:, None] * share
    between: NDArray[Any] = np.append(inner.ravel(), at[-1])
    return between


def _along(at: NDArray[Any], values: NDArray[Any], fine: NDArray[Any]) -> NDArray[Any]:
    """Interpolates along the first axis."""
    slopes = _slopes(at, values)
    left = np.clip(np.searchsorted(at, fine, side="right") - 1, 0, len(at) - 2)
    width = np.diff(at)[left]
    t = (fine - at[left]) / width
    t, width = t[:, None], width[:, None]
    start, end = values[left], values[left + 1]
    rise, fall = slopes[left] * width, slopes[left + 1] * width
    found: NDArray[Any] = (2 * t**3 - 3 * t**2 + 1) * start + (t**3 - 2 * t**2 + t) * rise
    found += (3 * t**2 - 2 * t**3) * end + (t**3 - t**2) * fall
    return found


def _slopes(at: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Returns the slope at each coordinate: that of the parabola through it and both neighbours."""
    width = np.diff(at)[:, None]
    rises: NDArray[Any] = np.diff(values, axis=0) / width
    if len(at) == 2:
        return np.concatenate([rises, rises])
    most = _OUTLIER * np.median(np.abs(rises))
    rises = rises.clip(-most, most)
    bends = np.diff(rises, axis=0) / (width[1:] + width[:-1])
    inner = rises[:-1] + bends * width[:-1]
    first, last = rises[:1] - bends[:1] * width[:1], rises[-1:] + bends[-1:] * width[-1:]
    return np.concatenate([first, inner, last])


def _nearest(at: NDArray[Any], fine: NDArray[Any]) -> NDArray[Any]:
    """Returns the index of the nearest coordinate."""
    found: NDArray[Any] = np.searchsorted((at[1:] + at[:-1]) / 2, fine)
    return found


def _filled(
    x: NDArray[Any], y: NDArray[Any], values: NDArray[Any], known: NDArray[Any]
) -> NDArray[Any]:
    """Returns the values, with the nearest finite one where there is none."""
    grid = np.stack(np.meshgrid(_unit(x), _unit(y)), axis=-1)
    given = grid[known]
    filled = values.copy()
    filled[~known] = [
        values[known][((given - place) ** 2).sum(1).argmin()] for place in grid[~known]
    ]
    return filled


def _unit(at: NDArray[Any]) -> NDArray[Any]:
    share: NDArray[Any] = (at - at[0]) / (at[-1] - at[0])
    return share
