"""Loss, gradient and Hessian-vector products against closed forms, and what must not change."""

import gc
import math
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.faults import OtherRankError
from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import NETWORKS, Problem, mlp
from tests.geometry.test_kernels import sdpa_flags
from tests.oracles import F64, Quadratic, flat, generator, normal, symmetric

SHAPES = {"a": (2, 2), "b": (3,)}
SPECTRUM = [7.0, 3.0, 1.0, 0.5, 0.0, -1.0, -4.0]


def quadratic(**options):
    return Quadratic(symmetric(SPECTRUM), shapes=SHAPES, **options)


def close(actual, expected, rtol=1e-12):
    """Within ``rtol`` of the largest entry; vectors may be mappings."""
    if isinstance(actual, dict):
        actual = flat(actual)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def bits(params):
    """The exact bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return [p.detach().numpy().tobytes() for p in params.values()]


# -- closed forms ---------------------------------------------------------------------------------


def test_quadratic():
    q = quadratic(constant=3.0)
    objective = Objective(q.loss, q.params)
    v, w = normal(7, seed=5), q.w()
    assert float(objective.loss()) == pytest.approx(q.value(w), rel=1e-12)
    assert objective.loss().dtype == F64
    close(objective.gradient(), q.g())
    assert {n: t.shape for n, t in objective.gradient().items()} == {"a": (2, 2), "b": (3,)}
    close(objective.hvp(q.named(v)), q.A @ v)
    assert float(objective.loss_at(q.named(v))) == pytest.approx(q.value(w + v), rel=1e-12)
    close(objective.gradient_at(q.named(v)), q.g() + q.A @ v)


def test_losses_at_combines_directions():
    q = quadratic()
    u, v = normal(7, seed=5), normal(7, seed=6)
    points = [(0.5, 0.0), (0.0, -2.0), (1.0, 3.0), (0.0, 0.0)]
    losses = Objective(q.loss, q.params).losses_at([q.named(u), q.named(v)], points)
    close(losses, [q.value(q.w() + a * u + b * v) for a, b in points])
    assert losses.dtype == F64
    assert Objective(q.loss, q.params).losses_at([q.named(u)], []).shape == (0,)


def test_no_loss_of_one_point_takes_memory_while_the_next_is_computed():
    """Each would lie in the middle of what the next forward had used; numpy tells who is alive."""
    w = Parameter(torch.tensor([1.0, 2.0]))
    losses = []

    def loss():
        assert all(reference() is None for reference in losses)
        value = np.array(float((w.detach() ** 2).sum()), dtype=np.float32)
        losses.append(weakref.ref(value))
        return torch.from_numpy(value)

    objective = Objective(loss, {"w": w}, check_deterministic=False)
    found = objective.losses_at([{"w": torch.tensor([1.0, 0.0])}], [(0.0,), (1.0,), (2.0,)])
    assert found.tolist() == [5.0, 8.0, 13.0]


def test_missing_entry_means_zero():
    q = quadratic()
    objective = Objective(q.loss, q.params)
    v = torch.cat([torch.zeros(4, dtype=F64), normal(3)])
    only_b = {"b": v[4:]}
    close(objective.hvp(only_b), q.A @ v)
    close(objective.gradient_at(only_b), q.g() + q.A @ v)
    assert float(objective.loss_at(only_b)) == pytest.approx(q.value(q.w() + v), rel=1e-12)
    assert flat(objective.hvp({})).count_nonzero() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_hvp_is_the_dense_hessian(name):
    """On attention too, where the fused kernel has no double backward: the math one is taken."""
    problem = NETWORKS[name]()
    objective = Objective(problem.loss, problem.params, engine="double_backward")
    rows = [
        flat(objective.hvp(dict(zip(problem.params, pieces, strict=True))))
        for pieces in zip(
            *(
                block.view(-1, *p.shape)
                for block, p in zip(
                    torch.eye(len(problem.hessian), dtype=F64).split(
                        [p.numel() for p in problem.params.values()], dim=1
                    ),
                    problem.params.values(),
                    strict=True,
                )
            ),
            strict=True,
        )
    ]
    close(torch.stack(rows), problem.hessian, 1e-11)
    close(objective.gradient(), flat(dict(enumerate(gradients(problem)))))


def gradients(problem):
    return torch.autograd.grad(problem.loss(), list(problem.params.values()))


def test_fused_attention_alone_has_no_double_backward():
    """What the test above relies on: without the Objective it fails."""
    problem = NETWORKS["attention"]()
    first = torch.autograd.grad(
        problem.loss(), problem.module.qkv.weight, create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(first[0].sum(), problem.module.qkv.weight)


def test_compiled_function_runs_eagerly():
    """What torch.compile makes has no double backward (aot_autograd).  `eager` needs no compiler
    and still shows whether dynamo was asked."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    q = quadratic()
    compiled = torch.compile(q.loss, backend=backend)
    close(Objective(compiled, q.params).hvp(q.named(normal(7))), q.A @ normal(7))
    assert calls == []
    torch._dynamo.reset()


