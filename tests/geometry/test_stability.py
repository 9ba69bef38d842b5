"""The stability edge against the real torch optimizers: where they begin to diverge is the edge."""

import copy
import inspect
import math
import re

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam, RMSprop

from lightning_landscape.geometry.stability import stability_edge

F64 = torch.float64
TINY = 1e-30  # adaptive optimizers start here, so that their gradients never reach a frozen nu

# -- real optimizers on a quadratic ---------------------------------------------------------------


def set_gradients(params, hessian):
    flat = torch.cat([p.detach().flatten() for p in params])
    sizes = [p.numel() for p in params]
    for p, g in zip(params, (hessian @ flat).split(sizes), strict=True):
        p.grad = g.view_as(p)
    return flat


def diverges(build, hessian, steps=400):
    """Whether the optimizers that ``build()`` sets up blow up on w'Hw/2.

    Judged by the second difference of w, in which slow smooth modes do not hide the one of period
    two, over the last half of the run: a growth of 1 + 1e-7 per step is distinguished from decay.
    """
    params, optimizers = build()
    trail = []
    start = torch.cat([p.detach().flatten() for p in params]).norm()
    for _ in range(steps):
        flat = set_gradients(params, hessian)
        trail.append(flat)
        if not 1e-12 < float(flat.norm() / start) < 1e9:
            return bool(flat.norm() > start)
        for optimizer in optimizers:
            optimizer.step()
    swing = [(a - 2 * b + c).norm() for a, b, c in zip(trail, trail[1:], trail[2:], strict=False)]
    return bool(swing[-1] > swing[len(swing) // 2])


def critical_factor(build, hessian, low=0.05, high=2e4, steps=400):
    """The c at which the optimizers switch from converging to diverging on c H, to 1e-7."""
    assert not diverges(build, low * hessian, steps)
    assert diverges(build, high * hessian, steps)
    while high / low > 1 + 1e-7:
        middle = math.sqrt(low * high)
        if diverges(build, middle * hessian, steps):
            high = middle
        else:
            low = middle
    return high


def freeze(optimizer, second_moment=1.0, step=1e16):
    """Gives an adaptive optimizer a second moment that stands still: it is preset, and beta2 or
    alpha keeps it.  ``step`` is so late (and so coarse in float32) that it stands still as well."""
    for group in optimizer.param_groups:
        group["eps"] = 0.0
        if "alpha" in group:
            group["alpha"] = 1 - 1e-12
        else:
            group["betas"] = (group["betas"][0], 1 - 1e-12)
        for p in group["params"]:
            moment = torch.as_tensor(second_moment, dtype=F64).expand_as(p).clone()
            state = optimizer.state[p]
            state["step"] = torch.tensor(step)
            if "alpha" in group:
                state["square_avg"] = moment
                if group["momentum"]:
                    state["momentum_buffer"] = torch.zeros_like(p)
                if group["centered"]:
                    state["grad_avg"] = torch.full_like(p, 0.6)  # 1 - 0.6^2 = 0.8^2
            else:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), moment
                if group.get("amsgrad"):
                    state["max_exp_avg_sq"] = 4 * moment
                if "momentum_decay" in group:
                    state["mu_product"] = torch.tensor(0.0)
    return optimizer


def scalar(make, start=1.0):
    """``build`` for one parameter of one entry, and the same parameter named."""

    def build():
        w = Parameter(torch.tensor([start], dtype=F64))
        return [w], [make([w])]

    return build


def edge_of(build):
    params, optimizers = build()
    return stability_edge(optimizers, {str(i): p for i, p in enumerate(params)})


ONE = torch.eye(1, dtype=F64)

SGDS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
    "dampening without momentum": {"lr": 0.1, "dampening": 0.3},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "weight decay": {"lr": 0.1, "momentum": 0.5, "weight_decay": 3.0},
    "nesterov, weight decay": {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 3.0},
}


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_sgd_diverges_beyond_its_edge(options):
    build = scalar(lambda w: SGD(w, **options))
    found = edge_of(build)
    assert found.edge == pytest.approx(critical_factor(build, ONE), rel=1e-6)
    assert "threshold on the top eigenvalue of the Hessian" in found.note
    assert found.preconditioner == {}
    assert found.weight_decay == {"0": options.get("weight_decay", 0.0)}


ADAPTIVES = {
    "adam": (Adam, {"betas": (0.9, 0.999)}, {}),
    "adam, slower": (Adam, {"betas": (0.5, 0.999)}, {}),
    "adam, weight decay": (Adam, {"weight_decay": 20.0}, {}),
    "amsgrad": (Adam, {"amsgrad": True}, {}),
    "adamw": (AdamW, {"weight_decay": 30.0}, {}),
    "adam, decoupled": (Adam, {"weight_decay": 30.0, "decoupled_weight_decay": True}, {}),
    "nadam, late": (NAdam, {}, {}),
    "nadam, midway": (NAdam, {"momentum_decay": 17e-16}, {}),
    "nadam, early": (NAdam, {"momentum_decay": 0.0}, {}),
    "nadam, decoupled": (NAdam, {"weight_decay": 30.0, "decoupled_weight_decay": True}, {}),
    "radam, late": (RAdam, {}, {}),
    "radam, midway": (RAdam, {}, {"step": 1e12}),
    "radam, decoupled": (RAdam, {"weight_decay": 30.0, "decoupled_weight_decay": True}, {}),
    "rmsprop": (RMSprop, {}, {}),
    "rmsprop, momentum": (RMSprop, {"momentum": 0.5}, {}),
    "rmsprop, centered": (RMSprop, {"centered": True}, {}),
    "rmsprop, weight decay": (RMSprop, {"momentum": 0.5, "weight_decay": 5.0}, {}),
}


