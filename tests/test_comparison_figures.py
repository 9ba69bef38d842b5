"""Figures of several runs: data, limits and text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lightning_landscape import Slice
from lightning_landscape.figures import (
    LossLimits,
    barrier_matrix_figure,
    curves_figure,
    eigenvalue_figure,
    figure_to_image,
    filmstrip_figure,
    line_figure,
    points_figure,
)
from lightning_landscape.figures.curves import spread_over
from tests.test_figures import text_of

KEY = "hessian/top_eigenvalue"


def rows(values: dict[int, float | None], key: str = KEY, **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, key: value, **more} for step, value in values.items()]


def curves(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> steps and values of each curve in the legend."""
    drawn = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        )
        for line in drawn
    }


def dashed(figure: Figure) -> list[Any]:
    return [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def band(figure: Figure) -> list[tuple[float, float, float]]:
    """Step, low and high of the band."""
    (area,) = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    by_step: dict[float, list[float]] = {}
    for x, y in area.get_paths()[0].vertices:
        by_step.setdefault(float(x), []).append(float(y))
    return [(x, min(found), max(found)) for x, found in sorted(by_step.items())]


# --- curves


def test_each_run_is_a_curve_of_its_own_length() -> None:
    figure = curves_figure(
        {"a": rows({20: 5.0, 10: 3.0, 30: 4.0}), "b": rows({5: 2.0, 40: 6.0})}, KEY
    )
    assert curves(figure) == {
        "a": ([10.0, 20.0, 30.0], [3.0, 5.0, 4.0]),
        "b": ([5.0, 40.0], [2.0, 6.0]),
    }
    assert legend(figure) == ["a", "b"]
    assert figure.get_suptitle() == KEY
    low, high = figure.axes[0].get_ylim()
    assert low <= 0 < 6 < high < 7
    colors = {line.get_color() for line in figure.axes[0].lines if line.get_label() in ("a", "b")}
    assert len(colors) == 2


def test_seeds_are_drawn_as_median_and_band() -> None:
    runs = {
        "adam/1": rows({0: 1.0, 10: 2.0, 20: 9.0}),
        "adam/2": rows({0: 3.0, 10: 4.0, 20: 5.0}),
        "adam/3": rows({0: 8.0, 10: 6.0, 20: 7.0}),
        "sgd/1": rows({0: 1.0}),
    }
    figure = curves_figure(runs, KEY, groups={name: name.split("/")[0] for name in runs})
    found = curves(figure)
    assert found["adam, 3 seeds"] == ([0.0, 10.0, 20.0], [3.0, 4.0, 7.0])
    assert found["sgd, 1 seed"] == ([0.0], [1.0])
    areas = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    areas[1].remove()
    assert band(figure) == [(0.0, 1.0, 8.0), (10.0, 2.0, 6.0), (20.0, 5.0, 9.0)]
    assert "median over seeds, band: lowest to highest" in text_of(figure)


def test_seed_counts_between_its_measurements_only() -> None:
    one, two = ([0, 10, 20], [0.0, 10.0, math.nan]), ([5, 30], [7.0, 32.0])
    steps, middle, low, high = spread_over([one, two])
    assert steps.tolist() == [0, 5, 10, 20, 30]
    # At step 10 run one has 10 and run two has 12; run one ends there.
    np.testing.assert_array_equal(middle, [0, 6, 11, 22, 32])
    np.testing.assert_array_equal(low, [0, 5, 10, 22, 32])
    np.testing.assert_array_equal(high, [0, 7, 12, 22, 32])


def test_legend_counts_the_seeds_that_have_the_key() -> None:
    runs = {"a/1": rows({1: 2.0}), "a/2": rows({1: 2.0}, key="other/x")}
    figure = curves_figure(runs, KEY, groups=dict.fromkeys(runs, "a"))
    assert legend(figure) == ["a, 1 of 2 seeds"]
    assert "not measured in 1 of 2 runs" in text_of(figure)


def test_blown_up_runs_do_not_stretch_the_axis() -> None:
    good = {step: 10.0 + step for step in range(0, 50, 10)}
    bad: dict[int, float | None] = {0: 12.0, 10: 1e30, 20: math.inf, 30: None, 40: math.nan}
    figure = curves_figure({"good": rows(good), "bad": rows(bad)}, KEY)
    assert figure.axes[0].get_ylim()[1] < 1e7
    text = text_of(figure)
    assert "up to 1e30" in text
    assert "not finite" in text
    marked = {
        line.get_marker(): np.asarray(line.get_xdata()).tolist()
        for line in figure.axes[0].lines
        if line.get_linestyle() == "None"
    }
    assert marked == {"^": [10.0], "x": [20.0, 30.0, 40.0]}
    figure_to_image(figure)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0, 99.0], "linear"),
        ([1.0, 2.0, 1000.0], "log"),
        ([-1.0, 2.0, 3.0], "linear"),
        ([-1e-3, 2e-3, 0.0, 1.0, -1e-3], "symlog"),
    ],
)
def test_axis_scale_depends_on_the_range(values: list[float], scale: str) -> None:
    figure = curves_figure({"a": rows(dict(enumerate(values)))}, KEY)
    assert figure.axes[0].get_yscale() == scale
    low, high = figure.axes[0].get_ylim()
    assert low <= min(values)
    assert max(values) <= high
    ticks = [t for t in figure.axes[0].get_yticks() if low <= t <= high]
    assert 3 <= len(ticks) <= 9


