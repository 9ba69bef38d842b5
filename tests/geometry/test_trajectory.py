"""Principal planes of known paths, and a bounded number of copies."""

import math

import pytest
import torch

from lightning_landscape.geometry.trajectory import Trajectory, pca_directions, project
from lightning_landscape.geometry.vectors import inner, norm
from tests.oracles import F64, normal


def frame(k, size=40, seed=0):
    """``k`` orthonormal vectors over two parameters."""
    q = torch.linalg.qr(normal(size, k, seed=seed)).Q
    return [{"a": q[:30, i].reshape(5, 6), "b": q[30:, i]} for i in range(k)]


def place(center, directions, coordinates):
    return {
        name: t + sum(c * d[name] for c, d in zip(coordinates, directions, strict=True))
        for name, t in center.items()
    }


CENTER = {"a": normal(5, 6, seed=3), "b": normal(10, seed=4)}


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [4, 5, 16])
def test_copies_are_evenly_spaced_and_few(capacity):
    w = torch.zeros(1)
    path = Trajectory(capacity)
    taken = 0
    for step in range(100_001):
        before = path.weights[-1] if path.weights else None
        w.fill_(step)
        path.add(step, {"w": w})
        taken += path.weights[-1] is not before
        assert len(path.steps) == len(path.weights) <= capacity
    gaps = {b - a for a, b in zip(path.steps, path.steps[1:], strict=False)}
    assert path.steps[0] == 0
    assert len(gaps) == 1
    assert 100_000 - path.steps[-1] < gaps.pop()  # up to now
    assert len(path.steps) >= capacity // 2
    assert [int(p["w"]) for p in path.weights] == path.steps
    assert taken <= capacity * (2 + math.log2(100_000 / capacity) / 2)


def test_skipped_steps_do_not_matter():
    path = Trajectory(4)
    for step in (7, 9, 100, 1000, 1001, 1003, 5000):
        path.add(step, {"w": torch.zeros(1)})
    assert path.steps == [7, 1001, 5000]
    assert not path.due(5000)


