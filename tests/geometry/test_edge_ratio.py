"""The edge ratio against the dense eigenvalue problem and against real optimizer runs."""

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_landscape.geometry.edge_ratio import edge_ratio
from lightning_landscape.geometry.eigen import top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.stability import stability_edge
from tests.oracles import F64, Quadratic, normal, symmetric

SHAPES = {"a": (2, 3), "b": (4,), "c": (2,)}
SPECTRUM = [9.0, 5.0, 4.0, 2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -3.0, -6.0]


def stepped(make, steps=3):
    """A quadratic after some steps of the optimizer."""
    q = Quadratic(symmetric(SPECTRUM), shapes=SHAPES)
    a, b, c = q.params.values()
    optimizer = make(a, b, c)
    for _ in range(steps):
        optimizer.zero_grad()
        q.loss().backward()
        optimizer.step()
    return q, optimizer


def dense_ratio(matrix, scale, decay):
    """``lambda_max(S^1/2 (H + wd) S^1/2)/2``."""
    root = np.sqrt(scale)
    inside = matrix.numpy() + np.diag(decay)
    return np.linalg.eigvalsh(root[:, None] * inside * root)[-1] / 2


def ratio(q, optimizer, **options):
    objective = Objective(q.loss, q.params)
    plain = top_eigenvalues(objective, tol=1e-9, max_hvps=50)
    edge = stability_edge(optimizer, objective.params)
    return edge_ratio(objective, edge, plain, tol=1e-9, max_hvps=200, **options), objective


def spread(q, values):
    """One value or tensor for each parameter, laid out flat."""
    return np.concatenate(
        [
            np.broadcast_to(np.asarray(v), p.shape).ravel()
            for v, p in zip(values, q.params.values(), strict=True)
        ]
    )


def adam_scale(q, optimizer, lr, beta1=0.9):
    """lr (1-b1)/((1+b1) P), P = sqrt(nu/(1-b2^t)) + eps, from the optimizer's own state."""
    b2, eps = optimizer.param_groups[0]["betas"][1], optimizer.param_groups[0]["eps"]
    p = [
        (state["exp_avg_sq"] / (1 - b2 ** float(state["step"]))).sqrt() + eps
        for state in (optimizer.state[param] for param in q.params.values())
    ]
    return lr * (1 - beta1) / (1 + beta1) / spread(q, p)


ZERO = np.zeros(12)


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_residual_of_the_ratio(optimizer):
    """||M v - 2 ratio v|| / 2 with the dense M = S^1/2 H S^1/2, far from converged."""
    q, stepping = stepped(lambda *p: optimizer(p, lr=0.05))
    objective = Objective(q.loss, q.params)
    plain = top_eigenvalues(objective, max_hvps=2)
    edge = stability_edge(stepping, objective.params)
    found = edge_ratio(objective, edge, plain, max_hvps=2)
    vector = (found.solved or plain).eigenvectors[0]
    v = np.concatenate([vector[name].numpy().ravel() for name in q.params])
    root = np.sqrt(spread(q, [edge.scale[name] for name in q.params]))
    defect = root * (q.A.numpy() @ (root * v)) - 2 * found.ratio * v
    assert found.residual == pytest.approx(np.linalg.norm(defect) / 2, rel=1e-9)
    assert found.residual > 1e-4


def test_one_step_size_needs_no_second_eigenvalue_problem():
    q, sgd = stepped(lambda *p: SGD(p, lr=0.05, momentum=0.5, weight_decay=0.3))
    found, objective = ratio(q, sgd)
    assert found.solved is None
    expected = dense_ratio(q.A, np.full(12, 0.05 / 1.5), np.full(12, 0.3))
    assert found.ratio == pytest.approx(expected, rel=1e-10)
    assert expected == pytest.approx(0.05 / 1.5 * 9.3 / 2, rel=1e-12)
    products = objective.hvps
    top = top_eigenvalues(objective, tol=1e-9)
    edge_ratio(objective, stability_edge(sgd, q.params), top)
    assert objective.hvps == products + top.hvps


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_groups_with_their_own_settings(method):
    q, sgd = stepped(
        lambda a, b, c: SGD(
            [
                {"params": [a], "lr": 0.1, "weight_decay": 0.2},
                {"params": [b], "lr": 0.01, "momentum": 0.9, "nesterov": True},
                {"params": [c], "lr": 0.05, "momentum": 0.5, "dampening": 0.1, "weight_decay": 1},
            ]
        )
    )
    found, _ = ratio(q, sgd, method=method)
    scale = spread(q, [0.1, 0.01 * 2.8 / 1.9, 0.05 * 0.9 / 1.5])
    expected = dense_ratio(q.A, scale, spread(q, [0.2, 0.0, 1.0]))
    assert found.ratio == pytest.approx(expected, rel=1e-9)
    assert found.solved.converged


