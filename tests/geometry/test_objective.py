"""Loss, gradient and Hessian-vector products against closed forms; no side effects."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry.objective import Objective
from tests.geometry.networks import NETWORKS, mlp, without_double_backward
from tests.geometry.test_kernels import sdpa_flags
from tests.oracles import (
    F64,
    Quadratic,
    close,
    flat,
    generator,
    named,
    normal,
    seven_weights,
    symmetric,
)

# -- closed forms ---------------------------------------------------------------------------------


def test_quadratic():
    q = seven_weights(constant=3.0)
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
    q = seven_weights()
    u, v = normal(7, seed=5), normal(7, seed=6)
    points = [(0.5, 0.0), (0.0, -2.0), (1.0, 3.0), (0.0, 0.0)]
    losses = Objective(q.loss, q.params).losses_at([q.named(u), q.named(v)], points)
    close(losses, [q.value(q.w() + a * u + b * v) for a, b in points])
    assert losses.dtype == F64
    assert Objective(q.loss, q.params).losses_at([q.named(u)], []).shape == (0,)


def test_no_loss_of_one_point_takes_memory_while_the_next_is_computed():
    """They would fragment the memory of the next forward; live objects are counted via numpy."""
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
    q = seven_weights()
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

    q = seven_weights()
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
    q, r = seven_weights(), seven_weights(seed=10)
    shared = [(1.0, q.loss), (3.0, lambda: q.loss() + float(r.c) + 8.0)]
    objective = Objective(shared, q.params)
    assert float(objective.loss()) == pytest.approx(q.value(q.w()) + 6.0, rel=1e-12)
    close(objective.hvp(q.named(normal(7))), q.A @ normal(7))


# -- no side effects ------------------------------------------------------------------------------


def test_no_side_effects():
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
    q = seven_weights()
    with torch.no_grad():
        objective = Objective(q.loss, q.params)
        close(objective.gradient(), q.g())
        close(objective.hvp(q.named(normal(7))), q.A @ normal(7))
    assert not any(tensor.requires_grad for tensor in objective.gradient().values())


def test_results_are_copies():
    q = seven_weights()
    objective = Objective(q.loss, q.params)
    objective.loss().zero_()
    flat_gradient = objective.gradient()
    for tensor in (*flat_gradient.values(), *objective.gradient_at({}).values()):
        tensor.zero_()
    assert float(objective.loss()) == pytest.approx(q.value(q.w()), rel=1e-12)
    close(objective.gradient(), q.g())


# -- amount of work -------------------------------------------------------------------------------


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


def test_loss_and_gradient_are_reused_from_the_graph():
    q = seven_weights()
    objective = Objective(q.loss, q.params, check_deterministic=False)
    objective.hvp(q.named(normal(7)))
    assert counts(objective) == (0, 1, 1)
    close(objective.gradient(), q.g())
    assert float(objective.loss()) == pytest.approx(q.value(q.w()), rel=1e-12)
    assert counts(objective) == (0, 1, 1)
    objective.release()
    objective.hvp(q.named(normal(7)))
    assert counts(objective) == (0, 2, 2)


# -- invalid losses and arguments -----------------------------------------------------------------


def test_nondeterministic_loss_raises():
    w = Parameter(torch.ones(3))
    steps = iter(range(100))
    objective = Objective(lambda: w.sum() * (1 + 1e-4 * next(steps)), {"w": w})
    for _ in range(2):  # and again: a failed check does not count as a check
        with pytest.raises(ValueError, match=r"not deterministic: .*check_deterministic=False"):
            objective.loss()


def test_nondeterministic_loss_without_the_check():
    w = Parameter(torch.ones(3))
    steps = iter(range(100))
    objective = Objective(lambda: w.sum() * (1 + next(steps)), {"w": w}, check_deterministic=False)
    assert float(objective.loss()) == 3.0
    assert float(objective.loss_at({})) == 6.0
    assert objective.forwards == 2


def test_check_is_repeated_after_a_failed_call():
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


def test_loss_that_is_not_finite_is_returned():
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
def test_loss_that_is_not_a_scalar_tensor(loss, kind, message, check):
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
        ({"engine": "jvp"}, ValueError, "engine='jvp': expected 'auto', 'double_backward' or"),
        ({"loss_fn": []}, ValueError, r"loss_fn=\[\]: expected at least one"),
        ({"loss_fn": [(0.0, len)]}, ValueError, r"holds \(0.0, .*: expected \(weight > 0"),
        ({"loss_fn": [(math.inf, len)]}, ValueError, "expected .weight > 0, callable. pairs"),
        ({"loss_fn": [(math.nan, len)]}, ValueError, "expected .weight > 0, callable. pairs"),
        ({"loss_fn": [(1.0, 2.0)]}, ValueError, r"holds \(1.0, 2.0\)"),
    ],
)
def test_invalid_arguments(arguments, kind, message):
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
def test_invalid_vector(vector, message):
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
    """After a RuntimeError the loss is evaluated with a graph; a second error is raised."""
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


# -- memory ---------------------------------------------------------------------------------------


class Saved:
    """What the graph keeps for one tensor, alive as long as the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def no_collector():
    """Reference counts alone must free everything: on a GPU the collector would run too late."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["release", "delete", "loss_at", "moved"])
def test_graph_is_freed(end, no_collector):
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


def test_dense_hessian_equals_differences_of_losses():
    """The dense Hessian of the networks, computed without derivatives."""
    problem, hessian = mlp(), mlp().hessian
    w, step = [p.detach().clone() for p in problem.params.values()], 1e-3

    def loss_at(v, c):
        with torch.no_grad():
            for p, kept, piece in zip(
                problem.params.values(), w, named(v, problem.params).values(), strict=True
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
