"""Data, limits and text of the figures."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lightning_landscape.figures import (
    LossLimits,
    barrier_matrix_figure,
    curves_figure,
    density_figure,
    density_film_figure,
    eigenvalue_figure,
    figure_to_image,
    filmstrip_figure,
    line_figure,
    paper_axes,
    plane_figure,
    points_figure,
    save_figure,
)
from lightning_landscape.figures.interpolation import refined
from lightning_landscape.figures.labels import number
from lightning_landscape.figures.limits import isolines, round_down, round_up
from lightning_landscape.figures.plane_map import COLOR_MAP
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity

MINUS = "\N{MINUS SIGN}"
METADATA = {
    "step": 120,
    "directions": ["random", "top eigenvector"],
    "fixed": [True, False],
    "norms": [3.2, 1.6],
    "normalization": "filter",
    "probe_samples": 512,
    "probe_mode": "train",
    "cosine": 0.01,
}


def plane(losses: Any = None, center: float = 1.0, metadata: dict[str, Any] | None = None) -> Slice:
    """A plane of 5 x 4 points; by default L = 1 + x**2 + 10 y, so that the axes differ."""
    x, y = np.linspace(-1, 1, 5), np.linspace(-1, 2, 4)
    if losses is None:
        losses = 1 + x[None, :] ** 2 + 10 * y[:, None]
    return Slice((x, y), np.asarray(losses, dtype=float), center, metadata or {})


def line(losses: Any, center: float = 0.0, **metadata: Any) -> Slice:
    """A line over [-1, 1]."""
    losses = np.asarray(losses, dtype=float)
    return Slice((np.linspace(-1, 1, len(losses)),), losses, center, metadata)


def colours_of(figure: Figure, index: int = 0) -> Any:
    """The filled contours of a map."""
    (found,) = [c for c in figure.axes[index].collections if getattr(c, "filled", False)]
    return found


def cells_of(figure: Figure) -> QuadMesh:
    """The coloured cells of a plane that is not interpolated."""
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    return mesh


def isolines_of(figure: Figure) -> Any:
    (found,) = [c for c in figure.axes[0].collections if getattr(c, "filled", True) is False]
    return found


def pixel(figure: Figure, x: float, y: float) -> np.ndarray:
    """The colour that is drawn at a point of the first axes."""
    image = figure_to_image(figure)
    column, row = figure.axes[0].transData.transform((x, y))
    return image[image.shape[0] - 1 - round(row), round(column)].astype(int)


def luminance(colors: Any) -> np.ndarray:
    return np.asarray(colors)[..., :3] @ [0.299, 0.587, 0.114]


def text_of(figure: Figure) -> str:
    """The title and the notes, one per line."""
    return "\n".join([figure.get_suptitle(), *(text.get_text() for text in figure.texts)])


def bar_of(figure: Figure) -> Any:
    """The axes of the colour bar."""
    (bar,) = figure.axes[0].child_axes
    return bar


def bar_labels(figure: Figure) -> list[str]:
    """The labels of the colour bar, bottom to top."""
    return [label.get_text() for label in bar_of(figure).get_yticklabels()]


def curve_of(figure: Figure, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The n-th curve of a line figure, that is line with more than two points."""
    curves = [
        c for c in figure.axes[0].lines if c.get_linestyle() != "None" and c.get_label()[0] != "_"
    ]
    return np.asarray(curves[index].get_xdata()), np.asarray(curves[index].get_ydata())


# --- planes

POSITIVE = plane().losses - plane().losses.min() + 0.5


def test_points_are_drawn_at_their_coordinates() -> None:
    (dots,) = [c for c in plane_figure(plane()).axes[0].lines if c.get_label() == "_samples"]
    drawn = set(zip(dots.get_xdata().tolist(), dots.get_ydata().tolist(), strict=True))
    x, y = plane().coordinates
    assert drawn == {(a, b) for a in x.tolist() for b in y.tolist()}


def test_colours_match_the_losses_at_the_points() -> None:
    """Within one band of colour: a 24th of the range, on a logarithmic scale."""
    losses = np.exp(np.linspace(0, 3, 5)[None, :] + np.linspace(0, 2, 4)[:, None])
    figure = plane_figure(plane(losses))
    limits = LossLimits.for_film([plane(losses)])
    x, y = plane().coordinates
    for i, j in ((1, 1), (3, 1), (3, 2), (1, 2)):
        wanted = np.array(COLOR_MAP(float(limits.color(losses[j, i])))[:3]) * 255
        beside = [
            pixel(figure, x[i] + dx, y[j] + dy) for dx in (-0.04, 0.04) for dy in (-0.05, 0.05)
        ]
        # Without isolines and labels.
        assert min(abs(color - wanted).max() for color in beside) < 18


def test_colours_are_monotone_in_the_loss() -> None:
    for factor in (1.01, 3.0, 1e3, 1e9):
        losses = np.geomspace(2.0, 2.0 * factor, 20).reshape(4, 5)
        figure = plane_figure(plane(losses, center=2.0))
        filled = colours_of(figure)
        assert (np.diff(luminance(filled.get_facecolor())) >= 0).all()
        assert len(np.unique(filled.get_facecolor(), axis=0)) >= 20
        span = luminance(filled.get_facecolor())
        assert span[-1] - span[0] > 0.6  # most of the colour map is used
        assert (np.diff(filled.levels) > 0).all()
        assert figure_to_image(figure).std() > 0