def test_weights_are_copied():
    w = torch.zeros(2)
    path = Trajectory()
    path.add(0, {"w": w})
    w.fill_(1.0)
    assert path.weights[0]["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("capacity", [3, 4.0, True])
def test_capacity_is_checked(capacity):
    with pytest.raises(ValueError, match="expected an integer >= 4"):
        Trajectory(capacity)


# -- the plane of a path --------------------------------------------------------------------------


def test_path_in_a_known_plane():
    x, y, off = frame(3)
    ts = torch.linspace(-4.0, -0.5, 12, dtype=F64).tolist()
    path = [place(CENTER, (x, y), (t, 0.2 * math.cos(3 * t) - 0.2)) for t in ts]
    found = pca_directions(path, CENTER)
    assert len(found) == 2
    for i, d in enumerate(found):
        assert norm(d) == pytest.approx(1.0, rel=1e-12)
        assert inner(d, off) == pytest.approx(0.0, abs=1e-12)
        for other in found[:i]:
            assert inner(d, other) == pytest.approx(0.0, abs=1e-10)
    assert inner(found[0], x) > 0.98  # from the start to here, and this is most of it
    seen = project(path, CENTER, found)
    assert seen.residuals.max() < 1e-6
    assert float(seen.explained.sum()) == pytest.approx(1.0, rel=1e-9)
    assert seen.explained[0] > seen.explained[1] > 0
    # Against a singular value decomposition of the same points.
    points = torch.stack([torch.cat([p["a"].flatten(), p["b"]]) for p in [*path, CENTER]])
    values = torch.linalg.svdvals(points - points.mean(0)).square()
    assert seen.explained.tolist() == pytest.approx((values / values.sum())[:2].tolist(), rel=1e-9)


def test_points_off_the_plane():
    x, y, off = frame(3)
    double = {name: 2 * t for name, t in x.items()}
    coordinates, residuals = [(1.0, 2.0), (-3.0, 0.5), (0.0, 0.0)], [0.0, 2.0, 5.0]
    path = [
        place(CENTER, (double, y, off), (*c, r))
        for c, r in zip(coordinates, residuals, strict=True)
    ]
    seen = project(path, CENTER, [double, y])
    torch.testing.assert_close(seen.coordinates, torch.tensor(coordinates, dtype=F64))
    torch.testing.assert_close(
        seen.residuals, torch.tensor(residuals, dtype=F64), atol=1e-6, rtol=0
    )
    distances = [math.hypot(2 * a, b, r) for (a, b), r in zip(coordinates, residuals, strict=True)]
    assert seen.distances.tolist() == pytest.approx(distances)
    points = torch.tensor(
        [[2 * a, b, r] for (a, b), r in zip(coordinates, residuals, strict=True)] + [[0.0] * 3],
        dtype=F64,
    )
    spread = (points - points.mean(0)).square().sum(0)
    assert seen.explained.tolist() == pytest.approx((spread / spread.sum())[:2].tolist())


def test_axes_at_an_angle():
    """The nearest point of the plane, not the product with each axis alone."""
    x, y = frame(2)
    slanted = {name: x[name] + y[name] for name in x}
    seen = project([place(CENTER, (x, slanted), (2.0, -1.0))], CENTER, [x, slanted])
    assert seen.coordinates.flatten().tolist() == pytest.approx([2.0, -1.0])
    assert seen.residuals.tolist() == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize("length", [1.0, 1e-4])  # rounding is not a direction of the path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_path_has_one_direction(dtype, length):
    center = {name: t.to(dtype) for name, t in CENTER.items()}
    (x,) = frame(1)
    path = [
        place(center, [{n: t.to(dtype) for n, t in x.items()}], [t * length]) for t in (-1.0, -0.3)
    ]
    found = pca_directions(path, center)
    assert len(found) == 1
    assert found[0]["a"].dtype == dtype
    assert inner(found[0], {n: t.to(dtype) for n, t in x.items()}) == pytest.approx(1.0, rel=1e-4)


def test_constant_path_has_no_direction():
    assert pca_directions([CENTER, CENTER], CENTER) == []
    assert pca_directions([], CENTER) == []
    x, y = frame(2)
    seen = project([CENTER], CENTER, [x, y])
    assert seen.coordinates.tolist() == [[0.0, 0.0]]
    assert seen.explained.isnan().all()


def test_points_that_are_not_finite():
    x, y = frame(2)
    bad = {name: torch.full_like(t, math.nan) for name, t in CENTER.items()}
    # Start and centre differ along both directions: else the sign of one would be rounding.
    good = [place(CENTER, (x, y), c) for c in ((-2.0, 0.3), (-1.0, 0.5))]
    with_bad = pca_directions([good[0], bad, good[1]], CENTER)
    for a, b in zip(with_bad, pca_directions(good, CENTER), strict=True):
        torch.testing.assert_close(a, b)
    seen = project([good[0], bad], CENTER, [x, y])
    assert seen.coordinates[0].tolist() == pytest.approx([-2.0, 0.3], abs=1e-12)
    assert seen.coordinates[1].isnan().all()
    assert seen.explained.isfinite().all()
    assert pca_directions(good, bad) == []


def test_parameter_unfrozen_later():
    """Before that it has its first recorded value."""
    early = {"a": CENTER["a"] + 1.0}
    late = {"a": CENTER["a"] + 0.5, "b": CENTER["b"] - 2.0}
    whole = [{**early, "b": late["b"]}, late]
    for got, expected in zip(
        pca_directions([early, late], CENTER), pca_directions(whole, CENTER), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_chunks_add_up(monkeypatch):
    x, y = frame(2)
    path = [place(CENTER, (x, y), c) for c in ((-2.0, 1.0), (-1.0, 0.5), (0.0, 3.0))]
    whole = project(path, CENTER, [x, y])
    monkeypatch.setattr("lightning_landscape.geometry.trajectory._CHUNK", 7)
    torch.testing.assert_close(project(path, CENTER, [x, y]).coordinates, whole.coordinates)
