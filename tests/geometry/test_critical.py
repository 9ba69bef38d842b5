"""Critical sharpness of losses with a known crossing."""

import math
import re

import pytest
import torch

from lightning_landscape.geometry.critical import critical_sharpness
from lightning_landscape.geometry.objective import Objective
from tests.geometry.forms import RaisesAt
from tests.oracles import F64, Quadratic, bits, normal, symmetric

SPECTRUM = [20.0, 5.0, 1.0, 0.5, 0.1, -0.2]


def problem_and_update(seed=0, **settings):
    """A quadratic, gradient descent's update on it and the critical sharpness along that."""
    problem = Quadratic(symmetric(SPECTRUM, seed), seed=seed, **settings)
    g = problem.g()
    return problem, problem.named(-g), float(g @ problem.A @ g / (g @ g))


def objective_of(problem):
    return Objective(problem.loss, problem.params, check_deterministic=False)


def along(function):
    """An objective in one weight at 0, and the direction 1."""
    x = torch.nn.Parameter(torch.zeros((), dtype=F64))
    objective = Objective(lambda: function(x), {"x": x}, check_deterministic=False)
    return objective, {"x": torch.ones((), dtype=F64)}


# -- known crossings ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_quadratic_along_its_gradient(seed):
    problem, update, truth = problem_and_update(seed)
    found = critical_sharpness(objective_of(problem), update, rtol=1e-8)
    assert found.value == pytest.approx(truth, rel=1e-6)
    assert found.eta == pytest.approx(2 / truth, rel=1e-6)
    assert found.note == ""
    assert found.value <= max(SPECTRUM)


def test_quadratic_along_any_descent_direction():
    # L(w + eta u) - L(w) = eta g'u + eta^2/2 u'Au crosses at -2 g'u / u'Au.
    problem = Quadratic(symmetric([*SPECTRUM[:5], 3.0]))
    u = normal(6, seed=9)
    u = u if float(problem.g() @ u) < 0 else -u
    eta = float(-2 * problem.g() @ u / (u @ problem.A @ u))
    found = critical_sharpness(objective_of(problem), problem.named(u), rtol=1e-8)
    assert found.eta == pytest.approx(eta, rel=1e-6)
    assert found.value == pytest.approx(2 / eta, rel=1e-6)


def test_top_eigenvector_gives_the_top_eigenvalue():
    w = torch.nn.Parameter(torch.tensor([2.0, 0.0, 0.0], dtype=F64))
    values = torch.tensor([7.0, 3.0, 1.0], dtype=F64)
    objective = Objective(lambda: (values * w**2).sum() / 2, {"w": w})
    found = critical_sharpness(objective, {"w": -values * w.detach()}, rtol=1e-8)
    assert found.value == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "eta"),
    [
        (lambda x: x**3 - x, 1.0),
        (lambda x: 5.0 - torch.sin(x), math.pi),
        (lambda x: torch.where(x < 1.0, -x, math.inf), 1.0),
        (lambda x: torch.where(x < 1.0, -x, math.nan), 1.0),
        (lambda x: (x - 3e-7) ** 2, 6e-7),
        (lambda x: (x / 3e7 - 1) ** 2, 6e7),
    ],
    ids=["cubic", "sine", "wall", "hole", "near", "far"],
)
def test_other_losses(function, eta):
    objective, direction = along(function)
    found = critical_sharpness(objective, direction, rtol=1e-8)
    assert found.eta == pytest.approx(eta, rel=1e-6)


@pytest.mark.parametrize("start", [1e-6, 1e-3, 0.1, 1.0, 1e3, 1e6])
def test_result_does_not_depend_on_the_start(start):
    problem, update, truth = problem_and_update()
    found = critical_sharpness(objective_of(problem), update, rtol=1e-8, start=start)
    assert found.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("rtol", [0.3, 0.05, 1e-3])