def test_lower_losses_are_darker() -> None:
    grey = luminance(COLOR_MAP(np.linspace(0, 1, 101)))
    assert (np.diff(grey) > 0).all()
    assert grey[50] - grey[0] > 0.25
    assert grey[-1] - grey[50] > 0.25


def test_frames_give_the_same_colour_to_the_same_loss() -> None:
    """Also if the second exceeds the limits of the first by far."""
    left = np.where(np.arange(5) < 3, 0.5, 2.0) * np.ones((4, 1))
    later = np.where(np.arange(5) < 3, 0.5, 300.0) * np.ones((4, 1))
    later[0, 0] = 1e-5
    limits = LossLimits.from_slice(plane(left))
    assert (limits.low, limits.high) == (pytest.approx(2e-3), 2.0)
    first = plane_figure(plane(left), limits=limits)
    second = plane_figure(plane(later), limits=limits.widened(plane(later)))
    assert abs(pixel(first, -0.4, 1.4) - pixel(second, -0.4, 1.4)).max() <= 1
    assert [a.get_position().bounds for a in first.axes] == [
        a.get_position().bounds for a in second.axes
    ]


def test_losses_beyond_the_limits_differ_in_colour() -> None:
    limits = LossLimits(0.01, 10.0, room=0.15)
    places = limits.color(np.array([0.0, 1e-9, 1e-3, 0.01, 1.0, 10.0, 30.0, 1e3]))
    assert (np.diff(places) > 0).all()
    assert places[0] < 1e-3
    assert places[-1] < 1
    # Linear in the logarithm in between: 1 is two thirds of the way from 0.01 to 10.
    assert (places[4] - places[3]) / (places[5] - places[3]) == pytest.approx(2 / 3)
    # No jump and no kink at the limits.
    near = limits.color(10.0 * np.exp([-2e-4, -1e-4, 0.0, 1e-4, 2e-4]))
    assert np.diff(near) == pytest.approx(np.diff(near)[0], rel=1e-3)


def test_quadratic_is_interpolated_exactly() -> None:
    x, y = np.array([-1.0, -0.4, 0.0, 0.7, 1.0]), np.array([-1.0, 0.0, 2.0])

    def loss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 2 + (x - 0.15) ** 2 + 3 * y[:, None] ** 2 + x * y[:, None]

    fine_x, fine_y, fine = refined(x, y, loss(x, y))
    inside = loss(x, y).min()  # nothing is below the lowest sampled loss
    np.testing.assert_allclose(fine, loss(fine_x, fine_y).clip(inside), rtol=1e-12)
    assert set(x) <= set(fine_x)
    _, _, between_two = refined(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.eye(2))
    assert between_two.mean() == pytest.approx(0.5)


def test_interpolation_does_not_overshoot_at_an_outlier() -> None:
    losses = np.ones((5, 5))
    losses[2, 3], losses[0, 0] = 1e9, 0.01
    at = np.arange(5.0)
    _, fine_y, fine = refined(at, at, losses)
    assert (fine.min(), fine.max()) == (0.01, 1e9)
    assert fine[fine_y >= 1].min() == 1.0  # no valley beside the outlier


def test_plane_without_interpolation() -> None:
    figure = plane_figure(plane(POSITIVE), interpolate=False)
    mesh = cells_of(figure)
    corners = mesh.get_coordinates()  # (rows + 1, columns + 1, 2)
    centers = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    losses = np.ma.getdata(mesh.get_array())
    assert losses.shape == (4, 5)
    expected = centers[..., 0] ** 2 + 10 * centers[..., 1] + 10.5
    np.testing.assert_allclose(losses, expected, atol=1e-12)
    # x runs along the horizontal axis.
    assert figure.axes[0].get_xlim() == pytest.approx((-1.25, 1.25))
    assert figure.axes[0].get_ylim() == pytest.approx((-1.5, 2.5))


def test_cells_of_uneven_coordinates_contain_their_points() -> None:
    x, y = np.array([-1.0, 0.0, 3.0]), np.array([0.0, 0.5])
    figure = plane_figure(Slice((x, y), np.ones((2, 3)), 1.0), interpolate=False)
    corners = cells_of(figure).get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [-1.5, -0.5, 1.5, 4.5])
    np.testing.assert_allclose(corners[:, 0, 1], [-0.25, 0.25, 0.75])


def test_loss_that_is_not_finite_is_hatched() -> None:
    losses = np.full((4, 5), 0.3)
    losses[0, 0], losses[3, 4], losses[2, 1] = np.nan, np.inf, -np.inf
    figure = plane_figure(plane(losses, center=0.3))
    x, y = plane().coordinates
    for j, i in np.ndindex(4, 5):
        if (x[i], y[j]) != (0.0, 0.0):
            colors = pixel(figure, 0.93 * x[i] - 0.02, 0.93 * y[j] + 0.02)
            hatched = np.ptp(colors) == 0  # white or grey, which the colour map does not contain
            assert hatched != np.isfinite(losses[j, i])
    assert figure.axes[0].patch.get_hatch()
    assert "hatched: not finite" in text_of(figure)
    assert "hatched" not in text_of(plane_figure(plane()))
    cells = cells_of(plane_figure(plane(losses, center=0.3), interpolate=False))
    np.testing.assert_array_equal(np.ma.getmaskarray(cells.get_array()), ~np.isfinite(losses))