@pytest.mark.parametrize(("kind", "options", "frozen"), ADAPTIVES.values(), ids=ADAPTIVES)
def test_adaptive_optimizer_diverges_beyond_its_edge(kind, options, frozen):
    moment = 1.0 if options.get("centered") else 0.49
    build = scalar(lambda w: freeze(kind(w, lr=0.01, **options), moment, **frozen), TINY)
    found = edge_of(build)
    decay = 0.0 if "decoupled" in str(options) or kind is AdamW else options.get("weight_decay", 0)
    curvature = (critical_factor(build, ONE) + decay) / float(found.preconditioner["0"])
    assert found.edge == pytest.approx(curvature, rel=1e-6)
    assert float(found.scale["0"]) * (found.edge * found.preconditioner["0"]) == pytest.approx(2)
    assert found.weight_decay == {"0": decay}
    assert "threshold on the top eigenvalue of the preconditioned Hessian" in found.note


def test_edges_known_from_the_literature():
    def edge(make, start=1.0):
        return edge_of(scalar(make, start)).edge

    assert edge(lambda w: SGD(w, lr=0.4)) == pytest.approx(5)
    assert edge(lambda w: SGD(w, lr=0.5, momentum=0.9)) == pytest.approx(7.6)
    assert edge(lambda w: SGD(w, lr=0.15, momentum=0.9, nesterov=True)) == pytest.approx(3.8 / 0.42)
    assert edge(lambda w: freeze(Adam(w, lr=0.1))) == pytest.approx(380)
    assert edge(lambda w: freeze(RMSprop(w, lr=0.1, momentum=0.5))) == pytest.approx(30)
    assert edge(lambda w: freeze(NAdam(w, lr=0.1))) == pytest.approx(38 / 0.28)
    # After 1000 default steps NAdam's mu is 0.518 (0.96^4 = 0.8493), far from 0.9.
    midway = edge(lambda w: freeze(NAdam(w, lr=0.1), step=1000.0))
    assert midway == pytest.approx(20 / (1 - 0.5178 + 0.5178 / 19), rel=1e-3)


# -- P from the size of a real step ----------------------------------------------------------------

STEPPERS = {
    "adam": (Adam, {}),
    "adam, fused": (Adam, {"fused": True}),
    "amsgrad": (Adam, {"amsgrad": True, "foreach": True}),
    "adamw": (AdamW, {"weight_decay": 0.0}),
    "radam": (RAdam, {}),
    "radam, foreach": (RAdam, {"foreach": True}),
    "rmsprop": (RMSprop, {}),
    "rmsprop, centered": (RMSprop, {"centered": True, "foreach": True}),
}


