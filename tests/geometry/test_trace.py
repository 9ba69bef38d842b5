"""Trace and Frobenius norm, in total and by block, against closed forms; coverage of errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from lightning_landscape.geometry.estimate import mean_and_stderr, student_factor
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.trace import hessian_frobenius, hessian_trace
from tests.geometry.forms import Matrix, RaisesAt, ReluNetwork, student
from tests.oracles import (
    F64,
    Quadratic,
    bits,
    generator,
    normal,
    scalar_chain_top,
    softmax_at_zero_spectrum,
    symmetric,
)

SPECTRUM = [20 / (i + 1) - 1 for i in range(40)]  # from 19 down to -0.5, trace 45.6
SPLIT = {"a.weight": (3, 5), "a.bias": (5,), "b.weight": (2, 10)}


def covered(estimates, truth):
    return sum(abs(e.value - truth) <= 2 * e.stderr for e in estimates) / len(estimates)


def diagonal(values, shapes=None):
    return Matrix(torch.diag(torch.tensor(values, dtype=F64)), shapes)


# -- exactly ---------------------------------------------------------------------------------------


def test_diagonal_hessian_has_no_error():
    found = hessian_trace(diagonal(SPECTRUM), samples=2)
    assert found.value == pytest.approx(math.fsum(SPECTRUM), rel=1e-12)
    assert found.stderr <= 1e-12
    squares = math.fsum(x * x for x in SPECTRUM)
    assert found.frobenius.value == pytest.approx(math.sqrt(squares), rel=1e-12)
    assert found.frobenius.stderr <= 1e-12


def test_blocks_are_modules_and_sum_to_the_trace():
    found = hessian_trace(diagonal(SPECTRUM, SPLIT), samples=2)
    assert list(found.blocks) == ["a", "b"]
    assert found.blocks["a"].value == pytest.approx(math.fsum(SPECTRUM[:20]), rel=1e-12)
    assert found.blocks["b"].value == pytest.approx(math.fsum(SPECTRUM[20:]), rel=1e-12)

    full = hessian_trace(Matrix(symmetric(SPECTRUM), SPLIT), samples=7)
    assert sum(b.value for b in full.blocks.values()) == pytest.approx(full.value, rel=1e-12)


def test_given_blocks_may_leave_parameters_out():
    found = hessian_trace(
        diagonal(SPECTRUM, SPLIT), samples=2, blocks={"a.weight": "weights", "b.weight": "weights"}
    )
    assert list(found.blocks) == ["weights"]
    wanted = math.fsum(SPECTRUM[:15] + SPECTRUM[20:])
    assert found.blocks["weights"].value == pytest.approx(wanted, rel=1e-12)
    assert found.value == pytest.approx(math.fsum(SPECTRUM), rel=1e-12)


def test_two_by_two_in_closed_form():
    # v'Av = a + c + 2bs and |Av|^2 = a^2 + 2b^2 + c^2 + 2b(a + c)s with s = v1 v2 = +-1: with the
    # mean m of the signs s everything follows.
    a, b, c, n = 3.0, 0.7, -1.0, 9
    found = hessian_trace(Matrix(torch.tensor([[a, b], [b, c]], dtype=F64)), samples=n)
    m = (found.value - (a + c)) / (2 * b)
    assert m * n == pytest.approx(round(m * n), abs=1e-9)
    assert -1 < m < 1
    stderr = student(n) * math.sqrt((1 - m**2) / (n - 1))
    assert found.stderr == pytest.approx(2 * b * stderr, rel=1e-9)
    norm = math.sqrt(a * a + 2 * b * b + c * c + 2 * b * (a + c) * m)
    assert found.frobenius.value == pytest.approx(norm, rel=1e-12)
    assert found.frobenius.stderr == pytest.approx(2 * b * (a + c) * stderr / (2 * norm), rel=1e-9)


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 10, 29, 30, 200])
def test_student_factor(samples):
    assert student_factor(samples) == pytest.approx(student(samples), rel=1e-9)


def test_mean_and_stderr_of_three():
    value, stderr = mean_and_stderr(torch.tensor([[1.0], [2.0], [6.0]], dtype=F64))
    assert float(value) == 3.0  # variance (4 + 1 + 9) / 2 = 7
    assert float(stderr) == pytest.approx(student(3) * math.sqrt(7 / 3), rel=1e-9)


# -- known models ----------------------------------------------------------------------------------


def test_softmax_regression():
    x, classes = normal(50, 6), 4
    weight = torch.nn.Parameter(torch.zeros(classes, 6, dtype=F64))
    y = torch.randint(classes, (50,), generator=generator(0))
    objective = Objective(lambda: F.cross_entropy(x @ weight.T, y), {"weight": weight})
    found = hessian_trace(objective, samples=400)
    truth = float(x.square().sum(1).mean()) * (1 - 1 / classes)
    spectrum = softmax_at_zero_spectrum(x, classes)
    assert truth == pytest.approx(spectrum.sum(), rel=1e-12)
    assert found.stderr < 0.03 * truth  # otherwise the next check would be weak
    assert abs(found.value - truth) <= 3 * found.stderr
    norm = math.sqrt((spectrum**2).sum())
    assert found.frobenius.stderr < 0.03 * norm
    assert abs(found.frobenius.value - norm) <= 3 * found.frobenius.stderr


def test_relu_network_has_the_trace_of_its_gauss_newton_matrix_in_every_block():
    network = ReluNetwork()
    found = hessian_trace(Objective(network.loss, network.params), samples=600)
    truths = network.traces()
    assert found.blocks.keys() == truths.keys()
    for block, truth in truths.items():
        assert found.blocks[block].stderr < 0.03 * truth
        assert abs(found.blocks[block].value - truth) <= 3 * found.blocks[block].stderr
    assert abs(found.value - sum(truths.values())) <= 3 * found.stderr


def test_scalar_chain_by_block():
    # H = E[x^2] c^2 (1/w_i)(1/w_j) where it fits: rank one, tr = ||H||_F = lambda_max.
    values, x = [0.5, 2.0, -1.5], normal(20, 1)
    params = {
        f"layer{i}.w": torch.nn.Parameter(torch.tensor(v, dtype=F64)) for i, v in enumerate(values)
    }
    c = math.prod(values)

    def loss():
        return (torch.stack(list(params.values())).prod() * x - c * x).square().mean() / 2

    found = hessian_trace(Objective(loss, params), samples=2000)
    top = scalar_chain_top(values, x)
    assert found.stderr < 0.03 * top
    assert abs(found.value - top) <= 3 * found.stderr
    assert abs(found.frobenius.value - top) <= 3 * found.frobenius.stderr
    for i, w in enumerate(values):
        truth = float(x.square().mean()) * c * c / w**2
        block = found.blocks[f"layer{i}"]
        assert block.stderr < 0.1 * truth
        assert abs(block.value - truth) <= 3 * block.stderr


# -- coverage of the error bars --------------------------------------------------------------------


@pytest.mark.parametrize("samples", [5, 10, 30])
def test_two_standard_errors_cover_95_percent(samples):
    problem = Matrix(symmetric(SPECTRUM), SPLIT)
    whole, norms, block = [], [], []
    for seed in range(200):
        found = hessian_trace(problem, samples, generator=generator(seed))
        whole.append(found)
        norms.append(found.frobenius)
        block.append(found.blocks["a"])
    assert problem.hvps == 200 * samples
    assert 0.91 <= covered(whole, math.fsum(SPECTRUM)) <= 0.985
    assert 0.91 <= covered(block, float(problem.matrix[:20, :20].trace())) <= 0.985
    # The root of a mean bends, and the squares are skewed: a little less at 5.
    truth = math.sqrt(math.fsum(x * x for x in SPECTRUM))
    assert (0.91 if samples > 5 else 0.89) <= covered(norms, truth) <= 0.985


def test_coverage_for_a_hessian_of_rank_one():
    u = normal(40)
    problem = Matrix(torch.outer(u, u))
    truth = float(u @ u)
    many = [hessian_trace(problem, 30, generator=generator(s)) for s in range(200)]
    assert 0.88 <= covered(many, truth) <= 0.97
    few = [hessian_trace(problem, 5, generator=generator(s)) for s in range(200)]
    assert 0.80 <= covered(few, truth) <= 0.92


def test_mean_over_many_seeds_is_unbiased():
    problem = Matrix(symmetric(SPECTRUM), SPLIT)
    values = torch.tensor(
        [hessian_trace(problem, 10, generator=generator(s)).value for s in range(200)], dtype=F64
    )
    error = float(values.std()) / math.sqrt(200)
    assert error < 0.02 * math.fsum(SPECTRUM)
    assert abs(float(values.mean()) - math.fsum(SPECTRUM)) < 3 * error


# -- costs and contracts ---------------------------------------------------------------------------


def test_one_product_per_sample_gives_trace_and_norm():
    problem = Quadratic(symmetric(SPECTRUM), shapes=SPLIT)
    objective = Objective(problem.loss, problem.params, check_deterministic=False)
    before = bits(problem.params)
    found = hessian_trace(objective, samples=6)
    assert (objective.hvps, objective.gradients, objective.forwards) == (6, 1, 0)
    assert (found.samples, found.hvps, found.frobenius.hvps) == (6, 6, 6)
    norm = hessian_frobenius(objective, samples=6)
    assert (objective.hvps, objective.gradients) == (12, 1)
    assert norm == found.frobenius
    assert bits(problem.params) == before


def test_same_signs_without_a_generator_others_with_one():
    problem = Matrix(symmetric(SPECTRUM))
    torch.manual_seed(1)
    first = hessian_trace(problem, samples=3)
    state = torch.get_rng_state()
    assert hessian_trace(problem, samples=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert hessian_trace(problem, samples=3, generator=generator(1)).value != first.value


def test_order_of_the_parameters_does_not_matter():
    u = {"a": normal(3, seed=0), "b": normal(4, seed=1)}

    def found(names):
        params = {n: torch.nn.Parameter(torch.zeros_like(u[n])) for n in names}
        objective = Objective(lambda: sum((u[n] * params[n]).sum() for n in u) ** 2, params)
        return hessian_trace(objective, samples=4)

    assert found("ab").value == pytest.approx(found("ba").value, rel=1e-12)


def test_scaling_the_loss_scales_everything():
    matrix = symmetric(SPECTRUM)
    one, three = (hessian_trace(Matrix(f * matrix, SPLIT), samples=4) for f in (1, 3))
    assert three.value == pytest.approx(3 * one.value, rel=1e-12)
    assert three.stderr == pytest.approx(3 * one.stderr, rel=1e-12)
    assert three.frobenius.value == pytest.approx(3 * one.frobenius.value, rel=1e-12)


def test_zero_and_nan_curvature():
    flat = hessian_trace(Matrix(torch.zeros(4, 4, dtype=F64)), samples=3)
    assert (flat.value, flat.stderr, flat.frobenius.value, flat.frobenius.stderr) == (0, 0, 0, 0)
    broken = hessian_trace(Matrix(torch.full((2, 2), math.nan, dtype=F64)), samples=3)
    assert math.isnan(broken.value)
    assert math.isnan(broken.frobenius.value)


def test_weights_are_restored_after_an_error_with_differences():
    problem = Quadratic(symmetric(SPECTRUM))
    before = bits(problem.params)
    objective = Objective(
        RaisesAt(problem.loss, 4),
        problem.params,
        engine="finite_difference",
        check_deterministic=False,
    )
    with pytest.raises(ArithmeticError, match="half way"):
        hessian_trace(objective, samples=3)
    assert bits(problem.params) == before


@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius])
@pytest.mark.parametrize("samples", [1, 0, -3, 2.5])
def test_too_few_samples(measure, samples):
    message = re.escape(f"samples={samples}: expected an integer >= 2")
    with pytest.raises(ValueError, match=message):
        measure(diagonal(SPECTRUM), samples)


@pytest.mark.parametrize("blocks", [{"nowhere": "x"}, {}])
def test_blocks_of_unknown_or_no_parameters(blocks):
    with pytest.raises(ValueError, match="expected a mapping from trainable parameters"):
        hessian_trace(diagonal(SPECTRUM), blocks=blocks)
