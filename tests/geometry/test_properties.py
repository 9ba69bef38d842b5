"""Properties that hold for any problem, tested on random ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_landscape import Slice
from lightning_landscape.geometry import (
    Objective,
    filter_normalize,
    hessian_trace,
    line_slice,
    loss_barrier,
    plane_slice,
    random_direction,
    sam_sharpness,
    top_eigenvalues,
)
from lightning_landscape.geometry.vectors import norm
from tests.fuzz import profile
from tests.geometry.forms import Matrix, true_residuals
from tests.oracles import F64, Quadratic, flat, generator, normal, symmetric

SEEDS = st.integers(0, 2**20)
METHODS = st.sampled_from(["lanczos", "power"])
# Clusters, multiplicities, zeros and either sign, at scales far from 1.
VALUES = st.one_of(
    st.floats(-5, 5).map(lambda v: round(v, 9)),  # whose squares do not vanish
    st.sampled_from([0.0, 1.0, 1.0, 1.0 + 1e-9, -1.0, 3.0, 3.0]),
)
SPECTRA = st.lists(VALUES, min_size=1, max_size=12)
SCALES = st.sampled_from([1.0, 1.0, 1e-12, 1e-6, 1e6, 1e12])


@given(SPECTRA, SCALES, METHODS, st.sampled_from(["LA", "SA"]), SEEDS, st.data())
@profile(150)
def test_eigenvalues_of_random_matrices(spectrum, scale, method, which, seed, data):
    size = len(spectrum)
    matrix = scale * symmetric(spectrum, seed)
    k = data.draw(st.integers(1, min(size, 3)), "k")
    operator = Matrix(matrix)
    root = torch.ones(size, dtype=F64)
    preconditioner = None
    if data.draw(st.booleans(), "preconditioned"):
        root = (0.5 + torch.rand(size, generator=generator(seed), dtype=F64)).rsqrt()
        preconditioner = {"w": root**-2}
    matrix = root[:, None] * matrix * root
    found = top_eigenvalues(
        operator, k, which=which, method=method, tol=1e-6, max_hvps=3000,
        preconditioner=preconditioner,
    )  # fmt: skip
    dense = np.linalg.eigvalsh(matrix.numpy())
    largest = np.abs(dense).max()
    expected = dense[::-1][:k] if which == "LA" else dense[:k]
    # Told truly, whether converged or not.
    np.testing.assert_allclose(
        found.residuals.numpy(), true_residuals(matrix, found).numpy(), rtol=1e-3,
        atol=1e-12 * largest,
    )  # fmt: skip
    assert found.hvps == operator.hvps
    distances = np.abs(dense[None] - found.eigenvalues.numpy()[:, None]).min(1)
    assert (distances <= found.residuals.numpy() + 1e-12 * largest).all()
    if method == "lanczos":
        assert found.converged
        np.testing.assert_allclose(found.eigenvalues, expected, rtol=0, atol=2e-6 * largest)
    elif found.converged:  # power iteration may take clusters for one another
        np.testing.assert_allclose(found.eigenvalues, expected, rtol=0, atol=1e-2 * largest)


@pytest.mark.parametrize("spectrum", [(0, 1, 2), (0, 1, 3, 5), (1, 3, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_power_iteration_does_not_converge_to_another_eigenvalue(spectrum, seed):
    """From a start orthogonal to the wanted eigenvector it returned the next one as converged."""
    positive = Matrix(symmetric(spectrum, seed))
    smallest = top_eigenvalues(positive, which="SA", method="power", tol=1e-6, max_hvps=3000)
    negative = Matrix(-symmetric(spectrum, seed))
    largest = top_eigenvalues(negative, method="power", tol=1e-6, max_hvps=3000)
    for found, sign in ((smallest, 1), (largest, -1)):
        assert found.converged
        assert float(found.eigenvalues[0]) == pytest.approx(sign * spectrum[0], abs=1e-4)


def quadratic(seed: int, size: int = 6) -> Quadratic:
    values = normal(size, seed=seed)
    return Quadratic(symmetric(values.tolist(), seed), shapes={"a": (2, 2), "b": (size - 4,)})


@given(SEEDS, st.sampled_from([1e-6, 0.3, 7.0, 1e6]))
@profile(40)
def test_scaling_the_loss_scales_what_is_measured(seed, factor):
    problem = quadratic(seed)
    one = Objective(problem.loss, problem.params)
    scaled = Objective(lambda: factor * problem.loss(), problem.params)
    for measure in (
        lambda o: float(top_eigenvalues(o, tol=1e-9).eigenvalues[0]),
        lambda o: hessian_trace(o, samples=3).value,
        lambda o: hessian_trace(o, samples=3).stderr,
        lambda o: hessian_trace(o, samples=3).frobenius.value,
        lambda o: sam_sharpness(o).value,
    ):
        # The rise is a difference of two losses, each rounded.
        rounding = 1e-14 * factor * (1 + abs(problem.value(problem.w())))
        assert measure(scaled) == pytest.approx(factor * measure(one), rel=1e-7, abs=rounding)


@given(SEEDS)
@profile(40)
def test_order_of_the_parameters_changes_nothing(seed):
    problem = quadratic(seed)
    there = Objective(problem.loss, problem.params)
    back = Objective(problem.loss, dict(reversed(problem.params.items())))
    direction = random_direction(problem.params, generator=generator(seed))
    turned = random_direction(dict(reversed(problem.params.items())), generator=generator(seed))
    assert all(torch.equal(direction[name], turned[name]) for name in direction)
    for measure in (
        lambda o: float(top_eigenvalues(o, tol=1e-9).eigenvalues[0]),
        lambda o: hessian_trace(o, samples=3).value,
        lambda o: sam_sharpness(o, adaptive=True).value,
        lambda o: float(line_slice(o, direction, resolution=3).losses[0]),
    ):
        assert measure(back) == pytest.approx(measure(there), rel=1e-9, abs=1e-12)


_ENDS = st.floats(-2, 2, allow_subnormal=False)


@given(SEEDS, _ENDS, st.floats(0.1, 3), st.integers(2, 7), st.integers(2, 5))
@profile(60)
def test_slices_are_direct_evaluations(seed, first, width, size_x, size_y):
    problem = quadratic(seed)
    objective = Objective(problem.loss, problem.params)
    x_way, y_way = (random_direction(problem.params, generator=generator(seed + i)) for i in (1, 2))
    span = (first, first + width)
    before = {name: p.detach().clone() for name, p in problem.params.items()}
    line = line_slice(objective, x_way, span, size_x)
    plane = plane_slice(objective, x_way, y_way, (span, (-1.0, 0.5)), (size_x, size_y))
    assert all(torch.equal(before[name], p) for name, p in problem.params.items())
    x, y = plane.coordinates
    np.testing.assert_allclose(x, np.linspace(*span, size_x), atol=1e-12 * width)
    np.testing.assert_allclose(y, np.linspace(-1.0, 0.5, size_y), atol=1e-12)
    w, dx, dy = problem.w(), flat(x_way), flat(y_way)
    expected = [[problem.value(w + a * dx + b * dy) for a in x] for b in y]
    np.testing.assert_allclose(plane.losses, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        line.losses, [problem.value(w + a * dx) for a in x], rtol=1e-10, atol=1e-10
    )
    assert plane.center_loss == line.center_loss == pytest.approx(problem.value(w))


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=12),
    st.sampled_from(["linear", "mean"]),
)
@profile(200)
def test_barrier_is_the_same_backwards(losses, ends):
    x = np.linspace(-1, 0, len(losses))
    there, back = (
        loss_barrier(Slice((x,), np.array(values), values[-1]), ends)
        for values in (losses, losses[::-1])
    )
    assert there >= 0
    assert back == pytest.approx(there, rel=1e-9, abs=1e-9 * np.abs(losses).max())
    if ends == "mean":
        assert there == pytest.approx(max(losses) - (losses[0] + losses[-1]) / 2)


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 1), SEEDS,
    st.sampled_from([1e-8, 1.0, 1e8]),
)  # fmt: skip
@profile(60)
def test_filters_have_the_norms_of_the_weights(shape, dim, seed, scale):
    params = {"w": scale * normal(*shape, seed=seed), "bias": normal(3, seed=seed)}
    direction = {"w": normal(*shape, seed=seed + 1), "bias": normal(3, seed=seed + 1)}
    found = filter_normalize(direction, params, filter_dims={"w": dim})
    assert not found["bias"].any()
    for index in range(shape[dim]):
        given_, made, weights = (
            t["w"].select(dim, index).flatten() for t in (direction, found, params)
        )
        assert float(made.norm()) == pytest.approx(float(weights.norm()), rel=1e-9)
        assert float(made @ given_) == pytest.approx(float(made.norm() * given_.norm()), rel=1e-9)


def test_coverage_of_the_error_of_the_trace():
    """``value +- 2 stderr`` holds the truth 92 to 94 % of the time, as the docstring says."""
    matrix = symmetric(normal(20, seed=1).tolist(), 2)
    truth, operator, trials = float(matrix.trace()), Matrix(matrix), 600
    hits = 0
    for seed in range(trials):
        found = hessian_trace(operator, samples=10, generator=generator(seed))
        hits += abs(found.value - truth) <= 2 * found.stderr
    # Three standard deviations of a count below 92 %, and above 95.45 %.
    assert 0.92 - 3 * (0.92 * 0.08 / trials) ** 0.5 < hits / trials < 0.9545 + 3 * 0.0085


def test_norm_of_live_weights_does_not_warn():
    """Found by random trainings: a path's principal directions are taken from the live weights."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert norm({"w": torch.nn.Parameter(torch.tensor([3.0, 4.0]))}) == 5.0
    finally:
        torch.set_warn_always(before)
