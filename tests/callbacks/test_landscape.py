"""Slices in real runs of a quadratic, whose values are known at every point."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_landscape import LandscapeMonitor, Slice
from tests.runs import train
from tests.small import Linear, regression
from tests.training.clock import Timed

PAIRS = [
    "random",
    "eigenvectors",
    "gradient",
    ("gradient", "eigenvectors"),
    ("eigenvectors", "random"),
    ("gradient", "gradient"),
]


def run(tmp_path, **settings):
    monitor = LandscapeMonitor(every_n_train_steps=2, max_overhead=None, **settings)
    outcome = train(Linear, regression, [monitor], tmp_path, precision="64-true")
    parts = {
        part: [
            Slice.load(path) for path in sorted((tmp_path / "landscape").glob(f"*{part}-step*.npz"))
        ]
        for part in ("line-1", "line-2", "plane")
    }
    return monitor, parts, outcome


@pytest.mark.parametrize("directions", PAIRS)
def test_every_pair_of_directions(tmp_path, directions):
    monitor, parts, _ = run(tmp_path, directions=directions, resolution=(5, 3), line_resolution=7)
    assert monitor.failed == 0
    assert len(parts["plane"]) == monitor.measured
    for plane in parts["plane"]:
        assert plane.losses.shape == (3, 5)
        assert plane.losses[1, 2] == plane.center_loss  # the weights are the middle
        if directions != "random":
            assert plane.metadata["norms"] == pytest.approx([1.0, 1.0])
            assert plane.metadata["cosine"] == pytest.approx(0.0, abs=1e-6)


def test_curvature_along_the_eigenvectors(tmp_path):
    """A quadratic: the second difference of the line is the eigenvalue, at any step."""
    x = regression().dataset.tensors[0].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())
    monitor = {"directions": "eigenvectors", "line_resolution": 3, "resolution": 0}
    _, parts, _ = run(tmp_path, span=(-0.5, 0.5), **monitor)
    for part, eigenvalue in (("line-1", exact[-1]), ("line-2", exact[-2])):
        for line in parts[part]:
            low, middle, high = line.losses
            assert (low - 2 * middle + high) / 0.25 == pytest.approx(eigenvalue, rel=1e-3)


def test_loss_rises_along_the_gradient(tmp_path):
    _, parts, _ = run(tmp_path, directions="gradient", resolution=0, span=(-1e-3, 1e-3))
    for line in parts["line-1"]:
        assert line.losses[0] < line.center_loss < line.losses[-1]


def test_scale_and_random_directions_are_fixed_during_the_run(tmp_path):
    monitor, parts, _ = run(tmp_path, directions="random")
    assert set(monitor._limits) == {"landscape/line", "landscape/plane"}
    from lightning_landscape.figures import LossLimits

    first = LossLimits.from_slice(parts["plane"][0])
    assert monitor._limits["landscape/plane"] == first.to_dict()
    lines = monitor._limits["landscape/line"]
    highest = max(float(line.losses.max()) for line in parts["line-1"] + parts["line-2"])
    assert lines["high"] == pytest.approx(highest)  # widened to contain all
    assert all(plane.metadata["fixed"] == [True, True] for plane in parts["plane"])
    again = LandscapeMonitor(every_n_train_steps=2, max_overhead=None)
    train(Linear, regression, [again], tmp_path / "again", precision="64-true")
    for path in (tmp_path / "again" / "landscape").glob("*plane*.npz"):
        a, b = Slice.load(path), Slice.load(tmp_path / "landscape" / path.name)
        assert (a.losses == b.losses).all()


@pytest.mark.pictures
@pytest.mark.short_runs
def test_single_affordable_picture_is_at_the_end(tmp_path, monkeypatch, clock):
    """A forward takes .12 s and a picture 51 of them: the budget of 10 s allows one."""
    Timed(monkeypatch, clock, {}, evaluation=0.12)
    probe = regression().dataset.tensors
    monitor = LandscapeMonitor(every_n_train_steps=1000, resolution=3, probe=probe)
    train(Linear, regression, [monitor], tmp_path)
    assert [row["step"] for row in monitor.history] == [6]
    assert len(list((tmp_path / "landscape").glob("*.png"))) == 2


def test_lines_only_and_plane_only(tmp_path):
    _, parts, _ = run(tmp_path / "a", line_resolution=0, resolution=3)
    assert (len(parts["line-1"]), len(parts["plane"])) == (0, 3)  # steps 3, 5 and the last
    _, parts, _ = run(tmp_path / "b", resolution=0)
    assert (len(parts["line-1"]), len(parts["plane"])) == (3, 0)