# -- several batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_unequal_batches_are_one_large_batch(dtype, rtol):
    problem = mlp(dtype)
    parts = [slice(0, 2), slice(2, 9), slice(9, 11)]
    x, y = problem.x, problem.y
    terms = [
        (9.0 * len(x[part]), lambda part=part: F.cross_entropy(problem.module(x[part]), y[part]))
        for part in parts
    ]
    whole, pieces = Objective(problem.loss, problem.params), Objective(terms, problem.params)
    v = {n: normal(*p.shape, seed=3).to(dtype) for n, p in problem.params.items()}
    close(pieces.loss(), whole.loss(), rtol)
    close(pieces.gradient(), flat(whole.gradient()), rtol)
    close(pieces.hvp(v), flat(whole.hvp(v)), rtol)
    close(pieces.loss_at(v), whole.loss_at(v), rtol)
    close(pieces.gradient_at(v), flat(whole.gradient_at(v)), rtol)


def test_weights_of_terms_are_relative():
    q, r = quadratic(), quadratic(seed=10)
    shared = [(1.0, q.loss), (3.0, lambda: q.loss() + float(r.c) + 8.0)]
    objective = Objective(shared, q.params)
    assert float(objective.loss()) == pytest.approx(q.value(q.w()) + 6.0, rel=1e-12)
    close(objective.hvp(q.named(normal(7))), q.A @ normal(7))


# -- the weights come back ------------------------------------------------------------------------


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
    q = quadratic()
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
    close(objective.gradient_at(v), q.g() + q.A @ flat(v))  # and it goes on working


def test_training_between_two_calls_is_not_undone():
    """The copy that is put back is of the weights as they are now, not of an earlier call."""
    q = quadratic()
    objective = Objective(q.loss, q.params)
    objective.loss_at(q.named(normal(7)))
    for p in q.params.values():
        p.data.add_(1.0)  # leaves no trace in the version counter
    before = bits(q.params)
    objective.loss_at(q.named(normal(7)))
    assert bits(q.params) == before


def test_touches_nothing_else():
    problem = mlp()
    problem.module[0].weight.grad = torch.ones_like(problem.module[0].weight)
    objective = Objective(problem.loss, problem.params)
    state, flags = torch.get_rng_state(), sdpa_flags()
    v = objective.gradient()
    objective.hvp(v)
    objective.gradient_at(v)
    objective.loss_at(v)
    grads = [p.grad for p in problem.params.values()]
    assert torch.equal(grads[0], torch.ones_like(grads[0]))
    assert all(grad is None for grad in grads[1:])
    assert torch.equal(torch.get_rng_state(), state)
    assert sdpa_flags() == flags
    assert torch.is_grad_enabled()


def test_works_inside_no_grad():
    """Lightning calls its validation hooks under no_grad."""
    q = quadratic()
    with torch.no_grad():
        objective = Objective(q.loss, q.params)
        close(objective.gradient(), q.g())
        close(objective.hvp(q.named(normal(7))), q.A @ normal(7))
    assert not any(tensor.requires_grad for tensor in objective.gradient().values())


def test_results_belong_to_the_caller():
    q = quadratic()
    objective = Objective(q.loss, q.params)
    objective.loss().zero_()
    flat_gradient = objective.gradient()
    for tensor in (*flat_gradient.values(), *objective.gradient_at({}).values()):
        tensor.zero_()
    assert float(objective.loss()) == pytest.approx(q.value(q.w()), rel=1e-12)
    close(objective.gradient(), q.g())


# -- work done once -------------------------------------------------------------------------------


def counts(objective):
    return objective.forwards, objective.gradients, objective.hvps


