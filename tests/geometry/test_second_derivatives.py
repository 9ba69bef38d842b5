"""Explicit second derivatives against torch's own and against central differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_landscape.geometry import operation, second_derivatives
from lightning_landscape.geometry.memory import counting_saved
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.second_derivatives import (
    explicit_second_derivatives,
    torch_second_derivatives,
)
from tests.oracles import F64, flat, normal


@pytest.fixture(autouse=True, params=["explicit", "small"])
def _large_enough(request, monkeypatch):
    """Otherwise torch's functions are used for small inputs."""
    if request.param == "explicit":
        monkeypatch.setattr(operation, "_MIN_NUMEL", {})


def only_explicit(test):
    return pytest.mark.parametrize("_large_enough", ["explicit"], indirect=True)(test)


IMAGES, SERIES, TABLE = (5, 4, 6, 6), (6, 4, 5), (7, 4)


class Functional(nn.Module):
    """A norm without a module: as functions take it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def by_the_older_name(x, weight, bias):
    return torch.batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, False)


LAYERS = {
    "conv1d": (SERIES, lambda: [nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 2, 2, 1)]),
    "conv2d": (IMAGES, lambda: [nn.Conv2d(4, 3, 3, bias=False), nn.Tanh(), nn.Conv2d(3, 2, 2)]),
    "conv2d, groups, dilated": (
        IMAGES,
        lambda: [nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.Tanh(), nn.Conv2d(8, 8, 2, groups=8)],
    ),
    "conv2d, same": (IMAGES, lambda: [nn.Conv2d(4, 3, 3, padding="same"), nn.Tanh()]),
    "conv2d, circular": (
        IMAGES,
        lambda: [nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="circular"), nn.Tanh()],
    ),
    "conv2d, one image": (IMAGES[1:], lambda: [nn.Conv2d(4, 3, 3), nn.Tanh()]),
    "conv3d": ((2, 2, 4, 4, 3), lambda: [nn.Conv3d(2, 3, (3, 2, 2)), nn.Tanh()]),
    "transposed": (
        IMAGES,
        lambda: [nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 2, 2)],
    ),
    "transposed, padded": (
        SERIES,
        lambda: [nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1, bias=False), nn.Tanh()],
    ),
    "batch norm": (
        IMAGES,
        lambda: [nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2)],
    ),
    "batch norm of the data": (
        TABLE,
        lambda: [nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Tanh()],
    ),
    "batch norm, eval": (
        SERIES,
        lambda: [nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3).eval()],
    ),
    "batch norm, function": (
        TABLE,
        lambda: [nn.Linear(4, 3), Functional(by_the_older_name), nn.Tanh()],
    ),
    "instance norm": (
        IMAGES,
        lambda: [
            nn.Conv2d(4, 3, 3),
            nn.InstanceNorm2d(3, affine=True),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2),
            nn.InstanceNorm2d(2),
        ],
    ),
    "layer norm": (
        TABLE,
        lambda: [nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3)],
    ),
    "layer norm of the data": (TABLE, lambda: [nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh()]),
    "layer norm, no bias": (
        TABLE,
        lambda: [
            nn.Linear(4, 5),
            nn.LayerNorm(5, elementwise_affine=False),
            nn.Linear(5, 3),
            nn.LayerNorm(3, bias=False),
        ],
    ),
    "one layer twice": (TABLE, lambda: [nn.Linear(4, 4), *[nn.LayerNorm(4), nn.Tanh()] * 2]),
    "layer norm of two axes": (
        SERIES,
        lambda: [nn.Conv1d(4, 3, 1), nn.LayerNorm([3, 5]), nn.Tanh()],
    ),
}


class Problem:
    """A network of some layers with random weights, and a loss with a graph or a penalty."""

    def __init__(self, name: str, dtype: torch.dtype = F64) -> None:
        shape, layers = LAYERS[name]
        self.net = nn.Sequential(*layers()).to(dtype)
        for index, p in enumerate(self.net.parameters()):
            p.data = normal(*p.shape, seed=index + 1).to(dtype)
        self.x = normal(*shape).to(dtype)

    @property
    def params(self):
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    def loss(self):
        y = self.net(self.x)
        return (y - 0.3).square().mean() + y.pow(3).mean()

    def critic(self):
        """With the gradient penalty of a critic: the loss contains a gradient by the data."""
        x = self.x.clone().requires_grad_()
        y = self.net(x)
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return slope.square().mean() + y.mean()

    def physics(self):
        """A residual with two derivatives by the data."""
        x = self.x.clone().requires_grad_()
        y = self.net(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return (second + x).square().mean() + y.mean()

    def flattened(self):
        """The gradient by the weights is penalized."""
        loss = self.loss()
        slopes = torch.autograd.grad(loss, list(self.params.values()), create_graph=True)
        return loss + sum(slope.square().sum() for slope in slopes)


def direction(params, seed=9):
    return {n: normal(*p.shape, seed=seed + i).to(p) for i, (n, p) in enumerate(params.items())}


def by_differences(loss, params, vector, step=1e-5):
    """``H v`` from torch's first derivatives alone, which are right."""

    def gradient(sign):
        with torch.no_grad():
            for name, p in params.items():
                p.add_(vector[name], alpha=sign * step)
        found = torch.autograd.grad(loss(), list(params.values()))
        with torch.no_grad():
            for name, p in params.items():
                p.sub_(vector[name], alpha=sign * step)
        return torch.cat([g.reshape(-1) for g in found])

    return (gradient(1) - gradient(-1)) / (2 * step)


