"""The weights: restored bitwise, changes detected, and which parameters are used."""

import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.objective import Objective
from tests.oracles import F64, bits, close, flat, normal, seven_weights

# -- restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_weights_are_restored_bit_for_bit(dtype):
    # 1e4 swallows the last bits of what is added to it: subtracting again would not be enough.
    w = Parameter(torch.tensor([0.1, -0.0, 1e4, 1e-4], dtype=dtype))
    u = Parameter(torch.full((2,), 1 / 3, dtype=dtype))
    params = {"w": w, "u": u}
    objective = Objective(lambda: w.double().square().sum() + u.double().sum(), params)
    before = [p.detach().clone() for p in params.values()]
    v = {n: torch.full_like(p, 0.7).detach() for n, p in params.items()}
    addresses = [p.data_ptr() for p in params.values()]
    objective.loss_at(v)
    objective.losses_at([v, {"w": v["w"]}], [(0.3, 0.1), (-0.2, 5.0)])
    objective.gradient_at(v)
    Objective(lambda: w.double().square().sum(), params, engine="finite_difference").hvp(v)
    for p, kept in zip(params.values(), before, strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, kept)
        assert torch.equal(p.detach().signbit(), kept.signbit())
    assert [p.data_ptr() for p in params.values()] == addresses


@pytest.mark.parametrize("call", ["loss_at", "losses_at", "gradient_at", "finite_difference"])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_weights_are_restored_after_an_exception(call, fail_at):
    q = seven_weights()
    countdown = [math.inf]

    def loss():
        countdown[0] -= 1
        if countdown[0] < 0:
            raise ArithmeticError("half way")
        return q.loss()

    engine = "finite_difference" if call == "finite_difference" else "auto"
    objective = Objective([(1.0, q.loss), (1.0, loss)], q.params, engine=engine)
    objective.loss()
    before, v = bits(q.params), q.named(normal(7))
    calls = {
        "loss_at": (objective.loss_at, (v,)),
        "losses_at": (objective.losses_at, ([v], [(0.5,), (1.0,)])),
        "gradient_at": (objective.gradient_at, (v,)),
        "finite_difference": (objective.hvp, (v,)),
    }
    method, arguments = calls[call]
    # loss_at and gradient_at evaluate the second term once only.
    countdown[0] = fail_at if call in ("losses_at", "finite_difference") else 0
    with pytest.raises(ArithmeticError, match="half way"):
        method(*arguments)
    assert bits(q.params) == before
    countdown[0] = math.inf
    close(objective.gradient_at(v), q.g() + q.A @ flat(v))  # still correct


def test_training_between_two_calls_is_not_undone():
    """The weights are restored to their current values, not to those of an earlier call."""
    q = seven_weights()
    objective = Objective(q.loss, q.params)
    objective.loss_at(q.named(normal(7)))
    for p in q.params.values():
        p.data.add_(1.0)  # leaves no trace in the version counter
    before = bits(q.params)
    objective.loss_at(q.named(normal(7)))
    assert bits(q.params) == before


# -- changed elsewhere ----------------------------------------------------------------------------


SGD, ADAM = torch.optim.SGD, torch.optim.Adam


@pytest.mark.parametrize(
    "move",
    [
        lambda w: SGD([w], lr=0.5, foreach=True).step(),
        lambda w: SGD([w], lr=0.5, fused=True).step(),
        lambda w: ADAM([w], lr=0.5).step(),
        lambda w: ADAM([w], lr=0.5, fused=True).step(),
        lambda w: w.data.mul_(2.0),
        lambda w: setattr(w, "data", 2 * w.data),
        lambda w: w.detach().neg_(),  # of the same length
    ],
    ids=["sgd", "fused_sgd", "adam", "fused_adam", "data", "new_data", "sign"],
)
@pytest.mark.parametrize("warm", ["loss", "gradient", "hvp"])
def test_weights_changed_elsewhere_are_detected(move, warm):
    """Quartic, so that loss, gradient and curvature all change."""
    w = Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    ones = {"w": torch.ones(3, dtype=F64)}
    objective = Objective(lambda: (torch.tensor([1.0, 2.0, 5.0]) * w**4).sum(), {"w": w})
    getattr(objective, warm)(*([ones] if warm == "hvp" else []))
    before = w.detach().clone()
    w.grad = torch.ones_like(w)
    move(w)
    now = w.detach().clone()
    assert not torch.equal(before, now)
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    expected = {
        "loss": (scale * now**4).sum(),
        "gradient": 4 * scale * now**3,
        "hvp": 12 * scale * now**2,
    }
    for call in (warm, *expected):  # first what was known
        close(getattr(objective, call)(*([ones] if call == "hvp" else [])), expected[call])
    assert torch.equal(w.detach(), now)


# -- which parameters -----------------------------------------------------------------------------


def test_frozen_dropped_tied_once_unused_zero():
    a, b = (Parameter(torch.tensor([value], dtype=F64)) for value in (2.0, 3.0))
    frozen = Parameter(torch.ones(1, dtype=F64), requires_grad=False)
    unused = Parameter(torch.ones(2, dtype=F64))
    params = {"a": a, "frozen": frozen, "again": a, "b": b, "unused": unused}
    objective = Objective(lambda: (a**2 * b + frozen).sum(), params)
    assert list(objective.params) == ["a", "b", "unused"]
    close(objective.gradient(), [12.0, 4.0, 0.0, 0.0])
    one = {"a": torch.ones(1, dtype=F64), "unused": torch.ones(2, dtype=F64)}
    close(objective.hvp(one), [6.0, 4.0, 0.0, 0.0])


def test_linear_parameter_has_no_curvature():
    w, linear = (Parameter(normal(2, seed=seed)) for seed in (0, 1))
    objective = Objective(lambda: w.pow(3).sum() + linear.sum(), {"w": w, "linear": linear})
    both = {"w": torch.ones(2, dtype=F64), "linear": torch.ones(2, dtype=F64)}
    close(objective.hvp(both), flat({"w": 6 * w.detach(), "linear": torch.zeros(2)}))
    assert objective.hvp({"linear": torch.ones(2, dtype=F64)})["w"].count_nonzero() == 0
    flat_loss = Objective(lambda: linear.sum(), {"linear": linear})
    assert flat(flat_loss.hvp({"linear": torch.ones(2, dtype=F64)})).count_nonzero() == 0
    assert flat_loss.engine_used == "double_backward"


def test_sparse_gradients():
    """An embedding with sparse=True; only looked-up rows have a gradient."""
    embedding = nn.Embedding(4, 2, sparse=True, dtype=F64)
    index = torch.tensor([1, 3, 1])
    objective = Objective(
        lambda: embedding(index).square().sum() / 2, dict(embedding.named_parameters())
    )
    rows = torch.tensor([[0.0], [2.0], [0.0], [1.0]], dtype=F64)
    close(objective.gradient()["weight"], rows * embedding.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_give_float32_vectors(dtype):
    """Exact numbers, so that the precision of the weights does not blur the comparison."""
    w = Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    objective = Objective(lambda: (w.float() ** 3).sum(), {"w": w})
    ones = {"w": torch.ones(2)}
    for vector, expected in [
        (objective.gradient(), [3.0, 12.0]),
        (objective.hvp(ones), [6.0, 12.0]),
        (objective.gradient_at(ones), [12.0, 27.0]),
    ]:
        assert vector["w"].dtype == torch.float32
        assert vector["w"].tolist() == expected
    assert float(objective.loss_at(ones)) == 35.0
