"""Functions without a double backward: differences of gradients, and the warning."""

import pytest
import torch
from torch.nn import Parameter

from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import OnceTanh, mlp, without_double_backward
from tests.oracles import F64, close, flat, named, normal, seven_weights

# -- no double backward ---------------------------------------------------------------------------


def test_falls_back_to_finite_differences_with_a_warning():
    smooth, once = without_double_backward()
    objective = Objective(once.loss, once.params)
    assert (objective.engine_used, objective.engine_note) == ("double_backward", "")
    v = normal(83, seed=9)
    product = objective.hvp(named(v, once.params))
    close(product, smooth.hessian @ v, 1e-7)
    assert objective.engine_used == "finite_difference"
    assert objective.engine_note.startswith("no double backward: the backward of one")
    assert "\n" not in objective.engine_note
    gradients = objective.gradients
    objective.hvp(objective.gradient())  # does not try the other engine again
    assert objective.gradients - gradients <= 3


def test_last_function_of_the_loss_has_no_double_backward():
    """The input of its backward is constant, so its gradient looks like that of a linear loss."""
    w = Parameter(normal(4))
    objective = Objective(lambda: OnceTanh.apply(w).sum(), {"w": w})
    v, y = normal(4, seed=1), w.detach().tanh()
    close(objective.hvp({"w": v}), -2 * y * (1 - y * y) * v, 1e-6)
    assert objective.engine_used == "finite_difference"


def test_engine_double_backward_does_not_fall_back():
    _, once = without_double_backward()
    objective = Objective(once.loss, once.params, engine="double_backward")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"engine='double_backward': .*twice .*pass engine='auto'"
        ):
            objective.hvp({name: torch.ones_like(p) for name, p in once.params.items()})
    assert objective.engine_used == "double_backward"


class Eats(torch.autograd.Function):
    """A backward that works, and a double backward that runs out of memory."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.order == 2:
            raise torch.OutOfMemoryError("not enough")
        return Eats.apply(grad, 2), None


def test_out_of_memory_is_not_a_missing_double_backward():
    """Nor a loss that needs a graph: either fallback would need more memory."""
    w = Parameter(torch.ones(3))
    objective = Objective(lambda: Eats.apply(w**2, 1).sum().square(), {"w": w})
    with pytest.raises(torch.OutOfMemoryError):
        objective.hvp({"w": torch.ones(3)})
    assert objective.engine_used == "double_backward"
    calls = []

    def loss():
        calls.append(1)
        raise torch.OutOfMemoryError("not enough")

    with pytest.raises(torch.OutOfMemoryError):
        Objective(loss, {"w": w}).loss()
    assert len(calls) == 1


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-8)])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e4])
def test_finite_differences_on_a_smooth_network(dtype, rtol, length):
    """The length of the vector must not matter: the step is set for a unit vector."""
    problem, exact = mlp(dtype), mlp().hessian
    objective = Objective(problem.loss, problem.params, engine="finite_difference")
    for seed in range(5):
        v = length * normal(83, seed=seed)
        product = objective.hvp(named(v.to(dtype), problem.params))
        error = (flat(product).double() - exact @ v).norm()
        assert error < rtol * v.norm() * torch.linalg.matrix_norm(exact, 2)
    assert objective.engine_used == "finite_difference"


def test_finite_differences_from_zero():
    """All weights zero: no length to take the step from; and the zero vector."""
    q = seven_weights()
    for p in q.params.values():
        p.data.zero_()
    objective = Objective(q.loss, q.params, engine="finite_difference")
    close(objective.hvp(q.named(normal(7))), q.A @ normal(7), 1e-9)
    assert flat(objective.hvp({})).count_nonzero() == 0


def test_finite_differences_need_two_gradients():
    q = seven_weights()
    objective = Objective(q.loss, q.params, engine="finite_difference", check_deterministic=False)
    objective.hvp(q.named(normal(7)))
    assert (objective.forwards, objective.gradients, objective.hvps) == (0, 2, 1)
