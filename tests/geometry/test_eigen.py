"""Extreme eigenvalues against known spectra, closed forms and dense solvers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from tests import oracles
from tests.geometry.forms import Matrix, film, spread, true_residuals
from tests.geometry.networks import NETWORKS, mlp
from tests.oracles import F64, Quadratic, generator, normal, orthogonal, symmetric

METHODS = ["lanczos", "power"]


# -- the largest algebraic eigenvalue -------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tail", [0, 37])
def test_negative_eigenvalue_of_largest_magnitude(method, tail):
    """Plain power iteration returns -5.  60 spectra, each with its own start."""
    for seed in range(60):
        matrix = symmetric([-5.0, 3.0, 1.0, *spread([1.0], tail)[1:]], seed)
        largest, smallest = (
            top_eigenvalues(
                Matrix(matrix),
                which=which,
                method=method,
                tol=1e-3,
                max_hvps=1000,
                generator=generator(seed),
            )
            for which in ("LA", "SA")
        )
        assert float(largest.eigenvalues) == pytest.approx(3.0, rel=1e-4)
        assert float(smallest.eigenvalues) == pytest.approx(-5.0, rel=1e-4)
        assert largest.converged
        assert smallest.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("spectrum", "largest", "smallest"),
    [
        ([-3.0, -2.0, -1.0], -1.0, -3.0),  # a maximum
        ([-3.0, -2.0, -1.0] * 5, -1.0, -3.0),
        ([4.0, -4.0, 1.0], 4.0, -4.0),  # a tie in magnitude, on which power iteration oscillates
        ([4.0, -4.0, *[0.1] * 20], 4.0, -4.0),
        ([2.0, 0.0, 0.0], 2.0, 0.0),
        ([-2.0, 0.0, 0.0], 0.0, -2.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([1e-12, -3e-12], 1e-12, -3e-12),
        ([1e12, -3e12], 1e12, -3e12),
        ([7.0], 7.0, 7.0),
        ([-7.0], -7.0, -7.0),
        ([1.0] * 6, 1.0, 1.0),
    ],
)
def test_awkward_spectra(method, spectrum, largest, smallest):
    for seed in range(5):
        operator = Matrix(symmetric(spectrum, seed))
        for which, expected in (("LA", largest), ("SA", smallest)):
            result = top_eigenvalues(
                operator,
                which=which,
                method=method,
                tol=1e-6,
                max_hvps=2000,
                generator=generator(seed),
            )
            scale = max(abs(value) for value in spectrum)
            assert float(result.eigenvalues) == pytest.approx(expected, abs=1e-9 * scale)
            assert result.converged


@pytest.mark.parametrize("method", METHODS)
def test_close_eigenvalues(method):
    """lambda2/lambda1 = .99: the value is right long before the vector is."""
    for seed in range(10):
        matrix = symmetric([1.0, 0.99, *spread([0.9], 60, seed)[1:]], seed)
        result = top_eigenvalues(
            Matrix(matrix), method=method, max_hvps=600, generator=generator(seed)
        )
        assert result.converged
        assert 0.985 < float(result.eigenvalues) <= 1.0 + 1e-12
        tight = top_eigenvalues(
            Matrix(matrix),
            2,
            method=method,
            tol=1e-5,
            max_hvps=5000,
            generator=generator(seed),
        )
        np.testing.assert_allclose(tight.eigenvalues, [1.0, 0.99], rtol=1e-8)


# -- several --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_pairs_are_eigenpairs(method, which, k):
    """Values in order, vectors orthonormal, and the residuals those of the returned vectors."""
    for seed in range(8):
        matrix = symmetric(
            spread([6.0, -5.5, 5.0, -4.5, 4.0, -3.0, 3.0, -2.0, 1.0], 28, seed), seed
        )
        expected = np.linalg.eigvalsh(matrix.numpy())
        expected = expected[::-1][:k] if which == "LA" else expected[:k]
        tol = 1e-4
        result = top_eigenvalues(
            Matrix(matrix, {"a": (5, 5), "b": (12,)}),
            k,
            which=which,
            method=method,
            tol=tol,
            max_hvps=3000,
            generator=generator(seed),
        )
        assert result.converged
        assert result.eigenvalues.dtype == result.residuals.dtype == F64
        assert len(result.eigenvectors) == k
        assert result.eigenvectors[0]["a"].shape == (5, 5)
        np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-6)
        residuals = true_residuals(matrix, result)
        np.testing.assert_allclose(result.residuals, residuals, rtol=1e-6, atol=1e-10)
        assert float(residuals.max()) <= tol * 6.0 * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3])
def test_converged_is_true_only_within_the_tolerance(method, k):
    """From too few products to enough: at the cap it is False, unless the residuals hold."""
    tol, seen = 1e-3, set()
    matrix = symmetric(spread([5.0, -4.8, 4.6, 4.0], 50), 1)
    for cap in [*range(k, 40), 60, 100, 400, 1600]:
        operator = Matrix(matrix)
        result = top_eigenvalues(operator, k, method=method, tol=tol, max_hvps=cap)
        assert operator.hvps == result.hvps <= cap
        residuals = true_residuals(matrix, result)
        np.testing.assert_allclose(result.residuals, residuals, rtol=1e-6, atol=1e-10)
        if result.converged:
            assert float(residuals.max()) <= tol * 5.0
            np.testing.assert_allclose(result.eigenvalues, [5.0, 4.6, 4.0][:k], rtol=1e-3)
        else:
            assert operator.hvps == cap  # it did not stop earlier
            if method == "lanczos":
                assert float(residuals.max()) > tol * float(result.eigenvalues.abs().max())
        seen.add(result.converged)
    assert seen == {True, False}


@pytest.mark.parametrize("method", METHODS)
def test_wrong_end_is_never_called_converged(method):
    """A cap reached just when power iteration has found -5 and must switch to the other end."""
    answers = set()
    for seed in range(10):
        matrix = symmetric([-5.0, 3.0, 1.0, *[0.5] * 8], seed)
        for cap in range(1, 60):
            result = top_eigenvalues(
                Matrix(matrix), method=method, max_hvps=cap, generator=generator(seed)
            )
            answers.add((result.converged, float(result.eigenvalues) > 2.9))
    assert (True, False) not in answers
    assert {(True, True), (False, False)} <= answers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("k", "cap"), [(1, 1), (1, 2), (3, 3), (3, 7), (5, 11)])
def test_cap_is_hard(method, k, cap):
    operator = Matrix(symmetric(range(1, 41)))
    result = top_eigenvalues(operator, k, method=method, tol=1e-12, max_hvps=cap)
    assert operator.hvps == result.hvps == cap
    assert not result.converged
    again = top_eigenvalues(operator, k, method=method, tol=1e-12, max_hvps=cap, init=result)
    assert operator.hvps == 2 * cap
    assert again.hvps == cap


def test_lanczos_is_exact_when_the_space_is_exhausted():
    """Never more products than dimensions."""
    matrix = symmetric([3.0, 1.0, -2.0, 0.5])
    operator = Matrix(matrix)
    result = top_eigenvalues(operator, 4, tol=1e-15, max_hvps=50)
    assert operator.hvps == 4
    np.testing.assert_allclose(result.eigenvalues, [3.0, 1.0, 0.5, -2.0], rtol=1e-12)


def test_lanczos_uses_few_products():
    """A well separated top eigenvalue: an order less than power iteration would take at .9."""
    matrix = symmetric([10.0, *np.linspace(0.0, 9.0, 99)])
    lanczos, power = (
        top_eigenvalues(Matrix(matrix), method=method, tol=1e-3, max_hvps=500) for method in METHODS
    )
    assert lanczos.converged
    assert power.converged
    assert lanczos.hvps <= 25
    assert power.hvps > 2 * lanczos.hvps


# -- multiplicities -------------------------------------------------------------------------------


def softmax_regression(classes, features=6):
    x = normal(40, features)
    module = nn.Linear(features, classes, bias=False, dtype=F64)
    nn.init.zeros_(module.weight)
    y = torch.randint(classes, (40,), generator=generator(0))
    objective = Objective(lambda: F.cross_entropy(module(x), y), dict(module.named_parameters()))
    return objective, oracles.softmax_at_zero_spectrum(x, classes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_softmax_regression_has_equal_eigenvalues(method, k):
    """Ten classes: the top nine eigenvalues are equal, the tenth is smaller."""
    objective, spectrum = softmax_regression(10)
    assert spectrum[8] == spectrum[0] > 1.05 * spectrum[9]
    result = top_eigenvalues(objective, k, method=method, tol=1e-5, max_hvps=3000)
    np.testing.assert_allclose(result.eigenvalues, spectrum[:k], rtol=1e-6)
    assert result.converged


@pytest.mark.parametrize("method", METHODS)
def test_multiplicities_at_the_usual_tolerance(method):
    """Within the 1e-2 of the defaults, over many starts, and with the usual cap for Lanczos."""
    objective, spectrum = softmax_regression(4, features=8)
    for seed in range(20):
        result = top_eigenvalues(
            objective,
            4,
            method=method,
            max_hvps=50 if method == "lanczos" else 1000,
            generator=generator(seed),
        )
        assert result.converged
        np.testing.assert_allclose(result.eigenvalues, spectrum[:4], rtol=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_linear_regression(method):
    x, y = normal(30, 5), normal(30, 3, seed=1)
    module = nn.Linear(5, 3, bias=False, dtype=F64)
    objective = Objective(lambda: nn.MSELoss()(module(x), y), dict(module.named_parameters()))
    result = top_eigenvalues(objective, 7, method=method, tol=1e-6, max_hvps=5000)
    expected = oracles.linear_regression_spectrum(x, 3)
    np.testing.assert_allclose(result.eigenvalues, expected[:7], rtol=1e-8)


# -- closed forms ---------------------------------------------------------------------------------


def test_logistic_regression():
    x, y = normal(30, 5), torch.randint(2, (30,), generator=generator(0)).to(F64)
    w = Parameter(torch.zeros(5, dtype=F64))
    objective = Objective(lambda: F.binary_cross_entropy_with_logits(x @ w, y), {"w": w})
    expected = oracles.logistic_at_zero_spectrum(x)
    np.testing.assert_allclose(
        top_eigenvalues(objective, 5, tol=1e-9).eigenvalues, expected, rtol=1e-10
    )


@pytest.mark.parametrize("method", METHODS)
def test_scalar_chain(method):
    weights, x = [0.5, -2.0, 1.5, 0.8], normal(20)
    params = {f"w{i}": Parameter(torch.tensor(w, dtype=F64)) for i, w in enumerate(weights)}
    fit = math.prod(weights) * x

    def loss():
        return (x * torch.stack(list(params.values())).prod() - fit).square().mean() / 2

    result = top_eigenvalues(Objective(loss, params), method=method, tol=1e-6, max_hvps=200)
    assert float(result.eigenvalues) == pytest.approx(
        oracles.scalar_chain_top(weights, x), rel=1e-9
    )


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_flattest_deep_linear_network(depth):
    target = normal(3, 4)
    factors = oracles.balanced_factors(target, depth)
    params = {f"layer{i}": Parameter(factor.clone()) for i, factor in enumerate(factors)}

    def loss():
        product = None
        for factor in params.values():
            product = factor if product is None else factor @ product
        return (product - target).square().sum() / 2

    result = top_eigenvalues(Objective(loss, params), tol=1e-7, max_hvps=80)
    expected = oracles.flattest_deep_linear_top(target, depth)
    assert float(result.eigenvalues) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks(name, which, method):
    problem = NETWORKS[name]()
    expected = np.linalg.eigvalsh(problem.hessian.numpy())
    expected = expected[::-1][:3] if which == "LA" else expected[:3]
    result = top_eigenvalues(
        Objective(problem.loss, problem.params),
        3,
        which=which,
        method=method,
        tol=2e-5,
        max_hvps=4000,
    )
    assert result.converged
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-6)


# -- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-6, 32.0, 1e6])
def test_scaling_the_loss_scales_the_eigenvalue(method, factor):
    problem = mlp()
    one, scaled = (
        top_eigenvalues(Objective(loss, problem.params), 2, method=method, max_hvps=300)
        for loss in (problem.loss, lambda: factor * problem.loss())
    )
    np.testing.assert_allclose(scaled.eigenvalues, factor * one.eigenvalues, rtol=1e-9)
    assert scaled.hvps == one.hvps


def test_sum_instead_of_mean_multiplies_by_the_examples():
    problem = mlp()
    total = Objective(lambda: problem.loss() * len(problem.x), problem.params)
    result = top_eigenvalues(total, tol=1e-7, max_hvps=83)
    expected = len(problem.x) * np.linalg.eigvalsh(problem.hessian.numpy())[-1]
    assert float(result.eigenvalues) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_weight_decay_in_the_loss_shifts_by_itself(method, which):
    problem, decay = mlp(), 0.37

    def decayed():
        return problem.loss() + decay / 2 * sum(p.square().sum() for p in problem.params.values())

    dense = np.linalg.eigvalsh(problem.hessian.numpy()) + decay
    expected = dense[::-1][:2] if which == "LA" else dense[:2]
    result = top_eigenvalues(
        Objective(decayed, problem.params), 2, which=which, method=method, tol=1e-5, max_hvps=2000
    )
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_the_parameters_does_not_matter(method):
    problem = mlp()
    forward, backward = (
        top_eigenvalues(
            Objective(problem.loss, dict(items)), 2, method=method, tol=1e-3, max_hvps=300
        )
        for items in (problem.params.items(), reversed(problem.params.items()))
    )
    np.testing.assert_allclose(forward.eigenvalues, backward.eigenvalues, rtol=1e-10)
    assert forward.hvps == backward.hvps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1e-150, 1e-8, 5.0, 1e150])
def test_length_of_init_does_not_matter(method, length):
    matrix = symmetric(spread([3.0, 2.0], 20))
    start = normal(22, seed=4)
    one, other = (
        top_eigenvalues(Matrix(matrix), 2, method=method, init={"w": v}, max_hvps=300)
        for v in (start, length * start)
    )
    np.testing.assert_allclose(other.eigenvalues, one.eigenvalues, rtol=1e-10)
    assert other.hvps == one.hvps


@pytest.mark.parametrize("method", METHODS)
def test_same_start_every_time_and_global_random_state_unchanged(method):
    problem = mlp()
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def solve(**options):
        objective = Objective(problem.loss, problem.params)
        return top_eigenvalues(objective, 2, method=method, tol=0.1, **options)

    first = solve()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = solve()
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    seeded = [solve(generator=generator(seed)).eigenvalues for seed in (3, 3, 4)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], first.eigenvalues)


@pytest.mark.parametrize("method", METHODS)
def test_float32(method):
    matrix = symmetric(spread([3.0, -2.9, 2.0], 40))
    result = top_eigenvalues(Matrix(matrix.float()), 2, method=method, tol=1e-4, max_hvps=500)
    assert result.converged
    assert result.eigenvalues.dtype == F64
    assert result.eigenvectors[0]["w"].dtype == torch.float32
    np.testing.assert_allclose(result.eigenvalues, [3.0, 2.0], rtol=1e-5)


def test_start_at_an_eigenvector_needs_one_product_and_a_search():
    basis = orthogonal(20)
    values = torch.arange(1, 21, dtype=F64)
    operator = Matrix(basis * values @ basis.T)
    one = top_eigenvalues(operator, init={"w": basis[:, -1]}, max_hvps=1)
    assert (one.hvps, one.converged, one.checked) == (1, True, False)
    assert float(one.eigenvalues) == pytest.approx(20.0, rel=1e-12)
    assert top_eigenvalues(operator, init={"w": basis[:, -1]}).checked


def test_missing_names_of_init_are_zero():
    operator = Matrix(torch.diag(torch.tensor([5.0, 1.0, 2.0], dtype=F64)), {"a": 1, "b": 2})
    result = top_eigenvalues(operator, init={"a": torch.ones(1, dtype=F64)}, max_hvps=1)
    assert (float(result.eigenvalues), result.hvps) == (5.0, 1)


# -- warm starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_warm_start_follows_a_crossing(pace, seed):
    """Fewer products than a cold start, and never the eigenvalue that was overtaken.

    From the sum v1 + 0.3 v2 + 0.3 v3 the overtaken one was returned as converged until the end.
    """
    previous, warm, cold = None, 0, 0
    for matrix, expected in film(pace, seed):
        operator = Matrix(matrix)
        previous = top_eigenvalues(operator, init=previous)
        assert previous.converged
        assert float(previous.eigenvalues) == pytest.approx(expected, rel=1e-3)
        warm += operator.hvps
        cold += top_eigenvalues(Matrix(matrix)).hvps
    assert warm < 0.75 * cold


@pytest.mark.parametrize("pace", [0.003, 0.03])
def test_warm_start_of_several(pace):
    previous, warm, cold = None, 0, 0
    for matrix, _ in film(pace):
        expected = np.linalg.eigvalsh(matrix.numpy())[::-1][:2]
        previous = top_eigenvalues(Matrix(matrix), 2, init=previous)
        np.testing.assert_allclose(previous.eigenvalues, expected, rtol=1e-3)
        warm += previous.hvps
        cold += top_eigenvalues(Matrix(matrix), 2).hvps
    assert warm < 0.75 * cold


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_warm_start_respects_the_cap(cap):
    """Also where the start vectors alone would be more."""
    matrices = [matrix for matrix, _ in film(0.1, frames=2)]
    start = top_eigenvalues(Matrix(matrices[0]), 2)
    operator = Matrix(matrices[1])
    result = top_eigenvalues(operator, 2, tol=1e-9, max_hvps=cap, init=start)
    assert operator.hvps == result.hvps == cap


@pytest.mark.parametrize("method", METHODS)
def test_warm_start_from_another_k(method):
    matrix = symmetric(spread([5.0, 4.0, 3.0], 30))
    expected = [5.0, 4.0, 3.0]
    for before, after in [(1, 3), (3, 1)]:
        start = top_eigenvalues(Matrix(matrix), before, method=method, max_hvps=300)
        result = top_eigenvalues(
            Matrix(matrix), after, method=method, tol=1e-5, max_hvps=1000, init=start
        )
        np.testing.assert_allclose(result.eigenvalues, expected[:after], rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_warm_start_from_a_result_that_is_not_finite(method):
    """After a result that is not finite the next solve starts cold."""
    matrix = symmetric(spread([5.0, 4.0], 20))
    bad = top_eigenvalues(Matrix(matrix * math.nan), 2, method=method)
    result = top_eigenvalues(Matrix(matrix), 2, method=method, max_hvps=300, init=bad)
    np.testing.assert_allclose(result.eigenvalues, [5.0, 4.0], rtol=1e-3)


# -- preconditioning ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_preconditioner(method, which):
    """``H v = lambda P v`` has the eigenvalues of ``P^-1/2 H P^-1/2``."""
    shapes = {"a": (3, 4), "b": (5,), "c": (4,)}
    operator = Matrix(symmetric(spread([4.0, -3.0, 2.5], 18)), shapes)
    a = torch.rand(3, 4, generator=generator(0), dtype=F64) + 0.05
    diagonal = torch.cat([a.flatten(), torch.full((5,), 7.0, dtype=F64), torch.ones(4, dtype=F64)])
    dense = scipy.linalg.eigh(operator.matrix.numpy(), np.diag(diagonal.numpy()), eigvals_only=True)
    expected = dense[::-1][:3] if which == "LA" else dense[:3]
    result = top_eigenvalues(
        operator,
        3,
        which=which,
        method=method,
        tol=1e-6,
        max_hvps=3000,
        preconditioner={"a": a, "b": 7.0},  # a number for a tensor; a missing name is 1
    )
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-9)
    root = diagonal.rsqrt()
    residuals = true_residuals(root[:, None] * operator.matrix * root, result)
    np.testing.assert_allclose(result.residuals, residuals, rtol=1e-4, atol=1e-10)


def test_infinite_preconditioner_leaves_a_parameter_out():
    matrix = symmetric(spread([4.0, 3.0], 8))
    operator = Matrix(matrix, {"moves": (6,), "stands": (4,)})
    result = top_eigenvalues(operator, tol=1e-9, preconditioner={"stands": math.inf})
    expected = np.linalg.eigvalsh(matrix[:6, :6].numpy())[-1]
    assert float(result.eigenvalues) == pytest.approx(expected, rel=1e-9)
    assert result.eigenvectors[0]["stands"].abs().max() < 1e-9


# -- operators that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("k", [1, 3])
def test_operator_that_is_not_finite(method, poison, after, k):
    class Poisoned(Matrix):
        def hvp(self, vector):
            product = super().hvp(vector)
            if self.hvps > after:
                product["w"][3] = poison
            return product

    operator = Poisoned(symmetric(spread([3.0, 2.0, 1.0], 20)))
    result = top_eigenvalues(operator, k, method=method, tol=1e-10)
    assert result.eigenvalues.isnan().all()
    assert result.eigenvalues.shape == result.residuals.shape == (k,)
    assert result.residuals.isnan().all()
    assert len(result.eigenvectors) == k
    assert not result.converged
    assert result.hvps == operator.hvps == after + 1


# -- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k=0: expected an integer from 1 to the 3 parameters"),
        ({"k": 4}, r"k=4: expected an integer from 1 to the 3 parameters"),
        ({"k": 1.5}, r"k=1.5: expected an integer"),
        ({"which": "LM"}, r"which='LM': expected 'LA' \(largest\) or 'SA' \(smallest\)"),
        ({"method": "arnoldi"}, "method='arnoldi': expected 'lanczos' or 'power'"),
        ({"tol": 0.0}, "tol=0.0: expected a number > 0"),
        ({"tol": -1.0}, "tol=-1.0: expected a number > 0"),
        ({"tol": math.nan}, "tol=nan: expected a number > 0"),
        ({"max_hvps": 0}, "max_hvps=0: expected at least k=1 products"),
        ({"k": 3, "max_hvps": 2}, "max_hvps=2: expected at least k=3 products"),
        ({"init": {"w": torch.zeros(3)}}, "init is zero or not finite"),
        ({"init": {}}, "init is zero or not finite"),
        ({"init": {"w": torch.full((3,), math.nan)}}, "init is zero or not finite"),
        ({"init": {"w": torch.ones(2)}}, r"vector\['w'\] has shape \(2,\): expected .* \(3,\)"),
        ({"init": {"x": torch.ones(3)}}, r"vector names \['x'\] that the parameters do not have"),
        ({"preconditioner": {"w": 0.0}}, "preconditioner: expected positive entries only"),
        ({"preconditioner": {"w": torch.tensor([1.0, -1.0, 1.0])}}, "positive entries only"),
        ({"preconditioner": {"w": math.nan}}, "positive entries only"),
        ({"preconditioner": {"x": 1.0}}, r"names \['x'\] that the parameters do not have"),
        ({"preconditioner": {"w": torch.ones(3, 1)}}, r"shape \(3, 1\)"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    operator = Matrix(symmetric([3.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(operator, **arguments)
    assert operator.hvps == 0


def test_result_is_frozen_plain_data():
    result = top_eigenvalues(Matrix(symmetric([3.0, 2.0, 1.0])))
    assert isinstance(result, EigenResult)
    with pytest.raises(AttributeError):
        result.hvps = 0
    assert replace(result, hvps=0).hvps == 0


def test_quadratic_through_an_objective():
    """The two together, over parameters of several shapes."""
    q = Quadratic(symmetric(spread([4.0, -9.0, 2.0], 17)), shapes={"a": (4, 4), "b": (), "c": (3,)})
    result = top_eigenvalues(Objective(q.loss, q.params), 2, tol=1e-8)
    np.testing.assert_allclose(result.eigenvalues, [4.0, 2.0], rtol=1e-10)
    assert result.eigenvectors[0]["b"].shape == ()


def test_asymmetric_operator_is_detected():
    """As with a kernel whose second derivative is wrong."""
    matrix = symmetric([3.0, 2.0, 1.0, 0.5, 0.1])
    broken = matrix.clone()
    broken[0, 1] += 1.0
    assert top_eigenvalues(Matrix(matrix)).asymmetry < 1e-12
    assert top_eigenvalues(Matrix(broken)).asymmetry > 0.1


def test_random_start_has_not_converged_after_a_few_products():
    """The start is nearly orthogonal to the top eigenvector, so a small residual is not enough."""
    w = Parameter(torch.zeros(2000, dtype=F64))
    spectrum = torch.full((2000,), -1.0, dtype=F64)
    spectrum[7] = 1e-3
    objective = Objective(lambda: (spectrum * w**2).sum() / 2, {"w": w}, check_deterministic=False)
    few = top_eigenvalues(objective, tol=0.2, max_hvps=1)
    assert float(few.eigenvalues[0]) < -0.9  # so it is no upper end
    assert float(few.residuals[0]) <= 0.2  # and yet close to an eigenvalue
    assert not few.converged
    warm = top_eigenvalues(objective, tol=0.2, max_hvps=1, init={"w": spectrum.clamp(min=0.0)})
    assert float(warm.eigenvalues[0]) == pytest.approx(1e-3)
    assert warm.converged