def test_same_step_but_other_weight_decay():
    """Biases often have no weight decay: the step size is one number, but the matrix is not H."""
    q, sgd = stepped(
        lambda a, b, c: SGD([{"params": [a, c], "weight_decay": 2.0}, {"params": [b]}], lr=0.05)
    )
    found, _ = ratio(q, sgd)
    expected = dense_ratio(q.A, np.full(12, 0.05), spread(q, [2.0, 0.0, 2.0]))
    assert found.ratio == pytest.approx(expected, rel=1e-9)


def test_adam():
    q, adam = stepped(lambda *p: Adam(p, lr=3e-2))
    found, _ = ratio(q, adam)
    expected = dense_ratio(q.A, adam_scale(q, adam, 3e-2), ZERO)
    assert found.ratio == pytest.approx(expected, rel=1e-9)
    assert found.solved.converged


def test_adam_adds_coupled_weight_decay_before_it_preconditions():
    q, adam = stepped(
        lambda a, b, c: Adam(
            [{"params": [a], "weight_decay": 3.0}, {"params": [b, c], "lr": 1e-3}], lr=3e-2
        )
    )
    found, _ = ratio(q, adam)
    lr = spread(q, [3e-2, 1e-3, 1e-3])
    expected = dense_ratio(q.A, adam_scale(q, adam, lr), spread(q, [3.0, 0.0, 0.0]))
    assert found.ratio == pytest.approx(expected, rel=1e-9)


def test_adamw_decouples():
    q, adamw = stepped(lambda *p: AdamW(p, lr=3e-2, weight_decay=4.0))
    found, _ = ratio(q, adamw)
    scale = adam_scale(q, adamw, 3e-2) * 2 / (2 - 3e-2 * 4.0)
    assert found.ratio == pytest.approx(dense_ratio(q.A, scale, ZERO), rel=1e-9)


def test_rmsprop():
    q, rmsprop = stepped(lambda *p: RMSprop(p, lr=1e-2, momentum=0.4))
    found, _ = ratio(q, rmsprop)
    p = [rmsprop.state[param]["square_avg"].sqrt() + 1e-8 for param in q.params.values()]
    assert found.ratio == pytest.approx(dense_ratio(q.A, 1e-2 / 1.4 / spread(q, p), ZERO), rel=1e-9)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_maximize_takes_the_hessian_of_the_negated_loss(make):
    """Weight decay still acts towards zero, so it is added after the sign change."""
    q, optimizer = stepped(lambda *p: make(p, lr=0.02, weight_decay=0.5, maximize=True))
    found, _ = ratio(q, optimizer)
    scale = np.full(12, 0.02) if make is SGD else adam_scale(q, optimizer, 0.02)
    expected = dense_ratio(-q.A, scale, np.full(12, 0.5))
    assert found.ratio == pytest.approx(expected, rel=1e-9)
    if make is SGD:
        assert expected == pytest.approx(0.02 * 6.5 / 2, rel=1e-12)


def test_parameter_without_an_update_is_left_out():
    q, sgd = stepped(lambda a, b, c: SGD([{"params": [a]}, {"params": [c], "lr": 0.02}], lr=0.1))
    found, _ = ratio(q, sgd)
    expected = dense_ratio(q.A, spread(q, [0.1, 0.0, 0.02]), ZERO)
    assert found.ratio == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("make", [Adam, RMSprop])
def test_coordinates_without_a_second_moment_are_left_out(make, method):
    """1/(sqrt(0) + eps) is no step: the ratio is that of the Hessian over the others."""
    q, optimizer = stepped(lambda *p: make(p, lr=3e-2, eps=1e-8))
    square = "exp_avg_sq" if make is Adam else "square_avg"
    optimizer.state[q.params["a"]][square][1].zero_()
    optimizer.state[q.params["c"]][square].zero_()
    moves = spread(q, [torch.tensor([[1.0] * 3, [0.0] * 3]), 1.0, 0.0])
    if make is Adam:
        scale = adam_scale(q, optimizer, 3e-2)
    else:
        p = [optimizer.state[param][square].sqrt() + 1e-8 for param in q.params.values()]
        scale = 3e-2 / spread(q, p)
    found, objective = ratio(q, optimizer, method=method)
    expected = dense_ratio(q.A, scale * moves, ZERO)
    assert found.ratio == pytest.approx(expected, rel=1e-9)
    assert dense_ratio(q.A, scale, ZERO) > 1e3 * expected
    vector = found.solved.eigenvectors[0]
    assert float(vector["c"].abs().max() + vector["a"][1].abs().max()) < 1e-6
    assert stability_edge(optimizer, objective.params).inactive_share == 5 / 12