def test_exact_counts_of_work():
    problem = mlp()
    calls = []

    def loss():
        calls.append(torch.is_grad_enabled())
        return problem.loss()

    objective = Objective(loss, problem.params)
    assert counts(objective) == (0, 0, 0)
    objective.loss()
    assert counts(objective) == (2, 0, 0)  # twice, to see that it is deterministic
    v = objective.gradient()
    objective.loss()
    objective.gradient()
    assert counts(objective) == (2, 1, 0)
    for _ in range(20):
        objective.hvp(v)
    assert counts(objective) == (2, 2, 20)  # one graph for all products
    objective.loss_at(v)
    objective.losses_at([v], [(0.1,), (0.2,), (0.3,)])
    objective.gradient_at(v)
    assert counts(objective) == (6, 3, 20)
    objective.loss()
    objective.gradient()
    assert counts(objective) == (6, 3, 20)  # the weights are the same again: still known
    objective.hvp(v)
    assert counts(objective) == (6, 4, 21)  # but the graph is gone
    assert (calls.count(False), calls.count(True)) == (6, 4)


def test_graph_gives_loss_and_gradient_for_nothing():
    q = quadratic()
    objective = Objective(q.loss, q.params, check_deterministic=False)
    objective.hvp(q.named(normal(7)))
    assert counts(objective) == (0, 1, 1)
    close(objective.gradient(), q.g())
    assert float(objective.loss()) == pytest.approx(q.value(q.w()), rel=1e-12)
    assert counts(objective) == (0, 1, 1)
    objective.release()
    objective.hvp(q.named(normal(7)))
    assert counts(objective) == (0, 2, 2)


def test_finite_differences_cost_two_gradients():
    q = quadratic()
    objective = Objective(q.loss, q.params, engine="finite_difference", check_deterministic=False)
    objective.hvp(q.named(normal(7)))
    assert counts(objective) == (0, 2, 1)


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
def test_weights_moved_by_someone_else_are_noticed(move, warm):
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


# -- losses that cannot be, and messages ----------------------------------------------------------


def test_loss_that_varies_is_refused():
    w = Parameter(torch.ones(3))
    steps = iter(range(100))
    objective = Objective(lambda: w.sum() * (1 + 1e-4 * next(steps)), {"w": w})
    for _ in range(2):  # and again: refused is not the same as checked
        with pytest.raises(ValueError, match=r"not deterministic: .*check_deterministic=False"):
            objective.loss()


def test_loss_that_varies_is_accepted_when_asked_for():
    w = Parameter(torch.ones(3))
    steps = iter(range(100))
    objective = Objective(lambda: w.sum() * (1 + next(steps)), {"w": w}, check_deterministic=False)
    assert float(objective.loss()) == 3.0
    assert float(objective.loss_at({})) == 6.0
    assert objective.forwards == 2


def test_check_is_made_up_for_after_a_failed_call():
    w = Parameter(torch.ones(3))
    steps = iter(range(100))

    def loss():
        if (step := next(steps)) == 0:
            raise ArithmeticError("once")
        return w.sum() * step

    objective = Objective(loss, {"w": w})
    with pytest.raises(ArithmeticError, match="once"):
        objective.loss()
    with pytest.raises(ValueError, match="not deterministic"):
        objective.loss()


def test_a_loss_that_is_not_a_number_is_data():
    w = Parameter(torch.tensor([1.0, 0.0]))
    for value in (math.nan, math.inf):
        objective = Objective(lambda value=value: (w * value).sum(), {"w": w})
        assert not math.isfinite(objective.loss())
        assert not flat(objective.gradient()).isfinite().all()


BAD_LOSSES = [
    (lambda w: w, ValueError, r"shape \(2,\): expected a scalar"),
    (lambda w: 3.0, TypeError, "returned float: expected a scalar tensor"),
    (lambda w: None, TypeError, "returned NoneType: expected a scalar tensor"),
    (lambda w: {"loss": w.sum()}, TypeError, "returned dict: expected a scalar tensor"),
]


@pytest.mark.parametrize(("loss", "kind", "message"), BAD_LOSSES)
@pytest.mark.parametrize("check", [True, False])
def test_loss_that_is_no_scalar_tensor(loss, kind, message, check):
    w = Parameter(torch.ones(2))
    for call in ("loss", "gradient", "hvp"):
        objective = Objective(lambda: loss(w), {"w": w}, check_deterministic=check)
        with pytest.raises(kind, match=message):
            getattr(objective, call)(*([{}] if call == "hvp" else []))