def torchs_product(loss, params, vector):
    gradient = torch.autograd.grad(loss(), list(params.values()), create_graph=True)
    found = torch.autograd.grad(
        gradient, list(params.values()), [vector[n] for n in params], materialize_grads=True
    )
    return torch.cat([t.reshape(-1) for t in found])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_products(name):
    problem = Problem(name)
    params, vector = problem.params, direction(problem.params)
    objective = Objective(problem.loss, params)
    for _ in range(2):  # nothing of the first stays in the second
        found = flat(objective.hvp(vector))
        assert relative(found, by_differences(problem.loss, params, vector)) < 1e-6
        if name != "transposed, padded":  # torch refuses that one
            assert relative(found, torchs_product(problem.loss, params, vector)) < 1e-11
        vector = direction(params, seed=90)
    assert objective.engine_used == "double_backward"


@pytest.mark.parametrize("name", LAYERS)
def test_products_with_and_without(name):
    problem = Problem(name)
    vector = direction(problem.params)
    explicit = Objective(problem.loss, problem.params)
    found = flat(explicit.hvp(vector))
    with torch_second_derivatives():
        plain = Objective(problem.loss, problem.params)
        expected = flat(plain.hvp(vector))
    if name != "transposed, padded":  # some versions of torch refuse that one
        assert plain.engine_used == "double_backward"
    exact = plain.engine_used == "double_backward"
    assert relative(found, expected) < (1e-12 if exact else 1e-6)


