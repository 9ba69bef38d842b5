"""Many products at the same weights: equal to single products, without side effects."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry import hessian_trace, spectral_density, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import NETWORKS, without_double_backward
from tests.oracles import close, flat, named, normal, seven_weights


@pytest.mark.parametrize("name", NETWORKS)
def test_products_equal_the_dense_hessian(name):
    problem = NETWORKS[name]()
    identity = torch.eye(len(problem.hessian), dtype=torch.float64)
    with Objective(problem.loss, problem.params).products() as product:
        close(torch.stack([product(row) for row in identity]), problem.hessian, 1e-11)


def test_batches_of_different_weights():
    first, second = seven_weights(seed=0), seven_weights(seed=3)
    second.params.update(first.params)
    objective = Objective([(1.0, first.loss), (3.0, second.loss)], first.params)
    v = normal(7, seed=5)
    with objective.products() as product:
        found = [product(v), product(2 * v)]
    close(found[0], (first.A + 3 * second.A) @ v / 4)
    assert torch.equal(found[1], 2 * found[0])
    assert torch.equal(found[0], flat(objective.hvp(first.named(v))))
    assert (objective.hvps, objective.gradients) == (3, 1)


def test_parameters_of_different_dtypes():
    a, b = Parameter(normal(3).float()), Parameter(normal(2, seed=1))
    x = normal(3, seed=3)

    def loss():
        return (x * a.double()).sum() ** 2 / 2 + (b**2).sum()

    v = normal(5, seed=2)
    with Objective(loss, {"a": a, "b": b}).products() as product:
        found = product(v)
    assert found.dtype == torch.float64
    close(found, torch.cat([x * (x @ v[:3]), 2 * v[3:]]), 1e-6)


def test_weights_moved_between_products_are_detected():
    w = Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    objective = Objective(lambda: w.exp().sum(), {"w": w})
    ones = torch.ones(2, dtype=torch.float64)
    for factor in (1.0, 3.0):
        w.data = factor * torch.tensor([1.0, 2.0], dtype=torch.float64)
        with objective.products() as product:
            close(product(ones), w.detach().exp())


def test_finite_differences_take_over_inside():
    smooth, once = without_double_backward()
    objective = Objective(once.loss, once.params)
    v, own = normal(83, seed=9), F.conv2d
    with objective.products() as product:
        assert F.conv2d is not own  # kernels are replaced inside the context
        for _ in range(2):
            close(product(v), smooth.hessian @ v, 1e-7)
        assert F.conv2d is own
    assert objective.engine_note.startswith("no double backward")
    assert F.conv2d is own


def test_kernels_are_replaced_once_and_restored():
    net, x = nn.Conv1d(2, 3, 2), torch.randn(4, 2, 5)
    objective = Objective(lambda: net(x).pow(3).mean(), dict(net.named_parameters()))
    own, v = torch.conv1d, torch.ones(15)
    with objective.products() as product:
        stand_in = torch.conv1d
        assert stand_in is not own
        product(v)
        objective.loss()
        assert torch.conv1d is stand_in
        with pytest.raises(RuntimeError, match="size"):
            product(v[1:])
    assert torch.conv1d is own
    close(flat(objective.hvp(named(v, objective.params))), product(v), 1e-6)


def test_state_is_restored_after_an_error():
    """The fused attention kernel is restored, and replaced again for the next product."""
    problem = NETWORKS["attention"]()
    objective = Objective(problem.loss, problem.params, engine="double_backward")
    own = torch.conv1d

    def fails():
        with objective.products():
            raise KeyError("a solver's own")

    with pytest.raises(KeyError, match="own"):
        fails()
    assert torch.conv1d is own
    v = normal(len(problem.hessian), seed=5)
    close(objective.hvp(named(v, problem.params)), problem.hessian @ v, 1e-11)


class Damped(Objective):
    """A subclass with its own Hessian."""

    def hvp(self, vector):
        return {n: t + 10 * vector[n] for n, t in super().hvp(vector).items()}


@pytest.mark.parametrize("patched", [False, True])
def test_overridden_products_are_used(patched):
    """By inheritance or put into the object; top eigenvalue 7, trace 6.5 over 7 directions."""
    q = seven_weights()
    objective = (Objective if patched else Damped)(q.loss, q.params)
    if patched:
        damped = Damped(q.loss, q.params)
        objective.hvp = damped.hvp
    assert float(top_eigenvalues(objective).eigenvalues[0]) == pytest.approx(17.0, abs=1e-3)
    density = spectral_density(objective, samples=2)
    assert float(density.ritz_values.max()) == pytest.approx(17.0, abs=1e-6)
    assert hessian_trace(objective, samples=300).value == pytest.approx(76.5, rel=0.05)