def test_loss_below_zero_is_drawn_relative_to_its_minimum() -> None:
    figure = plane_figure(plane(plane().losses, center=1.0))  # from -9 to 22
    assert bar_of(figure).get_ylabel() == "loss above the lowest"
    assert bar_labels(figure)[0].startswith("< ")  # the logarithm of zero is not on the bar
    filled = colours_of(figure)
    assert (np.diff(luminance(filled.get_facecolor())) > 0).all()
    # The lowest point is in the lowest, open band.
    assert np.ptp(pixel(figure, 0.05, -0.97)) > 0
    assert bar_of(figure).get_ylim()[1] >= 31
    assert bar_of(plane_figure(plane(POSITIVE))).get_ylabel() == "loss"


def test_live_limits_are_reset_at_the_first_loss_that_is_not_positive() -> None:
    limits = LossLimits.from_slice(plane(POSITIVE))
    assert not limits.excess
    assert limits.widened(plane(0.01 * POSITIVE)) == limits
    below = plane(POSITIVE - 1)
    assert limits.widened(below).excess
    assert bar_of(plane_figure(below, limits=limits)).get_ylabel() == "loss above the lowest"


def test_colour_bar_shows_the_ranges_of_limits_and_plane() -> None:
    limits = LossLimits(1e-3, 1.0)
    inside = np.full((4, 5), 0.1)
    inside[0, 0] = 0.5
    assert bar_of(plane_figure(plane(inside), limits=limits)).get_ylim() == (1e-3, 1.0)
    inside[0, 0], inside[0, 1] = 4.0, 2e-5
    low, high = bar_of(plane_figure(plane(inside), limits=limits)).get_ylim()
    assert low <= 2e-5
    assert high >= 3.0
    ticks = [float(label.replace("e-", "e-")) for label in bar_labels(plane_figure(plane(inside)))]
    assert ticks == sorted(ticks)


def test_colour_bar_of_a_positive_plane_among_losses_below_zero() -> None:
    """Also for this plane the losses are drawn relative to its minimum."""
    limits = LossLimits.from_slice(plane(POSITIVE - 1))
    assert limits.excess
    later = plane(POSITIVE + 1e6)
    low, high = bar_of(plane_figure(later, limits=limits)).get_ylim()
    assert (low, high) == (limits.low, limits.high)  # the excess is at most 31


def test_blown_up_corner_leaves_the_colour_range() -> None:
    losses = POSITIVE.copy()
    losses[0, 0] = 1e9
    figure = plane_figure(plane(losses, center=10.5))
    assert bar_of(figure).get_ylim()[1] < 2000
    assert bar_labels(figure)[-1].startswith("> ")
    assert np.ptp(pixel(figure, -0.97, -0.97)) > 0  # drawn nevertheless


def test_lowest_sampled_point_is_marked_unless_it_is_at_the_weights() -> None:
    def circles(slice: Slice) -> set[tuple[float, float]]:
        marks = [m for m in plane_figure(slice).axes[0].lines if m.get_label() == "_lowest"]
        return {(float(m.get_xdata()[0]), float(m.get_ydata()[0])) for m in marks}

    x = np.linspace(-1, 1, 5)
    bowl = Slice((x, x), 1 + x[None, :] ** 2 + x[:, None] ** 2, 1.0)
    moved = Slice((x, x), 1 + (x[None, :] - 0.5) ** 2 + (x[:, None] + 1) ** 2, 2.25)
    assert circles(bowl) == set()
    assert circles(moved) == {(0.5, -1.0)}
    named = {t.get_text(): t.xy for t in plane_figure(moved).axes[0].texts if hasattr(t, "xy")}
    assert named == {"lowest": (0.5, -1.0)}


def test_isolines_of_a_plane_within_a_decade() -> None:
    wide = isolines_of(plane_figure(plane(np.geomspace(0.03, 40, 20).reshape(4, 5))))
    assert [float(level) for level in wide.levels] == [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    narrow = isolines_of(plane_figure(plane(np.geomspace(2.0, 2.02, 20).reshape(4, 5))))
    assert len(narrow.levels) >= 3
    assert np.diff(narrow.levels) == pytest.approx(np.diff(narrow.levels)[0])
    assert not isolines(1.0, 1.0)
    assert len(isolines(1e-9, 1e9)) <= 8


def test_isolines_are_at_their_levels() -> None:
    x = np.linspace(-1, 1, 9)
    losses = np.tile(10 + 4 * x, (9, 1))
    figure = plane_figure(Slice((x, x), losses, 10.0))
    lines = isolines_of(figure)
    assert len(lines.levels) > 3
    for level, segments in zip(lines.levels, lines.allsegs, strict=True):
        for segment in segments:
            np.testing.assert_allclose(segment[:, 0], (level - 10) / 4, atol=1e-6)
    labels = [text.get_text() for text in figure.axes[0].texts if not hasattr(text, "xy")]
    assert labels
    assert {float(label) for label in labels} <= {float(level) for level in lines.levels}


def test_plane_shows_its_metadata() -> None:
    figure = plane_figure(plane(metadata=METADATA, center=0.5341))
    assert figure.get_suptitle() == "step 120, loss 0.534"
    text = text_of(figure)
    assert "random (fixed) \N{MULTIPLICATION SIGN} top eigenvector (taken anew)" in text
    assert "filter-normalised, 512 examples in train mode" in text
    assert len(set(text.splitlines())) == 3
    assert "cosine" not in text
    assert figure.axes[0].get_xlabel() == "random (1 = norm 3.2)"
    assert figure.axes[0].get_ylabel() == "top eigenvector (1 = norm 1.6)"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fixed": [False, False]}, "top eigenvector (taken anew)"),
        ({"fixed": None}, "random \N{MULTIPLICATION SIGN} top eigenvector\n"),
        ({"normalization": None}, "not normalised, 512 examples in train mode"),
        ({"probe_samples": None}, "filter-normalised, train mode"),
        ({"probe_mode": None}, "filter-normalised, 512 examples\n"),
        ({"cosine": -0.4}, f"axes at cosine {MINUS}0.4"),
        ({"step": None}, "loss 1\n"),
        ({"directions": ["$a_", "b"]}, "$a_ (fixed)"),
    ],
)
def test_text_of_plane_metadata(change: dict[str, Any], expected: str) -> None:
    assert expected in text_of(plane_figure(plane(metadata={**METADATA, **change}))) + "\n"


