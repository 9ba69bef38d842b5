"""What the pictures say, read back from the figures: data, limits and words, not pixels."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import SymLogNorm, to_rgba
from matplotlib.figure import Figure

from lightning_landscape.figures import (
    ColorScale,
    eigenvalue_figure,
    figure_to_image,
    line_figure,
    plane_figure,
)
from lightning_landscape.figures.labels import number
from lightning_landscape.figures.plane import GROUND
from lightning_landscape.figures.scale import round_up
from lightning_landscape.geometry.slices import Slice

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
    """A plane of 5 x 4 points; without losses L = 1 + x**2 + 10 y, no two axes alike."""
    x, y = np.linspace(-1, 1, 5), np.linspace(-1, 2, 4)
    if losses is None:
        losses = 1 + x[None, :] ** 2 + 10 * y[:, None]
    return Slice((x, y), np.asarray(losses, dtype=float), center, metadata or {})


def line(losses: Any, center: float = 0.0, **metadata: Any) -> Slice:
    """A line over [-1, 1]."""
    losses = np.asarray(losses, dtype=float)
    return Slice((np.linspace(-1, 1, len(losses)),), losses, center, metadata)


def mesh_of(figure: Figure) -> QuadMesh:
    """The coloured cells of a plane."""
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    return mesh


def words_of(figure: Figure) -> str:
    """Title and small lines, one a line."""
    return "\n".join([figure.get_suptitle(), *(text.get_text() for text in figure.texts)])


def bar_labels(figure: Figure) -> list[str]:
    """The labels of the colour bar, bottom to top."""
    return [label.get_text() for label in figure.axes[1].get_yticklabels()]


def curve_of(figure: Figure, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The n-th curve of a line figure, that is line with more than two points."""
    curves = [
        c for c in figure.axes[0].lines if c.get_linestyle() != "None" and c.get_label()[0] != "_"
    ]
    return np.asarray(curves[index].get_xdata()), np.asarray(curves[index].get_ydata())


# --- planes


def test_plane_puts_every_loss_at_its_place() -> None:
    figure = plane_figure(plane())
    mesh = mesh_of(figure)
    corners = mesh.get_coordinates()  # (rows + 1, columns + 1, 2)
    centers = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    difference = np.ma.getdata(mesh.get_array())
    assert difference.shape == (4, 5)
    np.testing.assert_allclose(difference, centers[..., 0] ** 2 + 10 * centers[..., 1], atol=1e-12)
    # x runs along the horizontal axis.
    assert figure.axes[0].get_xlim() == pytest.approx((-1.25, 1.25))
    assert figure.axes[0].get_ylim() == pytest.approx((-1.5, 2.5))


def test_plane_pixels_follow_the_data() -> None:
    # One high cell at x = 1, y = -1: the lower right corner of the map.
    losses = np.zeros((4, 5))
    losses[0, -1] = 1.0
    figure = plane_figure(plane(losses, center=0.0), scale=ColorScale(0.1, 1.0))
    image = figure_to_image(figure)
    box = figure.axes[0].get_window_extent()
    lower_right = image[image.shape[0] - int(box.y0) - 20, int(box.x1) - 20]
    upper_left = image[image.shape[0] - int(box.y1) + 20, int(box.x0) + 20]
    assert lower_right == pytest.approx(np.array(GROUND(1.0)[:3]) * 255, abs=2)
    assert upper_left == pytest.approx(np.array(GROUND(0.5)[:3]) * 255, abs=2)


def test_plane_of_uneven_coordinates_keeps_points_inside_their_cells() -> None:
    x, y = np.array([-1.0, 0.0, 3.0]), np.array([0.0, 0.5])
    corners = mesh_of(plane_figure(Slice((x, y), np.zeros((2, 3)), 0.0))).get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [-1.5, -0.5, 1.5, 4.5])
    np.testing.assert_allclose(corners[:, 0, 1], [-0.25, 0.25, 0.75])


