"""The mean rise under noise against Gaussian integrals, and the coverage of its error bars."""

import math
import re
from itertools import count

import pytest
import torch

from lightning_landscape.geometry.average import average_sharpness
from lightning_landscape.geometry.objective import Objective
from tests.geometry.forms import RaisesAt, ReluNetwork, student
from tests.oracles import F64, Quadratic, bits, generator, normal, symmetric

SPECTRUM = [20 / (i + 1) - 1 for i in range(20)]


def objective_of(problem):
    return Objective(problem.loss, problem.params, check_deterministic=False)


def covered(estimates, truth):
    return sum(abs(e.value - truth) <= 2 * e.stderr for e in estimates) / len(estimates)


# -- known integrals ------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 10.0])
def test_quadratic_is_half_the_trace(sigma):
    problem = Quadratic(symmetric(SPECTRUM))
    found = average_sharpness(objective_of(problem), sigma, samples=1000)
    truth = sigma**2 * math.fsum(SPECTRUM) / 2
    assert found.stderr < 0.03 * truth
    assert abs(found.value - truth) <= 3 * found.stderr
    # The variance of d'Ad is 2 sigma^4 ||A||_F^2.
    stderr = sigma**2 * math.sqrt(math.fsum(x * x for x in SPECTRUM) / 2 / 1000)
    assert found.stderr == pytest.approx(stderr, rel=0.15)


def test_quartic():
    # E (w + d)^4 - w^4 = 6 w^2 sigma^2 + 3 sigma^4, for each of many weights.
    w = torch.nn.Parameter(normal(400))
    objective = Objective(lambda: (w**4).sum(), {"w": w})
    found = average_sharpness(objective, sigma=0.8, samples=300)
    truth = float((6 * w.detach() ** 2).sum()) * 0.8**2 + 400 * 3 * 0.8**4
    half_trace = float((12 * w.detach() ** 2).sum()) * 0.8**2 / 2
    assert found.stderr < 0.02 * truth
    assert abs(found.value - truth) <= 3 * found.stderr
    assert abs(found.value - half_trace) > 10 * found.stderr


def test_adaptive_noise_is_relative_to_each_weight():
    # sigma^2/2 sum A_ii w_i^2.
    problem = Quadratic(symmetric(SPECTRUM))
    found = average_sharpness(objective_of(problem), 0.1, samples=1000, adaptive=True)
    truth = 0.1**2 / 2 * float(problem.A.diagonal() @ problem.w().square())
    assert found.stderr < 0.03 * truth
    assert abs(found.value - truth) <= 3 * found.stderr


def test_linear_loss_does_not_rise_and_has_no_error():
    w, slope = torch.nn.Parameter(normal(50)), normal(50, seed=1)
    found = average_sharpness(Objective(lambda: 100 * slope @ w, {"w": w}), sigma=1.0, samples=5)
    assert abs(found.value) < 1e-10  # single draws have a standard deviation of 700
    assert found.stderr < 1e-10


def test_two_pairs_in_closed_form():
    # One weight: the rises are a sigma^2 z^2 / 2, so that their mean and difference give both z^2;
    # the standard error is half the difference, widened.
    w = torch.nn.Parameter(torch.tensor(3.0, dtype=F64))
    seen = []

    def loss():
        seen.append(float(w.detach()) - 3.0)
        return 5.0 * w**2 / 2

    found = average_sharpness(Objective(loss, {"w": w}, check_deterministic=False), 0.5, samples=2)
    assert seen[0] == 0.0
    assert seen[2] == pytest.approx(-seen[1])
    assert seen[4] == pytest.approx(-seen[3])
    rises = [5 * seen[1] ** 2 / 2, 5 * seen[3] ** 2 / 2]
    assert found.value == pytest.approx(sum(rises) / 2, rel=1e-9)
    assert found.stderr == pytest.approx(student(2) * abs(rises[0] - rises[1]) / 2, rel=1e-9)


# -- coverage of the error bars -------------------------------------------------------------------


@pytest.mark.parametrize("samples", [5, 10, 30])
@pytest.mark.parametrize("slope", [1.0, 300.0])
def test_two_standard_errors_cover_95_percent(samples, slope):
    spectrum = [20 / (i + 10) for i in range(60)]
    problem = Quadratic(symmetric(spectrum))
    problem.b *= slope
    objective = objective_of(problem)
    found = [
        average_sharpness(objective, 0.05, samples, generator=generator(s)) for s in range(200)
    ]
    assert 0.91 <= covered(found, 0.05**2 * math.fsum(spectrum) / 2) <= 0.985
    # Pairs make the gradient cost nothing: single draws would have at least this error.
    single = 0.05 * float(problem.g().norm()) / math.sqrt(2 * samples)
    if slope == 300.0:
        assert max(e.stderr for e in found) < single / 100