def test_plane_without_metadata() -> None:
    figure = plane_figure(plane())
    assert figure.get_suptitle() == "loss 1"
    assert figure.axes[0].get_xlabel() == "direction 1"
    assert "not to scale" in text_of(figure)


def test_axes_have_equal_scale_in_weight_space() -> None:
    figure = plane_figure(plane(metadata={"norms": [4.0, 2.0]}))
    figure_to_image(figure)
    axes = figure.axes[0]
    across, up = axes.transData.transform([(1, 0), (0, 1)]) - axes.transData.transform((0, 0))
    assert across[0] / 4 == pytest.approx(up[1] / 2)
    assert "not to scale" not in text_of(figure)


@pytest.mark.parametrize("norms", [[1.0, 100.0], [0.0, 1.0], [math.nan, 1.0], [None, 1.0], [1.0]])
def test_axes_of_extreme_or_zero_norms_are_not_to_scale(norms: list[Any]) -> None:
    figure = plane_figure(plane(metadata={"norms": norms}))
    assert figure.axes[0].get_aspect() == "auto"
    assert "not to scale" in text_of(figure)


def test_center_is_marked_and_does_not_move_the_limits() -> None:
    away = Slice((np.array([2.0, 3.0]), np.array([2.0, 3.0])), np.eye(2), 0.0)
    for slice in (plane(), away):
        axes = plane_figure(slice).axes[0]
        crosses = [mark for mark in axes.lines if mark.get_marker() == "+"]
        assert crosses
        assert all(mark.get_xdata()[0] == mark.get_ydata()[0] == 0 for mark in crosses)
    assert axes.get_xlim() == pytest.approx((2, 3))


def test_flat_empty_and_tiny_planes() -> None:
    flat = plane_figure(plane(np.full((4, 5), 2.3), center=2.3))
    assert "flat" in text_of(flat)
    empty = plane_figure(plane(np.full((4, 5), np.nan), center=math.nan))
    assert empty.get_suptitle() == "loss nan"
    assert "no finite loss" in [text.get_text() for text in empty.axes[0].texts]
    point = plane_figure(Slice((np.zeros(1), np.zeros(1)), np.ones((1, 1)), 1.0))
    row = plane_figure(Slice((np.arange(3.0), np.zeros(1)), np.ones((1, 3)), 1.0))
    for figure in (flat, empty, point, row):
        assert figure_to_image(figure).std() > 0


def test_every_chart_is_drawn_into_given_axes() -> None:
    grid = torch.linspace(-1, 1, 50, dtype=torch.float64)
    density = SpectralDensity(grid, grid**2, 0 * grid, 0.1, grid[None], grid[None], 1)
    history = rows([1.0, 4.0, 9.6], edge=10.0)
    charts: list[Any] = [
        lambda ax: plane_figure(plane(), ax=ax),
        lambda ax: line_figure([line([1, 0, 1]), line([2, 0, 1], step=3)], ax=ax),
        lambda ax: filmstrip_figure([plane(), plane(), plane()], ax=ax),
        lambda ax: filmstrip_figure([line([1, 0, 1]), line([2, 0, 1])], ax=ax),
        lambda ax: eigenvalue_figure(history, ax=ax),
        lambda ax: curves_figure({"a": history}, "hessian/top_eigenvalue", ax=ax),
        lambda ax: density_figure(density, ax=ax),
        lambda ax: density_film_figure({1: density, 2: density}, ax=ax),
        lambda ax: points_figure({"a": (1.0, 2.0)}, x="x", y="y", ax=ax),
        lambda ax: barrier_matrix_figure(np.eye(2), ["a", "b"], ax=ax),
    ]
    for draw in charts:
        figure = Figure(figsize=(3.25, 2.6), layout="constrained")
        axes = figure.subplots()
        assert draw(axes) is figure
        assert figure.axes == [axes]
        assert axes.get_title()
        assert not figure.texts
        assert not figure.legends
        assert figure_to_image(figure).std() > 0