def test_curves_far_from_zero_are_not_flat() -> None:
    low, high = curves_figure({"a": rows({1: 2.30, 2: 2.31})}, KEY).axes[0].get_ylim()
    assert 2.29 < low < 2.30 < 2.31 < high < 2.32


def test_edge_is_dashed_where_it_bounds_the_key() -> None:
    edge = {"hessian/edge": 10.0}
    sgd = rows({1: 5.0, 2: 6.0}, **edge)
    adam = rows(
        {1: 3.0, 2: 4.0}, **{"hessian/edge": 20.0, "hessian/preconditioned_eigenvalue": 9.0}
    )
    figure = curves_figure({"sgd": sgd, "adam": adam}, KEY)
    assert [np.asarray(line.get_ydata()).tolist() for line in dashed(figure)] == [[10.0, 10.0]]
    assert "dashed: edge of stability" in text_of(figure)
    assert figure.axes[0].get_ylim()[1] > 10
    figure = curves_figure({"sgd": sgd, "adam": adam}, "hessian/preconditioned_eigenvalue")
    assert [np.asarray(line.get_ydata()).tolist() for line in dashed(figure)] == [[20.0, 20.0]]
    assert not dashed(curves_figure({"sgd": sgd}, KEY, edge=False))
    assert not dashed(curves_figure({"sgd": sgd}, "hessian/edge"))
    # Of several edges each has the colour of its run; of groups the median.
    other = rows({1: 5.0, 2: 6.0}, **{"hessian/edge": 12.0})
    figure = curves_figure({"one": sgd, "two": other}, KEY)
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert [line.get_color() for line in dashed(figure)] == [drawn["one"], drawn["two"]]
    figure = curves_figure({"one": sgd, "two": other}, KEY, groups={"one": "a", "two": "a"})
    assert [np.asarray(line.get_ydata()).tolist() for line in dashed(figure)] == [[11.0, 11.0]]


def test_logarithmic_axis_for_curves_decades_apart() -> None:
    key = "hessian/edge_ratio"

    def scale(key: str, *runs: list[Any]) -> str:
        return curves_figure(dict(zip("ab", runs, strict=False)), key).axes[0].get_yscale()

    assert scale(KEY, rows({1: 1.0, 2: 1.0}), rows({1: 9.0, 2: 9.0})) == "linear"
    assert scale(KEY, rows({1: 1.0, 2: 1.0}), rows({1: 11.0, 2: 11.0})) == "log"
    # The line at 1 counts.
    assert scale(key, rows({1: 0.2, 2: 0.3}, key)) == "linear"
    assert scale(key, rows({1: 0.02, 2: 0.03}, key)) == "log"