@pytest.mark.parametrize(("kind", "options"), STEPPERS.values(), ids=STEPPERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_preconditioner_explains_a_real_step(kind, options, momentum):
    """eps is as large as the gradients, so that its place shows, and t is small, so that the bias
    correction does."""
    torch.manual_seed(0)
    w = Parameter(torch.randn(4, 3, dtype=F64))
    if kind is RMSprop:
        optimizer = kind([w], lr=0.01, eps=0.3, momentum=momentum, **options)
    else:
        optimizer = kind([w], lr=0.01, eps=0.3, betas=(momentum, 0.9), **options)
    for step in range(1, 13):
        before, w.grad = w.detach().clone(), torch.randn_like(w) / step
        buffer = optimizer.state[w].get("momentum_buffer", torch.zeros_like(w)).clone()
        optimizer.step()
    moved = (before - w.detach()) / 0.01
    if kind is RMSprop:
        p = w.grad / (moved - momentum * buffer)
        factor = 1 / (1 + momentum)
    else:
        p = optimizer.state[w]["exp_avg"] / (1 - momentum**12) / moved
        factor = (1 - momentum) / (1 + momentum)
    found = stability_edge(optimizer, {"w": w})
    torch.testing.assert_close(found.scale["w"], 0.01 * factor / p, rtol=1e-9, atol=0)
    if kind is RAdam:  # its rectification scales the learning rate, so it is in the edge, not in P
        p = p * (2 / (0.01 * factor)) / found.edge
    torch.testing.assert_close(found.preconditioner["w"], p, rtol=1e-9, atol=0)


def test_nadam_preconditioner_is_adams():
    torch.manual_seed(0)
    w, u = (Parameter(torch.zeros(5, dtype=F64)) for _ in range(2))
    adam, nadam = Adam([w], eps=0.3), NAdam([u], eps=0.3)
    for _ in range(7):
        w.grad = u.grad = torch.randn(5, dtype=F64)
        adam.step()
        nadam.step()
    p = [stability_edge(o, {"x": x}).preconditioner["x"] for o, x in [(adam, w), (nadam, u)]]
    torch.testing.assert_close(p[0], p[1])


# -- several groups, several optimizers, a Hessian that couples them -------------------------------


def coupling():
    """A positive definite matrix over three parameters of shapes (3,), (2, 2) and (1,)."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(8, 8, dtype=F64, generator=generator)
    return root @ root.T / 8 + 0.2 * torch.eye(8, dtype=F64)


def three(start=1.0):
    return [Parameter(torch.full(s, start, dtype=F64)) for s in [(3,), (2, 2), (1,)]]


def ratio(found, params, hessian):
    """The definition, spelled out: lambda_max(S^1/2 (H + wd) S^1/2) / 2."""

    def spread(values):
        flat = [torch.as_tensor(values[n], dtype=F64).expand(p.shape) for n, p in params.items()]
        return torch.cat([f.flatten() for f in flat])

    root = spread(found.scale).sqrt()
    matrix = root[:, None] * (hessian + spread(found.weight_decay).diag()) * root
    return float(torch.linalg.eigvalsh(matrix)[-1]) / 2


UNEVEN = torch.tensor([0.5, 1.0, 2.0], dtype=F64)


def mixed_sgd():
    a, b, c = three()
    groups = [
        {"params": [a], "lr": 0.1},
        {"params": [b], "lr": 0.3, "momentum": 0.9, "weight_decay": 0.5},
        {"params": [c], "lr": 0.05, "momentum": 0.8, "nesterov": True},
    ]
    return [a, b, c], [SGD(groups, lr=1.0)]


def mixed_adam():
    a, b, c = three(TINY)
    groups = [
        {"params": [a], "lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.5},
        {"params": [b], "lr": 0.02, "betas": (0.5, 0.999)},
        {"params": [c], "lr": 0.3, "betas": (0.8, 0.999)},
    ]
    adam = freeze(Adam(groups))
    adam.state[a]["exp_avg_sq"].copy_(UNEVEN)
    return [a, b, c], [adam]


def mixed_decoupled():
    a, b, c = three(TINY)
    adamw = freeze(AdamW([{"params": [a], "weight_decay": 4.0}, {"params": [b]}], lr=0.1))
    adamw.state[a]["exp_avg_sq"].copy_(UNEVEN)
    return [a, b, c], [adamw, freeze(NAdam([c], lr=0.05, momentum_decay=9e-16))]


def adaptive_beside_plain():
    a, b, c = three(TINY)
    rmsprop = freeze(RMSprop([a], lr=0.05, momentum=0.3))
    rmsprop.state[a]["square_avg"].copy_(UNEVEN)
    return [a, b, c], [rmsprop, SGD([b, c], lr=0.2, momentum=0.7, dampening=0.2)]


def plain_with_one_left_out():
    a, b, c = three()
    with torch.no_grad():
        b.zero_()
    return [a, b, c], [SGD([a], lr=0.1, momentum=0.6), SGD([c], lr=0.4)]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mixed_sgd, r"groups' thresholds run from 12\.17 to 27\.69"),
        pytest.param(mixed_adam, "groups' thresholds run", marks=pytest.mark.slow),
        pytest.param(
            mixed_decoupled,
            "AdamW and NAdam: no single edge, only the ratio, .* thresholds run",
            marks=pytest.mark.slow,
        ),
        (adaptive_beside_plain, "RMSprop and SGD: .* adaptive and plain optimizers step together"),
        (plain_with_one_left_out, "groups' thresholds run from 5 to 32"),
    ],
)
def test_folded_scale_gives_the_edge_of_a_mixture(build, reason):
    params, optimizers = build()
    named = dict(zip("abc", params, strict=True))
    found = stability_edge(optimizers, named)
    assert found.edge is None
    assert re.search(reason, found.note)
    matrix = coupling()
    still = [n for n in named if isinstance(found.scale[n], float) and found.scale[n] == 0]
    assert still == (["b"] if build is plain_with_one_left_out else [])
    factor = critical_factor(build, matrix, steps=800)
    assert ratio(found, named, factor * matrix) == pytest.approx(1, rel=1e-5)


def test_groups_that_agree_share_an_edge():
    a, b, c = params = three()
    named = dict(zip("abc", params, strict=True))
    sgd = SGD([{"params": [a]}, {"params": [b, c]}], lr=0.25, momentum=0.5, weight_decay=2.0)
    found = stability_edge(sgd, named)
    assert found.edge == pytest.approx(2 * 1.5 / 0.25 - 2)
    assert found.scale == {n: pytest.approx(0.25 / 1.5) for n in "abc"}
    assert found.weight_decay == dict.fromkeys("abc", 2.0)
    # Weight decay on the matrix only, as everybody sets it: 5e-6 apart, one edge, the smaller one.
    adamw = freeze(AdamW([{"params": [b]}, {"params": [a, c], "weight_decay": 0.0}], lr=1e-3))
    assert stability_edge(adamw, named).edge == pytest.approx(38e3 * (1 - 0.5e-5), rel=1e-9)
    # Two optimizers may agree as well.
    pair = [SGD([a], lr=0.1, momentum=0.5), SGD([b, c], lr=0.2 / 3)]
    assert stability_edge(pair, named).edge == pytest.approx(30)


def test_sgd_with_weight_decay_on_one_group_has_no_single_edge():
    a, b, _ = three()
    sgd = SGD([{"params": [a], "weight_decay": 5.0}, {"params": [b]}], lr=0.1)
    found = stability_edge(sgd, {"a": a, "b": b})
    assert found.edge is None
    assert "run from 15 to 20" in found.note
    assert found.weight_decay == {"a": 5.0, "b": 0.0}
    # Adaptive: the edge is one on P^-1/2 (H + wd) P^-1/2, where weight decay counts as curvature.
    adam = freeze(Adam([{"params": [a], "weight_decay": 5.0}, {"params": [b]}], lr=0.1))
    found = stability_edge(adam, {"a": a, "b": b})
    assert found.edge == pytest.approx(380)
    assert found.weight_decay == {"a": 5.0, "b": 0.0}


def test_maximize_climbs_the_negated_loss():
    """On L = -w'Hw/2 gradient ascent uses -Hw; weight decay still acts towards zero."""
    w = Parameter(torch.ones(1, dtype=F64))
    sgd = SGD([w], lr=0.1, momentum=0.5, weight_decay=2.0, maximize=True)
    found = stability_edge(sgd, {"w": w})
    assert found.maximize
    assert found.edge == pytest.approx(28)

    def size_after(curvature):
        run = copy.deepcopy(sgd)
        (u,) = run.param_groups[0]["params"]
        for _ in range(300):
            u.grad = -curvature * u.detach()
            run.step()
        return float(u.detach().abs())

    assert size_after(28 * 0.99) < 0.01 < 100 < size_after(28 * 1.01)
    assert not stability_edge(SGD([w], lr=0.1), {"w": w}).maximize


# -- the optimizer's settings as they are now ------------------------------------------------------


def test_learning_rate_follows_a_scheduler_and_may_be_a_tensor():
    w = Parameter(torch.ones(2))
    sgd = SGD([w], lr=torch.tensor(0.5))
    assert stability_edge(sgd, {"w": w}).edge == pytest.approx(4)
    assert type(stability_edge(sgd, {"w": w}).edge) is float
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    w.grad = torch.zeros(2)
    for expected in [8, 16]:
        sgd.step()
        schedule.step()
        assert stability_edge(sgd, {"w": w}).edge == pytest.approx(expected)


@pytest.mark.parametrize("step", [1e16, 10**16, torch.tensor(1e16)])
def test_betas_may_be_tensors_and_step_a_number(step):
    w = Parameter(torch.ones(2, dtype=F64))
    adam = freeze(Adam([w], lr=0.1))
    adam.state[w]["step"] = step
    adam.param_groups[0]["betas"] = tuple(torch.tensor([0.5, 0.999], dtype=F64))
    adam.param_groups[0]["lr"] = torch.tensor(0.1, dtype=F64)
    assert stability_edge(adam, {"w": w}).edge == pytest.approx(60)


def test_reading_changes_nothing():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = Adam([w, u])
    w.grad = torch.ones(2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    gradient = {"w": torch.full((2,), 40.0), "u": torch.ones(2)}
    found = stability_edge(optimizer, {"w": w, "u": u}, gradient=gradient)
    assert torch.equal(gradient["w"], torch.full((2,), 40.0))
    found.preconditioner["w"].zero_()
    found.scale["w"].zero_()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys() == {0}
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
    assert u not in optimizer.state
    assert not found.preconditioner["u"].requires_grad


# -- parameters that do not move -------------------------------------------------------------------


def test_parameter_without_an_optimizer_is_left_out():
    a, b, c = three()
    found = stability_edge(SGD([a, b], lr=0.5), {"a": a, "b": b, "c": c})
    assert found.scale == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert found.weight_decay == dict.fromkeys("abc", 0.0)
    assert found.edge is None
    assert (
        "SGD: no single edge, only the ratio, because 1 of 3 parameters do not move" in found.note
    )


def test_group_with_learning_rate_zero_is_left_out():
    a, b, _ = three()
    groups = [{"params": [a]}, {"params": [b], "lr": 0.0, "weight_decay": 1.0}]
    found = stability_edge(SGD(groups, lr=0.5), {"a": a, "b": b})
    assert found.scale == {"a": 0.5, "b": 0.0}
    assert found.weight_decay == {"a": 0.0, "b": 0.0}
    assert "1 of 2 parameters do not move" in found.note


def test_infinite_preconditioner_of_parameters_without_updates():
    """b never had a gradient, c is in no optimizer: the edge is one on the Hessian over a."""
    a, b, c = three()
    adam = Adam([a, b], lr=0.1, betas=(0.9, 0.5), eps=0.0)
    for _ in range(60):
        a.grad = 3 * torch.ones_like(a)
        adam.step()
    found = stability_edge(adam, {"a": a, "b": b, "c": c})
    assert found.edge == pytest.approx(380)
    assert found.scale["b"] == found.scale["c"] == 0.0
    torch.testing.assert_close(found.preconditioner["a"], torch.full_like(a, 3.0).detach())
    for name, p in [("b", b), ("c", c)]:
        assert torch.equal(found.preconditioner[name].rsqrt(), torch.zeros_like(p))
    assert "preconditioned Hessian" in found.note


MOVERS = {
    "adam": (Adam, {}),
    "adam, fused": (Adam, {"fused": True}),
    "adam, weight decay": (Adam, {"weight_decay": 0.3}),
    "amsgrad": (Adam, {"amsgrad": True, "foreach": True}),
    "adamw": (AdamW, {"weight_decay": 0.3}),
    "nadam": (NAdam, {}),
    "radam": (RAdam, {}),
    "rmsprop": (RMSprop, {}),
    "rmsprop, momentum": (RMSprop, {"momentum": 0.5, "weight_decay": 0.3}),
    "rmsprop, centered": (RMSprop, {"centered": True}),
}
movers = pytest.mark.parametrize(("kind", "options"), MOVERS.values(), ids=MOVERS)


def walked(optimizer, gradients):
    """Steps with these gradients; each is one tensor for each parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for each in gradients:
        for p, g in zip(params, each, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


@movers
def test_coordinates_without_a_second_moment_are_left_out(kind, options):
    """The rest is as if they were not there.  (Weights of 0: decay gives no gradient either.)"""
    torch.manual_seed(0)
    live = torch.tensor([[True, False, True], [False, False, True]])
    both, alone = (Parameter(torch.zeros(n, dtype=F64)) for n in [(2, 3), (3,)])
    gradients = torch.randn(12, 3, dtype=F64)
    padded = torch.zeros(12, 2, 3, dtype=F64)
    padded[:, live] = gradients
    with torch.no_grad():
        both[live] = alone.copy_(torch.tensor([0.5, -1.0, 2.0]))
    optimizer = walked(kind([both], **options), [[g] for g in padded])
    expected = stability_edge(
        walked(kind([alone], **options), [[g] for g in gradients]), {"w": alone}
    )
    for gradient in [None, {"w": torch.ones_like(both)}]:
        found = stability_edge(optimizer, {"w": both}, gradient=gradient)
        assert found.edge == expected.edge
        for name in ("scale", "preconditioner"):
            here, there = getattr(found, name)["w"][live], getattr(expected, name)["w"]
            torch.testing.assert_close(here, there, rtol=1e-12, atol=0)
        assert torch.equal(found.scale["w"][~live], torch.zeros(3, dtype=F64))
        assert torch.equal(found.preconditioner["w"][~live].rsqrt(), torch.zeros(3, dtype=F64))
        assert found.inactive_share == 0.5
    assert expected.inactive_share == 0.0


def test_share_of_inactive_coordinates():
    """4 of a's were never used, and c, b's 2 have no state; d is not trained, e not for now."""
    a, b, c, d, e = (Parameter(torch.zeros(n)) for n in (10, 2, 3, 4, 1))
    groups = [{"params": [a, b, c]}, {"params": [e], "lr": 0.0}]
    adam = Adam(groups)
    a.grad, c.grad = torch.ones(10), torch.zeros(3)
    a.grad[6:] = 0
    adam.step()
    found = stability_edge(adam, dict(zip("abcde", (a, b, c, d, e), strict=True)))
    assert found.inactive_share == 9 / 20
    assert found.scale["b"] == found.scale["c"] == 0.0
    assert torch.equal(found.preconditioner["c"], torch.full((3,), math.inf))
    assert stability_edge(SGD([a, b], lr=0.1), {"a": a, "b": b, "d": d}).inactive_share == 0.0
    z = Parameter(torch.zeros(2, dtype=torch.complex64))  # four numbers, one of them was used
    adam = walked(Adam([z]), [[torch.tensor([1j, 0])]])
    assert stability_edge(adam, {"z": z}).inactive_share == 0.75


# -- P where one gradient changes it ---------------------------------------------------------------

USED = torch.tensor([9.0, 2.0, 1e-4, 1e-9, 3.0, 1e-6], dtype=F64)  # sizes of the gradients so far
NEXT = torch.tensor([0.1, 2.0, 1.0, 1.0, -0.02, -2e-6], dtype=F64)


@movers
@pytest.mark.parametrize("maximize", [False, True])
def test_preconditioner_where_one_gradient_doubles_the_second_moment(kind, options, maximize):
    """There it is that of the real optimizer after this step, elsewhere what it is now."""
    torch.manual_seed(0)
    w = Parameter(torch.zeros(6, dtype=F64))
    optimizer = kind([w], lr=1e-9, eps=1e-12, maximize=maximize, **options)
    walked(optimizer, [[USED * torch.randn(6, dtype=F64)] for _ in range(30)])
    w.data.copy_(torch.tensor([1.0, -1.0, -3.0, 2.0, 1.0, 0.0]))  # so that their decay counts
    found = stability_edge(optimizer, {"w": w}, gradient={"w": NEXT})
    now = stability_edge(optimizer, {"w": w})
    after = stability_edge(walked(optimizer, [[NEXT]]), {"w": w}).preconditioner["w"]
    before = now.preconditioner["w"]
    jumps = after > math.sqrt(2) * before
    assert jumps.tolist() == [False, False, True, True, False, False]
    expected = torch.where(jumps, after, before)
    torch.testing.assert_close(found.preconditioner["w"], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        found.scale["w"], now.scale["w"] * before / expected, rtol=1e-9, atol=0
    )
    assert found.edge == now.edge


def test_amsgrad_with_a_second_moment_that_underflows():
    """After 10^5 steps without a gradient the running average is 0 in float32, its maximum not."""
    w = Parameter(torch.ones(2))
    adam = stepped(Adam([w], amsgrad=True))
    adam.state[w]["exp_avg_sq"][0] = 0.0
    found = stability_edge(adam, {"w": w}, gradient={"w": torch.ones(2)})
    assert torch.equal(found.scale["w"][0], found.scale["w"][1])
    assert found.inactive_share == 0.0


def test_preconditioner_of_a_complex_parameter_where_one_gradient_changes_it():
    z = Parameter(torch.zeros(2, dtype=torch.complex128))
    x = Parameter(torch.zeros(2, 2, dtype=F64))
    used = torch.tensor([1e-5 + 5j, 1e-7 + 3j], dtype=torch.complex128)
    fresh = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    found = [
        stability_edge(walked(Adam([p]), [[g]] * 40), {"p": p}, gradient={"p": h})
        for p, g, h in [
            (z, used, fresh),
            (x, torch.view_as_real(used), torch.view_as_real(fresh)),
        ]
    ]
    torch.testing.assert_close(found[0].scale["p"], found[1].scale["p"])
    jump = math.sqrt((0.999 * (1 - 0.999**40) * 1e-10 + 0.001) / (1 - 0.999**41)) + 1e-8
    assert float(found[0].preconditioner["p"][0, 0]) == pytest.approx(jump, rel=1e-9)


@movers
def test_gradient_longer_than_all_before_is_shortened(kind, options):
    """In a run that blows up P stays what it was.  The second moments so far sum up to 2^2."""
    w = Parameter(torch.zeros(5, dtype=F64))
    optimizer = kind([w], lr=1e-6, eps=1e-12, **options)
    used = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-9], dtype=F64)
    # Of both signs, so that the centered one, too, has something to divide by.
    walked(optimizer, [[used * (-1) ** step] for step in range(20)])
    now = stability_edge(optimizer, {"w": w})
    for growth in [1e2, 1e6, 1e200]:
        grown = stability_edge(optimizer, {"w": w}, gradient={"w": growth * used})
        torch.testing.assert_close(grown.preconditioner["w"], now.preconditioner["w"])
    fresh = torch.tensor([0.0, 0.0, 0.0, 3.0, 4.0], dtype=F64)
    long = stability_edge(optimizer, {"w": w}, gradient={"w": 1e3 * fresh})
    short = stability_edge(optimizer, {"w": w}, gradient={"w": fresh * 2 / 5})
    torch.testing.assert_close(
        long.preconditioner["w"], short.preconditioner["w"], rtol=1e-4, atol=0
    )
    assert float(short.preconditioner["w"][4] / now.preconditioner["w"][4]) > 1e5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_is_ignored(bad):
    w = Parameter(torch.ones(2, dtype=F64))
    adam = stepped(Adam([w]), 3)
    found = stability_edge(adam, {"w": w}, gradient={"w": torch.tensor([bad, 1.0])})
    assert torch.equal(found.scale["w"], stability_edge(adam, {"w": w}).scale["w"])


def test_gradient_concerns_adaptive_optimizers_only():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    gradient = {"w": torch.full((2,), 50.0), "u": torch.full((2,), 50.0)}
    assert stability_edge(SGD([w], lr=0.1), {"w": w}, gradient={"w": w}).scale == {"w": 0.1}
    sam = stability_edge(SAM([w], SGD, lr=0.1), {"w": w}, 1.0, gradient={"w": w})
    assert sam.edge == stability_edge(SAM([w], SGD, lr=0.1), {"w": w}, 1.0).edge
    beside = [stepped(Adam([w])), SGD([u], lr=0.1)]
    found = stability_edge(beside, {"w": w, "u": u}, gradient=gradient)
    assert found.scale["u"] == 0.1
    assert torch.equal(found.scale["w"], stability_edge(beside, {"w": w, "u": u}).scale["w"])
    # One with moments of its own kind, for which no rule is known.
    foreign = type("Foreign", (Adam,), {"step": lambda self, closure=None: None})([w])
    foreign.state[w] = {"exp_avg_sq": torch.ones(2)}
    refused(foreign, w, "Foreign has no known stability edge", gradient={"w": w})


def test_gradient_of_other_parameters_raises():
    w = Parameter(torch.ones(2))
    adam = stepped(Adam([w]))
    with pytest.raises(TypeError, match=r"gradient=3.*: expected a mapping"):
        stability_edge(adam, {"w": w}, gradient=3)
    with pytest.raises(TypeError, match=r"gradient\['w'\] is 1.0: expected a tensor"):
        stability_edge(adam, {"w": w}, gradient={"w": 1.0})
    with pytest.raises(ValueError, match=r"gradient\['v'\]: no trainable parameter of that name"):
        stability_edge(adam, {"w": w}, gradient={"v": w})
    with pytest.raises(ValueError, match=r"gradient\['w'\] has shape \(3,\): expected .* \(2,\)"):
        stability_edge(adam, {"w": w}, gradient={"w": torch.ones(3)})


def test_optimizer_of_other_parameters_is_ignored():
    a, b, _ = three()
    optimizers = [SGD([a], lr=0.5), torch.optim.Adagrad([b]), Adam([Parameter(torch.ones(1))])]
    found = stability_edge(optimizers, {"a": a})
    assert found.edge == pytest.approx(4)
    assert found.note.startswith("SGD: the edge")


# -- wrappers and subclasses -----------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class Keeps(SGD):
    pass


class Overrides(SGD):
    def step(self, closure=None):
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """The usual way to write one: an Optimizer around another, with a rule of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state


def test_wrapped_optimizer_is_the_same_optimizer():
    w = Parameter(torch.ones(1))
    sgd = SGD([w], lr=0.5)
    for wrapped in [Wrapper(sgd), [Wrapper(sgd)], Wrapper(Wrapper(sgd)), (Wrapper(sgd), sgd)]:
        assert stability_edge(wrapped, {"w": w}).edge == pytest.approx(4)


def test_lightning_optimizer():
    core = pytest.importorskip("pytorch_lightning.core.optimizer")
    w = Parameter(torch.ones(1))
    wrapped = core.LightningOptimizer(SGD([w], lr=0.5))
    found = stability_edge([wrapped], {"w": w})
    assert found.edge == pytest.approx(4)
    assert found.note.startswith("SGD: ")


def test_edge_of_subclasses(monkeypatch):
    w = Parameter(torch.ones(1))
    assert stability_edge(Keeps([w], lr=0.5), {"w": w}).edge == pytest.approx(4)
    # Where a subclass is the first SGD of the process, torch wraps `step` on the subclass alone.
    monkeypatch.setattr(SGD, "step", inspect.unwrap(SGD.step))
    fresh = type("Fresh", (SGD,), {})([w], lr=0.5)
    assert "step" in vars(type(fresh))
    assert stability_edge(fresh, {"w": w}).edge == pytest.approx(4)
    refused(Overrides([w], lr=0.5), w, "Overrides has no known stability edge")
    refused(Lookahead(SGD([w], lr=0.5)), w, "Lookahead has no known stability edge")


# -- SAM -------------------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """github.com/davda54/sam, less the parts that do not matter here."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, dict(rho=rho, adaptive=adaptive, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        held = [(p, group["rho"]) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm() + 1e-12
        before = [p.clone() for p, _ in held]
        for p, rho in held:
            p.add_(p.grad * rho / norm)
        closure()
        for (p, _), old in zip(held, before, strict=True):
            p.copy_(old)
        self.base_optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.6},
        {"lr": 0.05, "momentum": 0.6, "nesterov": True, "weight_decay": 2.0},
    ],
)
@pytest.mark.parametrize("curvature", [9.0, 14.0])
def test_sam_converges_to_its_edge(options, curvature):
    """Below 2/lr SAM ends in an orbit w, -w, that is at its edge: the gradient norm is then the one
    whose edge is the curvature."""
    w = Parameter(torch.ones(1, dtype=F64))
    sam = SAM([w], SGD, rho=0.3, **options)

    def gradient():
        w.grad = curvature * w.detach()

    for _ in range(4000):
        gradient()
        sam.step(gradient)
    before = float(w.detach())
    gradient()
    norm = w.grad.norm()
    sam.step(gradient)
    assert float(w.detach()) == pytest.approx(-before, rel=1e-9)
    found = stability_edge(sam, {"w": w}, gradient_norm=norm)
    assert found.edge == pytest.approx(curvature, rel=1e-9)
    decay = found.weight_decay["w"]
    assert decay == options.get("weight_decay", 0.0)
    assert found.scale["w"] * (curvature + decay) / 2 == pytest.approx(1)
    assert "SGD under SAM: at this gradient norm the edge is" in found.note


