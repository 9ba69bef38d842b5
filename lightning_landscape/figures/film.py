"""Films: animations of the slices of one run, on one scale and one layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_landscape.figures.canvas import figure_to_image
from lightning_landscape.figures.data import check_slice, evenly
from lightning_landscape.figures.figure_checks import check_limits
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.figures.line import draw_lines
from lightning_landscape.figures.plane import draw_plane
from lightning_landscape.geometry.checks import check_count, check_number, quoted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice


def film_frames(slices: Sequence[Slice], *, limits: LossLimits | None = None) -> list[Any]:
    """Draws one frame per slice; only the title and the surface differ between frames.

    Args:
        slices: lines, or planes, on the same coordinates, in the order in which they are shown.
        limits: the range of losses of all frames. None: one that contains all frames.

    Returns:
        uint8 images of the same shape (height, width, 3), as ``figure_to_image`` returns them;
        60 ms each.

    Raises:
        TypeError: if ``slices`` is not a sequence of slices.
        ValueError: if it is empty, or the slices differ in their kind or coordinates.
    """
    check_limits("film_frames", limits)
    return list(_frames(as_film("film_frames", slices), limits))


def save_film(
    slices: Sequence[Slice],
    path: str | os.PathLike[str],
    *,
    limits: LossLimits | None = None,
    seconds: float = 0.3,
    most: int = 30,
) -> None:
    """Writes an animation that loops, and pauses at its last frame.

    Args:
        slices: as for ``film_frames``.
        path: ``.gif``, or ``.png`` for an animated PNG, whose colours are exact (a GIF has 256).
        limits: the range of losses of all frames. None: one that contains all frames.
        seconds: duration of a frame; the last one is shown five times as long.
        most: maximum number of frames; of more slices as many are chosen, evenly spaced and
            including both ends.

    Raises:
        TypeError: if ``slices`` is not a sequence of slices.
        ValueError: if the slices differ in kind or coordinates, or an argument is out of range.
    """
    owner, ends = "save_film", "expected a name that ends in .gif or .png"
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{quoted(owner, 'path', path)}: {ends}")
    name = os.fspath(path)
    kind = {".gif": "GIF", ".png": "PNG"}.get(os.path.splitext(name)[1].lower())
    if kind is None:
        raise ValueError(f"save_film(path={name!r}): {ends}")
    check_limits(owner, limits)
    expected = "a time above 0, at most 60 seconds"
    check_number(owner, "seconds", seconds, expected, lambda x: 0.0 < x <= 60.0)
    check_count(owner, "most", most)
    film = as_film("save_film", slices)
    write_film([film[index] for index in evenly(len(film), most)], name, limits, kind, seconds)


def write_film(
    film: Sequence[Slice],
    path: str | os.PathLike[str],
    limits: LossLimits | None,
    kind: str = "GIF",
    seconds: float = 0.3,
) -> None:
    """Writes an animation of the given kind to ``path``, whatever its suffix."""
    from PIL import Image

    drawn = list(_frames(film, limits))
    if kind == "GIF":
        # One palette for all frames, from eight of them: colours do not flicker.
        palette = _palette(np.concatenate([drawn[index] for index in evenly(len(drawn), 8)]))
        frames = [Image.fromarray(_nearest(frame, palette)) for frame in drawn]
        for frame in frames:
            frame.putpalette(_parts(palette).tobytes())
    else:
        frames = [Image.fromarray(frame) for frame in drawn]
    times = [round(1000 * seconds)] * (len(frames) - 1) + [round(5000 * seconds)]
    frames[0].save(
        path, format=kind, save_all=True, append_images=frames[1:], duration=times, loop=0
    )


def _packed(image: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns one number for each colour."""
    packed: NDArray[np.int32] = image.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    return packed


def _parts(colors: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Returns red, green and blue of packed colours, in the last axis."""
    return np.stack([colors >> 16, (colors >> 8) & 255, colors & 255], axis=-1).astype(np.uint8)


def _palette(image: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns 256 colours: the 64 most frequent ones, and those farthest from all before."""
    colors, counts = np.unique(_packed(image), return_counts=True)
    chosen = list(np.argsort(-counts)[:64])
    places = _parts(colors).astype(np.int16)
    apart = np.full(len(colors), 256)
    for index in chosen:
        apart = np.minimum(apart, np.abs(places - places[index]).max(axis=1))
    while len(chosen) < 256:
        chosen.append(apart.argmax())
        apart = np.minimum(apart, np.abs(places - places[chosen[-1]]).max(axis=1))
    return colors[chosen]


def _nearest(image: NDArray[np.uint8], palette: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Returns the index of the nearest colour for each pixel."""
    colors, places = np.unique(_packed(image), return_inverse=True)
    apart = np.abs(_parts(colors)[:, None].astype(np.int16) - _parts(palette).astype(np.int16))
    nearest = apart.max(axis=-1).argmin(axis=1).astype(np.uint8)
    indices: NDArray[np.uint8] = nearest[places].reshape(image.shape[:2])
    return indices


def as_film(call: str, slices: Sequence[Slice], one_grid: bool = True) -> list[Slice]:
    """Returns the slices as a list; raises unless all are lines or all planes (on one grid)."""
    if not isinstance(slices, Sequence) or isinstance(slices, str):
        raise TypeError(f"{call}(slices={slices!r:.80}): expected a list of Slices")
    if not slices:
        raise ValueError(f"{call}(slices=[]): expected at least one slice")
    for index, slice in enumerate(slices):
        axes = len(getattr(slices[0], "coordinates", ())) or 1
        check_slice(f"{call}(slices=...), slice {index}", slice, axes=axes)
        pairs = zip(slice.coordinates, slices[0].coordinates, strict=True)
        if one_grid and not all(np.array_equal(axis, first) for axis, first in pairs):
            raise ValueError(
                f"{call}(slices=...): slice {index} has other coordinates than slice 0; pass "
                "slices of one kind, on the same grid"
            )
    return list(slices)


def _frames(film: Sequence[Slice], limits: LossLimits | None) -> Iterator[NDArray[np.uint8]]:
    """Yields the frames, one after the other."""
    shared = LossLimits.for_film(film) if limits is None else limits
    for slice in film:
        if len(slice.coordinates) == 2:
            yield figure_to_image(draw_plane(slice, shared, film))
        else:
            yield figure_to_image(draw_lines([slice], shared, film))