def test_rtol_is_the_relative_error(rtol):
    for seed in range(10):
        problem, update, truth = problem_and_update(seed)
        for start in (0.01, 0.0137, 0.02):
            found = critical_sharpness(objective_of(problem), update, rtol, start=start)
            assert abs(found.eta * truth / 2 - 1) <= rtol


def test_start_at_the_crossing():
    # (1 - x)^2 is equal at 2 and at 0: neither a decrease nor an increase.
    objective, direction = along(lambda x: (1 - x) ** 2)
    found = critical_sharpness(objective, direction, rtol=1e-8, start=2.0)
    assert found.eta == pytest.approx(2.0, rel=1e-6)


def test_missing_name_means_zero():
    problem, update, _ = problem_and_update(shapes={"a": (2,), "b": (4,)})
    u = torch.cat([torch.zeros(2, dtype=F64), update["b"]])
    truth = float(-(u @ problem.A @ u) / (problem.g() @ u))
    found = critical_sharpness(objective_of(problem), {"b": update["b"]}, rtol=1e-8)
    assert found.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "again"), [(1.5, None), (3.0, None), (7.5, 7.5), (15.0, 15), (30.0, 15)]
)
def test_first_of_several_crossings(start, again):
    # Below L(0) up to pi, and again from 2 pi to 3 pi, from 4 pi to 5 pi, ...
    objective, direction = along(lambda x: 5.0 - torch.sin(x))
    found = critical_sharpness(objective, direction, rtol=1e-8, start=start)
    assert found.eta == pytest.approx(math.pi, rel=1e-6)
    if again is None:
        assert found.note == ""
    else:
        assert found.note.startswith("the loss crosses L(w) several times")
        assert f"(it is below again at step {again})" in found.note


def test_scaling_the_update_scales_the_step():
    problem, update, _ = problem_and_update()
    one = critical_sharpness(objective_of(problem), update, rtol=1e-8)
    half = critical_sharpness(
        objective_of(problem), {n: u / 2 for n, u in update.items()}, rtol=1e-8
    )
    assert half.eta == pytest.approx(2 * one.eta, rel=1e-6)


def test_float32_with_a_large_constant():
    # The fall is 1e-4 of the loss, the precision 1e-7: the crossing is found to its rounding.
    problem = Quadratic(symmetric(SPECTRUM), dtype=torch.float32, constant=0.0)
    g = problem.g().double()
    A = problem.A.double()
    truth = float(g @ A @ g / (g @ g))
    problem.c = 1e4 * float(g @ g) / truth / 2
    found = critical_sharpness(objective_of(problem), problem.named(-problem.g()))
    assert found.value == pytest.approx(truth, rel=0.06)


# -- where there is none --------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("start", [None, 1e-20, 1.0])
def test_reason_if_the_direction_is_uphill(constant, start):
    problem, update, _ = problem_and_update(constant=constant)
    uphill = {n: -u for n, u in update.items()}
    found = critical_sharpness(objective_of(problem), uphill, start=start)
    assert math.isnan(found.value)
    assert math.isnan(found.eta)
    assert found.note == "the loss falls nowhere along the direction: it rises"
    assert found.forwards <= 42


def test_decrease_by_rounding_is_ignored():
    # Gently uphill: a loss of 100, in float32, jitters by 1e-5 and "falls" at some short steps.
    jitter = 0
    for seed in range(20):
        w = torch.nn.Parameter(1 + 0.01 * normal(1000, seed=seed).float())
        r = normal(1000, seed=seed + 100).float()
        uphill = {"w": r + (0.001 - r @ w.detach() / (w.detach() @ w.detach())) * w.detach()}
        objective = Objective(lambda w=w: (w**2).sum() / 10, {"w": w})
        steps = [(2.0**-i,) for i in range(8, 32)]
        jitter += bool((objective.losses_at([uphill], steps) < objective.loss()).any())
        assert "falls nowhere" in critical_sharpness(objective, uphill).note
    assert jitter > 5