def test_sam_edge_equals_long_and_bartlett():
    w = Parameter(torch.ones(1))
    lr, rho, norm = 0.1, 0.05, 0.7
    found = stability_edge(SAM([w], SGD, lr=lr, rho=rho), {"w": w}, gradient_norm=norm)
    expected = norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * norm)) - 1)
    assert found.edge == pytest.approx(expected)
    without = stability_edge(SAM([w], SGD, lr=lr, rho=0.0), {"w": w}, gradient_norm=norm)
    assert without.edge == pytest.approx(20)


# -- reasons for no edge ---------------------------------------------------------------------------


def refused(optimizers, w, reason, **kwargs):
    params = w if isinstance(w, dict) else {"w": w}
    found = stability_edge(optimizers, params, **kwargs)
    assert re.search(reason, found.note), found.note
    assert found.edge is None
    assert found.scale == found.weight_decay == found.preconditioner == {}


def stepped(optimizer, times=1):
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


UNKNOWN = ["Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor", "Muon", "LBFGS"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_has_no_edge(name):
    w = Parameter(torch.ones(2, 2))
    optimizer = getattr(torch.optim, name)([w])
    if name != "LBFGS":  # whose step wants a closure
        stepped(optimizer)
    refused(optimizer, w, f"^{name} has no known stability edge: the ratio is not available")


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, RMSprop])
def test_adaptive_optimizer_without_state_has_no_edge(kind):
    w = Parameter(torch.ones(2))
    refused(kind([w]), w, f"^{kind.__name__} has no state yet: no step taken, or only skipped ones")
    assert stability_edge(SGD([w]), {"w": w}).edge is not None  # SGD needs none


