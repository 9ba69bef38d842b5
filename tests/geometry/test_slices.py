"""Slices: positions of the points, the loss at the centre, and files."""

import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.directions import filter_normalize, random_direction
from lightning_landscape.geometry.eigen import top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.slices import Slice, line_slice, lowest_point, plane_slice
from tests.geometry.networks import NETWORKS
from tests.oracles import F64, Quadratic, normal, symmetric


def separable():
    """L = f(x) + g(y) without symmetries, so that swapped, flipped or shifted rows are detected."""
    w = Parameter(torch.zeros(2, dtype=F64))
    objective = Objective(lambda: w[0].exp() + 10 * w[1] ** 3 + w[1], {"w": w})
    return objective, {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}


def separable_at(x, y):
    return np.exp(x) + 10 * y**3 + y


# -- where the points are -------------------------------------------------------------------------


def test_line_runs_along_the_direction():
    objective, x, y = separable()
    line = line_slice(objective, {"w": 2 * x["w"] + y["w"]}, span=(-1.0, 0.5), resolution=7)
    t = np.linspace(-1.0, 0.5, 7)
    np.testing.assert_allclose(line.coordinates[0], t, rtol=0, atol=1e-15)
    np.testing.assert_allclose(line.losses, separable_at(2 * t, t), rtol=1e-12)
    assert line.metadata["norms"] == [pytest.approx(math.sqrt(5))]


@pytest.mark.parametrize("resolution", [(7, 4), [4, 7], (2, 9), 5])
@pytest.mark.parametrize("span", [((-1.0, 2.0), (0.5, 0.75)), (-0.5, 1.0), [[-2, 1], [0, 1]]])
def test_plane_orientation(resolution, span):
    """Rows are y and columns x, on grids that are not square, with different spans."""
    objective, dx, dy = separable()
    plane = plane_slice(objective, dx, dy, span=span, resolution=resolution)
    nx, ny = (resolution, resolution) if isinstance(resolution, int) else resolution
    span_x, span_y = (span, span) if isinstance(span[0], float) else span
    x, y = np.linspace(*span_x, nx), np.linspace(*span_y, ny)
    assert plane.losses.shape == (ny, nx)
    np.testing.assert_allclose(plane.coordinates[0], x, rtol=0, atol=1e-15)
    np.testing.assert_allclose(plane.coordinates[1], y, rtol=0, atol=1e-15)
    for row in range(ny):
        for column in range(nx):
            assert plane.losses[row, column] == pytest.approx(
                separable_at(x[column], y[row]), rel=1e-12
            )


def test_lengths_and_angle_of_the_axes():
    objective, x, _ = separable()
    plane = plane_slice(objective, {"w": 3 * x["w"]}, {"w": torch.tensor([1.0, 1.0])}, resolution=2)
    assert plane.metadata["norms"] == [3.0, pytest.approx(math.sqrt(2))]
    assert plane.metadata["cosine"] == pytest.approx(math.sqrt(0.5), rel=1e-6)
    zero = plane_slice(objective, x, {"w": torch.zeros(2)}, resolution=2)
    assert zero.metadata["cosine"] == 0.0


def test_metadata_is_kept():
    objective, x, y = separable()
    facts = {"step": 7, "directions": ["a", "b"]}
    assert line_slice(objective, x, resolution=2, metadata=facts).metadata.items() >= facts.items()
    plane = plane_slice(objective, x, y, resolution=2, metadata=facts)
    assert plane.metadata.items() >= facts.items()