def test_plane_in_given_axes() -> None:
    figure = Figure(figsize=(6.75, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plane_figure(plane(POSITIVE, metadata=METADATA), ax=left) is figure
    assert line_figure(line([3.0, 1.0, 2.0], center=1.0, step=7), ax=right) is figure
    assert left.get_title() == "step 120, loss 1"
    assert right.get_title() == "step 7, loss 1"
    assert left.get_xlabel() == "random (1 = norm 3.2)"
    assert len(left.child_axes) == 1  # the colour bar
    assert figure.get_suptitle() == ""
    assert not figure.texts
    assert figure_to_image(figure).std() > 0


# --- lines


def test_line_shows_the_loss_and_the_weights() -> None:
    figure = line_figure(line([3.0, 1.0, 0.5, 2.0, 4.0], center=0.5, **METADATA))
    x, losses = curve_of(figure)
    np.testing.assert_allclose(x, [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(losses, [3, 1, 0.5, 2, 4])
    (dot,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "o"]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.0, 0.5)
    assert figure.get_suptitle() == "step 120, loss 0.5"
    assert "random (fixed)\nfilter-normalised, 512 examples in train mode" in text_of(figure)
    assert figure.axes[0].get_xlabel() == "random (1 = norm 3.2)"
    assert figure.axes[0].get_ylabel() == "loss"
    assert figure.axes[0].get_yscale() == "linear"
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5 < 4 < high < 5


def test_blown_up_line_keeps_the_valley_visible() -> None:
    figure = line_figure(line([1e6, 1.0, 0.25, 0.0, 0.25, 1.0, -1e7]))
    low, high = figure.axes[0].get_ylim()
    assert 1 < high < 100
    assert -100 < low < 0
    assert f"> {number(high)}, up to 1e6" in text_of(figure)
    assert f"< {number(low)}, down to {MINUS}1e7" in text_of(figure)
    (up,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "^"]
    (down,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "v"]
    assert list(up.get_xdata()) == [-1.0]
    assert list(down.get_xdata()) == [1.0]


def test_line_marks_losses_that_are_not_finite() -> None:
    figure = line_figure(line([np.nan, 1.0, 0.0, 1.0, np.inf]))
    _, losses = curve_of(figure)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, False, False, True])
    (crosses,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [-1.0, 1.0]
    assert "\N{MULTIPLICATION SIGN} not finite" in text_of(figure)
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_parabola_has_a_linear_axis() -> None:
    x = np.linspace(-1, 1, 21)
    figure = line_figure(Slice((x,), 0.01 + 4 * x**2, 0.01))
    _, losses = curve_of(figure)
    np.testing.assert_allclose(losses, 0.01 + 4 * x**2)
    axes = figure.axes[0]
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert -0.3 < low <= 0  # from 0
    assert 4.01 < high < 4.3


def test_axis_starts_at_zero_unless_that_hides_the_curve() -> None:
    assert LossLimits.for_film([line([2.0, 0.5, 1.0], 0.5)]).low == 0.0
    assert LossLimits.for_film([line([2.35, 2.3, 2.33], 2.3)]).low == 2.3
    assert LossLimits.for_film([line([2.0, -0.5, 1.0], -0.5)]).low == -0.5


def test_axis_of_a_line_film_is_widened_and_never_narrowed() -> None:
    first, steeper = line([3.0, 2.0, 3.2], 2.0), line([9.0, 0.1, 0.4], 0.1)
    flat = line([0.2, 0.1, 0.2], 0.1)
    limits = LossLimits.from_slice(first)
    assert (limits.low, limits.high) == (2.0, 3.2)
    wider = limits.widened(steeper)
    assert (wider.low, wider.high) == (0.0, 9.0)
    assert wider.widened(flat) == wider
    for frame in (first, steeper, flat):
        assert line_figure(frame, limits=wider).axes[0].get_ylim() == pytest.approx((-0.45, 9.45))


def test_blown_up_frame_is_marked_and_does_not_widen_the_axis() -> None:
    limits = LossLimits(0.0, 3.0)
    blown = line([1e6, 1e6, 2e6], 1e6)
    assert limits.widened(blown) == limits
    figure = line_figure(blown, limits=limits)
    assert "\N{BLACK UP-POINTING TRIANGLE} > 3.15, up to 2e6" in text_of(figure)
    (marks,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "^"]
    assert len(marks.get_xdata()) == 3
    assert LossLimits.for_film([line([1.0, 0.0, 2.0]), blown]).high == 2.0


def test_logarithmic_axis_on_request() -> None:
    figure = line_figure(line([3.0, 0.01, 0.0, 2.0], center=0.01), scale="log")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "loss (logarithmic)"
    assert 0 < axes.get_ylim()[0] < 0.01
    (below,) = [mark for mark in axes.lines if mark.get_marker() == "v"]
    assert list(below.get_xdata()) == [pytest.approx(1 / 3)]
    assert figure_to_image(figure).std() > 0
    with pytest.raises(ValueError, match=r"line_figure\(scale='symlog'\).*'linear'.*'log'"):
        line_figure(line([1.0, 0.0, 2.0]), scale="symlog")


@pytest.mark.parametrize(
    ("second", "labels", "title"),
    [
        ({"step": 900}, ["step 120", "step 900"], "Loss along a line, by step"),
        (
            {"directions": ["gradient"], "norms": [0.5]},
            ["random (1 = norm 3.2)", "gradient (1 = norm 0.5)"],
            "step 120, loss 0",
        ),
        (
            {"probe_mode": "eval"},
            ["512 examples in train mode", "512 examples in eval mode"],
            "step 120, loss 0",
        ),
        ({}, ["slice 1", "slice 2"], "step 120, loss 0"),
    ],
)
def test_legend_shows_what_differs_between_lines(
    second: dict[str, Any], labels: list[str], title: str
) -> None:
    lines = [line([1, 0, 1], **METADATA), line([2, 0, 2], **{**METADATA, **second})]
    figure = line_figure(lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert figure.get_suptitle() == title
    np.testing.assert_allclose(curve_of(figure, 1)[1], [2, 0, 2])
    colors = {
        to_rgba(mark.get_color()) for mark in figure.axes[0].lines if mark.get_marker() == "o"
    }
    assert len(colors) == 2


@pytest.mark.parametrize(
    ("norm", "labels", "axis"),
    [
        (6.7500001, ["random 1", "random 2"], "along the direction (1 = norm 6.8)"),
        (8.0, ["random 1 (1 = norm 6.8)", "random 2 (1 = norm 8)"], "along the direction"),
    ],
)
def test_norms_of_several_directions_are_shown_once(
    norm: float, labels: list[str], axis: str
) -> None:
    lines = [
        line([1, 0, 1], directions=["random 1"], norms=[6.75]),
        line([2, 0, 2], directions=["random 2"], norms=[norm]),
    ]
    figure = line_figure(lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert figure.axes[0].get_xlabel() == axis


def test_lines_with_different_centers_have_no_loss_in_the_title() -> None:
    assert (
        line_figure([line([1, 0, 1]), line([1, 1, 1], 1.0)]).get_suptitle() == "Loss along a line"
    )
    lines = [line([1, 0, 1], step=3), line([1, 1, 1], 1.0, step=3)]
    assert line_figure(lines).get_suptitle() == "step 3"


def test_flat_empty_and_tiny_lines() -> None:
    flat = line_figure(line([2.3, 2.3, 2.3], center=2.3))
    low, high = flat.axes[0].get_ylim()
    assert low < 2.3 < high
    for limits in (None, LossLimits(0.1, 1.0)):
        for slice in (
            line([np.nan] * 3, math.nan),
            line([1.0, np.nan, 2.0], math.nan),
            line([1e308, 0.0, -1e308]),
            line([5.0], 5.0),
        ):
            figure = line_figure(slice, limits=limits)
            assert np.isfinite(figure.axes[0].get_ylim()).all()
            assert figure_to_image(figure).std() > 0


# --- eigenvalues


def rows(values: list[float], **columns: Any) -> list[dict[str, Any]]:
    """A history with a row every 10 steps; columns are numbers, or lists as long as the values."""
    history = []
    for index, value in enumerate(values):
        row = {"step": 10 * index, "hessian/top_eigenvalue": value}
        for name, column in columns.items():
            row[f"hessian/{name}"] = column[index] if isinstance(column, list) else column
        history.append(row)
    return history


def test_eigenvalue_and_edge() -> None:
    figure = eigenvalue_figure(rows([1.0, 4.0, 9.6], edge=10.0, edge_ratio=0.96))
    curve, edge = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(curve.get_ydata(), [1, 4, 9.6])
    np.testing.assert_allclose(edge.get_ydata(), [10, 10, 10])
    assert edge.get_linestyle() == "--"
    assert edge.get_color() != curve.get_color()
    assert "edge of stability 10" in [text.get_text() for text in figure.axes[0].texts]
    assert "step 20: 9.6, 0.96 of the edge" in text_of(figure)
    assert figure.axes[0].get_yscale() == "linear"
    low, high = figure.axes[0].get_ylim()
    assert low < 0 < 10 < high


def test_edge_may_be_left_out_or_missing() -> None:
    assert len(eigenvalue_figure(rows([1.0, 2.0], edge=10.0), edge=False).axes[0].lines) == 1
    assert len(eigenvalue_figure(rows([1.0, 2.0])).axes[0].lines) == 1
    figure = eigenvalue_figure(rows([1.0, 2.0, 3.0], edge=[5.0, None, 6.0]))
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [5, np.nan, 6])


def test_preconditioned_eigenvalue_replaces_the_plain_one() -> None:
    history = rows([1.0, 2.0, 3.0], preconditioned_eigenvalue=[None, 400.0, 500.0], residual=2.0)
    del history[0]["hessian/preconditioned_eigenvalue"]
    figure = eigenvalue_figure(history)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [10, 20])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [400, 500])
    assert figure.get_suptitle() == "Top preconditioned eigenvalue"
    assert "residual" not in text_of(figure)
    plain = eigenvalue_figure(rows([1.0, 2.0], preconditioned_eigenvalue=math.nan))
    np.testing.assert_allclose(plain.axes[0].lines[0].get_ydata(), [1, 2])


def test_adaptive_optimizer_has_the_ratio_above_the_eigenvalue() -> None:
    history = rows(
        [1.0, 2.0, 3.0], preconditioned_eigenvalue=[300.0, 400.0, 500.0], edge=400.0,
        edge_ratio=[0.75, 1.0, 1.25],
    )  # fmt: skip
    figure = eigenvalue_figure(history)
    eigenvalue, ratio = figure.axes
    assert ratio.get_position().y0 > eigenvalue.get_position().y1
    line, curve = ratio.lines
    np.testing.assert_allclose(line.get_ydata(), [1, 1])
    np.testing.assert_allclose(curve.get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(curve.get_ydata(), [0.75, 1, 1.25])
    np.testing.assert_allclose(eigenvalue.lines[0].get_ydata(), [300, 400, 500])
    np.testing.assert_allclose(eigenvalue.lines[1].get_ydata(), [400, 400, 400])
    assert ratio.get_yscale() == "linear"
    assert "1.2 of the edge" in text_of(figure)
    for row in history:
        row["hessian/edge_ratio"] /= 50
    assert eigenvalue_figure(history).axes[1].get_yscale() == "log"  # decades below 1
    assert len(eigenvalue_figure(rows([1.0, 2.0], edge=10.0, edge_ratio=0.2)).axes) == 1


def test_second_monitor() -> None:
    history = [{"step": 1, "hessian/head/top_eigenvalue": 3.0, "hessian/top_eigenvalue": 8.0}]
    figure = eigenvalue_figure(history, name="head")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [3])
    assert figure.get_suptitle() == "Top Hessian eigenvalue (head)"


def test_rows_out_of_order_or_without_numbers() -> None:
    history = [
        {"step": 30, "hessian/top_eigenvalue": 3.0},
        {"step": 10, "hessian/top_eigenvalue": 1.0},
        {"step": 20, "hessian/top_eigenvalue": math.inf},
        {"step": 25, "hessian/top_eigenvalue": None},
        {"step": 40, "sharpness/sam": 1.0},
        {"hessian/top_eigenvalue": 7.0},
    ]
    figure = eigenvalue_figure(history)
    curve, crosses = figure.axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), [10, 20, 25, 30])
    np.testing.assert_array_equal(curve.get_ydata(), [1, np.nan, np.nan, 3])
    assert list(crosses.get_xdata()) == [20, 25]
    assert crosses.get_marker() == "x"
    assert "\N{MULTIPLICATION SIGN} not finite" in text_of(figure)
    assert "step 30: 3" in text_of(figure)