@pytest.mark.parametrize(
    "detached", [lambda w: w.detach().sum(), lambda w: w.data.sum(), lambda w: torch.ones(())]
)
def test_detached_loss(detached):
    w = Parameter(torch.ones(2))
    objective = Objective(lambda: detached(w), {"w": w})
    for call in (objective.gradient, lambda: objective.hvp({}), lambda: objective.gradient_at({})):
        with pytest.raises(ValueError, match="loss without a graph"):
            call()


def test_loss_of_one_entry_is_a_scalar():
    w = Parameter(torch.ones(2))
    objective = Objective(lambda: w.square().sum().reshape(1, 1), {"w": w})
    assert float(objective.loss()) == 2.0
    assert objective.gradient()["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"params": {}}, ValueError, "0 tensors and none requires a gradient"),
        (
            {"params": {"w": torch.ones(2)}},
            ValueError,
            "1 tensors and none requires a gradient: expected at least one trainable",
        ),
        ({"params": [torch.ones(2)]}, TypeError, r"params=list: expected a mapping"),
        (
            {"params": {"c": Parameter(torch.ones(2, dtype=torch.complex64))}},
            TypeError,
            r"params\['c'\] is complex",
        ),
        ({"engine": "jvp"}, ValueError, "engine='jvp': expected 'auto', 'double_backward' or"),
        ({"loss_fn": []}, ValueError, r"loss_fn=\[\]: expected at least one"),
        ({"loss_fn": [(0.0, len)]}, ValueError, r"holds \(0.0, .*: expected \(weight > 0"),
        ({"loss_fn": [(math.inf, len)]}, ValueError, "expected .weight > 0, callable. pairs"),
        ({"loss_fn": [(math.nan, len)]}, ValueError, "expected .weight > 0, callable. pairs"),
        ({"loss_fn": [(1.0, 2.0)]}, ValueError, r"holds \(1.0, 2.0\)"),
    ],
)
def test_constructor_refuses(arguments, kind, message):
    w = Parameter(torch.ones(2))
    arguments = {"loss_fn": w.sum, "params": {"w": w}, **arguments}
    with pytest.raises(kind, match=message):
        Objective(**arguments)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ({"x": torch.ones(2)}, r"vector\['x'\]: no trainable parameter of that name"),
        ({"w": torch.ones(3)}, r"vector\['w'\] has shape \(3,\): .*parameter's shape \(2,\)"),
        ({"w": torch.ones(2, 1)}, r"has shape \(2, 1\)"),
        ({"w": torch.ones(())}, r"has shape \(\)"),  # would broadcast
    ],
)
def test_vector_that_does_not_fit(vector, message):
    w = Parameter(torch.ones(2))
    objective = Objective(lambda: w.square().sum(), {"w": w})
    for call in (objective.hvp, objective.loss_at, objective.gradient_at):
        with pytest.raises(ValueError, match=message):
            call(vector)
    with pytest.raises(ValueError, match=message):
        objective.losses_at([vector], [(1.0,)])


# -- losses that differentiate inside -------------------------------------------------------------


def test_gradient_penalty():
    """f = (w'x)^2/2 has the input gradient (w'x) w, so that the penalty is (w'x)^2 ||w||^2."""
    w = Parameter(normal(3))
    data, v = normal(5, 3, seed=1), normal(3, seed=2)

    calls = []

    def penalty():
        calls.append(torch.is_grad_enabled())
        x = data.clone().requires_grad_()
        f = (x @ w).square().sum() / 2
        (slope,) = torch.autograd.grad(f, x, create_graph=True)
        return slope.square().sum(1).mean()

    def formula(w):
        return (data @ w).square().mean() * (w @ w)

    objective = Objective(penalty, {"w": w})
    at = w.detach()
    close(objective.loss(), formula(at))
    assert calls == [False, True, True]  # it fails without a graph once, not every time
    points = [(0.5,), (-1.0,)]
    close(objective.losses_at([{"w": v}], points), [formula(at + c * v) for (c,) in points])
    close(objective.gradient(), torch.func.grad(formula)(at))
    close(objective.hvp({"w": v}), torch.func.hessian(formula)(at) @ v)
    assert objective.engine_used == "double_backward"