def test_edge_of_an_adaptive_optimizer_is_always_shown() -> None:
    key = "hessian/preconditioned_eigenvalue"
    figure = curves_figure({"a": rows({1: 90.0, 2: 95.0}, key, **{"hessian/edge": 5e3})}, key)
    assert [np.asarray(line.get_ydata()).tolist() for line in dashed(figure)] == [[5e3, 5e3]]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[1] > 5e3
    assert "above the chart" not in text_of(figure)


def test_logarithmic_axis_for_an_edge_a_decade_away() -> None:
    def figure(edge: float, **more: float) -> Figure:
        return eigenvalue_figure(rows({1: 1.0, 2: 2.0}, **{"hessian/edge": edge}, **more))

    assert figure(edge=14.0).axes[0].get_yscale() == "linear"
    far = figure(edge=16.0, **{"hessian/edge_ratio": 0.00123})
    assert far.axes[0].get_yscale() == "log"
    figure_to_image(far)
    ticks = [text.get_text() for text in far.axes[0].get_yticklabels()]
    assert {"1", "3", "10", "30"} <= set(ticks)
    assert "0.0012 of the edge" in text_of(far)


def test_edge_far_above_the_curves_is_a_note() -> None:
    figure = curves_figure({"a": rows({1: 5.0, 2: 6.0}, **{"hessian/edge": 3800.0})}, KEY)
    assert figure.axes[0].get_ylim()[1] < 10
    assert "edge above the chart, at 3800" in text_of(figure)


def test_edge_ratio_has_a_line_at_one() -> None:
    key = "hessian/edge_ratio"
    figure = curves_figure({"a": rows({1: 0.5, 2: 0.6}, key=key)}, key)
    assert [np.asarray(line.get_ydata()).tolist() for line in dashed(figure)] == [[1.0, 1.0]]
    assert figure.axes[0].get_ylim()[1] > 1


def test_ten_of_hundreds_of_runs_are_drawn() -> None:
    figure = curves_figure({f"run{i}": rows({1: float(i)}) for i in range(300)}, KEY)
    assert len(curves(figure)) == 10
    assert {"run0", "run299"} <= set(legend(figure))
    assert "10 of 300 runs" in text_of(figure)