def test_coverage_for_a_single_direction():
    problem = Quadratic(symmetric([1.0] + [0.0] * 10))
    objective = objective_of(problem)
    for samples, low, high in ((5, 0.77, 0.88), (30, 0.88, 0.97)):
        found = [
            average_sharpness(objective, 0.05, samples, generator=generator(s)) for s in range(200)
        ]
        assert low <= covered(found, 0.05**2 / 2) <= high


def test_mean_over_many_seeds_is_unbiased():
    problem = Quadratic(symmetric(SPECTRUM))
    objective = objective_of(problem)
    values = torch.tensor(
        [average_sharpness(objective, 0.1, 10, generator=generator(s)).value for s in range(200)],
        dtype=F64,
    )
    truth = 0.1**2 * math.fsum(SPECTRUM) / 2
    error = float(values.std()) / math.sqrt(200)
    assert error < 0.03 * truth
    assert abs(float(values.mean()) - truth) < 3 * error


# -- rescaling ------------------------------------------------------------------------------------


def test_adaptive_is_invariant_to_rescaling():
    network = ReluNetwork()
    objective = Objective(network.loss, network.params)
    adaptive = average_sharpness(objective, 0.1, adaptive=True)
    plain = average_sharpness(objective, 0.1)
    network.rescale(3.0)
    after = average_sharpness(objective, 0.1, adaptive=True)
    assert adaptive.value > 0
    assert after.value == pytest.approx(adaptive.value, rel=1e-9)
    assert after.stderr == pytest.approx(adaptive.stderr, rel=1e-9)
    assert abs(average_sharpness(objective, 0.1).value / plain.value - 1) > 0.1


# -- costs and contracts --------------------------------------------------------------------------


def test_two_forwards_per_sample():
    problem = Quadratic(symmetric(SPECTRUM), shapes={"a": (4, 3), "b": (8,)})
    objective = objective_of(problem)
    before = bits(problem.params)
    found = average_sharpness(objective, samples=7)
    assert (objective.forwards, objective.gradients, objective.hvps) == (15, 0, 0)
    assert found.samples == 7
    assert found.displacement == {}
    assert found.definition == "average case, Gaussian noise of sigma 0.01, 7 pairs"
    assert bits(problem.params) == before
    state = torch.get_rng_state()
    assert average_sharpness(objective, samples=7) == found
    assert objective.forwards == 29  # the loss at the weights is known
    assert torch.equal(torch.get_rng_state(), state)
    other = average_sharpness(objective, samples=7, generator=generator(1))
    assert other.value != found.value
    adaptive = average_sharpness(objective, samples=7, adaptive=True)
    assert adaptive.definition == "average case, Gaussian noise of sigma 0.01 |w|, 7 pairs"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_loss_that_is_not_finite(broken):
    w = torch.nn.Parameter(torch.ones(2, dtype=F64))
    found = average_sharpness(Objective(lambda: (w**2).sum() * broken, {"w": w}))
    assert math.isnan(found.value)
    assert math.isnan(found.stderr)
    assert found.note == f"the loss at the weights is {broken}"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_draws_that_are_not_finite_are_counted(broken):
    w = torch.nn.Parameter(torch.ones(2, dtype=F64))
    calls = count(1)  # L(w), then the two sides of each draw
    objective = Objective(
        lambda: (w**2).sum() * (broken if next(calls) in (3, 6) else 1.0),
        {"w": w},
        check_deterministic=False,
    )
    found = average_sharpness(objective, samples=7)
    assert math.isnan(found.value)
    assert math.isnan(found.stderr)
    assert found.note == "2 of 7 draws gave a loss that is not finite"


@pytest.mark.parametrize("call", [2, 3, 6])
def test_weights_are_restored_after_an_error(call):
    problem = Quadratic(symmetric(SPECTRUM))
    before = bits(problem.params)
    loss = RaisesAt(problem.loss, call)
    with pytest.raises(ArithmeticError, match="half way"):
        average_sharpness(Objective(loss, problem.params, check_deterministic=False))
    assert bits(problem.params) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0: expected a finite number > 0"),
        ({"sigma": math.nan}, "sigma=nan: expected a finite number > 0"),
        ({"samples": 1}, "samples=1: expected an integer >= 2"),
        ({"samples": 2.5}, "samples=2.5: expected an integer >= 2"),
    ],
)
def test_invalid_arguments(wrong, message):
    objective = objective_of(Quadratic(symmetric(SPECTRUM)))
    with pytest.raises(ValueError, match=re.escape(message)):
        average_sharpness(objective, **wrong)
    assert objective.forwards == 0