def test_point_between_gaps_gets_a_dot() -> None:
    values = [1.0] * 50
    values[20] = values[22] = math.nan
    curve = eigenvalue_figure(rows(values)).axes[0].lines[0]
    assert curve.get_markevery() == [21]


def test_axis_is_logarithmic_over_more_than_two_decades() -> None:
    assert eigenvalue_figure(rows([0.1, 50.0])).axes[0].get_yscale() == "log"
    assert eigenvalue_figure(rows([1.0, 2.0], edge=300.0)).axes[0].get_yscale() == "log"
    assert eigenvalue_figure(rows([1.0, 99.0])).axes[0].get_yscale() == "linear"
    assert eigenvalue_figure(rows([-0.1, 50.0])).axes[0].get_yscale() == "linear"


def test_residual_band_is_drawn_if_wide_enough() -> None:
    def bands(figure: Figure) -> list[PolyCollection]:
        return [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]

    thin = eigenvalue_figure(rows([5.0, 10.0], residual=0.001))
    assert not bands(thin)
    assert "residual" not in text_of(thin)
    wide = eigenvalue_figure(rows([5.0, 10.0], residual=[1.0, math.nan]))
    assert len(bands(wide)) == 1
    assert "band: ± residual" in text_of(wide)
    logarithmic = eigenvalue_figure(rows([0.01, 10.0], residual=0.05))
    assert len(bands(logarithmic)) == 1
    assert figure_to_image(logarithmic).std() > 0


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], "no eigenvalue measured"),
        ([{"step": 1, "sharpness/sam": 2.0}], "no eigenvalue measured"),
        (rows([math.nan], edge=2.0), "no finite eigenvalue"),
    ],
)
def test_history_without_finite_values(history: list[dict[str, Any]], expected: str) -> None:
    figure = eigenvalue_figure(history)
    assert expected in [text.get_text() for text in figure.axes[0].texts]
    assert figure_to_image(figure).std() > 0