def test_unusual_names_and_empty_runs_are_drawn() -> None:
    runs = {
        "_hidden": rows({1: 1.0}),
        "$x^{": rows({1: 2.0}),
        "x" * 200: rows({1: 3.0}),
        "none": [],
    }
    figure = curves_figure(runs, KEY)
    assert len(legend(figure)) == 3
    assert "_hidden" in legend(figure)[0]
    assert "not measured in 1 of 4 runs" in text_of(figure)
    figure_to_image(figure)
    for empty in ({"a": []}, {"a": rows({1: math.nan})}):
        figure_to_image(curves_figure(empty, KEY))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curves_figure([1], KEY), TypeError, "expected a mapping"),  # type: ignore[arg-type]
        (lambda: curves_figure({"a": "rows"}, KEY), TypeError, "lists of dicts"),  # type: ignore[dict-item]
        (lambda: curves_figure({}, KEY), ValueError, "at least one run"),
        (
            lambda: curves_figure({"a": [], "b": []}, KEY, groups={"a": "x"}),
            ValueError,
            "lacks the run 'b'",
        ),
        (lambda: barrier_matrix_figure([[1.0, 2.0]], ["a"]), ValueError, r"\(1, 2\)"),
        (
            lambda: barrier_matrix_figure(np.ones((10, 10)), list("abcdefghij")),
            ValueError,
            "1 to 9",
        ),
        (lambda: barrier_matrix_figure([[1.0]], ["a", "b"]), ValueError, "2 names for 1 rows"),
        (lambda: barrier_matrix_figure([[1.0]], "a"), ValueError, "names"),
        (
            lambda: barrier_matrix_figure([[1.0]], ["a"], limits=(1.0, 1.0)),
            ValueError,
            "two finite numbers",
        ),
        (lambda: points_figure({}, x="x", y="y"), ValueError, "at least one name"),
        (lambda: points_figure({"a": (1.0,)}, x="x", y="y"), ValueError, "two numbers"),  # type: ignore[dict-item]
        (
            lambda: points_figure({"a": (1.0, 2.0)}, x="x", y="y", groups={}),
            ValueError,
            "lacks the run 'a'",
        ),
        (lambda: line_figure(line([1.0, 2.0]), names=[]), ValueError, "0 names for 1 slices"),
        (
            lambda: line_figure([line([1.0, 2.0])], band=True, names=["a"]),
            ValueError,
            "1 names for one band",
        ),
    ],
)
def test_invalid_arguments(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


# --- matrices


def cells(figure: Figure) -> list[str]:
    return [text.get_text().replace("\N{MINUS SIGN}", "-") for text in figure.axes[0].texts]


def test_matrix_shows_its_numbers_by_row() -> None:
    figure = barrier_matrix_figure([[0.0, 0.316], [1.2, -0.5]], ["adam", "sgd"], title="Barrier")
    assert figure.get_suptitle() == "Barrier"
    assert cells(figure) == ["0.00", "0.32", "1.20", "-0.50"]
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["adam", "sgd"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["adam", "sgd"]
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places["1.20"] == (0, 1)  # column 0, row 1
    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == [[0.0, 0.316], [1.2, -0.5]]
    assert image.get_clim() == (-0.5, 1.2)


def test_equal_limits_give_equal_colours() -> None:
    figures = [
        barrier_matrix_figure([[0.0, high], [0.5, 0.0]], ["a", "b"], limits=(0.0, 2.0))
        for high in (1.0, 5.0)
    ]
    for figure in figures:
        assert figure.axes[0].images[0].get_clim() == (0.0, 2.0)
    bars = [figure.axes[0].child_axes[0] for figure in figures]
    ends = [[t.get_text() for t in bar.get_yticklabels()] for bar in bars]
    assert ends == [["0", "2"], ["0", "> 2"]]


def test_small_numbers_share_a_power_of_ten() -> None:
    figure = barrier_matrix_figure([[0.0, 3.14e-5], [2e-6, 0.0]], ["a", "b"])
    assert cells(figure) == ["0.00", "3.14", "0.20", "0.00"]
    assert "in units of 1e-5" in text_of(figure)


def test_missing_entries_are_hatched() -> None:
    figure = barrier_matrix_figure([[0.0, math.nan], [math.inf, 1e200]], ["a", "b"])
    assert cells(figure) == ["0.00"]
    hatched = {patch.get_xy() for patch in figure.axes[0].patches if patch.get_hatch()}
    assert hatched == {(0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)}
    assert "hatched: not finite" in text_of(figure)
    figure_to_image(figure)


@pytest.mark.parametrize("count", range(1, 10))
def test_numbers_stay_inside_their_cells(count: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"network number {index}" for index in range(count)]
    figure = barrier_matrix_figure(rng.random((count, count)), names)
    figure_to_image(figure)
    axes = figure.axes[0]
    width = axes.get_window_extent().width / count
    for text in axes.texts:
        assert text.get_window_extent().width <= width
    whole = figure.bbox
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        box = label.get_window_extent()
        assert whole.x0 <= box.x0
        assert whole.y0 <= box.y0


def test_numbers_contrast_with_their_cells() -> None:
    figure = barrier_matrix_figure(np.linspace(0, 1, 81).reshape(9, 9), list("abcdefghi"))
    image = figure.axes[0].images[0]
    for text in figure.axes[0].texts:
        column, row = text.get_position()
        ground = image.cmap(image.norm(float(np.asarray(image.get_array())[int(row), int(column)])))
        assert contrast(ground, to_rgba(text.get_color())) > 3


def contrast(one: Any, other: Any) -> float:
    """The contrast ratio of the Web Content Accessibility Guidelines."""

    def luminance(color: Any) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# --- scatter plots


def markers(figure: Figure) -> list[tuple[list[float], list[float], float, str]]:
    return [
        (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
            line.get_markersize(),
            line.get_color(),
        )
        for line in figure.axes[0].lines
    ]


def test_group_has_one_colour_and_a_median() -> None:
    points = {"a/1": (1.0, 5.0), "a/2": (2.0, 9.0), "a/3": (9.0, 6.0), "b/1": (4.0, 4.0)}
    groups = {name: name[0] for name in points}
    figure = points_figure(
        points, x="hessian/top_eigenvalue", y="generalization/gap", groups=groups
    )
    seeds, median, other, other_median = markers(figure)
    assert seeds[:2] == ([1.0, 2.0, 9.0], [5.0, 9.0, 6.0])
    assert median[:2] == ([2.0], [6.0])
    assert median[2] > seeds[2]
    assert median[3] == seeds[3] != other[3] == other_median[3]
    assert legend(figure) == ["a, 3 seeds", "b, 1 seed"]
    assert figure.axes[0].get_xlabel() == "hessian/top_eigenvalue"
    assert figure.axes[0].get_ylabel() == "generalization/gap"


def test_points_without_groups_are_labelled() -> None:
    points = {"a": (1.0, 1e4), "b": (2.0, 1.0), "c": (math.nan, 1.0), "d": (1.0, math.inf)}
    figure = points_figure(points, x="x", y="y")
    assert legend(figure) == ["a", "b"]
    assert "2 runs, 2 more not finite" in text_of(figure)
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_xscale() == "linear"
    figure_to_image(figure)
    figure_to_image(points_figure({"c": (math.nan, 1.0)}, x="x", y="y"))


def test_hundreds_of_points_are_drawn_without_labels() -> None:
    figure = points_figure({f"r{i}": (float(i), float(i)) for i in range(300)}, x="x", y="y")
    assert len(markers(figure)) == 300
    assert not figure.legends


# --- slices of several runs


def line(losses: Any, center: float = 0.0, reach: float = 1.0, **metadata: Any) -> Slice:
    losses = np.asarray(losses, dtype=float)
    return Slice((np.linspace(-reach, reach, len(losses)),), losses, center, metadata)


def plane(size: int, reach: float = 1.0, **metadata: Any) -> Slice:
    x = np.linspace(-reach, reach, size)
    return Slice((x, x), x[:, None] ** 2 + x**2, 0.0, metadata)


def test_planes_on_different_grids_share_colours_and_frame() -> None:
    shown = [plane(5, directions=["random", "gradient"]), plane(9, 2.0, directions=["a", "b"])]
    limits = LossLimits(0.01, 8.0, excess=True)
    figure = filmstrip_figure(shown, names=["coarse", "fine"], limits=limits)
    maps = [
        next(c for c in axes.collections if getattr(c, "filled", False)) for axes in figure.axes[:2]
    ]
    assert [one.norm.limits for one in maps] == [limits] * 2
    frames = {axes.get_xlim() + axes.get_ylim() for axes in figure.axes[:2]}
    assert frames == {(-2.0, 2.0, -2.0, 2.0)}
    # Outside its own grid a panel is white; hatching means "not finite".
    (own,) = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert own.get_bbox().bounds == (-1.0, -1.0, 2.0, 2.0)
    assert not figure.axes[0].patch.get_hatch()
    assert figure.axes[1].patch.get_hatch()
    # The axes are not named after the directions of the first.
    assert "random" not in text_of(figure)
    figure_to_image(figure)


def test_one_run_on_different_grids_raises() -> None:
    with pytest.raises(ValueError, match="other coordinates"):
        filmstrip_figure([plane(5), plane(9)])


def test_lines_on_different_grids() -> None:
    shown = [line([1.0, 0.0, 1.0]), line([4.0, 1.0, 0.0, 1.0, 4.0], reach=2.0)]
    figure = line_figure(shown, names=["_a", "b"], limits=LossLimits(0.0, 5.0))
    assert [text.strip() for text in legend(figure)] == ["_a", "b"]
    assert figure.get_suptitle() == "Loss on 2 lines, one scale"
    assert figure.axes[0].get_xlim()[1] > 2
    strip = filmstrip_figure(shown, names=["a", "b"])
    assert len({axes.get_xlim() for axes in strip.axes}) == 1
