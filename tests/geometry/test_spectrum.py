"""The spectral density against exact spectra, smoothed by the same Gaussian."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.spectrum import SpectralDensity, spectral_density
from tests.geometry.forms import Matrix, RaisesAt, smoothed_density
from tests.oracles import (
    F64,
    Quadratic,
    bits,
    generator,
    normal,
    softmax_at_zero_spectrum,
    symmetric,
)

SPECTRUM = [*np.linspace(-1, 2, 45), 5.0, 5.0, 7.5, 10.0]  # a bulk, two equal ones, two outliers


def diagonal(values):
    return Matrix(torch.diag(torch.tensor(values, dtype=F64)))


def covered(found, eigenvalues):
    """The share of the points with eigenvalues that lie within two standard errors of the truth."""
    exact = smoothed_density(eigenvalues, found.grid, found.sigma)
    within = (found.density - exact).abs() <= 2 * found.stderr
    one = 1 / (len(eigenvalues) * found.sigma * math.sqrt(2 * math.pi))  # the peak of a single one
    return float(within[exact > 0.3 * one].double().mean())


def mass(found):
    return float(found.density.sum() * (found.grid[1] - found.grid[0]))


def distance(found, eigenvalues):
    """The area between the density and the exact one: 2 where they have nothing in common."""
    exact = smoothed_density(eigenvalues, found.grid, found.sigma)
    return float((found.density - exact).abs().sum() * (found.grid[1] - found.grid[0]))


# -- exactly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_all_steps_on_a_diagonal_hessian_give_the_exact_density(sigma):
    found = spectral_density(diagonal(SPECTRUM), samples=2, steps=len(SPECTRUM), sigma=sigma)
    assert found.sigma == pytest.approx(sigma or 0.11, rel=1e-9)  # 1 % of 10 - (-1)
    exact = smoothed_density(SPECTRUM, found.grid, found.sigma)
    torch.testing.assert_close(found.density, exact, rtol=1e-6, atol=1e-8)
    assert float(found.stderr.max()) < 1e-8
    assert mass(found) == pytest.approx(1.0, abs=1e-7)
    assert found.value is found.density


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_few_steps_are_a_gauss_rule(steps):
    # sum_j w_j theta_j^p = v'A^p v / n up to p = 2 steps - 1, and v'A^p v / n = mean lambda^p for
    # any signs v where A is diagonal.
    found = spectral_density(diagonal(SPECTRUM), samples=3, steps=steps)
    for power in range(2 * steps):
        moments = (found.ritz_weights * found.ritz_values**power).sum(1)
        assert moments.tolist() == pytest.approx(
            [np.mean(np.array(SPECTRUM) ** power)] * 3, rel=1e-6
        )


def test_krylov_space_that_ends_early():
    # Three distinct eigenvalues: three steps find them all, with their multiplicities as weights.
    found = spectral_density(diagonal([0.0] * 5 + [1.0] * 3 + [4.0] * 2), samples=2, steps=8)
    assert found.hvps == 6
    assert found.ritz_values.shape == found.ritz_weights.shape == (2, 8)
    assert found.ritz_values[:, :3].tolist() == [pytest.approx([0, 1, 4], abs=1e-9)] * 2
    assert found.ritz_weights[:, :3].tolist() == [pytest.approx([0.5, 0.3, 0.2], rel=1e-6)] * 2
    assert not found.ritz_weights[:, 3:].any()
    assert float(found.ritz_values.max()) == pytest.approx(4.0)


def test_equal_eigenvalues_and_no_curvature():
    for value, sigma in ((-3.0, 0.03), (0.0, 0.01)):
        found = spectral_density(Matrix(value * torch.eye(6, dtype=F64)), samples=2)
        assert found.sigma == pytest.approx(sigma)
        assert found.hvps == 2
        assert float(found.grid[found.density.argmax()]) == pytest.approx(value, abs=sigma / 8)
        assert mass(found) == pytest.approx(1.0, abs=1e-7)


def test_scaling_the_loss_scales_the_axis():
    one, three = (spectral_density(Matrix(f * symmetric(SPECTRUM)), 2, 20) for f in (1, 3))
    torch.testing.assert_close(three.grid, 3 * one.grid)
    torch.testing.assert_close(three.density, one.density / 3)
    assert three.sigma == pytest.approx(3 * one.sigma)
    assert three.resolution == pytest.approx(3 * one.resolution)


# -- random starts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_hessian_is_within_its_error_bars():
    problem = Matrix(symmetric(SPECTRUM))
    at = torch.tensor([-0.5, 0.5, 1.5, 5.0, 7.5, 10.0], dtype=F64)
    inside, seen = [], []
    for seed in range(200):
        found = spectral_density(
            problem, 10, 20, sigma=0.6, points=128, span=(-4.0, 13.0), generator=generator(seed)
        )
        nearest = [int((found.grid - value).abs().argmin()) for value in at]
        exact = smoothed_density(SPECTRUM, found.grid[nearest], 0.6)
        inside.append((found.density[nearest] - exact).abs() <= 2 * found.stderr[nearest])
        seen.append(found.density[nearest])
    exact = smoothed_density(SPECTRUM, found.grid[nearest], 0.6)
    covered = torch.stack(inside).to(F64).mean(0)
    bulk, outliers = covered[:3], covered[3:]
    assert float(bulk.min()) >= 0.91
    assert float(outliers.min()) >= 0.83  # one eigenvalue: its weight in a sample is skewed
    assert float(covered.max()) <= 0.985
    # Twenty steps are enough here: what is left in the mean over all seeds is not bias.
    error = torch.stack(seen).std(0) / math.sqrt(200)
    assert float((error / exact).max()) < 0.05
    assert bool(((torch.stack(seen).mean(0) - exact).abs() < 3 * error).all())


def test_error_decreases_with_samples_but_not_with_too_few_steps():
    problem = Matrix(symmetric(SPECTRUM))
    assert distance(spectral_density(problem, 40), SPECTRUM) < 0.1
    assert distance(spectral_density(problem, 4), SPECTRUM) > 0.1
    assert distance(spectral_density(problem, 40, steps=5, sigma=0.11), SPECTRUM) > 0.5


def test_softmax_regression():
    x, classes = normal(60, 5), 4
    weight = torch.nn.Parameter(torch.zeros(classes, 5, dtype=F64))
    y = torch.randint(classes, (60,), generator=generator(0))
    objective = Objective(lambda: F.cross_entropy(x @ weight.T, y), {"weight": weight})
    found = spectral_density(objective, samples=100)
    spectrum = softmax_at_zero_spectrum(x, classes)
    assert len(set(np.round(spectrum, 9))) == 6  # so that six steps reach all of it
    assert found.ritz_values.shape == (100, 20)
    assert 590 < found.hvps <= 600  # fewer where the signs have no share of an eigenspace
    assert distance(found, spectrum) < 0.08
    zero = float(found.density[found.grid < spectrum[spectrum > 1e-9].min() / 2].sum())
    assert zero / float(found.density.sum()) == pytest.approx(1 / classes, abs=0.03)


# -- resolution ------------------------------------------------------------------------------------

MIDDLES = (np.arange(500) + 0.5) / 500
SPREAD_OUT = {
    "uniform": 2 * MIDDLES - 1,
    "semicircle": 2 * stats.beta.ppf(MIDDLES, 1.5, 1.5) - 1,
    "Marchenko-Pastur": np.linalg.eigvalsh((lambda x: x.T @ x / 1000)(normal(1000, 500).numpy())),
    "Marchenko-Pastur, of low rank": np.linalg.eigvalsh(
        (lambda x: x.T @ x / 250)(normal(250, 500).numpy())
    ),
    "two bulks": np.concatenate([np.linspace(-1, -0.5, 250), np.linspace(0.3, 1, 250)]),
    "log-uniform": 10 ** np.linspace(-4, 0, 500),
    "normal": stats.norm.ppf(MIDDLES),
    "a spike and a bulk": np.concatenate([np.zeros(300), np.linspace(0, 1, 200)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPREAD_OUT)
def test_spread_out_spectra_lie_within_two_standard_errors(name, dtype):
    spectrum = SPREAD_OUT[name]
    found = spectral_density(Matrix(symmetric(spectrum).to(dtype)))
    assert covered(found, spectrum) >= 0.85
    assert found.hvps == 300
    assert found.note == ""
    assert found.sigma < 0.035 * (spectrum.max() - spectrum.min())


@pytest.mark.parametrize("name", SPREAD_OUT)
def test_error_of_too_few_steps_is_within_two_standard_errors(name):
    # Random signs on a diagonal Hessian have no error of their own.
    spectrum = SPREAD_OUT[name]
    found = spectral_density(diagonal(spectrum), samples=2)
    assert distance(found, spectrum) < 0.004
    assert covered(found, spectrum) >= 0.85
    finer = spectral_density(diagonal(spectrum), samples=2, sigma=found.resolution / 3)
    assert distance(finer, spectrum) > 0.1
    assert covered(finer, spectrum) >= 0.85


@pytest.mark.parametrize("size", [500, 10_000])
def test_resolution_of_a_uniform_spectrum(size):
    # In the middle the nodes are pi / (2 steps) of the width apart: the ripple of Gaussians there
    # is 2 exp(-2 (steps sigma / (width / 2))^2), whatever the number of eigenvalues.
    spectrum = torch.linspace(-1, 1, size, dtype=F64)
    problem = SimpleNamespace(
        params={"w": torch.zeros(size, dtype=F64)},
        hvp=lambda vector: {"w": spectrum * vector["w"]},
    )
    for steps in (15, 30, 60):
        found = spectral_density(problem, samples=2, steps=steps)
        ripple = 2 * math.exp(-2 * (steps * found.resolution) ** 2)
        assert 1e-3 < ripple < 1e-2


def test_given_sigma_and_steps_are_used():
    spectrum = SPREAD_OUT["uniform"]
    found = spectral_density(diagonal(spectrum), samples=2, steps=30, sigma=0.02)
    assert found.sigma == 0.02
    assert found.hvps == 60
    resolved = f"30 Lanczos steps resolve {found.resolution:.3g}"
    assert f"at sigma=0.02 peaks may be single Ritz values: {resolved}" in found.note
    enough = spectral_density(diagonal(spectrum), samples=2, steps=100, sigma=0.02)
    assert enough.note == ""
    assert enough.resolution < 0.02
    assert distance(enough, spectrum) < 0.004
    assert spectral_density(diagonal(spectrum), 2, sigma=found.resolution).note == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_rule_resolves_all(dtype):
    matrix = torch.diag(torch.tensor([0.0] * 5 + [1.0] * 3 + [4.0] * 2, dtype=dtype))
    for steps in (3, 8):  # the third is the last that there is
        found = spectral_density(Matrix(matrix), samples=2, steps=steps, sigma=0.01)
        assert found.resolution == 0.0
        assert found.note == ""
        assert not found.stderr.any()


def test_one_step_resolves_nothing():
    found = spectral_density(diagonal(SPECTRUM), samples=2, steps=1)
    assert found.resolution == math.inf
    assert "1 Lanczos steps resolve no width up to the spectrum's" in found.note


# -- costs and contracts ---------------------------------------------------------------------------


def test_counts_shapes_and_weights_in_place():
    problem = Quadratic(symmetric(SPECTRUM), shapes={"a": (9,), "b": (4, 10)})
    objective = Objective(problem.loss, problem.params, check_deterministic=False)
    before = bits(problem.params)
    found = spectral_density(objective, samples=3, steps=4, points=200)
    assert (objective.hvps, objective.gradients, objective.forwards) == (12, 1, 0)
    assert found.hvps == 12
    assert found.grid.shape == found.density.shape == found.stderr.shape == (200,)
    assert found.ritz_values.shape == found.ritz_weights.shape == (3, 4)
    assert found.ritz_weights.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert bits(problem.params) == before
    again = spectral_density(objective, samples=3, steps=4, points=200)
    assert torch.equal(again.density, found.density)
    other = spectral_density(objective, samples=3, steps=4, generator=generator(1))
    assert not torch.equal(other.ritz_values, found.ritz_values)


def test_file_holds_all_fields(tmp_path):
    found = spectral_density(diagonal(SPECTRUM), samples=2, steps=5)
    found.save(tmp_path / "density.npz")
    with np.load(tmp_path / "density.npz", allow_pickle=False) as file:
        for name in ("grid", "density", "stderr", "ritz_values", "ritz_weights"):
            assert file[name].tolist() == getattr(found, name).tolist()
        assert (float(file["sigma"]), int(file["hvps"])) == (found.sigma, 10)
        assert float(file["resolution"]) == found.resolution
        older = {name: file[name] for name in file if name != "resolution"}
    again = SpectralDensity.load(tmp_path / "density.npz")
    for name, value in vars(found).items():
        assert np.array_equal(getattr(again, name), value)
    np.savez(tmp_path / "older.npz", **older)
    again = SpectralDensity.load(tmp_path / "older.npz")
    assert torch.equal(again.density, found.density)
    assert math.isnan(again.resolution)
    assert again.note == ""


def test_span_limits_the_grid():
    found = spectral_density(diagonal(SPECTRUM), 2, len(SPECTRUM), span=(4.0, 6.0))
    assert (float(found.grid[0]), float(found.grid[-1])) == (4.0, 6.0)
    assert mass(found) == pytest.approx(2 / len(SPECTRUM), rel=1e-3)  # the two at 5


def test_float32():
    matrix = symmetric(SPECTRUM)
    wide, narrow = (spectral_density(Matrix(m), 2, 30) for m in (matrix, matrix.float()))
    assert narrow.density.dtype == F64
    exact = np.sort(SPECTRUM)[-1]
    assert float(narrow.ritz_values.max()) == pytest.approx(exact, rel=1e-5)
    assert float(wide.ritz_values.max()) == pytest.approx(exact, rel=1e-9)


def test_loss_that_is_not_finite_gives_nan():
    found = spectral_density(Matrix(torch.full((5, 5), math.nan, dtype=F64)), samples=2)
    assert found.density.isnan().all()
    assert found.hvps == 2
    assert math.isnan(found.resolution)
    infinite = Matrix(torch.full((5, 5), math.inf, dtype=F64))
    assert spectral_density(infinite, samples=2, sigma=1.0).density.isnan().all()


def test_weights_are_restored_after_an_error():
    problem = Quadratic(symmetric(SPECTRUM))
    before = bits(problem.params)
    objective = Objective(
        RaisesAt(problem.loss, 4),
        problem.params,
        engine="finite_difference",
        check_deterministic=False,
    )
    with pytest.raises(ArithmeticError, match="half way"):
        spectral_density(objective)
    assert bits(problem.params) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 1}, "samples=1: expected an integer >= 2"),
        ({"steps": 0}, "steps=0: expected an integer >= 1"),
        ({"steps": 1.5}, "steps=1.5: expected an integer >= 1"),
        ({"sigma": 0.0}, "sigma=0.0: expected a finite number > 0, or None"),
        ({"sigma": math.inf}, "sigma=inf: expected a finite number > 0, or None"),
        ({"points": 100}, "points=100: expected an integer >= 128"),
        ({"span": (1.0, 1.0)}, "span=(1.0, 1.0): expected two finite numbers"),
        ({"span": (0.0, math.inf)}, "span=(0.0, inf): expected two finite numbers"),
    ],
)
def test_invalid_arguments(wrong, message):
    problem = diagonal(SPECTRUM)
    with pytest.raises(ValueError, match=re.escape(message)):
        spectral_density(problem, **wrong)
    assert problem.hvps == 0


def test_grid_too_coarse_for_its_gaussian_raises():
    with pytest.raises(ValueError, match=r"the grid's spacing .* is above sigma=0.001") as caught:
        spectral_density(diagonal([0.0, 1.0]), samples=2, sigma=0.001, points=500)
    enough = int(re.search(r"at least (\d+) points", str(caught.value)).group(1))
    found = spectral_density(diagonal([0.0, 1.0]), samples=2, sigma=0.001, points=enough)
    assert mass(found) == pytest.approx(1.0, abs=1e-7)