# --- the limits


def test_live_limits_span_three_decades() -> None:
    limits = LossLimits.from_slice(plane(POSITIVE))  # to 31.5
    assert limits == LossLimits(0.05, 50.0, room=0.15)
    assert LossLimits.from_dict(limits.to_dict()) == limits
    assert all(type(value) in (float, bool) for value in limits.to_dict().values())


def test_limits_of_a_film_exclude_a_blown_up_frame() -> None:
    film = [plane(POSITIVE), plane(0.01 * POSITIVE), plane(3 * POSITIVE)]
    assert LossLimits.for_film(film) == LossLimits(0.005, 100.0)
    assert LossLimits.for_film([*film, plane(1e9 * POSITIVE)]) == LossLimits(0.005, 100.0)


@pytest.mark.parametrize("losses", [
    [2.0, 2.0, 2.0], [2.0 + 1e-7, 2.0, 2.0], [0.0, 0.0, 0.0], [np.nan, np.nan, np.nan],
    [np.inf, 0.0, 1.0], [2.0, np.nan, 1.0], [1e12, 1.0, 0.0], [1e308, -1e308, 1.0],
    [1e-200, 0.0, 0.0], [-3.0, -3.0, -3.0], [1e-30, 1e30, 1.0],
])  # fmt: skip
@pytest.mark.parametrize("center", [0.0, 2.0, math.nan])
def test_limits_of_any_losses(losses: list[float], center: float) -> None:
    x = np.arange(3.0)
    for slice in (line(losses, center), Slice((x, x), np.tile(losses, (3, 1)), center)):
        for limits in (LossLimits.from_slice(slice), LossLimits.for_film([slice])):
            assert -math.inf < limits.low < limits.high < math.inf
            assert np.isfinite(limits.widened(slice).high)
    assert limits.low > 0
    values = limits.values(slice)
    assert np.isfinite(limits.color(values[np.isfinite(values)])).all()
    assert figure_to_image(plane_figure(slice)).std() > 0


def test_round_down() -> None:
    for exponent in (-100, -3, 0, 7, 100):
        ten = float(f"1e{exponent}")
        assert round_down(ten) == ten
        assert round_down(1.5 * ten) == pytest.approx(ten)
        assert round_down(4.9 * ten) == pytest.approx(2 * ten)
        assert round_down(7.0 * ten) == pytest.approx(5 * ten)


