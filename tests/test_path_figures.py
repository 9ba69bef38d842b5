"""Figures with the training path, the validation loss, the last step and bands."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from lightning_landscape.figures import LossLimits, figure_to_image, line_figure, plane_figure
from lightning_landscape.figures.labels import TIMES
from lightning_landscape.geometry.slices import Slice
from tests.test_figures import METADATA, isolines_of, line, plane, text_of

PATH = {
    "steps": [0, 100, 200, 300],
    "coordinates": [[-0.9, 0.5], [-0.5, 1.0], [-0.2, 9.0], [math.nan, math.nan]],
    "residuals": [0.0, 0.5, 1.0, math.nan],
    "distances": [1.0, 1.0, 1.0, math.nan],
    "explained": [0.62, 0.0004],
}


def with_path(path: dict[str, Any] | None = None, **more: Any) -> Slice:
    return plane(metadata={**METADATA, "path": path or PATH, **more})


def markers(figure: Any, kind: str) -> list[Any]:
    return [piece for piece in figure.axes[0].lines if piece.get_marker() == kind]


def test_path_is_drawn_from_its_start_to_the_weights() -> None:
    figure = plane_figure(with_path())
    (start,) = markers(figure, "s")
    assert [*start.get_xdata(), *start.get_ydata()] == [-0.9, 0.5]
    assert [float(dot.get_xdata()[0]) for dot in markers(figure, "o")][:2] == [-0.5, -0.2]
    (_, curve) = (piece for piece in figure.axes[0].lines if len(piece.get_xdata()) == 5)
    assert (curve.get_xdata()[-1], curve.get_ydata()[-1]) == (0.0, 0.0)


def test_dots_off_the_plane_are_paler() -> None:
    figure = plane_figure(with_path())
    shades = [float(dot.get_color()) for dot in (*markers(figure, "s"), *markers(figure, "o")[:2])]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0.1, 1.0)


def test_notes_and_labels_of_the_path() -> None:
    figure = plane_figure(with_path())
    text = text_of(figure)
    assert "2 of 4 outside" in text
    named = {t.get_text(): t.xy for t in figure.axes[0].texts if hasattr(t, "xy")}
    assert named["step 0"] == (-0.9, 0.5)
    assert figure.axes[0].get_xlabel() == "random (62 % of variance)"
    assert figure.axes[0].get_ylabel() == "top eigenvector (< 0.1 % of variance)"
    finite = {key: value[:3] if len(value) > 2 else value for key, value in PATH.items()}
    assert "1 of 3 outside" in text_of(plane_figure(with_path(finite)))


def test_path_does_not_change_limits_and_colours() -> None:
    for figure in (plane_figure(with_path()), plane_figure(plane(metadata=METADATA))):
        limits = (figure.axes[0].get_xlim(), figure.axes[0].get_ylim())
        assert limits == ((-1.0, 1.0), (-1.0, 2.0))


def test_path_of_weights_that_did_not_move() -> None:
    still = {**PATH, "coordinates": [[0.0, 0.0]] * 4, "distances": [0.0] * 4,
             "residuals": [0.0] * 4, "explained": [math.nan, math.nan]}  # fmt: skip
    assert "the weights have not moved" in text_of(plane_figure(with_path(still)))


def test_path_is_drawn_from_a_saved_slice(tmp_path: Any) -> None:
    piece = with_path(validation={"losses": [[1.0] * 5] * 4, "center_loss": 2.0})
    piece.save(tmp_path / "plane.npz")
    loaded = Slice.load(tmp_path / "plane.npz")
    assert (figure_to_image(plane_figure(piece)) == figure_to_image(plane_figure(loaded))).all()


def test_labels_do_not_overlap_the_path() -> None:
    x = np.linspace(-1, 1, 15)
    points = [[t, 0.0] for t in np.linspace(-0.95, -0.05, 12)]
    path = {"steps": list(range(12)), "coordinates": points, "residuals": [0.0] * 12,
            "distances": [1.0] * 12, "explained": [1.0, 0.0]}  # fmt: skip
    losses = 1 + 5 * np.tile(x**2, (15, 1))
    figure = plane_figure(Slice((x, x), losses, 1.0, {"path": path}))
    labels = [t for t in figure.axes[0].texts if t.get_text()]
    assert labels
    assert all(
        abs(label.get_position()[1]) > 0.2 for label in labels if label.get_position()[0] < 0
    )


# -- the validation loss --------------------------------------------------------------------------

VALIDATION = {"probe_samples": 300, "probe_mode": "eval", "center_loss": 2.5}


def test_isolines_show_the_validation_loss() -> None:
    x = np.linspace(-1, 1, 9)
    along_x, along_y = np.tile(x, (9, 1)), np.tile(x, (9, 1)).T
    known = {"validation": {**VALIDATION, "losses": (2.5 + along_y).tolist()}}
    piece = Slice((x, x), 2.0 + along_x, 2.0, known)
    figure = plane_figure(piece)
    assert "lines: validation, 300" in text_of(figure)
    contours = isolines_of(figure)
    assert len(contours.levels) > 3
    for segments, level in zip(contours.allsegs, contours.levels, strict=True):
        for segment in segments:
            assert np.allclose(segment[:, 1], level - 2.5, atol=1e-6)


def test_validation_curves_are_dashed() -> None:
    pieces = [
        line([1.0, 0.0, 1.0], **{**METADATA, "directions": [name], "fixed": [True]},
             validation={**VALIDATION, "losses": [4.0, 2.5, math.nan]})
        for name in ("a", "b")
    ]  # fmt: skip
    for limits in (None, LossLimits(0.0, 5.0)):
        figure = line_figure(pieces, limits=limits)
        text = text_of(figure)
        assert "directions fixed, dashed: 300 in eval mode\n" in text
        assert f"{TIMES} not finite" in text
        curves = [c for c in figure.axes[0].lines if len(c.get_xdata()) == 3]
        assert [c.get_linestyle() for c in curves] == ["--", "-", "--", "-"]
        assert curves[0].get_ydata()[0] == 4.0
        assert np.isnan(curves[0].get_ydata()[2])


def test_validation_losses_of_another_shape_raise() -> None:
    known = {"validation": {**VALIDATION, "losses": [1.0]}}
    with pytest.raises(ValueError, match="losses have shape"):
        plane_figure(plane(metadata=known))


# -- the last step --------------------------------------------------------------------------------


def stepped(overshoot: float, lowest: float) -> Slice:
    x = np.linspace(-2, 3, 21)
    update = {"update_norm": 0.031, "lowest_along_update": lowest, "overshoot": overshoot}
    known = {**METADATA, "directions": ["update"], "fixed": [False], "update": update}
    return Slice((x,), (x - lowest) ** 2, lowest**2, known)


@pytest.mark.parametrize(
    ("overshoot", "lowest", "expected"),
    [
        (1.7, -0.41, f"1.7{TIMES} the step to the lowest point"),
        (0.5, 1.0, f"0.5{TIMES} the step to the lowest point"),
        (math.nan, 3.0, "lowest point not in the picture"),
        (math.nan, -1.5, "uphill from the start"),
        (math.nan, math.nan, "lowest point not in the picture"),
    ],
)
def test_last_step(overshoot: float, lowest: float, expected: str) -> None:
    figure = line_figure(stepped(overshoot, lowest))
    assert f"update (taken anew), {expected}\n512 examples in train mode" in text_of(figure)
    before = next(c for c in markers(figure, "o") if c.get_xdata()[0] == -1.0)
    named = {text.get_text(): text.xy for text in figure.axes[0].texts}
    assert set(named) == ({"before", "now", "lowest"} if math.isfinite(lowest) else set())
    if math.isfinite(lowest):
        assert named["before"] == (-1.0, pytest.approx((-1 - lowest) ** 2))
        assert named["now"] == (0.0, pytest.approx(lowest**2))
        assert named["lowest"][0] == lowest
        assert before.get_ydata()[0] == pytest.approx((-1 - lowest) ** 2)
        (star,) = markers(figure, "*")
        assert star.get_xdata()[0] == lowest


def test_captions_have_at_most_three_lines() -> None:
    """Of a step, of the line to a reference and of a path, each with a validation loss."""
    x = np.linspace(-2, 3, 21)
    curve = {"validation": {**VALIDATION, "losses": (x**2).tolist()}}
    step = stepped(1.7, -0.41)
    reference = {"directions": ["from the start"], "reference": "the start", "barrier": 12.25}
    reference |= {**METADATA, **reference, "fixed": [True], **curve}
    names = {"directions": ["PCA 1 of the path", "PCA 2 of the path"], "fixed": [False, False]}
    stretched = [1.0, 100.0]
    inside = {**PATH, "coordinates": [[-0.9, 0.5], [-0.5, 1.0], [-0.2, 0.9], [-0.1, 0.1]]}
    surface = {"validation": {**VALIDATION, "losses": plane().losses.tolist()}}
    path = with_path(inside, **names, normalization="unit", norms=stretched, **surface)
    for figure in (
        line_figure(dataclasses.replace(step, metadata={**step.metadata, **curve})),
        line_figure(Slice((x,), x**2, 0.0, reference)),
        plane_figure(path),
    ):
        lines = set(text_of(figure).splitlines())
        assert len(lines) == 3, lines
        assert max(map(len, lines)) <= 58
    assert f"PCA 1 {TIMES} PCA 2 of the path (taken anew), not to scale" in lines


def test_legend_shows_which_directions_are_fixed() -> None:
    fixed = {**METADATA, "directions": ["random"], "fixed": [True]}
    figure = line_figure([stepped(1.7, -0.41), line([1.0, 0.0, 1.0], **fixed)])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0].startswith("update, taken anew")
    assert texts[1].startswith("random, fixed")


# -- bands ----------------------------------------------------------------------------------------


def test_band_spans_minimum_to_maximum() -> None:
    pieces = [
        line([k, 1.0, 2.0 * k], center=1.0, **{**METADATA, "directions": [f"random {k}"],
             "fixed": [True], "norms": [float(k)]})
        for k in (2, 3, 7)
    ]  # fmt: skip
    figure = line_figure(pieces, band=True)
    curve = next(c for c in figure.axes[0].lines if len(c.get_xdata()) == 3)
    assert curve.get_ydata().tolist() == [3.0, 1.0, 6.0]
    (shade,) = figure.axes[0].collections
    vertices = shade.get_paths()[0].vertices
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (1.0, 14.0)
    assert "median and range of 3 random directions, fixed" in text_of(figure)
    assert not figure.legends


def test_band_of_other_coordinates_raises() -> None:
    with pytest.raises(ValueError, match=r"band=True\), slice 1: other coordinates"):
        line_figure([line([1.0, 0.0, 1.0]), line([1.0, 0.0, 0.0, 1.0])], band=True)


def test_band_with_values_that_are_not_finite() -> None:
    pieces = [line([1.0, 0.0, math.nan]), line([2.0, 0.0, 3.0])]
    figure = line_figure(pieces, band=True)
    curve = next(c for c in figure.axes[0].lines if len(c.get_xdata()) == 3)
    assert np.isnan(curve.get_ydata()[2])
