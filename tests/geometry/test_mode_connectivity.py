"""Lines between weights and their barriers, against closed forms and explicit copies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_landscape import Slice
from lightning_landscape.geometry import (
    Objective,
    line_between,
    loss_barrier,
    plane_through,
    reestimate_batch_norm,
)
from tests.oracles import normal

F64 = torch.float64


def chain(a: float, b: float, x: torch.Tensor, c: float):
    """``L = mean((a b x - c x)^2) / 2``, of two weights in a row."""
    params = {n: nn.Parameter(torch.tensor(v, dtype=F64)) for n, v in (("a", a), ("b", b))}

    def loss():
        return ((params["a"] * params["b"] - c) * x).square().mean() / 2

    return Objective(loss, params)


def network(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9, **options), nn.ReLU(), nn.Linear(9, 3, **options))


def loss_of(net: nn.Module, x: torch.Tensor, y: torch.Tensor):
    return lambda: nn.functional.cross_entropy(net(x), y)


def mixed(one: nn.Module, other: nn.Module, t: float) -> nn.Module:
    """A copy with the weights ``(1-t) one + t other``."""
    made = copy.deepcopy(one)
    with torch.no_grad():
        for p, a, b in zip(made.parameters(), one.parameters(), other.parameters(), strict=True):
            p.copy_((1 - t) * a + t * b)
    return made


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_barrier_of_the_scalar_chain():
    """From (a, b) to (-a, -b), both minima: L(t) = c^2 E[x^2] ((1-2t)^2 - 1)^2 / 2."""
    a, b, x = 1.5, 0.8, normal(50).double()
    c = a * b
    objective = chain(-a, -b, x, c)
    start = {"a": torch.tensor(a, dtype=F64), "b": torch.tensor(b, dtype=F64)}
    line = line_between(objective, start, resolution=21)
    t = np.linspace(0, 1, 21)
    second = float(x.square().mean())
    np.testing.assert_allclose(
        line.losses, c**2 * second * ((1 - 2 * t) ** 2 - 1) ** 2 / 2, atol=1e-14
    )
    assert loss_barrier(line) == pytest.approx(c**2 * second / 2, rel=1e-12)
    assert line.losses.argmax() == 10
    assert line.metadata["norms"] == [pytest.approx(2 * np.hypot(a, b))]


def test_line_of_zero_length_has_no_barrier():
    net, x, y = network(), normal(20, 6).float(), torch.arange(20) % 3
    line = line_between(Objective(loss_of(net, x, y), dict(net.named_parameters())), weights(net))
    assert loss_barrier(line) == 0.0
    assert line.metadata["norms"] == [0.0]
    assert set(line.losses) == {line.center_loss}


@pytest.mark.parametrize("given_end", [False, True])
def test_line_equals_explicit_copies(given_end):
    one, other, away = (network(seed).double() for seed in (1, 2, 3))
    x, y = normal(20, 6).double(), torch.arange(20) % 3
    live = away if given_end else other
    before = weights(live)
    objective = Objective(loss_of(live, x, y), dict(live.named_parameters()))
    end = weights(other) if given_end else None
    line = line_between(objective, weights(one), end, 7, metadata={"step": 3})
    expected = [loss_of(mixed(one, other, t), x, y)().item() for t in np.linspace(0, 1, 7)]
    np.testing.assert_allclose(line.losses, expected, rtol=1e-12)
    np.testing.assert_allclose(line.coordinates[0], np.linspace(-1, 0, 7))
    assert line.center_loss == line.losses[-1]
    assert line.metadata["step"] == 3
    assert all(torch.equal(p, before[n]) for n, p in live.named_parameters())


def test_end_has_bitwise_the_given_weights():
    net, x, y = network(), normal(20, 6).float(), torch.arange(20) % 3
    objective = Objective(loss_of(net, x, y), dict(net.named_parameters()))
    line = line_between(objective, weights(network(5)), resolution=3)
    assert line.losses[-1] == float(objective.loss())


def test_permutation_of_units_causes_a_barrier():
    """The same function with permuted hidden units: distant weights with a barrier between."""
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=F64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    net = network(4).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(net, x, y)().backward()
        optimizer.step()
    order = torch.roll(torch.arange(9), 4)
    shuffled = weights(net)
    shuffled["0.weight"], shuffled["0.bias"] = (
        shuffled["0.weight"][order],
        shuffled["0.bias"][order],
    )
    shuffled["2.weight"] = shuffled["2.weight"][:, order]
    objective = Objective(loss_of(net, x, y), dict(net.named_parameters()))
    line = line_between(objective, shuffled)
    assert line.losses[0] == pytest.approx(line.losses[-1], rel=1e-12)
    assert loss_barrier(line) > 0.5 > 10 * line.center_loss
    back = torch.argsort(order)
    shuffled["0.weight"], shuffled["0.bias"] = shuffled["0.weight"][back], shuffled["0.bias"][back]
    shuffled["2.weight"] = shuffled["2.weight"][:, back]
    assert loss_barrier(line_between(objective, shuffled)) == 0.0


@pytest.mark.parametrize(
    ("losses", "linear", "mean"),
    [
        ([1.0, 3.0, 2.0], 1.5, 1.5),
        ([4.0, 3.0, 0.0], 1.0, 2.0),  # the mean of the ends is 2, and the start is above it
        ([4.0, 1.0, 0.0], 0.0, 2.0),
        ([0.0, np.inf, 0.0], np.inf, np.inf),
        ([0.0, np.nan, 0.0], np.nan, np.nan),
        ([np.inf, 1.0, 0.0], np.nan, np.nan),
    ],
)
def test_both_definitions_of_a_barrier(losses, linear, mean):
    line = Slice((np.linspace(-1, 0, 3),), np.array(losses), losses[-1])
    np.testing.assert_equal(loss_barrier(line), linear)
    np.testing.assert_equal(loss_barrier(line, "mean"), mean)


def test_plane_goes_through_all_three_points():
    nets = [network(seed).double() for seed in range(3)]
    x, y = normal(20, 6).double(), torch.arange(20) % 3
    objective = Objective(loss_of(nets[0], x, y), dict(nets[0].named_parameters()))
    plane = plane_through(objective, weights(nets[1]), weights(nets[2]), resolution=5, margin=0.5)
    points = plane.metadata["points"]
    assert [point["name"] for point in points] == ["weights", "second", "third"]
    assert plane.metadata["cosine"] == pytest.approx(0.0, abs=1e-12)
    assert plane.metadata["norms"] == pytest.approx([1.0, 1.0])
    places = np.array([[p["x"], p["y"]] for p in points])
    for i, j in ((0, 1), (0, 2), (1, 2)):  # coordinates are distances
        apart = torch.cat(
            [
                (a - b).flatten()
                for a, b in zip(nets[i].parameters(), nets[j].parameters(), strict=True)
            ]
        ).detach()
        assert np.hypot(*(places[i] - places[j])) == pytest.approx(float(apart.norm()))
    assert all(
        axis[0] < point[name] < axis[-1]
        for name, axis in zip("xy", plane.coordinates, strict=True)
        for point in points
    )
    # Without a margin two corners are marked points: the losses there are those of the networks.
    corners = plane_through(objective, weights(nets[1]), weights(nets[2]), resolution=2, margin=0.0)
    assert 0.0 < points[2]["x"] < points[1]["x"]
    expected = [loss_of(net, x, y)().item() for net in nets[:2]]
    np.testing.assert_allclose(corners.losses[0], expected, rtol=1e-12)
    # And that of the third, seen from itself.
    objective = Objective(loss_of(nets[2], x, y), dict(nets[2].named_parameters()))
    corners = plane_through(objective, weights(nets[0]), weights(nets[1]), resolution=2, margin=0.0)
    expected = [loss_of(nets[i], x, y)().item() for i in (2, 0)]
    np.testing.assert_allclose(corners.losses[0], expected, rtol=1e-12)


def test_collinear_points_raise():
    one, two = network(1), network(2)
    x, y = normal(20, 6).float(), torch.arange(20) % 3
    objective = Objective(loss_of(one, x, y), dict(one.named_parameters()))
    half = weights(mixed(one, two, 0.5))
    with pytest.raises(ValueError, match="three points that span a plane"):
        plane_through(objective, weights(two), half)
    with pytest.raises(ValueError, match="three points that span a plane"):
        plane_through(objective, weights(one), half)
    with pytest.raises(ValueError, match=r"at distances 0 and 0\): expected three points"):
        plane_through(objective, weights(one), weights(one))


def test_thin_triangle_spans_a_plane():
    """The third point is 1e-3 of the distance off the line: far above rounding in float32."""
    one, two = network(1), network(2)
    x, y = normal(20, 6).float(), torch.arange(20) % 3
    objective = Objective(loss_of(one, x, y), dict(one.named_parameters()))
    third = weights(mixed(one, two, 0.5))
    apart = sum(float((a - b).square().sum()) for a, b in
                zip(weights(one).values(), weights(two).values(), strict=True)) ** 0.5  # fmt: skip
    third["0.bias"] = third["0.bias"] + 1e-3 * apart / 3
    plane = plane_through(objective, weights(two), third, resolution=2)
    corner = plane.metadata["points"][2]
    assert corner["x"] == pytest.approx(apart / 2, rel=1e-2)
    assert 0 < corner["y"] <= 1.001e-3 * apart


# -- BatchNorm ------------------------------------------------------------------------------------


def with_norm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    net.train()
    for _ in range(20):
        net(torch.randn(32, 6))
    net[1].momentum = 0.2
    return net


def test_re_estimated_statistics_equal_update_bn():
    net = with_norm(0)
    batches = [normal(16, 6, seed=seed).float() for seed in range(3)]
    twin = copy.deepcopy(net)
    update_bn(batches, twin)
    reestimate_batch_norm(net, lambda: [net(batch) for batch in batches])
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name], rtol=1e-6, atol=1e-7)
    assert net[1].momentum == 0.2
    assert net[1].training


def test_module_in_eval_mode_is_re_estimated_in_train_mode():
    """As in ``update_bn``; otherwise nothing would be estimated."""
    net = with_norm(0).eval()
    batches = [normal(16, 6, seed=seed).float() for seed in range(3)]
    twin = copy.deepcopy(net)
    update_bn(batches, twin)
    before = net[1].running_mean.clone()
    reestimate_batch_norm(net, lambda: [net(batch) for batch in batches])
    assert not torch.equal(net[1].running_mean, before)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(net[1].running_var, twin[1].running_var)
    assert not any(m.training for m in net.modules())


def test_statistics_of_layers_in_eval_mode_and_after_an_error():
    net = with_norm(0)
    net[1].eval()
    before = copy.deepcopy(net[1].state_dict())
    reestimate_batch_norm(net, lambda: net(normal(16, 6).float()))
    assert all(torch.equal(value, before[name]) for name, value in net[1].state_dict().items())
    net.train()
    with pytest.raises(RuntimeError, match="stop"):
        reestimate_batch_norm(net, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert net[1].momentum == 0.2
    net.eval()
    with pytest.raises(RuntimeError, match="stop"):
        reestimate_batch_norm(net, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not any(m.training for m in net.modules())


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, w: line_between(o, w, resolution=1), r"resolution=1: expected an integer >= 2"),
        (
            lambda o, w: line_between(o, {}),
            r"start holds no parameter '0.weight', '0.bias', '2.weight', '2.bias': expected",
        ),
        (
            lambda o, w: line_between(o, {n: w[n] for n in list(w)[:3]}),
            r"no parameter '2.bias': .* it has '0.weight', '0.bias', '2.weight'",
        ),
        (
            lambda o, w: line_between(o, w, {**w, "0.bias": torch.zeros(2)}),
            r"end\['0.bias'\] has shape \(2,\): expected \(9,\)",
        ),
        (lambda o, w: plane_through(o, w, {}), "third holds no parameter"),
        (lambda o, w: plane_through(o, w, w, margin=-1.0), r"margin=-1.0: expected a finite"),
        (
            lambda o, w: loss_barrier(Slice((np.arange(2.0),) * 2, np.zeros((2, 2)), 0.0)),
            "line has two axes: expected a slice with one",
        ),
        (
            lambda o, w: loss_barrier(Slice((np.arange(2.0),), np.zeros(2), 0.0), "max"),
            "ends='max': expected 'linear' or 'mean'",
        ),
    ],
)
def test_messages(call, message):
    net, x, y = network(), normal(20, 6).float(), torch.arange(20) % 3
    objective = Objective(loss_of(net, x, y), dict(net.named_parameters()))
    with pytest.raises(ValueError, match=message):
        call(objective, weights(network(7)))
