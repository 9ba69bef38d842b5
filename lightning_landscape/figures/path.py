"""The trajectory of the weights on a plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_landscape.figures.canvas import INK, name_mark
from lightning_landscape.figures.labels import comma_joined, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice


@dataclass(frozen=True)
class Path:
    """The path in the metadata of a plane: its points, and their distance from the plane."""

    first: Any  # its step
    points: NDArray[np.float64]  # n x 2, possibly not finite
    off: NDArray[np.float64]  # distance from the plane over distance from the weights
    explained: list[float]

    @property
    def dense(self) -> NDArray[np.float64]:
        """Ten points of each segment that is drawn."""
        share = np.linspace(0.0, 1.0, 10)[:, None, None]
        return ((1 - share) * self.drawn[:-1] + share * self.drawn[1:]).reshape(-1, 2)

    @property
    def drawn(self) -> NDArray[np.float64]:
        """The points, followed by the current weights."""
        return np.append(self.points, [[0.0, 0.0]], axis=0)


def path_of(slice: Slice) -> Path | None:
    """Returns the path in the metadata of a plane, None if there is none."""
    known = slice.metadata.get("path")
    if not known or not known.get("steps"):
        return None
    distances = np.asarray(known["distances"], dtype=np.float64)
    off = np.asarray(known["residuals"], dtype=np.float64)
    return Path(
        known["steps"][0],
        np.asarray(known["coordinates"], dtype=np.float64).reshape(-1, 2),
        np.clip(off / np.where(distances > 0, distances, 1.0), 0.0, 1.0),
        [float(share) for share in known["explained"]],
    )


def draw_path(axes: Axes, path: Path) -> None:
    """Draws the path to the weights, with a square at its start, without changing the limits."""
    x, y = path.drawn.T
    for color, width in (("white", 3.6), (INK, 1.4)):
        axes.plot(x, y, "-", color=color, linewidth=width, zorder=4, scalex=False, scaley=False)
    for index, (place, off) in enumerate(zip(path.points, path.off, strict=True)):
        axes.plot(
            *place[:, None], "o" if index else "s", markersize=7.5 if index else 10.5, zorder=4.5,
            color=str(0.1 + 0.9 * float(off)) if np.isfinite(off) else "white",
            markeredgecolor=INK, markeredgewidth=1.2, scalex=False, scaley=False,
        )  # fmt: skip
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    start_x, start_y = path.points[0]
    if left <= start_x <= right and low <= start_y <= high:
        side = "left" if start_x < (left + right) / 2 else "right"
        name_mark(axes, start_x, start_y, f"step {path.first}", side)


def shares_text(path: Path) -> list[str]:
    """Returns ' (62 % of variance)' for each axis, empty if the weights have not moved."""
    if not np.isfinite(path.explained).all():
        return ["", ""]
    shares = ["< 0.1" if share < 1e-3 else number(100 * share, 2) for share in path.explained]
    return [f" ({share} % of variance)" for share in shares]


def path_text(path: Path, x_limits: tuple[float, float], y_limits: tuple[float, float]) -> str:
    """Describes the points of the path that are not shown."""
    x, y = path.points.T
    finite = np.isfinite(path.points).all(axis=1)
    inside = (x >= x_limits[0]) & (x <= x_limits[1]) & (y >= y_limits[0]) & (y <= y_limits[1])
    absent = int((~finite | ~inside).sum())
    return comma_joined(
        "" if np.isfinite(path.explained).all() else "the weights have not moved",
        f"{absent} of {len(x)} outside" if absent else "",
    )