def test_step_skipped_by_the_grad_scaler_leaves_no_edge():
    w = Parameter(torch.ones(2))
    adam, scaler = Adam([w]), torch.amp.GradScaler("cpu")
    scaler.scale(w.sum() * math.inf).backward()
    scaler.step(adam)
    scaler.update()
    refused(adam, w, "no state yet")


def test_fused_step_skipped_by_the_grad_scaler_leaves_no_edge():
    """It leaves a state, of 0 steps."""
    w = Parameter(torch.ones(2))
    adam, scaler = Adam([w], fused=True), torch.amp.GradScaler("cpu")
    scaler.scale(w.sum() * math.inf).backward()
    scaler.step(adam)
    scaler.update()
    assert float(adam.state[w]["step"]) == 0
    refused(adam, w, "Adam takes .* no step has had a gradient yet", gradient={"w": torch.ones(2)})


def test_one_of_two_optimizers_without_state():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    refused([stepped(Adam([w])), Adam([u])], {"w": w, "u": u}, "^Adam has no state yet")


def test_learning_rate_zero():
    w = Parameter(torch.ones(2))
    refused(SGD([w], lr=0.0), w, "^SGD has no stability edge while the learning rate is 0")
    refused(stepped(Adam([w], lr=0.0)), w, "while the learning rate is 0")