# -- the centre -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "resolution"),
    [
        ((-1.0, 1.0), 3),
        ((-1 / 3, 1 / 3), 9),
        ((-0.7, 2.1), 5),
        # Into these numpy's linspace puts some 1e-16 instead of 0.
        ((-1.7, 1.7), 21),
        ((-0.1, 0.1), 23),
        ((-0.2, 0.4), 4),
    ],
)
def test_centre_is_exactly_the_loss(span, resolution):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = normal(8, 3).float()
    objective = Objective(lambda: module(x).square().mean(), dict(module.named_parameters()))
    direction = random_direction(objective.params)
    before = [p.detach().clone() for p in module.parameters()]
    loss = float(module(x).square().mean().detach())
    line = line_slice(objective, direction, span, resolution)
    gradient = objective.gradient()
    plane = plane_slice(objective, direction, gradient, (span, (0.0, 1.0)), (resolution, 2))
    assert line.center_loss == plane.center_loss == loss
    centre = round(-span[0] / (span[1] - span[0]) * (resolution - 1))
    for piece in (line, plane):
        assert np.flatnonzero(piece.coordinates[0] == 0.0).tolist() == [centre]
    assert line.losses[centre] == plane.losses[0, centre] == loss
    for p, kept in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_at_the_centre_is_the_eigenvalue(name):
    """The slice along a unit eigenvector, by its central second difference."""
    problem = NETWORKS[name]()
    objective = Objective(problem.loss, problem.params)
    found = top_eigenvalues(objective, 2, tol=1e-7, max_hvps=100)
    for value, vector in zip(found.eigenvalues.tolist(), found.eigenvectors, strict=True):
        x = line_slice(objective, vector, span=(-1e-3, 1e-3), resolution=3)
        second = (x.losses[0] - 2 * x.losses[1] + x.losses[2]) / 1e-6
        assert second == pytest.approx(value, rel=1e-5)


# -- the lowest point -----------------------------------------------------------------------------


@pytest.mark.parametrize("x", [np.linspace(-2, 3, 21), np.array([-2.0, -0.5, 0.1, 1.7, 3.0])])
@pytest.mark.parametrize("at", [-1.9, -0.412, 0.0, 1.3])
def test_lowest_point_of_a_parabola_between_the_points(x, at):
    line = Slice((x,), 3.0 * (x - at) ** 2 - 1.0, 0.0)
    lowest, within = lowest_point(line)
    if within:
        assert lowest == pytest.approx(at, abs=1e-12)
    else:
        assert lowest in (x[0], x[-1])
        assert abs(at - lowest) < abs(x[1] - x[0])  # next to the end


def test_lowest_point_at_an_end_on_a_plateau_and_nowhere():
    x = np.linspace(-1, 1, 5)
    assert lowest_point(Slice((x,), x.copy(), 0.0)) == (-1.0, False)
    assert lowest_point(Slice((x,), -x, 0.0)) == (1.0, False)
    nan = np.full(5, np.nan)
    assert math.isnan(lowest_point(Slice((x,), nan, 0.0))[0])
    beside = np.array([np.nan, 0.5, np.inf, 2.0, 3.0])
    assert lowest_point(Slice((x,), beside, 0.0)) == (-0.5, True)
    flat = np.array([1.0, 0.0, 0.0, 0.0, 1.0])
    assert lowest_point(Slice((x,), flat, 0.0))[1]
    with np.errstate(all="raise"):
        lowest_point(Slice((x,), np.array([np.inf, 0.0, np.inf, 1.0, np.nan]), 0.0))


def test_quadratic_plane():
    q = Quadratic(symmetric([5.0, -2.0, 1.0]))
    u, v = normal(3, seed=8), normal(3, seed=9)
    plane = plane_slice(Objective(q.loss, q.params), {"w": u}, {"w": v}, ((-1, 1), (-2, 2)), (3, 5))
    expected = [
        [q.value(q.w() + x * u + y * v) for x in plane.coordinates[0]] for y in plane.coordinates[1]
    ]
    np.testing.assert_allclose(plane.losses, expected, rtol=1e-12)


# -- invariance -----------------------------------------------------------------------------------