def test_round_up() -> None:
    for exponent in (-100, -3, 0, 7, 100):
        ten = float(f"1e{exponent}")
        assert round_up(ten) == ten
        assert round_up(1.5 * ten) == pytest.approx(2 * ten)
        assert round_up(4.9 * ten) == pytest.approx(5 * ten)
        assert round_up(7.0 * ten) == pytest.approx(10 * ten)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.5, f"{MINUS}0.5"), (100.0, "100"), (12666.7, "12700"), (99999.0, "1e5"),
        (1e-3, "0.001"), (-1.25e-7, f"{MINUS}1.25e-7"), (math.inf, "inf"),
        (-math.inf, f"{MINUS}inf"), (math.nan, "nan"), (0.30000000000000004, "0.3"),
        (3e22, "3e22"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


# --- errors


def test_errors_of_planes() -> None:
    with pytest.raises(TypeError, match=r"plane_figure\(slice=...\): got 3; expected a Slice"):
        plane_figure(3)
    with pytest.raises(ValueError, match=r"1 coordinate axes, expected 2; pass it to line_figure"):
        plane_figure(line([1, 2, 3]))
    backwards = Slice((np.array([1.0, 0.0]), np.arange(2.0)), np.zeros((2, 2)), 0.0)
    with pytest.raises(ValueError, match=r"got coordinates \[1. 0.\]; pass finite ones in rising"):
        plane_figure(backwards)
    nowhere = Slice((np.array([0.0, np.nan]), np.arange(2.0)), np.zeros((2, 2)), 0.0)
    with pytest.raises(ValueError, match=r"got coordinates \[ 0. nan\]"):
        plane_figure(nowhere)
    empty = Slice((np.zeros(0), np.zeros(2)), np.zeros((2, 0)), 0.0)
    with pytest.raises(ValueError, match=r"losses of shape \(2, 0\).*at least one point"):
        plane_figure(empty)


def test_errors_of_lines() -> None:
    with pytest.raises(TypeError, match=r"line_figure\(slices=3\): expected a Slice"):
        line_figure(3)
    with pytest.raises(TypeError, match=r"line_figure\(slices='abc'\): expected a Slice"):
        line_figure("abc")
    with pytest.raises(TypeError, match=r"slice 1: got None; expected a Slice"):
        line_figure([line([1, 2, 3]), None])
    with pytest.raises(ValueError, match=r"line_figure\(slices=\[\]\): expected at least one"):
        line_figure([])
    with pytest.raises(ValueError, match=r"slice 0: got a slice with 2.*pass it to plane_figure"):
        line_figure([plane()])


@pytest.mark.parametrize("history", ["step", {"step": 1}, [1, 2], None])
def test_errors_of_histories(history: Any) -> None:
    with pytest.raises(TypeError, match=r"eigenvalue_figure\(history=.*expected a list of dicts"):
        eigenvalue_figure(history)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)]
)
def test_errors_of_limits(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"LossLimits\(low=.*expected finite numbers"):
        LossLimits(low, high)


def test_incomplete_limits_raise() -> None:
    with pytest.raises(ValueError, match=r"from_dict\(values={'high': 1.0}\): expected the keys"):
        LossLimits.from_dict({"high": 1.0})


# --- vector graphics


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_text_in_vector_graphics_is_text(tmp_path: Any, ending: str) -> None:
    left, right = paper_axes(2, columns=2)
    plane_figure(plane(POSITIVE, metadata=METADATA), ax=left)
    figure = line_figure(line([1.0, 0.5, 1.0], 0.5, step=3), ax=right)
    path = tmp_path / f"paper.{ending}"
    save_figure(figure, path)
    written = path.read_bytes()
    if ending == "svg":
        assert b">step 120, loss 1</text>" in written
        assert b'width="486pt"' in written  # 6.75 inches
    else:
        assert b"/Type3" not in written  # glyphs as outlines
        assert b"/CIDFontType2" in written  # TrueType
    assert len(written) < 300_000


# --- images


def test_image() -> None:
    image = figure_to_image(plane_figure(plane(metadata=METADATA)))
    assert image.dtype == np.uint8
    assert image.shape == (560, 560, 3)
    assert (image[0] == 255).all()
    assert image.flags.c_contiguous
    assert image.flags.owndata
    bare = Figure(figsize=(2, 1), dpi=50)
    assert figure_to_image(bare).shape == (50, 100, 3)
    with pytest.raises(TypeError, match=r"figure_to_image\(figure=3\): expected a matplotlib Fig"):
        figure_to_image(3)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plane_figure(plane(metadata=METADATA)),
        lambda: line_figure([line([1, 0, 1], **METADATA), line([1, 0, 2], step=3)]),
        lambda: eigenvalue_figure(rows([1.0, 2.0], edge=3.0)),
    ],
)
def test_figures_ignore_the_style_of_the_user(draw: Any) -> None:
    image = figure_to_image(draw())
    strange = {
        "axes.facecolor": "black", "axes.grid": True, "axes.linewidth": 5.0, "font.size": 30.0,
        "figure.constrained_layout.use": True, "lines.marker": "x", "text.color": "red",
        "figure.facecolor": "black", "xtick.color": "red",
    }  # fmt: skip
    with matplotlib.rc_context(strange):
        np.testing.assert_array_equal(figure_to_image(draw()), image)
        assert matplotlib.rcParams["axes.linewidth"] == 5.0