def test_radam_before_it_rectifies():
    w = Parameter(torch.ones(2))
    optimizer = stepped(RAdam([w]), 5)
    refused(optimizer, w, r"no stability edge before it rectifies \(rho_t 5 <= 5\)")
    assert stability_edge(stepped(optimizer), {"w": w}).edge is not None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda w: SGD(w, lr=0.1, momentum=1.0), "SGD diverges at any curvature: momentum 1"),
        (lambda w: stepped(RMSprop(w, momentum=1.5)), "RMSprop diverges .*: momentum 1.5"),
        (
            lambda w: stepped(AdamW(w, lr=0.5, weight_decay=5.0)),
            r"AdamW diverges at any curvature: lr \* weight decay 2.5",
        ),
        (lambda w: SGD(w, momentum=0.5, dampening=1.5), "takes no finite step downhill for 'w'"),
        (lambda w: SGD(w, lr=math.nan), "takes no finite step downhill for 'w'"),
        (
            lambda w: freeze(Adam(w), 0.0),
            "takes no finite step downhill for 'w': its second moment is 0",
        ),
    ],
)
def test_settings_that_cannot_be_stable(make, reason):
    w = Parameter(torch.ones(2))
    refused(make([w]), w, reason)


def test_climbing_and_descending_at_once():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    duel = [SGD([w], lr=0.1), SGD([u], lr=0.1, maximize=True)]
    refused(duel, {"w": w, "u": u}, "some parameters climb while others descend")