def relu_net(bias):
    module = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias))
    for seed, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=seed)
        if p.ndim == 1:
            p.data.zero_()
    return module


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("bias", [False, True])
def test_filter_normalised_slices_are_invariant_to_rescaling(factor, bias):
    module, x = relu_net(bias), normal(10, 4, seed=5)
    objective = Objective(lambda: module(x).square().mean(), dict(module.named_parameters()))
    directions = [
        random_direction(objective.params, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    ]

    def slices(normalize):
        pair = [filter_normalize(d, objective.params) if normalize else d for d in directions]
        return line_slice(objective, pair[0]), plane_slice(objective, *pair, resolution=5)

    before, plain = slices(True), slices(False)
    with torch.no_grad():
        module[0].weight.mul_(factor)
        module[2].weight.div_(factor)
    after, plain_after = slices(True), slices(False)
    assert before[0].losses.std() > 0.1  # there is something to see
    for old, new, other, other_new in zip(before, after, plain, plain_after, strict=True):
        np.testing.assert_allclose(new.losses, old.losses, rtol=1e-10)
        assert abs(other_new.losses / other.losses - 1).max() > 0.1  # without, they do


# -- cost -----------------------------------------------------------------------------------------


def test_one_forward_per_point():
    calls = []
    w = Parameter(torch.zeros(2, dtype=F64))

    def loss():
        calls.append(1)
        return w.square().sum()

    objective = Objective(loss, {"w": w}, check_deterministic=False)
    d = {"w": torch.tensor([1.0, 0.0], dtype=F64)}
    line_slice(objective, d, resolution=21)
    assert objective.forwards == len(calls) == 21  # the centre is the loss itself
    line_slice(objective, d, resolution=20)
    assert objective.forwards == len(calls) == 41  # known by now, and not on this grid
    plane_slice(objective, d, d, resolution=(4, 3))
    assert objective.forwards == len(calls) == 53
    plane_slice(objective, d, d, resolution=3)
    assert objective.forwards == len(calls) == 61
    assert (objective.gradients, objective.hvps) == (0, 0)


# -- values that are not finite --------------------------------------------------------------------


def test_losses_that_are_not_finite_are_kept(tmp_path):
    """NaN and infinite losses are kept, also when saved and loaded."""
    w = Parameter(torch.ones(1, dtype=F64))
    objective = Objective(lambda: w.log().sum(), {"w": w})
    line = line_slice(objective, {"w": torch.ones(1)}, span=(-2.0, 2.0), resolution=5)
    assert np.isnan(line.losses[0])
    assert line.losses[1] == -math.inf
    assert line.losses[2:].tolist() == [0.0, pytest.approx(math.log(2)), pytest.approx(math.log(3))]
    line.save(tmp_path / "line.npz")
    np.testing.assert_array_equal(Slice.load(tmp_path / "line.npz").losses, line.losses)
    centre = Objective(lambda: (w * math.nan).sum(), {"w": w})
    assert math.isnan(line_slice(centre, {"w": torch.ones(1)}, resolution=3).center_loss)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plane.npz", "plane", "plane.dat"])
@pytest.mark.parametrize("as_text", [True, False])
def test_saved_and_loaded(tmp_path, name, as_text):
    """Bitwise equal, under the given name."""
    objective, x, y = separable()
    facts = {"step": 3, "names": ["a", "b"], "mode": "eval", "ratio": 0.1, "none": None}
    plane = plane_slice(objective, x, y, ((-1, 1), (0, 1 / 3)), (5, 3), metadata=facts)
    path = str(tmp_path / name) if as_text else tmp_path / name
    plane.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    loaded = Slice.load(path)
    for before, after in zip(plane.coordinates, loaded.coordinates, strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(plane.losses, loaded.losses)
    assert loaded.center_loss == plane.center_loss
    assert loaded.metadata == plane.metadata


def test_file_is_plain_numpy(tmp_path):
    objective, x, _ = separable()
    line_slice(objective, x, resolution=4, metadata={"step": 1}).save(tmp_path / "line.npz")
    with np.load(tmp_path / "line.npz", allow_pickle=False) as file:
        assert {*file} == {"x", "losses", "center_loss", "metadata"}
        assert json.loads(str(file["metadata"]))["step"] == 1
        assert file["losses"].shape == (4,)


def test_metadata_that_cannot_be_written_leaves_no_file(tmp_path):
    objective, x, _ = separable()
    line = line_slice(objective, x, resolution=2, metadata={"tensor": torch.ones(2)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        line.save(tmp_path / "line.npz")
    assert list(tmp_path.iterdir()) == []


class Boom:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def write_npz(path, **arrays):
    whole = {
        "x": np.zeros(2),
        "losses": np.zeros(2),
        "center_loss": np.float64(0),
        "metadata": np.array("{}"),
    }
    np.savez(path, **{name: a for name, a in {**whole, **arrays}.items() if a is not None})


DAMAGED = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x93NUMPY garbage" * 9),
    "text": lambda path: path.write_text("a,b\n1,2\n"),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Boom())),
    "pickled_losses": lambda path: write_npz(path, losses=np.array([Boom(), Boom()])),
    "pickled_metadata": lambda path: write_npz(path, metadata=np.array(Boom(), dtype=object)),
    "array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "no_losses": lambda path: write_npz(path, losses=None),
    "no_axes": lambda path: write_npz(path, x=None),
    "no_metadata": lambda path: write_npz(path, metadata=None),
    "no_json": lambda path: write_npz(path, metadata=np.array("{")),
    "other_shape": lambda path: write_npz(path, losses=np.zeros(3)),
    "strings": lambda path: write_npz(path, losses=np.array(["a", "b"])),
    "two_centres": lambda path: write_npz(path, center_loss=np.zeros(2)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_file_that_is_not_a_slice(tmp_path, damage):
    path = tmp_path / "slice.npz"
    DAMAGED[damage](path)
    with pytest.raises(ValueError, match=r"path='.*slice.npz': not a saved Slice"):
        Slice.load(path)


def test_truncated_file(tmp_path):
    objective, x, _ = separable()
    path = tmp_path / "slice.npz"
    line_slice(objective, x, resolution=50).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="not a saved Slice"):
            Slice.load(path)


def test_flipped_bytes(tmp_path):
    """The archive's checksum detects damaged numbers."""
    objective, x, _ = separable()
    path = tmp_path / "slice.npz"
    line_slice(objective, x, resolution=50).save(path)
    whole = bytearray(path.read_bytes())
    for position in range(60, 200, 10):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a saved Slice"):
            Slice.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Slice.load(tmp_path / "none.npz")


# -- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 1}, "resolution=1: expected an integer >= 2"),
        ({"resolution": 2.5}, "resolution=2.5: expected an integer >= 2"),
        ({"span": (1.0, 1.0)}, r"span=\(1.0, 1.0\): expected two finite numbers, the smaller"),
        ({"span": (1.0, -1.0)}, r"span=\(1.0, -1.0\): expected"),
        ({"span": (0.0, math.inf)}, r"span=\(0.0, inf\): expected"),
        ({"span": (math.nan, 1.0)}, r"span=\(nan, 1.0\): expected"),
    ],
)
def test_grid_out_of_range(arguments, message):
    objective, x, y = separable()
    with pytest.raises(ValueError, match=message):
        line_slice(objective, x, **arguments)
    with pytest.raises(ValueError, match=message):
        plane_slice(objective, x, y, **arguments)
    assert objective.forwards == 0


@pytest.mark.parametrize(
    "arguments", [{"resolution": (3, 1)}, {"span": ((0, 1), (1, 0))}, {"span": (0.0, 0.5, 1.0)}]
)
def test_second_axis_out_of_range(arguments):
    objective, x, y = separable()
    with pytest.raises(ValueError, match="expected"):
        plane_slice(objective, x, y, **arguments)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((3,), (4,)), ((3, 4), (3, 4)), ((3, 4), (12,)), ((), ()), ((2, 2, 2), (2, 2, 2))],
)
def test_losses_of_the_wrong_shape(axes, shape):
    with pytest.raises(ValueError, match=r"losses have shape .*expected \(len\(x\),\) for a line"):
        Slice(tuple(np.zeros(n) for n in axes), np.zeros(shape), 0.0)