def test_plane_never_paints_what_is_not_finite() -> None:
    losses = np.zeros((4, 5))
    losses[0, 0], losses[3, 4], losses[2, 1] = np.nan, np.inf, -np.inf
    figure = plane_figure(plane(losses, center=0.0))
    mask = np.ma.getmaskarray(mesh_of(figure).get_array())
    np.testing.assert_array_equal(mask, ~np.isfinite(losses))
    assert figure.axes[0].patch.get_hatch()
    assert "hatched: not finite" in words_of(figure)
    assert "hatched" not in words_of(plane_figure(plane()))


def test_frames_that_share_a_scale_share_colours_ticks_and_places() -> None:
    scale = ColorScale.from_slice(plane())
    first = plane_figure(plane(), scale=scale)
    later = plane_figure(plane(plane().losses * 1000, center=1000.0), scale=scale)
    norms = [mesh_of(figure).norm for figure in (first, later)]
    for norm in norms:
        assert isinstance(norm, SymLogNorm)
        assert (norm.vmin, norm.vmax) == (-scale.limit, scale.limit)
        assert norm(0.0) == pytest.approx(0.5)
    assert norms[0].linthresh == norms[1].linthresh
    assert [label.strip("<> ") for label in bar_labels(later)] == bar_labels(first)
    assert [a.get_position().bounds for a in first.axes] == [
        a.get_position().bounds for a in later.axes
    ]


def test_bar_says_what_is_clipped() -> None:
    losses = np.zeros((4, 5))
    scale = ColorScale(0.1, 2.0)
    losses[0, 0] = 1.9
    assert bar_labels(plane_figure(plane(losses, 0.0), scale=scale))[-1] == "2"
    losses[0, 0] = 2.1
    labels = bar_labels(plane_figure(plane(losses, 0.0), scale=scale))
    assert (labels[0], labels[-1]) == (f"{MINUS}2", "> 2")
    losses[1, 1] = -3.0
    labels = bar_labels(plane_figure(plane(losses, 0.0), scale=scale))
    assert (labels[0], labels[-1]) == (f"< {MINUS}2", "> 2")


def test_corner_that_blew_up_does_not_swamp_the_colours() -> None:
    losses = plane().losses.copy()
    losses[0, 0] = 1e9
    figure = plane_figure(plane(losses))
    assert mesh_of(figure).norm.vmax < 1000
    assert bar_labels(figure)[-1].startswith("> ")


def test_plane_tells_where_it_comes_from() -> None:
    figure = plane_figure(plane(metadata=METADATA, center=0.5341))
    assert figure.get_suptitle() == "step 120, loss 0.534"
    words = words_of(figure)
    assert "random (fixed) \N{MULTIPLICATION SIGN} top eigenvector (taken anew)" in words
    assert "filter-normalised, 512 examples in train mode" in words
    assert "colour: loss minus loss at the cross" in words
    assert "cosine" not in words
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
def test_plane_words(change: dict[str, Any], expected: str) -> None:
    assert expected in words_of(plane_figure(plane(metadata={**METADATA, **change}))) + "\n"


def test_plane_without_metadata() -> None:
    figure = plane_figure(plane())
    assert figure.get_suptitle() == "loss 1"
    assert figure.axes[0].get_xlabel() == "direction 1"
    assert "not to scale" in words_of(figure)


def test_one_unit_is_one_length_in_weight_space_along_both_axes() -> None:
    figure = plane_figure(plane(metadata={"norms": [4.0, 2.0]}))
    figure_to_image(figure)
    axes = figure.axes[0]
    across, up = axes.transData.transform([(1, 0), (0, 1)]) - axes.transData.transform((0, 0))
    assert across[0] / 4 == pytest.approx(up[1] / 2)
    assert "not to scale" not in words_of(figure)


@pytest.mark.parametrize("norms", [[1.0, 100.0], [0.0, 1.0], [math.nan, 1.0], [None, 1.0], [1.0]])
def test_axes_that_would_make_a_strip_or_have_no_length_are_not_to_scale(norms: list[Any]) -> None:
    figure = plane_figure(plane(metadata={"norms": norms}))
    assert figure.axes[0].get_aspect() == "auto"
    assert "not to scale" in words_of(figure)