def test_error_of_the_loss_is_not_hidden():
    """A RuntimeError without a graph is tried with one; what fails both ways is the user's."""
    w = Parameter(torch.ones(2))

    def loss():
        raise RuntimeError("size mismatch")

    for call in (lambda o: o.loss(), lambda o: o.hvp({})):
        for check in (True, False):
            with pytest.raises(RuntimeError, match="size mismatch"):
                call(Objective(loss, {"w": w}, check_deterministic=check))


# -- one function for loss and gradient -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_without_its_inference_fast_path():
    """In eval mode under no_grad torch takes another kernel, which zeroes the padded positions."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    padded[0, 2:] = True

    def loss():
        return encoder(x, src_key_padding_mask=padded).square().mean()

    with torch.no_grad():
        assert float(loss()) < 0.9
    expected = float(loss().detach())
    objective = Objective(loss, dict(encoder.named_parameters()))
    assert float(objective.loss()) == pytest.approx(expected, rel=1e-6)
    assert float(objective.loss_at({})) == pytest.approx(expected, rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


# -- no double backward ---------------------------------------------------------------------------


class OnceTanh(torch.autograd.Function):
    """tanh as many custom kernels are: with a backward that has no backward."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Once(nn.Module):
    def forward(self, x):
        return OnceTanh.apply(x)


def without_double_backward():
    """The network of :func:`mlp`, and the same with the custom tanh."""
    smooth = mlp()
    layers = [Once() if isinstance(layer, nn.Tanh) else layer for layer in smooth.module]
    once = Problem(nn.Sequential(*layers), smooth.x)
    return smooth, once


def test_falls_back_to_finite_differences_and_says_so():
    smooth, once = without_double_backward()
    objective = Objective(once.loss, once.params)
    assert (objective.engine_used, objective.engine_note) == ("double_backward", "")
    v = normal(83, seed=9)
    product = objective.hvp(dict(zip(once.params, unflat(v, once.params), strict=True)))
    close(product, smooth.hessian @ v, 1e-7)
    assert objective.engine_used == "finite_difference"
    assert objective.engine_note.startswith("no double backward: the backward of one")
    assert "\n" not in objective.engine_note
    gradients = objective.gradients
    objective.hvp(objective.gradient())  # does not try the other engine again
    assert objective.gradients - gradients <= 3


def test_the_last_function_of_the_loss_has_no_double_backward():
    """What flows into its backward is constant: its gradient looks like that of a linear loss."""
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
    """A backward that works and a double backward for which the memory is not enough."""

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
    """Nor a loss that wants a graph: either answer would ask for more."""
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


def unflat(v, params):
    pieces = v.split([p.numel() for p in params.values()])
    return [piece.view(p.shape) for piece, p in zip(pieces, params.values(), strict=True)]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (F64, 1e-8)])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e4])
def test_finite_differences_on_a_smooth_network(dtype, rtol, length):
    """The length of the vector must not matter: the step is set for a unit vector."""
    problem, exact = mlp(dtype), mlp().hessian
    objective = Objective(problem.loss, problem.params, engine="finite_difference")
    for seed in range(5):
        v = length * normal(83, seed=seed)
        pieces = (piece.to(dtype) for piece in unflat(v, problem.params))
        product = objective.hvp(dict(zip(problem.params, pieces, strict=True)))
        error = (flat(product).double() - exact @ v).norm()
        assert error < rtol * v.norm() * torch.linalg.matrix_norm(exact, 2)
    assert objective.engine_used == "finite_difference"


def test_finite_differences_from_zero():
    """All weights zero: no length to take the step from; and the zero vector."""
    q = quadratic()
    for p in q.params.values():
        p.data.zero_()
    objective = Objective(q.loss, q.params, engine="finite_difference")
    close(objective.hvp(q.named(normal(7))), q.A @ normal(7), 1e-9)
    assert flat(objective.hvp({})).count_nonzero() == 0


# -- several processes ----------------------------------------------------------------------------