def test_reason_at_a_minimum():
    objective, direction = along(lambda x: x**2)
    assert "falls nowhere" in critical_sharpness(objective, direction).note


def test_reason_if_the_loss_never_rises():
    objective, direction = along(lambda x: -x)
    found = critical_sharpness(objective, direction)
    assert math.isnan(found.value)
    assert found.note.startswith("the loss does not rise along the direction up to step")


def test_reason_if_the_loss_does_not_change():
    objective, direction = along(lambda x: 0 * x + 2)
    note = critical_sharpness(objective, direction).note
    assert note == "the loss falls nowhere along the direction: it does not change"


@pytest.mark.parametrize("length", [0.0, math.inf, math.nan])
def test_reason_if_the_direction_is_not_finite_or_zero(length):
    objective, direction = along(lambda x: -x)
    found = critical_sharpness(objective, {"x": direction["x"] * length})
    assert math.isnan(found.value)
    assert found.note == f"the direction has length {length}"


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_reason_if_the_loss_is_not_finite_at_the_weights(broken):
    objective, direction = along(lambda x: x + broken)
    found = critical_sharpness(objective, direction)
    assert math.isnan(found.value)
    assert found.note == f"the loss at the weights is {broken}"


# -- costs and contracts --------------------------------------------------------------------------


def test_forwards():
    problem, update, truth = problem_and_update()
    before = bits(problem.params)
    for factor in (0.51, 0.7, 0.97, 1.03, 1.4, 1.99):
        objective = objective_of(problem)
        found = critical_sharpness(objective, update, start=factor * 2 / truth)
        assert found.forwards == objective.forwards
        # L(w), two or three to bracket, the earlier ones of three more, four to halve [1, 2] to a
        # sixteenth.
        assert 8 <= found.forwards <= 10
        assert (objective.gradients, objective.hvps) == (0, 0)
    objective.loss()
    again = critical_sharpness(objective, update, start=factor * 2 / truth)
    assert again.forwards == found.forwards - 1
    far = critical_sharpness(objective_of(problem), update, start=factor * 2 / truth / 2**10)
    # From 1.99 eta_c / 2^10: nine doublings to .995, and one more; three of them for earlier ones.
    assert far.forwards == found.forwards + 6
    assert bits(problem.params) == before
    assert far.definition == "critical sharpness 2 / eta_c, rtol 0.05"
    assert far.displacement == {}


@pytest.mark.parametrize("call", [2, 3, 5])
def test_weights_are_restored_after_an_error(call):
    problem, update, _ = problem_and_update()
    before = bits(problem.params)
    loss = RaisesAt(problem.loss, call)
    with pytest.raises(ArithmeticError, match="half way"):
        critical_sharpness(Objective(loss, problem.params, check_deterministic=False), update)
    assert bits(problem.params) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rtol": 0.0}, "rtol=0.0: expected a number above 0 and below 1"),
        ({"rtol": 1.0}, "rtol=1.0: expected a number above 0 and below 1"),
        ({"start": 0.0}, "start=0.0: expected a finite number > 0, or None"),
        ({"start": math.inf}, "start=inf: expected a finite number > 0, or None"),
    ],
)
def test_invalid_arguments(wrong, message):
    problem, update, _ = problem_and_update()
    with pytest.raises(ValueError, match=re.escape(message)):
        critical_sharpness(objective_of(problem), update, **wrong)


def test_direction_of_other_parameters_raises():
    problem, _, _ = problem_and_update()
    with pytest.raises(ValueError, match="no trainable parameter of that name"):
        critical_sharpness(objective_of(problem), {"elsewhere": torch.ones(6, dtype=F64)})
    with pytest.raises(ValueError, match="expected the parameter's shape"):
        critical_sharpness(objective_of(problem), {"w": torch.ones(5, dtype=F64)})