def test_center_is_marked_and_does_not_move_the_limits() -> None:
    away = Slice((np.array([2.0, 3.0]), np.array([2.0, 3.0])), np.eye(2), 0.0)
    for slice in (plane(), away):
        axes = plane_figure(slice).axes[0]
        crosses = [mark for mark in axes.lines if mark.get_marker() == "+"]
        assert crosses
        assert all(mark.get_xdata()[0] == mark.get_ydata()[0] == 0 for mark in crosses)
    assert axes.get_xlim() == pytest.approx((1.5, 3.5))


def test_contours_carry_their_difference() -> None:
    labels = [text.get_text() for text in plane_figure(plane()).axes[0].texts]
    assert labels
    assert set(labels) <= {
        sign + level for sign in ("", MINUS) for level in ("1", "3", "10", "0.3")
    }


def test_lower_ground_is_darker() -> None:
    red, green, blue = GROUND(np.linspace(0, 1, 101))[:, :3].T
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (np.diff(grey) > 0).all()
    assert grey[50] - grey[0] > 0.25
    assert grey[-1] - grey[50] > 0.25


def test_flat_empty_and_tiny_planes() -> None:
    flat = plane_figure(plane(np.full((4, 5), 2.3), center=2.3))
    assert "flat" in words_of(flat)
    empty = plane_figure(plane(np.full((4, 5), np.nan), center=math.nan))
    assert empty.get_suptitle() == "loss nan"
    assert "no finite loss" in [text.get_text() for text in empty.axes[0].texts]
    point = plane_figure(Slice((np.zeros(1), np.zeros(1)), np.ones((1, 1)), 1.0))
    row = plane_figure(Slice((np.arange(3.0), np.zeros(1)), np.ones((1, 3)), 1.0))
    for figure in (flat, empty, point, row):
        assert figure_to_image(figure).std() > 0


def test_lowest_loss_stands_in_where_the_weights_have_none() -> None:
    figure = plane_figure(plane(center=math.nan))
    assert "colour: loss minus the lowest loss" in words_of(figure)
    assert np.ma.min(mesh_of(figure).get_array()) == 0


# --- lines


