"""SAM and ASAM sharpness, and curvature along a direction, against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import curvature_along, sam_sharpness
from tests.geometry.networks import NETWORKS
from tests.oracles import F64, Quadratic, flat, normal, one_step_asam, one_step_sam, symmetric

SHAPES = {"a": (2, 3), "b": (4,)}
SPECTRUM = [9.0, 5.0, 2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -3.0, -6.0]


def quadratic(seed=0):
    q = Quadratic(symmetric(SPECTRUM, seed), shapes=SHAPES, seed=seed)
    return q, Objective(q.loss, q.params)


@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.7, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_sam_on_a_quadratic(rho, seed):
    q, objective = quadratic(seed)
    found = sam_sharpness(objective, rho)
    assert found.value == pytest.approx(one_step_sam(q.A, q.g(), rho), rel=1e-9)
    expected = rho * q.g() / q.g().norm()
    torch.testing.assert_close(flat(found.displacement), expected, rtol=1e-12, atol=0)
    assert found.definition == f"SAM, one ascent step, rho {rho:g}"


@pytest.mark.parametrize("eta", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_asam_on_a_quadratic(rho, eta):
    q, objective = quadratic()
    scale = q.w().abs() + eta
    found = sam_sharpness(objective, rho, adaptive=True, eta=eta)
    assert found.value == pytest.approx(one_step_asam(q.A, q.g(), scale, rho), rel=1e-9)
    # Its length is rho in the norm that each weight is a unit of.
    assert float((flat(found.displacement) / scale).norm()) == pytest.approx(rho, rel=1e-12)
    assert found.definition == f"ASAM (eta {eta:g}), one ascent step, rho {rho:g}"


def test_default_radius():
    q, objective = quadratic()
    plain, adaptive = sam_sharpness(objective), sam_sharpness(objective, adaptive=True)
    assert plain.value == pytest.approx(one_step_sam(q.A, q.g(), 0.05), rel=1e-9)
    expected = one_step_asam(q.A, q.g(), q.w().abs(), 0.5)
    assert adaptive.value == pytest.approx(expected, rel=1e-9)


def test_weights_are_restored_and_work_is_counted():
    q, objective = quadratic()
    before = q.w()
    sam_sharpness(objective)
    assert torch.equal(q.w(), before)
    assert (objective.forwards, objective.gradients, objective.hvps) == (3, 1, 0)  # 2 to check
    sam_sharpness(objective, adaptive=True)
    assert (objective.forwards, objective.gradients, objective.hvps) == (4, 1, 0)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0])
def test_asam_is_invariant_to_rescaling(adaptive, factor):
    """Biases too: the first layer's are scaled with its weights."""
    module, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(F64), normal(10, 4)
    for seed, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=seed)
    objective = Objective(lambda: module(x).square().mean(), dict(module.named_parameters()))
    before = sam_sharpness(objective, 0.1, adaptive=adaptive).value
    loss = float(objective.loss())
    with torch.no_grad():
        for p in module[0].parameters():
            p.mul_(factor)
        module[2].weight.div_(factor)
    assert float(objective.loss()) == pytest.approx(loss, rel=1e-12)
    after = sam_sharpness(objective, 0.1, adaptive=adaptive).value
    if adaptive:
        assert after == pytest.approx(before, rel=1e-10)
    else:
        assert abs(after / before - 1) > 0.05


@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradient_is_zero_sharpness(adaptive):
    """At a minimum and at a saddle point: there is no ascent direction."""
    for sign in (1.0, -1.0):
        w = Parameter(torch.zeros(3, dtype=F64))
        objective = Objective(lambda sign=sign, w=w: sign * w.square().sum(), {"w": w})
        found = sam_sharpness(objective, adaptive=adaptive, eta=0.01 if adaptive else 0.0)
        assert found.value == 0.0
        assert found.displacement["w"].tolist() == [0, 0, 0]


def test_asam_at_zero_weights_is_zero_without_eta():
    w = Parameter(torch.zeros(2, dtype=F64))
    objective = Objective(lambda: (w * 3).sum(), {"w": w})
    assert sam_sharpness(objective, adaptive=True).value == 0.0
    # T = eta everywhere: e = rho eta g/||g||, so that the rise is rho eta ||g||.
    found = sam_sharpness(objective, 0.5, adaptive=True, eta=0.1)
    assert found.value == pytest.approx(0.5 * 0.1 * 3 * math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_gradient_that_is_not_finite_gives_nan(adaptive, slope):
    w = Parameter(torch.ones(2, dtype=F64))
    objective = Objective(lambda: w[0] * slope + w[1], {"w": w})
    before = w.detach().clone()
    assert math.isnan(sam_sharpness(objective, adaptive=adaptive).value)
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "rho=0.0: expected a finite number > 0"),
        ({"rho": -0.1}, "rho=-0.1: expected a finite number > 0"),
        ({"rho": math.inf}, "rho=inf: expected"),
        ({"rho": math.nan}, "rho=nan: expected"),
        ({"adaptive": True, "eta": -1e-3}, "eta=-0.001: expected a number >= 0"),
        ({"adaptive": True, "eta": math.nan}, "eta=nan: expected"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    _, objective = quadratic()
    with pytest.raises(ValueError, match=message):
        sam_sharpness(objective, **arguments)
    assert objective.gradients == 0


# -- curvature along a direction ------------------------------------------------------------------


def test_curvature_along_a_quadratic():
    q, objective = quadratic()
    for seed, length in [(3, 1.0), (4, 1e-6), (5, 1e6)]:
        d = length * normal(10, seed=seed)
        expected = float(d @ q.A @ d / (d @ d))
        assert curvature_along(objective, q.named(d)) == pytest.approx(expected, rel=1e-10)
    assert objective.hvps == 3
    values, vectors = torch.linalg.eigh(q.A)
    for value, v in zip(values.tolist(), vectors.T, strict=True):
        assert curvature_along(objective, q.named(v)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_along_the_gradient_of_a_network(name):
    problem = NETWORKS[name]()
    objective = Objective(problem.loss, problem.params)
    g = flat(objective.gradient()).numpy()
    expected = g @ problem.hessian.numpy() @ g / (g @ g)
    assert curvature_along(objective, objective.gradient()) == pytest.approx(expected, rel=1e-10)
    # And SAM is its Taylor series in rho, to the third order.
    rho = 1e-3
    series = rho * np.linalg.norm(g) + rho**2 / 2 * expected
    assert sam_sharpness(objective, rho).value == pytest.approx(series, rel=1e-5)


def test_curvature_along_zero_is_nan():
    _, objective = quadratic()
    assert math.isnan(curvature_along(objective, {}))
    assert math.isnan(curvature_along(objective, {"b": torch.zeros(4)}))
    assert objective.hvps == 0