def test_switch_covers_all_functions():
    places = [(place, name) for place, name, _ in second_derivatives._EXPLICIT]
    own = [getattr(place, name) for place, name in places]
    with torch_second_derivatives(), explicit_second_derivatives():
        assert all(getattr(*place) is f for place, f in zip(places, own, strict=True))
    with explicit_second_derivatives():
        assert not any(getattr(*place) is f for place, f in zip(places, own, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_products_with_frozen_parameters(name):
    """Some of the derivatives are not needed then."""
    for frozen in range(len(Problem(name).params)):
        problem = Problem(name)
        list(problem.net.parameters())[frozen].requires_grad_(False)
        if not problem.params:
            continue
        vector = direction(problem.params)
        found = flat(Objective(problem.loss, problem.params).hvp(vector))
        expected = by_differences(problem.loss, problem.params, vector)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_products_along_part_of_the_weights(name):
    """Some of the cotangents are missing then."""
    problem = Problem(name)
    whole = direction(problem.params)
    objective = Objective(problem.loss, problem.params)
    parts = [flat(objective.hvp({key: whole[key]})) for key in whole]
    torch.testing.assert_close(sum(parts), flat(objective.hvp(whole)), rtol=1e-11, atol=1e-12)


def normalized(x, axes, weight, bias, eps, shape):
    centred = x - x.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm(x, weight, bias, mean, variance, training, momentum, eps, cudnn):
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if training:
        return normalized(x, [0, *range(2, x.dim())], weight, bias, eps, shape)
    y = (x - mean.view(shape)) / (variance + eps).sqrt().view(shape)
    return y * weight.view(shape) + bias.view(shape)


def instance_norm(x, weight, bias, mean, variance, use_input_stats, momentum, eps, cudnn):
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return normalized(x, list(range(2, x.dim())), weight, bias, eps, shape)


def layer_norm(x, shape, weight, bias, eps, cudnn):
    return normalized(x, list(range(-len(shape), 0)), weight, bias, eps, list(shape))


@pytest.mark.parametrize("kind", ["critic", "physics", "flattened"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_with_a_gradient_inside_the_loss(name, kind, monkeypatch):
    """torch's own third derivatives of batch, instance and layer norm are wrong."""
    problem = Problem(name)
    loss = getattr(problem, kind)
    params, vector = problem.params, direction(problem.params)
    objective = Objective(loss, params)
    found = flat(objective.hvp(vector))
    for norm in (batch_norm, instance_norm, layer_norm):
        monkeypatch.setattr(torch, norm.__name__, norm)
    if name == "transposed, padded":  # torch refuses to differentiate that one twice
        assert relative(found, by_differences(loss, params, vector)) < 1e-6
        return
    assert relative(found, torchs_product(loss, params, vector)) < 1e-8
    assert objective.engine_used == "double_backward"


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_equal_torch(name, monkeypatch):
    """Bit for bit, the running statistics too; on CUDA those without cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    mine, theirs = Problem(name, torch.float32), Problem(name, torch.float32)
    loss = theirs.loss()
    expected = torch.autograd.grad(loss, list(theirs.params.values()))
    with explicit_second_derivatives() as state:
        mine_loss = mine.loss()
        state.evaluated = True
        found = torch.autograd.grad(mine_loss, list(mine.params.values()), create_graph=True)
    assert torch.equal(mine_loss, loss)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, mine.net.buffers(), theirs.net.buffers()))


# -- work and memory ------------------------------------------------------------------------------


class Written(TorchDispatchMode):
    """Counts the numbers that all kernels write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and not func.is_view:
                self.numbers += result.numel()
        return results


@only_explicit
@pytest.mark.parametrize(("name", "share"), [("batch norm", 0.5), ("conv2d", 0.9)])
def test_product_writes_less(name, share):
    """With enough examples that the weights are negligible."""
    problem = Problem(name)
    problem.x = problem.x.repeat(20, *[1] * (problem.x.dim() - 1))
    params, vector = problem.params, direction(problem.params)
    gradient = torch.autograd.grad(problem.loss(), list(params.values()), create_graph=True)
    with Written() as theirs:
        torch.autograd.grad(gradient, list(params.values()), [vector[n] for n in params])
    objective = Objective(problem.loss, params)
    objective.hvp(vector)
    with Written() as mine:
        objective.hvp(vector)
    assert mine.numbers < share * theirs.numbers


@pytest.mark.parametrize("name", LAYERS)
def test_graph_takes_no_more_memory(name):
    problem = Problem(name)
    params = list(problem.params.values())
    with counting_saved(params) as theirs:
        kept = torch.autograd.grad(problem.loss(), params, create_graph=True)
        expected = theirs()
    with counting_saved(params) as mine, explicit_second_derivatives() as state:
        loss = problem.loss()
        state.evaluated = True
        kept = torch.autograd.grad(loss, params, create_graph=True)
        assert mine() <= expected + 8 * 30  # statistics of 3 channels
    del kept


# -- unsupported cases ----------------------------------------------------------------------------


@only_explicit
def test_third_derivative_of_the_graph_raises():
    problem = Problem("batch norm")
    params = list(problem.params.values())
    with explicit_second_derivatives() as state:
        loss = problem.loss()
        state.evaluated = True
        gradient = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives outside of the loss"):
        torch.autograd.grad(gradient, params, list(map(torch.ones_like, params)), create_graph=True)


def is_torchs(y):
    """Whether none of the functions that made it is ours."""
    pending = [y.grad_fn]
    while pending:
        node = pending.pop()
        if "_Value" in node.name():
            return False
        pending += [before for before, _ in node.next_functions if before is not None]
    return True


def test_only_supported_calls_are_replaced():
    norm, x = nn.LayerNorm(4), torch.randn(3, 4, requires_grad=True)
    with explicit_second_derivatives():
        assert not is_torchs(norm(x))
        assert is_torchs(norm.bfloat16()(x.bfloat16()))
        norm = norm.float()
        with torch.autocast(x.device.type, torch.bfloat16):
            assert is_torchs(norm(x))
        with torch.no_grad():
            assert norm(x).grad_fn is None
        assert F.layer_norm(x.detach(), (4,)).grad_fn is None
        rest = (None, None, None, None)
        assert is_torchs(torch.batch_norm(x[:1], *rest, True, 0.1, 1e-5, False))  # one value each
        with pytest.raises(RuntimeError, match="running_mean"):
            torch.batch_norm(x, *rest, False, 0.1, 1e-5, False)
        assert is_torchs(nn.InstanceNorm1d(3, track_running_stats=True)(x[None]))
        assert not is_torchs(nn.InstanceNorm1d(3)(x[None]))
        with forward_ad.dual_level():
            y = norm(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(y).tangent is not None


def test_torch_func_inside_a_loss():
    """The transforms of torch.func do not support this kind of autograd function."""
    problem = Problem("layer norm")
    norm, x = problem.net[1], normal(6, 5)

    def loss():
        slopes = torch.func.vmap(torch.func.grad(lambda row: norm(row).pow(3).sum()))(x)
        _, along = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
        return (slopes * x).square().mean() + norm(x).pow(3).mean() + along.square().mean()

    params = dict(norm.named_parameters())
    vector = direction(params)
    found = flat(Objective(loss, params).hvp(vector))
    assert relative(found, by_differences(loss, params, vector)) < 1e-6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(8), nn.Conv1d(8, 24, 1)

    def forward(self, x):  # (batch, width, token)
        query, key, value = self.conv(self.norm(x)).transpose(1, 2).chunk(3, -1)
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_checkpoint_recomputes_with_the_same_kernels(depth):
    """A checkpoint recomputes its part during a product, and must use the same kernels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 8, 1), *[Attention() for _ in range(depth)]).double()
    x = normal(4, 3, 5)

    def loss(checkpointed):
        h = net[0](x)
        for block in net[1:]:
            h = checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
        return h.square().mean() / math.sqrt(2)

    params = dict(net.named_parameters())
    vector = direction(params)
    objective = Objective(lambda: loss(True), params)
    for _ in range(2):
        found = flat(objective.hvp(vector))
        assert relative(found, torchs_product(lambda: loss(False), params, vector)) < 1e-11
    assert objective.engine_used == "double_backward"