def test_line_shows_the_loss_and_the_weights() -> None:
    figure = line_figure(line([3.0, 1.0, 0.5, 2.0, 4.0], center=0.5, **METADATA))
    x, losses = curve_of(figure)
    np.testing.assert_allclose(x, [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(losses, [3, 1, 0.5, 2, 4])
    (dot,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "o"]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.0, 0.5)
    assert figure.get_suptitle() == "step 120, loss 0.5"
    assert "random (fixed)\nfilter-normalised, 512 examples in train mode" in words_of(figure)
    assert figure.axes[0].get_xlabel() == "random (1 = norm 3.2)"
    assert figure.axes[0].get_ylabel() == "loss"
    assert figure.axes[0].get_yscale() == "linear"
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5 < 4 < high < 5


def test_line_that_blows_up_keeps_the_valley_in_sight() -> None:
    figure = line_figure(line([1e6, 1.0, 0.25, 0.0, 0.25, 1.0, -1e7]))
    low, high = figure.axes[0].get_ylim()
    assert 1 < high < 100
    assert -100 < low < 0
    assert f"> {number(high)}, up to 1e6" in words_of(figure)
    assert f"< {number(low)}, down to {MINUS}1e7" in words_of(figure)
    (up,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "^"]
    (down,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "v"]
    assert list(up.get_xdata()) == [-1.0]
    assert list(down.get_xdata()) == [1.0]


def test_line_marks_what_is_not_finite() -> None:
    figure = line_figure(line([np.nan, 1.0, 0.0, 1.0, np.inf]))
    _, losses = curve_of(figure)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, False, False, True])
    (crosses,) = [mark for mark in figure.axes[0].lines if mark.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [-1.0, 1.0]
    assert "\N{MULTIPLICATION SIGN} not finite" in words_of(figure)
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_frames_of_a_line_film_share_the_axis() -> None:
    frames = [line([3.0, 2.9, 3.2], center=2.9, step=0), line([50.0, 0.1, 0.4], 0.1, step=900)]
    scale = ColorScale.from_slice(frames[0])
    figures = [line_figure(frame, scale=scale) for frame in frames]
    for figure, frame in zip(figures, frames, strict=True):
        axes = figure.axes[0]
        assert axes.get_yscale() == "symlog"
        assert axes.get_ylim() == (-scale.limit, scale.limit)
        np.testing.assert_allclose(curve_of(figure)[1], frame.losses - frame.center_loss)
        assert [number(tick) for tick in scale.ticks()] == [
            label.get_text() for label in axes.get_yticklabels()
        ]
    assert figures[0].axes[0].get_position().bounds == figures[1].axes[0].get_position().bounds
    assert (figures[0].get_size_inches() == figures[1].get_size_inches()).all()
    assert f"> {number(scale.limit)}, up to 49.9" in words_of(figures[1])
    assert "> " not in words_of(figures[0])


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
def test_several_lines_are_named_by_what_differs(
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
    for scale in (None, ColorScale(0.1, 1.0)):
        for slice in (
            line([np.nan] * 3, math.nan),
            line([1.0, np.nan, 2.0], math.nan),
            line([1e308, 0.0, -1e308]),
            line([5.0], 5.0),
        ):
            figure = line_figure(slice, scale=scale)
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
    assert "step 20: 9.6, 0.96 of the edge" in words_of(figure)
    assert figure.axes[0].get_yscale() == "linear"
    low, high = figure.axes[0].get_ylim()
    assert low < 0 < 10 < high


def test_edge_can_be_left_out_or_missing() -> None:
    assert len(eigenvalue_figure(rows([1.0, 2.0], edge=10.0), edge=False).axes[0].lines) == 1
    assert len(eigenvalue_figure(rows([1.0, 2.0])).axes[0].lines) == 1
    figure = eigenvalue_figure(rows([1.0, 2.0, 3.0], edge=[5.0, None, 6.0]))
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [5, np.nan, 6])


def test_preconditioned_eigenvalue_takes_the_place_of_the_plain_one() -> None:
    history = rows([1.0, 2.0, 3.0], preconditioned_eigenvalue=[None, 400.0, 500.0], residual=2.0)
    del history[0]["hessian/preconditioned_eigenvalue"]
    figure = eigenvalue_figure(history)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [10, 20])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [400, 500])
    assert figure.get_suptitle() == "Top preconditioned eigenvalue"
    assert "residual" not in words_of(figure)
    plain = eigenvalue_figure(rows([1.0, 2.0], preconditioned_eigenvalue=math.nan))
    np.testing.assert_allclose(plain.axes[0].lines[0].get_ydata(), [1, 2])


def test_second_monitor() -> None:
    history = [{"step": 1, "hessian/head/top_eigenvalue": 3.0, "hessian/top_eigenvalue": 8.0}]
    figure = eigenvalue_figure(history, name="head")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [3])
    assert figure.get_suptitle() == "Top Hessian eigenvalue (head)"


def test_rows_may_be_out_of_order_lack_keys_or_hold_no_number() -> None:
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
    assert "\N{MULTIPLICATION SIGN} not finite" in words_of(figure)
    assert "step 30: 3" in words_of(figure)


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


def test_residual_band_is_drawn_where_it_can_be_seen() -> None:
    def bands(figure: Figure) -> list[PolyCollection]:
        return [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]

    thin = eigenvalue_figure(rows([5.0, 10.0], residual=0.001))
    assert not bands(thin)
    assert "residual" not in words_of(thin)
    wide = eigenvalue_figure(rows([5.0, 10.0], residual=[1.0, math.nan]))
    assert len(bands(wide)) == 1
    assert "band: ± residual" in words_of(wide)
    logarithmic = eigenvalue_figure(rows([0.01, 10.0], residual=0.05))
    assert len(bands(logarithmic)) == 1
    assert figure_to_image(logarithmic).std() > 0


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([], "no eigenvalue measured"),
        ([{"step": 1, "sharpness/sam": 2.0}], "no eigenvalue measured"),
        (rows([math.nan], edge=2.0), "no finite eigenvalue"),
    ],
)
def test_history_without_a_number(history: list[dict[str, Any]], words: str) -> None:
    figure = eigenvalue_figure(history)
    assert words in [text.get_text() for text in figure.axes[0].texts]
    assert figure_to_image(figure).std() > 0


