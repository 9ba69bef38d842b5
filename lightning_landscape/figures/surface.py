"""2-D slices as surfaces in 3-D, for TensorBoard's mesh plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_landscape.figures.data import check_slice
from lightning_landscape.figures.figure_checks import check_limits
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.figures.plane_map import COLOR_MAP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

# The width is 2.
_HEIGHT = 1.5
# Side 2: visible from below too. The plugin's lights are too dim to distinguish colours, so the
# material ignores them and the colours include the shading.
VIEW: dict[str, Any] = {
    "camera": {"cls": "PerspectiveCamera", "fov": 40, "position": [1.7, 2.5, 2.9]},
    "material": {"cls": "MeshBasicMaterial", "color": "#ffffff", "side": 2},
}
# The plugin counts points with 16 bits.
_MOST = 60_000
_LAMP = np.array([-0.6, 0.7, 0.4])


class Surface(NamedTuple):
    """Arguments of ``SummaryWriter.add_mesh``, without the batch axis.

    Attributes:
        vertices: ``(points, 3)`` float32: right, up, towards the camera. The last two belong to no
            triangle: they are the corners of the box that contains all surfaces of a scale, on
            which the plugin centres its view.
        colors: ``(points, 3)`` uint8.
        faces: ``(triangles, 3)`` int32, indices of points, counter-clockwise from above.
    """

    vertices: NDArray[np.float32]
    colors: NDArray[np.uint8]
    faces: NDArray[np.int32]


def surface_mesh(slice: Slice, limits: LossLimits | None = None) -> Surface:
    """Returns a surface whose height and colour are the loss, on the scale of the pictures.

    Heights are from -0.75 to 0.75 and increase with the logarithm of the loss, as the colours of
    ``plane_figure`` do.  The first axis runs from -1 to 1 from left to right, the second away from
    the camera.  Points without a finite loss and their triangles are left out.  Of a plane of more
    than 60,000 points only every second one along both axes is used, or every third, and so on.

    Args:
        slice: a slice with two coordinate axes.
        limits: the range of losses of all surfaces of a run. None: from this slice alone.

    Raises:
        TypeError: if ``slice`` is not a slice.
        ValueError: if it is not a plane, or the shapes of its coordinates and losses do not match.
    """
    check_slice("surface_mesh(slice=...)", slice, axes=2)
    check_limits("surface_mesh", limits)
    limits = LossLimits.for_film([slice]) if limits is None else limits.widened(slice)
    every = -(-int(np.ceil(np.sqrt(slice.losses.size))) // int(np.sqrt(_MOST)))
    values = limits.values(slice)[::every, ::every]
    known = np.isfinite(values)
    share = limits.color(np.where(known, values, limits.high))
    share[~known] = np.nan
    across, away = np.meshgrid(*(_unit(axis)[::every] for axis in slice.coordinates))
    points = np.stack([across, _HEIGHT * (share - 0.5), -away], axis=-1)

    # Indices of the finite points; -1 for the others.
    numbers = np.where(known, np.cumsum(known).reshape(known.shape) - 1, -1)
    corner, right = numbers[:-1, :-1], numbers[:-1, 1:]
    behind, opposite = numbers[1:, :-1], numbers[1:, 1:]
    faces = np.concatenate(
        [
            np.stack([corner, right, opposite], -1).reshape(-1, 3),
            np.stack([corner, opposite, behind], -1).reshape(-1, 3),
        ]
    )
    colors = COLOR_MAP(share)[..., :3] * _shade(points)[..., None]
    box = np.array([[-1.0, -_HEIGHT / 2, -1.0], [1.0, _HEIGHT / 2, 1.0]])
    return Surface(
        np.concatenate([points[known], box]).astype(np.float32),
        np.concatenate([(255 * colors[known]).round(), np.full((2, 3), 255)]).astype(np.uint8),
        faces[(faces >= 0).all(1)].astype(np.int32),
    )


def _shade(points: NDArray[Any]) -> NDArray[Any]:
    """Returns the brightness of each point, from 0.6 to 1, with light from the upper left."""
    if min(points.shape[:2]) < 2:
        return np.ones(points.shape[:2])
    away, across = np.gradient(points, axis=(0, 1))
    normals = np.cross(across, away)
    lengths = np.linalg.norm(normals, axis=-1).clip(1e-12) * np.linalg.norm(_LAMP)
    bright = 0.6 + 0.4 * (normals @ _LAMP / lengths).clip(0.0, 1.0)
    # Next to a hole the slope is unknown: as a level surface.
    return np.where(np.isfinite(bright), bright, 0.88)


def _unit(coordinates: NDArray[Any]) -> NDArray[Any]:
    """Returns the coordinates, rescaled to [-1, 1]; 0 for a single one."""
    axis = np.asarray(coordinates, dtype=np.float64)
    width = axis[-1] - axis[0]
    return (2 * axis - axis[0] - axis[-1]) / width if width else 0 * axis
