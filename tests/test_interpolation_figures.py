"""Figures of interpolations: data, markers and text."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_landscape.callbacks.interpolation_measurement import _line_figure
from lightning_landscape.figures import line_figure, plane_figure
from lightning_landscape.figures.canvas import GREY
from lightning_landscape.geometry.slices import Slice

LOSSES = np.array([2.0, 5.0, 3.0, 0.5, 1.0])
KNOWN = {"step": 7, "norms": [12.3], "directions": ["from the start"], "reference": "the start"}


def line(losses: np.ndarray = LOSSES, **more: object) -> Slice:
    return Slice((np.linspace(-1, 0, len(losses)),), losses, float(losses[-1]), {**KNOWN, **more})


def marks_of(figure: Figure) -> dict[tuple[float, float], bool]:
    """Where round marks are, and whether they are filled."""
    return {
        (float(c.get_xdata()[0]), float(c.get_ydata()[0])): c.get_markerfacecolor() != "white"
        for c in figure.axes[0].lines
        if c.get_marker() == "o"
    }


def text_of(figure: Figure) -> str:
    legend = [text.get_text() for box in figure.legends for text in box.get_texts()]
    return "\n".join([figure.get_suptitle(), *(t.get_text() for t in figure.texts), *legend])


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_grey_line_is_linear_in_the_loss(scale):
    """On a logarithmic axis the line between two losses is therefore curved."""
    figure = line_figure(line(), scale=scale)
    (chord,) = [
        c
        for c in figure.axes[0].lines
        if to_rgba(c.get_color()) == to_rgba(GREY) and len(c.get_xdata()) > 2
    ]
    x, y = chord.get_data()
    assert (x[0], x[-1]) == (-1.0, 0.0)
    at_reference, now = 2.0, 1.0
    np.testing.assert_allclose(y, at_reference * -x + now * (1 + x), atol=1e-12)
    assert marks_of(figure) == {(-1.0, at_reference): False, (0.0, now): True}


def test_line_shows_its_ends_distance_and_barrier():
    figure = line_figure(line(barrier=3.25))
    text = text_of(figure)
    named = {text.get_text(): text.xy for text in figure.axes[0].texts}
    assert named == {"the start": (-1.0, 2.0), "now": (0.0, 1.0)}
    assert "from the start, barrier 3.25 above grey line" in text
    assert line_figure(line()).axes[0].get_xlabel() == "from the start (1 = norm 12)"
    plain = Slice((np.linspace(-1, 1, 5),), LOSSES, 3.0)
    assert "grey" not in text_of(line_figure(plain))
    assert len(marks_of(line_figure(plain))) == 1


def test_legend_shows_the_barrier_of_each_probe():
    text = text_of(_line_figure({"": line(barrier=3.25), "old": line(LOSSES / 2, barrier=0.5)}))
    assert text.startswith("step 7\n")
    assert "probe, barrier 3.25\nold, barrier 0.5" in text
    assert "from the start, barrier above grey line" in text


def test_no_grey_line_if_an_end_is_not_finite():
    figure = line_figure(line(np.array([np.nan, 1.0, 2.0])))
    greys = [c for c in figure.axes[0].lines if len(c.get_xdata()) == 200]
    assert len(greys) == 1
    assert np.isfinite(greys[0].get_ydata()).sum() <= 1  # a line needs two points


def plane(**places: tuple[float, float]) -> Slice:
    x, y = np.linspace(-2, 6, 5), np.linspace(-1, 3, 5)
    points = [{"name": name, "x": at[0], "y": at[1]} for name, at in places.items()]
    losses = 1 + x[None, :] ** 2 + y[:, None] ** 2
    return Slice((x, y), losses, 1.0, {"norms": [1.0, 1.0], "points": points})


def test_points_of_a_plane_are_marked_and_labelled():
    figure = plane_figure(plane(now=(0.0, 0.0), first=(4.0, 0.0), third=(1.0, 2.0)))
    axes = figure.axes[0]
    diamonds = [
        (float(c.get_xdata()[0]), float(c.get_ydata()[0]))
        for c in axes.lines
        if c.get_marker() == "D"
    ]
    assert diamonds == [(4.0, 0.0), (1.0, 2.0)]  # the weights are marked by a cross
    named = {t.get_text(): t.xy for t in axes.texts if hasattr(t, "xy")}
    assert named == {"now": (0.0, 0.0), "first": (4.0, 0.0), "third": (1.0, 2.0)}
    assert axes.get_xlim() == pytest.approx((-2.0, 6.0))  # unchanged by the markers


def test_labels_of_close_points_do_not_overlap():
    figure = plane_figure(plane(now=(0.0, 0.0), near=(0.05, 0.0), third=(1.0, 2.0)))
    figure.canvas.draw()
    boxes = {t.get_text(): t.get_window_extent() for t in figure.axes[0].texts if hasattr(t, "xy")}
    assert not boxes["now"].overlaps(boxes["near"])
    marks = [c.get_window_extent() for c in figure.axes[0].lines if c.get_marker() == "D"]
    assert not any(box.overlaps(mark) for box in boxes.values() for mark in marks)


def test_labels_end_inside_the_figure():
    figure = plane_figure(plane(now=(0.0, 0.0), **{"a" * 60: (5.9, 0.0), "b" * 60: (-1.9, 2.0)}))
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        if hasattr(text, "xy"):
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.axes[0].child_axes[0].get_window_extent().x0


def numbers_of(figure: Figure) -> list[Text]:
    """The numbers on the contours: the texts that are not labels of points."""
    figure.canvas.draw()
    return [t for t in figure.axes[0].texts if not hasattr(t, "xy")]


def test_contour_numbers_do_not_overlap_points():
    """The points are where the numbers would otherwise be."""
    before = numbers_of(plane_figure(plane()))
    places = {f"p{i}": tuple(map(float, t.get_position())) for i, t in enumerate(before)}
    figure = plane_figure(plane(now=(0.0, 0.0), **places))
    numbers = [t.get_window_extent() for t in numbers_of(figure)]
    marks = [c.get_window_extent() for c in figure.axes[0].lines if c.get_marker() == "D"]
    assert numbers
    assert len(marks) >= 2
    assert not any(number.overlaps(mark) for number in numbers for mark in marks)