# --- the scale


def test_scale_of_a_film() -> None:
    scale = ColorScale.from_slice(line([1.0, 0.1, 0.0, 0.1, 0.7]))
    assert scale.limit == 5.0  # 4 times 1, rounded up
    assert 0 < scale.linthresh <= scale.limit / 20
    assert ColorScale.from_dict(scale.to_dict()) == scale
    assert all(type(value) is float for value in scale.to_dict().values())


def test_scale_leaves_room_for_the_loss_to_climb_back_to_where_it_began() -> None:
    assert ColorScale.from_slice(line([2.35, 2.3, 2.28], center=2.3)).limit == 5.0
    # An offset of the loss must not hide the surface.
    assert ColorScale.from_slice(line([1003.0, 1000.0, 1002.0], center=1000.0)).limit == 500.0


@pytest.mark.parametrize(
    ("losses", "center", "limit"),
    [
        ([2.0, 2.0, 2.0], 2.0, 2.0),
        ([2.0 + 1e-7, 2.0, 2.0], 2.0, 2.0),
        ([0.0, 0.0, 0.0], 0.0, 1.0),
        ([np.nan, np.nan, np.nan], math.nan, 1.0),
        ([np.inf, 0.0, 1.0], 0.0, 5.0),
        ([2.0, np.nan, 1.0], math.nan, 5.0),
        ([1e12, 1.0, 0.0, 1.0, 1.0], 0.0, 200.0),
        ([1e308, -1e308, 1.0], 0.0, 5.0),
        ([1e-200, 0.0, 0.0], 0.0, 1e-100),
    ],
)
def test_scale_is_finite_on_every_surface(losses: list[float], center: float, limit: float) -> None:
    scale = ColorScale.from_slice(line(losses, center))
    assert scale.limit == pytest.approx(limit)
    assert 0 < scale.linthresh <= scale.limit
    assert np.isfinite(scale.norm()(np.array([-limit, 0.0, limit]))).all()


@pytest.mark.parametrize("linthresh", [1e-6, 0.0002, 0.1, 0.5])
@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0, 5.0, 1e6])
def test_ticks_are_few_and_in_order(linthresh: float, limit: float) -> None:
    ticks = ColorScale(linthresh, limit).ticks()
    assert (np.diff(ticks) > 0).all()
    assert (ticks[0], ticks[-1]) == (-limit, limit)
    assert 0.0 in ticks
    assert len(ticks) <= 11


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


# --- refusals


def test_refusals_of_planes() -> None:
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


def test_refusals_of_lines() -> None:
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
def test_refusals_of_histories(history: Any) -> None:
    with pytest.raises(TypeError, match=r"eigenvalue_figure\(history=.*expected a list of dicts"):
        eigenvalue_figure(history)


@pytest.mark.parametrize(
    ("linthresh", "limit"), [(0.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0), (-1.0, 1.0)]
)
def test_refusals_of_scales(linthresh: float, limit: float) -> None:
    with pytest.raises(ValueError, match=r"ColorScale\(linthresh=.*0 < linthresh <= limit"):
        ColorScale(linthresh, limit)


def test_refusal_of_an_incomplete_scale() -> None:
    with pytest.raises(ValueError, match=r"from_dict\(values={'limit': 1.0}\): expected the keys"):
        ColorScale.from_dict({"limit": 1.0})


# --- the sheet


def test_image() -> None:
    image = figure_to_image(plane_figure(plane(metadata=METADATA)))
    assert image.dtype == np.uint8
    assert image.shape == (616, 560, 3)
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
def test_same_picture_under_any_style_of_the_user(draw: Any) -> None:
    image = figure_to_image(draw())
    strange = {
        "axes.facecolor": "black", "axes.grid": True, "axes.linewidth": 5.0, "font.size": 30.0,
        "figure.constrained_layout.use": True, "lines.marker": "x", "text.color": "red",
        "figure.facecolor": "black", "xtick.color": "red",
    }  # fmt: skip
    with matplotlib.rc_context(strange):
        np.testing.assert_array_equal(figure_to_image(draw()), image)
        assert matplotlib.rcParams["axes.linewidth"] == 5.0
