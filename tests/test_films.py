"""Figures of a whole run: one sheet, one scale, and a note on the frames that are left out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from lightning_landscape.figures import (
    LossLimits,
    density_film_figure,
    eigenvalue_figure,
    figure_to_image,
    film_frames,
    filmstrip_figure,
    plane_figure,
    save_film,
    surface_mesh,
)
from lightning_landscape.figures.data import by_change, evenly
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity

X = np.linspace(-1, 1, 7)
METADATA = {
    "directions": ["random 1", "random 2"],
    "fixed": [True, True],
    "normalization": "filter",
    "probe_samples": 512,
    "probe_mode": "train",
}


def plane(step: int, steep: float = 1.0, norms: tuple[float, float] = (3.0, 3.0)) -> Slice:
    """L = 1 + steep (x**2 + y), so that no two axes are alike."""
    losses = 1 + steep * (X[None, :] ** 2 + X[:, None])
    return Slice((X, X), losses, 1.0, {**METADATA, "step": step, "norms": list(norms)})


def line(step: int, steep: float = 1.0) -> Slice:
    metadata = {**METADATA, "directions": ["random 1"], "fixed": [True], "norms": [3.0]}
    return Slice((X,), 1 + steep * X**2, 1.0, {**metadata, "step": step})


def maps(figure: Figure) -> list[Any]:
    """The filled contours, one for each map."""
    return [c for axes in figure.axes for c in axes.collections if getattr(c, "filled", False)]


def text_of(figure: Figure) -> str:
    return "\n".join([figure.get_suptitle(), *(text.get_text() for text in figure.texts)])


# --- the choice


def test_evenly_includes_both_ends() -> None:
    for count in range(1, 200):
        chosen = evenly(count, 9)
        assert chosen[0] == 0
        assert chosen[-1] == count - 1
        assert len(chosen) == min(count, 9)
        gaps = np.diff(chosen)
        assert gaps.max(initial=0) - gaps.min(initial=10**9) <= 1


# --- the strip


@pytest.mark.parametrize("make", [plane, line])
def test_filmstrip_of_forty_slices(make: Any) -> None:
    figure = filmstrip_figure([make(step) for step in range(40)])
    text = text_of(figure)
    for step in evenly(40, 6):
        assert f"step {step}\nloss 1" in text
    assert "6 of 40 pictures" in text
    assert f"step {1}\n" not in text


def test_frames_are_chosen_where_the_surface_changes() -> None:
    """The change is the mean difference of the logarithms: a factor of e in all losses is 1."""

    def scaled(step: int, log: float) -> Slice:
        return Slice((X, X), math.exp(log) * np.exp(plane(0).losses - 1), 1.0, {"step": step})

    logs = [0.0, 0.1, 0.2, 0.3, 1.0, 1.9, 2.0, 2.9, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    film = [scaled(step, log) for step, log in enumerate(logs)]
    assert by_change(film, 4) == [0, 4, 6, 14]  # at 0, 1, 2 and 3
    assert by_change(film, 6) == [0, 3, 4, 5, 6, 14]  # nearest to 0, .6, 1.2, 1.8, 2.4 and 3
    assert by_change(film[8:], 3) == evenly(7, 3)  # no change at all
    lost = [scaled(step, math.nan) for step in range(5)]
    assert by_change(lost, 3) == evenly(5, 3)
    for most in range(2, 15):
        chosen = by_change(film, most)
        assert (len(chosen), chosen[0], chosen[-1]) == (most, 0, 14)
        assert (np.diff(chosen) > 0).all()


def test_filmstrip_panels_share_colours_and_size() -> None:
    film = [plane(step, steep) for step, steep in enumerate((0.4, 0.2, 0.1))]
    figure = filmstrip_figure(film)
    found = maps(figure)
    assert len(found) == 3
    limits = {(one.norm.limits.low, one.norm.limits.high) for one in found}
    ((low, high),) = limits
    assert low == pytest.approx(0.6, rel=0.05)
    assert high == pytest.approx(1.8, rel=0.05)
    sizes = [np.round(one.axes.get_position().size, 9) for one in found]
    assert len({tuple(size) for size in sizes}) == 1
    assert len([axes for axes in figure.axes if axes not in [m.axes for m in found]]) == 1
    for one, slice in zip(found, film, strict=True):
        ends = one.levels[[0, -1]]
        step = one.levels[1] / one.levels[0]
        assert slice.losses.min() / step <= ends[0] <= slice.losses.min() * (1 + 1e-9)
        assert slice.losses.max() * (1 - 1e-9) <= ends[1] <= slice.losses.max() * step


def test_filmstrip_lines_share_the_axis() -> None:
    limits = LossLimits(0.0, 5.0)
    figure = filmstrip_figure([line(step, step + 1.0) for step in range(5)], limits=limits)
    assert [axes.get_ylim() for axes in figure.axes] == [pytest.approx((-0.25, 5.25))] * 5
    for step, axes in enumerate(figure.axes):
        curve = [c for c in axes.lines if c.get_color() == "#0072B2" and len(c.get_xdata()) == 7]
        np.testing.assert_allclose(curve[0].get_ydata(), 1 + (step + 1) * X**2)
    assert "grey: step 0" in text_of(figure)


def test_filmstrip_hatches_values_that_are_not_finite() -> None:
    film = [plane(0), plane(1)]
    film[1].losses[2, 3] = np.nan
    figure = filmstrip_figure(film)
    assert all(one.axes.patch.get_hatch() for one in maps(figure))
    image = figure_to_image(figure).astype(int)
    colors = []
    for axes in figure.axes[:2]:
        column, row = axes.transData.transform((X[3] + 0.05, X[2] - 0.05))
        colors.append(image[image.shape[0] - 1 - round(row), round(column)])
    assert np.ptp(colors[0]) > 0
    assert np.ptp(colors[1]) == 0  # white or grey
    assert "hatched: not finite" in text_of(figure)
    assert "hatched" not in text_of(filmstrip_figure([plane(0)]))


def test_film_of_one_and_of_nothing_finite() -> None:
    empty = plane(0)
    empty.losses[:] = np.nan
    lost = Slice(empty.coordinates, empty.losses, math.nan, empty.metadata)
    for film in ([plane(3)], [line(3)], [lost], [lost, plane(1)]):
        assert figure_to_image(filmstrip_figure(film)).std() > 0
        assert len(film_frames(film)) == len(film)


# --- frames


@pytest.mark.parametrize("make", [plane, line])
def test_frames_differ_only_in_title_and_data(make: Any) -> None:
    film = [make(step, steep) for step, steep in enumerate((1.0, 30.0, 0.02))]
    film[1].losses[0] = np.nan  # noted in every frame
    film[2].losses[-1] = 1e5
    frames = film_frames(film, limits=LossLimits(0.01, 5.0))
    assert {(frame.shape, frame.dtype) for frame in frames} == {(frames[0].shape, np.dtype("u1"))}
    moved = np.zeros(frames[0].shape[:2], dtype=bool)
    for frame in frames[1:]:
        moved |= (frame != frames[0]).any(axis=2)
    assert moved.any()
    rows, columns = np.nonzero(moved)
    figure = plane_figure(film[0]) if make is plane else None
    if figure is not None:
        figure_to_image(figure)
        box = figure.axes[0].get_window_extent()
        below = rows > 45  # the title
        assert columns[below].max() <= box.x1 + 1  # the colour bar does not move
        assert columns[below].min() >= box.x0 - 1
        assert rows[below].min() >= frames[0].shape[0] - box.y1 - 1
        assert rows.max() <= frames[0].shape[0] - box.y0 + 1
    else:
        assert not moved[45:90].any()  # the small lines
        assert not moved[:, :90][45:].any()  # the labels of the axis


def test_axes_do_not_move_when_norms_change() -> None:
    film = [plane(0, norms=(3.0, 3.0)), plane(1, norms=(4.0, 4.1))]
    first, second = film_frames(film)
    assert (first[45:] == second[45:]).all()
    assert "random 1 (1 = norm 3 to 4)" in text_of(filmstrip_figure(film))


@pytest.mark.pictures
@pytest.mark.parametrize("ending", ["gif", "png"])
def test_animation(tmp_path: Any, ending: str) -> None:
    from PIL import Image

    film = [plane(step, step + 1.0) for step in range(7)]
    path = tmp_path / f"film.{ending}"
    save_film(film, path, limits=LossLimits(0.01, 20.0), most=4, seconds=0.2)
    with Image.open(path) as animation:
        assert animation.n_frames == 4
        wanted = film_frames([film[index] for index in (0, 2, 4, 6)], limits=LossLimits(0.01, 20.0))
        times = []
        for index, frame in enumerate(wanted):
            animation.seek(index)
            times.append(animation.info["duration"])
            shown = np.asarray(animation.convert("RGB")).astype(int)
            error = abs(shown - frame).max(axis=2)
            assert error.max() <= (12 if ending == "gif" else 0)
            assert np.quantile(error, 0.9) == 0  # the colours of the map are in the palette
    assert times == [200, 200, 200, 1000]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"film_frames\(slices=\[\]\): expected at least one"):
        film_frames([])
    with pytest.raises(TypeError, match=r"filmstrip_figure\(slices=3\): expected a list"):
        filmstrip_figure(3)
    with pytest.raises(TypeError, match=r"slice 0: got 3; expected a Slice"):
        filmstrip_figure([3])
    with pytest.raises(ValueError, match=r"slice 1: got a slice with 1 coordinate axes"):
        film_frames([plane(0), line(1)])
    other = Slice((X, 2 * X), plane(0).losses, 1.0)
    with pytest.raises(ValueError, match=r"slice 1 has other coordinates than slice 0"):
        film_frames([plane(0), other])
    with pytest.raises(ValueError, match=r"save_film\(path='a.mp4'\): expected a name"):
        save_film([plane(0)], "a.mp4")
    with pytest.raises(TypeError, match=r"density_film_figure\(densities=\[\]\): expected a dict"):
        density_film_figure([])


# --- densities


def density(top: float, value: float = 1.0) -> SpectralDensity:
    grid = torch.linspace(-1, top, 200, dtype=torch.float64)
    bump = torch.exp(-(grid**2) / 0.02) + 1e-4 * torch.exp(-((grid - top + 0.3) ** 2) / 0.02)
    ritz = torch.tensor([[0.0, top - 0.3]], dtype=torch.float64)
    return SpectralDensity(grid, value * bump, 0.1 * bump, 0.1, ritz, 0 * ritz + 0.5, 2)


def test_densities_over_training(tmp_path: Any) -> None:
    density(4.0).save(tmp_path / "a.npz")
    read = SpectralDensity.load(tmp_path / "a.npz")
    assert torch.equal(read.density, density(4.0).density)
    assert (read.sigma, read.hvps) == (0.1, 2)
    (tmp_path / "b.npz").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="not a saved SpectralDensity"):
        SpectralDensity.load(tmp_path / "b.npz")
    figure = density_film_figure({0: density(2.0), 50: density(math.pi, math.nan), 100: read})
    axes = figure.axes[0]
    (mesh,) = [c for c in axes.collections if isinstance(c, QuadMesh)]
    rows = mesh.get_array()
    assert rows.shape[0] == 3
    np.testing.assert_array_equal(np.ma.getmaskarray(rows).all(1), [False, True, False])
    assert "hatched: not finite" in text_of(figure)
    assert axes.patch.get_hatch()
    np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [-25, 25, 75, 125])
    columns = mesh.get_coordinates()[0, :, 0]
    peak = int(rows[0].argmax())  # the bulk is at zero
    assert columns[peak] <= 0.02
    assert columns[peak + 1] >= -0.02
    (dots,) = [mark for mark in axes.lines if mark.get_marker() == "o"]
    np.testing.assert_allclose(dots.get_xdata(), [1.7, math.pi - 0.3, 3.7])


def test_densities_not_finite_single_and_many() -> None:
    assert figure_to_image(density_film_figure({})).std() > 0
    assert figure_to_image(density_film_figure({3: density(2.0, math.nan)})).std() > 0
    assert figure_to_image(density_film_figure({3: density(2.0)})).std() > 0
    figure = density_film_figure({step: density(2.0) for step in range(200)})
    assert "60 of 200 steps" in text_of(figure)


# --- long histories


def test_long_history_is_grouped() -> None:
    history = [
        {"step": step, "hessian/top_eigenvalue": 5.0 + (step % 2), "hessian/edge": 10.0}
        for step in range(10_000)
    ]
    for step in range(4000, 4400):
        history[step]["hessian/top_eigenvalue"] = math.nan
    history[7000]["hessian/top_eigenvalue"] = 9.0
    figure = eigenvalue_figure(history)
    curve = figure.axes[0].lines[0]
    assert len(curve.get_xdata()) == 250
    gap = np.isnan(curve.get_ydata())
    assert gap.sum() == 10
    assert np.median(curve.get_ydata()[~gap]) == 5.5
    assert "line: median, band: lowest to highest" in text_of(figure)
    (band,) = figure.axes[0].collections
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert corners[:, 1].max() == 9.0  # an outlier is still visible
    assert "median" not in text_of(eigenvalue_figure(history[:1000]))


# --- surfaces


def test_surface_of_a_separable_function() -> None:
    # Increases along x, decreases along y: 4 x 3 points.
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0])
    limits = LossLimits(0.1, 10.0)
    losses = 10 ** (0.3 * x[None, :] - 0.4 * y[:, None])  # from 0.16 to 7.9
    surface = surface_mesh(Slice((x, y), losses, 1.0), limits)
    assert surface.vertices.shape == (12 + 2, 3)
    assert surface.colors.shape == (12 + 2, 3)
    assert surface.faces.shape == (2 * 3 * 2, 3)
    across, up, towards = surface.vertices[:12].T
    np.testing.assert_allclose(across.reshape(3, 4)[0], [-1, -1 / 3, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(towards.reshape(3, 4)[:, 0], [1, 0, -1])  # y goes away
    # 0.1 is at the bottom, 10 at the top.
    expected = 1.5 * (0.5 * np.log10(losses / 0.1) - 0.5)
    np.testing.assert_allclose(up.reshape(3, 4), expected, atol=1e-6)
    a, b, c = (surface.vertices[surface.faces[:, i]] for i in range(3))
    assert (np.cross(b - a, c - a)[:, 1] > 0).all()  # seen from above
    # The box in which the plugin centres every surface of the run.
    assert surface.vertices[-2:].tolist() == [[-1, -0.75, -1], [1, 0.75, 1]]


def test_surface_with_holes_keeps_its_height() -> None:
    limits = LossLimits(0.1, 5.0, excess=True)
    whole = surface_mesh(plane(0), limits)
    broken = plane(0)
    broken.losses[3, 3] = np.inf
    broken.losses[0, 0] = np.nan
    holed = surface_mesh(broken, limits)
    assert np.isfinite(holed.vertices).all()
    assert len(whole.vertices) - len(holed.vertices) == 2
    assert len(whole.faces) - len(holed.faces) == 6 + 2
    assert holed.faces.max() < len(holed.vertices) - 2
    kept = {tuple(vertex) for vertex in whole.vertices.tolist()}
    assert all(tuple(vertex) in kept for vertex in holed.vertices.tolist())
    steep = surface_mesh(plane(0, 1e6), limits).vertices
    assert abs(steep[:, 1]).max() == 0.75
    broken.losses[:] = np.nan
    assert surface_mesh(broken).faces.shape == (0, 3)
    big = np.linspace(-1, 1, 600)
    assert len(surface_mesh(Slice((big, big), np.zeros((600, 600)), 0.0)).vertices) < 2**16


def test_colour_bar_of_every_frame_shows_the_range_of_all() -> None:
    from lightning_landscape.figures.plane import draw_plane

    film = [plane(0, 0.1), plane(1, 0.4)]
    (bar,) = draw_plane(film[0], LossLimits(0.01, 1.0), film).axes[0].child_axes
    assert bar.get_ylim() == (0.01, 2.0)  # losses up to 1.8


def test_filmstrip_of_named_slices() -> None:
    figure = filmstrip_figure([plane(3), plane(3, 100)], names=["with", "without"])
    assert "with\nloss" in text_of(figure)
    assert "without\nloss" in text_of(figure)
    assert "step 3" not in text_of(figure)
    with pytest.raises(ValueError, match="got 1 names for 2 slices"):
        filmstrip_figure([plane(0), plane(1)], names=["one"])