class Ranks:
    """Two processes, played by two threads of which one computes at a time.

    ``reduce`` is as strict as an all-reduce: all must come, with the same shape and dtype.
    """

    def __init__(self):
        self.turn = threading.Lock()
        self.meeting = threading.Barrier(2, timeout=30)
        self.brought = [None, None]

    def reducer(self, rank):
        def reduce(tensor):
            self.brought[rank] = tensor.clone()
            self.turn.release()  # global flags, as the attention kernel's, are set under the lock
            try:
                self.meeting.wait()
                mine, other = self.brought
                assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
                total = mine + other
                self.meeting.wait()
            finally:
                self.turn.acquire()
            return total

        return reduce

    def run(self, work):
        """``work(rank, reduce)`` on both; what each returned or raised."""
        outcomes = [None, None]

        def task(rank):
            with self.turn:
                try:
                    outcomes[rank] = work(rank, self.reducer(rank))
                except Exception as error:
                    outcomes[rank] = error

        threads = [threading.Thread(target=task, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_two_processes_are_one(engine, dtype, rtol):
    v = {n: normal(*p.shape, seed=3).to(dtype) for n, p in mlp().params.items()}

    def ask(objective):
        return {
            "loss": objective.loss(),
            "hvp": flat(objective.hvp(v)),
            "gradient": flat(objective.gradient()),
            "loss_at": objective.loss_at(v),
            "losses_at": objective.losses_at([v], [(0.1,), (0.2,)]),
            "gradient_at": flat(objective.gradient_at(v)),
        }

    def work(rank, reduce):
        problem = mlp(dtype)  # its own copy, as a process has
        objective = Objective([problem.half(rank)], problem.params, engine=engine, reduce=reduce)
        return ask(objective), counts(objective)

    (first, work_first), (second, work_second) = Ranks().run(work)
    whole = mlp(dtype)
    alone = Objective(whole.loss, whole.params, engine=engine)
    expected = ask(alone)
    rounding = {"hvp": 1e-9 if dtype == F64 else 2e-3} if engine == "finite_difference" else {}
    for name, value in expected.items():
        close(first[name], value, rounding.get(name, rtol))
        assert torch.equal(first[name], second[name])
    assert work_first == work_second


CALLS = {
    "loss": lambda o, v: o.loss(),
    "gradient": lambda o, v: o.gradient(),
    "hvp": lambda o, v: o.hvp(v),
    "loss_at": lambda o, v: o.loss_at(v),
    "losses_at": lambda o, v: o.losses_at([v], [(0.1,), (0.2,)]),
    "gradient_at": lambda o, v: o.gradient_at(v),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_in_one_process_stops_both(call, dtype):
    """And neither waits: the barrier would time out.  Afterwards both can go on."""

    def work(rank, reduce):
        problem = mlp(dtype)
        size, half = problem.half(rank)
        broken = [False]

        def loss():
            if broken[0] and rank == 1:
                raise ArithmeticError("out of range")
            return half()

        objective = Objective([(size, loss)], problem.params, reduce=reduce)
        v = {name: torch.ones_like(p) for name, p in problem.params.items()}
        before = bits(problem.params)
        if call != "loss":
            objective.loss()
        broken[0] = True
        with pytest.raises(ArithmeticError if rank == 1 else OtherRankError) as caught:
            CALLS[call](objective, v)
        broken[0] = False
        assert bits(problem.params) == before
        objective.gradient()
        return str(caught.value)

    assert Ranks().run(work) == [
        "another process failed while computing its share",
        "out of range",
    ]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_processes_change_engine_together(which):
    v = normal(83, seed=9)

    def work(rank, reduce):
        smooth, once = without_double_backward()
        problem = once if rank in which else smooth
        objective = Objective([problem.half(rank)], problem.params, reduce=reduce)
        product = objective.hvp(dict(zip(problem.params, unflat(v, problem.params), strict=True)))
        return flat(product), objective.engine_used

    for product, engine in Ranks().run(work):
        assert engine == "finite_difference"
        close(product, mlp().hessian @ v, 1e-7)


def test_processes_refuse_a_loss_that_varies_together():
    """It varies in one of them only."""

    def work(rank, reduce):
        w = Parameter(torch.ones(2))
        steps = iter(range(10))
        objective = Objective(
            lambda: w.sum() * (1.0 if rank == 0 else 1.0 + next(steps)), {"w": w}, reduce=reduce
        )
        with pytest.raises(ValueError, match="not deterministic"):
            objective.loss()
        return "refused"

    assert Ranks().run(work) == ["refused", "refused"]


# -- memory ---------------------------------------------------------------------------------------


class Saved:
    """What the graph keeps for one tensor, alive as long as the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def no_collector():
    """Reference counts alone must free everything: on a GPU nobody calls the collector in time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["release", "delete", "loss_at", "moved"])
def test_the_graph_is_freed(end, no_collector):
    problem = mlp()
    alive = weakref.WeakSet()

    def pack(tensor):
        saved = Saved(tensor.detach())
        alive.add(saved)
        return saved

    def loss():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return problem.loss()

    v = {name: torch.ones_like(p) for name, p in problem.params.items()}
    objective = Objective(loss, problem.params)
    objective.gradient()
    objective.gradient_at(v)
    assert len(alive) == 0
    objective.hvp(v)
    held = len(alive)
    assert held > 0  # the graph is kept for the next product
    for _ in range(5):
        objective.hvp(v)
    assert len(alive) == held
    if end == "release":
        objective.release()
    elif end == "delete":
        del objective
    elif end == "loss_at":
        objective.loss_at(v)
    else:
        problem.module[0].weight.data.add_(1.0)
        objective.loss()
    assert len(alive) == 0


def tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_grows_over_rounds(no_collector):
    problem, v = mlp(), None
    counted = []
    for turn in range(50):
        objective = Objective(problem.loss, problem.params)
        v = objective.hvp(v or objective.gradient())
        objective.loss_at(v)
        objective.gradient_at(v)
        objective.hvp(v)
        if turn % 2:
            objective.release()
        del objective
        if turn % 10 == 9:
            counted.append(tensors())
    assert counted == [counted[0]] * 5


@pytest.mark.parametrize("reduce", [None, torch.clone], ids=["alone", "one_of_one"])
def test_nothing_grows_after_errors(reduce, no_collector):
    """An error's traceback holds the frame it came from: that must not keep the graph."""
    _, once = without_double_backward()
    v = {name: torch.ones_like(p) for name, p in once.params.items()}
    counted = []
    for _ in range(4):
        objective = Objective(once.loss, once.params, engine="double_backward", reduce=reduce)
        with pytest.raises(RuntimeError, match="twice"):
            objective.hvp(v)
        objective = Objective(lambda: once.module(once.x), once.params, reduce=reduce)
        with pytest.raises(ValueError, match="scalar"):
            objective.loss()
        del objective
        counted.append(tensors())
    assert counted[1:] == [counted[1]] * 3


def test_oracle_of_this_file_agrees_with_differences_of_losses():
    """The dense Hessian of the networks, once more without any derivative."""
    problem, hessian = mlp(), mlp().hessian
    w, step = [p.detach().clone() for p in problem.params.values()], 1e-3

    def loss_at(v, c):
        with torch.no_grad():
            for p, kept, piece in zip(
                problem.params.values(), w, unflat(v, problem.params), strict=True
            ):
                p.copy_(kept + c * piece)
            return float(problem.loss())

    for seed in range(3):
        v = torch.nn.functional.normalize(
            torch.randn(83, generator=generator(seed), dtype=F64), dim=0
        )
        second = np.dot(
            [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12], [loss_at(v, c * step) for c in range(-2, 3)]
        )
        assert second / step**2 == pytest.approx(float(v @ hessian @ v), rel=1e-6)


@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, None]
)
def test_weight_norm_has_the_true_second_derivative(normed):
    """torch's fused weight norm, differentiated twice, gives a matrix that is not symmetric."""
    torch.manual_seed(0)
    first = nn.Linear(4, 5)
    net = nn.Sequential(normed(first) if normed else first, nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = normal(9, 4), torch.arange(9) % 2
    params = dict(net.named_parameters())
    exact = Objective(lambda: F.cross_entropy(net(x), y), params)
    differences = Objective(lambda: F.cross_entropy(net(x), y), params, engine="finite_difference")
    before = torch._weight_norm
    for seed in range(3):
        v = {name: normal(*p.shape, seed=seed) for name, p in params.items()}
        assert torch.allclose(flat(exact.hvp(v)), flat(differences.hvp(v)), rtol=1e-5, atol=1e-7)
    assert exact.engine_used == "double_backward"
    assert torch._weight_norm is before


def test_losses_of_single_batches():
    """Each by itself, without its weight; the loss is their mean."""
    quadratic = Quadratic(symmetric([1.0, 2.0]))
    factors = (1.0, 2.0, 5.0)
    pairs = zip((4.0, 4.0, 2.0), factors, strict=True)
    objective = Objective(
        [(n, lambda f=f: f * quadratic.loss()) for n, f in pairs], quadratic.params
    )
    value = quadratic.value(quadratic.w())
    assert objective.batch_losses() == pytest.approx([f * value for f in factors], rel=1e-14)
    assert float(objective.loss()) == pytest.approx(value * (4 + 8 + 10) / 10, rel=1e-14)