def test_parameters_outside_the_objective_are_ignored():
    """Frozen and tied ones are in ``named_parameters``; the Objective drops them."""
    q, sgd = stepped(lambda a, b, c: SGD([{"params": [a, b]}, {"params": [c], "lr": 0.02}], lr=0.1))
    frozen = Parameter(torch.ones(3, dtype=F64), requires_grad=False)
    named = {**q.params, "frozen": frozen, "again": q.params["a"]}
    objective = Objective(q.loss, named)
    plain = top_eigenvalues(objective, tol=1e-9)
    found = edge_ratio(objective, stability_edge(sgd, named), plain, tol=1e-9)
    expected = dense_ratio(q.A, spread(q, [0.1, 0.1, 0.02]), ZERO)
    assert found.ratio == pytest.approx(expected, rel=1e-9)
    alike = SGD(q.params.values(), lr=0.1, weight_decay=0.5)
    uniform = edge_ratio(objective, stability_edge(alike, named), plain)
    assert uniform.solved is None
    assert uniform.ratio == pytest.approx(0.1 * 9.5 / 2, rel=1e-9)


def test_warm_start():
    q, adam = stepped(lambda *p: Adam(p, lr=3e-2))
    objective = Objective(q.loss, q.params)
    plain = top_eigenvalues(objective)
    edge = stability_edge(adam, q.params)
    first = edge_ratio(objective, edge, plain)
    second = edge_ratio(objective, edge, plain, init=first.solved)
    assert second.solved.hvps < first.solved.hvps
    expected = dense_ratio(q.A, adam_scale(q, adam, 3e-2), ZERO)
    assert second.ratio == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_divergence_begins_at_one(make):
    """The real optimizer, 1 % below and above, with its second moment held still: it starts so
    small that its gradients do not reach that in these steps."""
    for factor, grows in [(0.99, False), (1.01, True)]:
        q = Quadratic(symmetric(abs(np.array(SPECTRUM)) + 0.1), shapes=SHAPES)
        q.b.zero_()
        optimizer = make(q.params.values(), lr=1.0)
        if make is Adam:
            optimizer.param_groups[0].update(betas=(0.9, 1 - 1e-12), eps=0.0)
            for p in q.params.values():
                moment = normal(*p.shape, seed=4).square() + 0.5
                optimizer.state[p] = {
                    "step": torch.tensor(1e16),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": moment,
                }
                p.data.mul_(1e-40)
        found, _ = ratio(q, optimizer)
        optimizer.param_groups[0]["lr"] = factor / found.ratio
        assert ratio(q, optimizer)[0].ratio == pytest.approx(factor, rel=1e-9)
        start = q.w().norm()
        for _ in range(300):
            optimizer.zero_grad()
            q.loss().backward()
            optimizer.step()
        assert bool(q.w().norm() > start) == grows


def test_nan_stays_nan():
    q, sgd = stepped(lambda *p: SGD(p, lr=0.1))
    bad = Objective(lambda: q.loss() * math.nan, q.params)
    plain = top_eigenvalues(bad)
    assert math.isnan(edge_ratio(bad, stability_edge(sgd, q.params), plain).ratio)
    two = SGD([{"params": [q.params["a"]]}, {"params": [q.params["b"]], "lr": 0.2}], lr=0.1)
    assert math.isnan(edge_ratio(bad, stability_edge(two, q.params), plain).ratio)


def test_no_edge_no_ratio():
    q, adagrad = stepped(lambda *p: torch.optim.Adagrad(p))
    objective = Objective(q.loss, q.params)
    plain = top_eigenvalues(objective)
    with pytest.raises(ValueError, match="edge has no scale: Adagrad has no known stability edge"):
        edge_ratio(objective, stability_edge(adagrad, q.params), plain)
    partial = stability_edge(SGD(q.params.values(), lr=0.1), {"a": q.params["a"]})
    with pytest.raises(ValueError, match=r"no scale for \['b', 'c'\]: expected one for each"):
        edge_ratio(objective, partial, plain)
