"""Wrong uses of slices and of the functions that draw them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from lightning_landscape import Slice, figures
from lightning_landscape.geometry import (
    SpectralDensity,
    line_between,
    line_slice,
    loss_barrier,
    plane_slice,
    plane_through,
)
from tests.bad_input.of_geometry import COUNTS, NET, NO_VECTOR, ONES, UNKNOWN, VECTOR, objective
from tests.bad_input.rows import Call, wrong

INF, NAN = math.inf, math.nan
FOLDER = tempfile.TemporaryDirectory(prefix="wrong-uses-")  # removed when Python ends
HERE = Path(FOLDER.name)
X = np.linspace(-1.0, 1.0, 3)
LINE = Slice((X,), X**2, 0.0)
PLANE = Slice((X, X), np.add.outer(X**2, X**2), 0.0)
OTHER = Slice((2 * X,), X**2, 0.0)
UNSORTED = Slice((-X,), X**2, 0.0)
GRID = torch.linspace(-1.0, 1.0, 128, dtype=torch.float64)
DENSITY = SpectralDensity(GRID, GRID**2, 0 * GRID, 0.1, GRID[None], GRID[None], 1)
ROWS_OF_ONE = [{"step": 1, "hessian/top_eigenvalue": 3.0}]


def of(function, **right):
    return Call(function.__name__, function, lambda: right)


def _of_loss(function, **right):
    return Call(function.__name__, function, lambda: {"objective": objective(), **right})


SLICE = Call("Slice", Slice, lambda: {"coordinates": (X,), "losses": X**2, "center_loss": 0.0})
LINE_SLICE = _of_loss(line_slice, direction={"w": ONES})
FIRST = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
PLANE_SLICE = _of_loss(plane_slice, direction_x={"w": ONES}, direction_y={"w": FIRST})
BETWEEN = _of_loss(line_between, start={"w": ONES})
THROUGH = _of_loss(plane_through, second={"w": ONES}, third={"w": FIRST})
BARRIER = of(loss_barrier, line=LINE)
SLICES = (LINE_SLICE, PLANE_SLICE)
SPANS = ((1.0, 1.0), (1, -1), (0.0, INF), (NAN, 1.0), (0.0, 0.5, 1.0), ())
TWO = "expected two finite numbers, the smaller first"

PLANE_FIGURE = of(figures.plane_figure, slice=PLANE)
LINE_FIGURE = of(figures.line_figure, slices=[LINE])
SURFACE = of(figures.surface_mesh, slice=PLANE)
STRIP = of(figures.filmstrip_figure, slices=[LINE])
FRAMES = of(figures.film_frames, slices=[LINE])
FILM = Call("save_film", figures.save_film, lambda: {"slices": [LINE], "path": HERE / "a.gif"})
EIGENVALUE = of(figures.eigenvalue_figure, history=ROWS_OF_ONE)
CURVES = of(figures.curves_figure, histories={"a": ROWS_OF_ONE}, key="hessian/top_eigenvalue")
DENSITY_FIGURE = of(figures.density_figure, density=DENSITY)
DENSITIES = of(figures.density_film_figure, densities={1: DENSITY})
MATRIX = of(figures.barrier_matrix_figure, matrix=np.eye(2), names=["a", "b"])
POINTS = of(figures.points_figure, points={"a": (1.0, 2.0)}, x="x", y="y")
IMAGE = Call(
    "figure_to_image", figures.figure_to_image, lambda: {"figure": figures.plane_figure(PLANE)}
)
LIMITS = of(figures.LossLimits, low=0.1, high=1.0)
FROM_DICT = Call(
    "LossLimits.from_dict", figures.LossLimits.from_dict,
    lambda: {"values": {"low": 0.1, "high": 1.0, "excess": False, "room": 0.0}},
)  # fmt: skip
FROM_SLICE = Call("LossLimits.from_slice", figures.LossLimits.from_slice, lambda: {"slice": LINE})
FILMS = (STRIP, FRAMES, FILM)
PAPER = of(figures.paper_axes)
SAVE = Call(
    "save_figure", figures.save_figure,
    lambda: {"figure": figures.plane_figure(PLANE), "path": HERE / "a.pdf"},
)  # fmt: skip
CHARTS = (STRIP, EIGENVALUE, CURVES, DENSITY_FIGURE, DENSITIES, MATRIX, POINTS)
NO_SLICE = (3, None, "slice", [3], [LINE])

ROWS = [
    wrong(SLICE, "coordinates", (3, None, [[0.0, 1.0]], "x"), TypeError, "expected a tuple of one"),
    wrong(SLICE, "losses", (3.0, [1.0, 2.0, 3.0], None), TypeError, "and an array of losses"),
    wrong(SLICE, "losses", (X[:2], np.zeros((3, 3))), ValueError, r"\(len\(x\),\) for a line",
          names="have shape"),
    wrong(SLICE, "coordinates", ((), (X, X), (X, X, X)), ValueError, r"\(len\(x\),\) for a",
          names="of lengths"),
    wrong(SLICE, "center_loss", (None, "0", True, X), TypeError, "expected a number"),
    wrong(SLICE, "metadata", (3, None, ["step"]), TypeError, "expected a mapping of plain values"),
    wrong((LINE_SLICE, PLANE_SLICE, BETWEEN, THROUGH), "objective", (NET, 3, None), TypeError,
          "expected an Objective"),
    wrong(LINE_SLICE, "direction", NO_VECTOR, TypeError, VECTOR),
    wrong(LINE_SLICE, "direction", UNKNOWN, ValueError, "expected names among", names="'v'"),
    wrong(PLANE_SLICE, "direction_x", NO_VECTOR, TypeError, VECTOR),
    wrong(PLANE_SLICE, "direction_y", NO_VECTOR, TypeError, VECTOR),
    wrong(PLANE_SLICE, "direction_y", ({"w": torch.ones(3)},), ValueError, "expected the parameter",
          names="has shape (3,)"),
    wrong(SLICES, "span", SPANS, ValueError, TWO),
    wrong(SLICES, "span", (3.0, "01", ("0", "1"), (False, True), None), TypeError, TWO),
    wrong(PLANE_SLICE, "span", (((0, 1), (1, 0)),), ValueError, TWO, names="span=(1, 0)"),
    wrong((LINE_SLICE, BETWEEN, THROUGH, PLANE_SLICE), "resolution", (1, *COUNTS), ValueError,
          "expected an integer >= 2"),
    wrong(PLANE_SLICE, "resolution", ((3, 3, 3), ()), ValueError, "expected one integer >= 2, or "),
    wrong((*SLICES, BETWEEN, THROUGH), "progress", (1, "no", None), TypeError, "expected True or"),
    wrong((*SLICES, BETWEEN, THROUGH), "metadata", (3, ["step"]), TypeError, "a mapping of plain "),
    wrong(BETWEEN, "start", NO_VECTOR, TypeError, "e.g. a state dict"),
    wrong(BETWEEN, "start", ({}, {"v": ONES}), ValueError, "expected all that are measured, it has",
          names="holds no parameter 'w'"),
    wrong(BETWEEN, "end", (3, [ONES], "now"), TypeError, "e.g. a state dict"),
    wrong(BETWEEN, "end", ({"w": torch.ones(3)},), ValueError, r"expected \(2, 3\)", names="shape"),
    wrong(THROUGH, "second", NO_VECTOR, TypeError, "e.g. a state dict"),
    wrong(THROUGH, "third", NO_VECTOR, TypeError, "e.g. a state dict"),
    wrong(THROUGH, "margin", (-1.0, NAN, INF), ValueError, "expected a finite number >= 0"),
    wrong(THROUGH, "margin", ("0.25", None, True), TypeError, "expected a finite number >= 0"),
    wrong(BARRIER, "line", (3, X, None, [LINE]), TypeError, "expected a Slice, as line_between"),
    wrong(BARRIER, "line", (PLANE,), ValueError, "expected a slice with one", names="two axes"),
    wrong(BARRIER, "line", (Slice((X[:1],), X[:1], 0.0),), ValueError, "expected at least 2",
          names="1 points"),
    wrong(BARRIER, "ends", ("max", None, 0), ValueError, "expected 'linear' or 'mean'"),
    # Figures.
    wrong((PLANE_FIGURE, SURFACE, FROM_SLICE), "slice", NO_SLICE, TypeError, "expected a Slice"),
    wrong((PLANE_FIGURE, SURFACE), "slice", (LINE,), ValueError, "pass it to line_figure instead",
          names="1 coordinate axes"),
    wrong(LINE_FIGURE, "slices", (3, "abc", None), TypeError, "expected a Slice"),
    wrong(LINE_FIGURE, "slices", ([None], [LINE, 3]), TypeError, "expected a Slice", names="got "),
    wrong(LINE_FIGURE, "slices", ([],), ValueError, "expected at least one"),
    wrong(LINE_FIGURE, "slices", ([PLANE], PLANE), ValueError, "pass it to plane_figure instead",
          names="2 coordinate axes"),
    wrong(LINE_FIGURE, "slices", ([UNSORTED],), ValueError, "pass finite ones in rising order",
          names="got coordinates"),
    wrong(LINE_FIGURE, "slices", ([LINE, OTHER],), ValueError, "other coordinates", band=True,
          names="band=True"),
    wrong(LINE_FIGURE, "band", (1, "no", None), TypeError, "expected True or False"),
    wrong((LINE_FIGURE, STRIP), "names", (["a", "b"], []), ValueError, "pass one name per slice"),
    wrong((LINE_FIGURE, STRIP), "names", (3, "a", [3]), TypeError, "expected a list of strings"),
    wrong((LINE_FIGURE, PLANE_FIGURE, SURFACE, *FILMS), "limits", (3, (0.1, 1.0), "log"),
          TypeError, "expected a LossLimits, or None"),
    wrong((LINE_FIGURE, PLANE_FIGURE, *CHARTS), "ax", (3, "ax", [1]), TypeError,
          "expected a matplotlib Axes, or None"),
    wrong(PAPER, "count", (0, 2.5, True), ValueError, "expected an integer >= 1"),
    wrong(PAPER, "columns", (0, 3, "two"), ValueError, "expected 1 or 2"),
    wrong(PAPER, "aspect", (0.0, -1, NAN, INF), ValueError, "expected a finite number > 0"),
    wrong(PAPER, "aspect", ("1", None, True), TypeError, "expected a finite number > 0"),
    wrong(SAVE, "figure", (3, None, "a.png"), TypeError, "expected a matplotlib Figure"),
    wrong(SAVE, "path", (3, None), TypeError, "expected a path"),
    wrong(PLANE_FIGURE, "interpolate", (1, "no", None), TypeError, "expected True or False"),
    wrong(LINE_FIGURE, "scale", ("symlog", "", None, 3), ValueError, "expected 'linear' or 'log'"),
    wrong(FILMS, "slices", (3, "abc", None, LINE), TypeError, "expected a list of Slices"),
    wrong(FILMS, "slices", ([],), ValueError, "expected at least one slice"),
    wrong(FILMS, "slices", ([LINE, OTHER],), ValueError, "pass slices of one kind, on the same gri",
          names="other coordinates"),
    wrong(FILMS, "slices", ([3], [LINE, None]), TypeError, "expected a Slice, as li", names="got "),
    wrong(STRIP, "of", (0, -1, 2.5, True, "9"), ValueError, "expected an integer >= 1"),
    wrong(FILM, "path", ("a.mp4", "film", ""), ValueError, "expected a name that ends in .gif or "),
    wrong(FILM, "path", (3, None), TypeError, "expected a name that ends in .gif or .png"),
    wrong(FILM, "seconds", (0.0, -1, NAN, INF), ValueError, "expected a time above 0"),
    wrong(FILM, "seconds", ("0.3", None, True), TypeError, "expected a time above 0"),
    wrong(FILM, "most", COUNTS, ValueError, "expected an integer >= 1"),
    wrong(EIGENVALUE, "history", (3, "history.jsonl", [3], None), TypeError, "expected a list of "),
    wrong(EIGENVALUE, "history", ([{"step": "one"}], [{"step": 1, "hessian/top_eigenval": "high"}]),
          TypeError, "expected numbers", names="'"),
    wrong(EIGENVALUE, "edge", (1, "no", None), TypeError, "expected True or False"),
    wrong((EIGENVALUE), "name", (3, ["a"]), TypeError, "expected the name of a HessianMonitor, or"),
    wrong(CURVES, "histories", (3, ROWS_OF_ONE, {"a": 3}, {"a": "a.jsonl"}, {"a": [3]}), TypeError,
          "expected a mapping from names to lists of dicts"),
    wrong(CURVES, "histories", ({},), ValueError, "expected at least one run"),
    wrong(CURVES, "histories", ({"a": [{"step": 1, "hessian/top_eigenvalue": "high"}]},), TypeError,
          "expected numbers", names="'high'"),
    wrong(CURVES, "key", (3, None, ["a"]), TypeError, "expected the name of a scalar"),
    wrong((CURVES, POINTS), "groups", ({}, {"b": "x"}), ValueError, "name the group of every run"),
    wrong((CURVES, POINTS), "groups", (3, "seed", ["a"]), TypeError, "expected a mapping from run"),
    wrong(CURVES, "edge", (1, "no", None), TypeError, "expected True or False"),
    wrong(DENSITY_FIGURE, "density", (3, None, GRID, "a.npz"), TypeError, "as spectral_density re"),
    wrong((DENSITY_FIGURE, DENSITIES), "metadata", (3, ["step"], "x"), TypeError, "expected a map"),
    wrong(DENSITIES, "densities", (3, [DENSITY], None), TypeError, "expected a dict from the step"),
    wrong(DENSITIES, "densities", ({"a": DENSITY},), TypeError, "expected a dict from the step to"),
    wrong(DENSITIES, "densities", ({1: 3},), TypeError, "expected a SpectralDensit", names="got 3"),
    wrong(MATRIX, "matrix", (3.0, np.zeros((2, 3)), np.zeros((10, 10))), ValueError,
          r"expected \(n, n\) with n from 1 to 9", names="got shape"),
    wrong(MATRIX, "matrix", ("ab", None, [["a", "b"], ["c", "d"]]), TypeError, "expected a square"),
    wrong(MATRIX, "names", (["a"], "ab", ["a", "b", "c"]), ValueError, "pass one name per row"),
    wrong(MATRIX, "names", (3, None), TypeError, "expected a list of strings"),
    wrong(MATRIX, "limits", ((1.0, 1.0), (NAN, 1.0), (0.0, INF), (1.0,)), ValueError, TWO),
    wrong(MATRIX, "limits", (3, "01", ("0", "1")), TypeError, TWO),
    wrong(MATRIX, "title", (3, None), TypeError, "expected a string"),
    wrong(POINTS, "points", ({}, 3, [(1, 2)], None), ValueError, "expected a mapping from at leas"),
    wrong(POINTS, "points", ({"a": 3}, {"a": (1, 2, 3)}, {"a": ("x", "y")}), ValueError,
          "pass two numbers", names="'a'"),
    wrong(POINTS, "x", (3, None), TypeError, "expected a string"),
    wrong(POINTS, "y", (3, None), TypeError, "expected a string"),
    wrong(IMAGE, "figure", (3, None, "a.png"), TypeError, "expected a matplotlib Figure"),
    wrong(LIMITS, "low", (2.0, NAN, INF), ValueError, "expected finite numbers with low < high"),
    wrong(LIMITS, "high", (0.01, NAN, INF), ValueError, "expected finite numbers with low < high"),
    wrong(LIMITS, "room", (-0.1, 0.5, NAN), ValueError, "a part of the colour map from 0 to below"),
    wrong(LIMITS, "room", ("0", None, True), TypeError, "a part of the colour map from 0 to below"),
    wrong(LIMITS, "excess", (1, "no", None), TypeError, "expected True or False"),
    wrong(LIMITS, "low", ("0.1", None), TypeError, "expected finite numbers with low < high"),
    wrong(FROM_DICT, "values", ({}, {"high": 1.0}, 3, None), ValueError, "expected the keys"),
]  # fmt: skip