def test_parameters_in_no_or_two_optimizers():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    refused(SGD([u]), w, "No optimizer holds any of these parameters")
    refused([], w, "No optimizer holds any of these parameters")
    refused([SGD([w]), Adam([u, w])], w, "Two optimizers step the same parameter")


def test_sam_without_a_known_edge():
    w, u = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    plain = SAM([w], SGD, lr=0.1)
    for norm in [None, 0.0, math.nan, math.inf]:
        refused(plain, w, f"needs a gradient norm > 0, got {norm}", gradient_norm=norm)
    over = "SAM has a known stability edge over SGD only, downhill, with one edge"
    refused(SAM([w], SGD, lr=0.1, maximize=True), w, over, gradient_norm=1.0)
    refused(SAM([w], SGD, lr=0.1, weight_decay=30.0), w, over, gradient_norm=1.0)
    uneven = SAM([{"params": [w]}, {"params": [u], "lr": 0.2}], SGD, lr=0.1)
    refused(uneven, {"w": w, "u": u}, over, gradient_norm=1.0)
    over_adam = SAM([w], Adam, lr=0.1)
    stepped(over_adam.base_optimizer)
    refused(over_adam, w, over, gradient_norm=1.0)
    single = "for a single rho and adaptive=False only"
    refused(SAM([w], SGD, lr=0.1, adaptive=True), w, single, gradient_norm=1.0)
    two = SAM([{"params": [w]}, {"params": [u], "rho": 0.2}], SGD, lr=0.1)
    refused(two, {"w": w, "u": u}, single, gradient_norm=1.0)
    beside = [plain, SGD([u])]
    refused(beside, {"w": w, "u": u}, "SAM beside another optimizer", gradient_norm=1.0)
    refused(SAM([w], torch.optim.Adagrad, lr=0.1), w, "Adagrad has no known", gradient_norm=1.0)


@pytest.mark.parametrize("wrong", [3, [SGD([Parameter(torch.ones(1))]), 3]])
def test_not_an_optimizer(wrong):
    with pytest.raises(
        TypeError, match=r"stability_edge\(optimizers=\.\.\.\): expected torch optimizers, got 3"
    ):
        stability_edge(wrong, {"w": Parameter(torch.ones(1))})
