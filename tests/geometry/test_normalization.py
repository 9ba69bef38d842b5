"""Filter normalisation, layer by layer, against the definition of Li et al. 2018.

A filter is what reaches one output channel: found here with the gradient of that channel alone.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_landscape.geometry.directions import (
    filter_dims_of,
    filter_normalize,
    random_direction,
)
from tests.oracles import F64, generator, normal


def normalized(module):
    """The parameters by name, a random direction, and the normalized direction."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    direction = random_direction(params, generator=generator(1))
    return (
        params,
        direction,
        filter_normalize(direction, params, filter_dims=filter_dims_of(module)),
    )


def filters(layer, size=5):
    """The entries of the weight that reach each output channel, as masks."""
    dims = layer.weight.ndim - 2
    x = torch.rand(1, layer.in_channels, *[size] * dims, dtype=F64) + 1
    out = layer(x)
    sums = out.sum(dim=[0, *range(2, out.ndim)])
    return [torch.autograd.grad(s, layer.weight, retain_graph=True)[0] != 0 for s in sums]


def assert_filters(found, direction, weight, masks):
    """``found`` is the direction, in each filter at the norm of the weight's."""
    for mask in masks:
        expected = direction[mask] / direction[mask].norm() * weight[mask].norm()
        torch.testing.assert_close(found[mask], expected, rtol=1e-12, atol=0)


CONVOLUTIONS = [
    (kind, groups)
    for kind in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    )
    for groups in (1, 2, 4)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("outputs", [4, 8])
def test_filter_is_what_reaches_one_output_channel(kind, groups, outputs):
    """With four inputs, four groups are a depthwise convolution."""
    layer = kind(4, outputs, 2, groups=groups, dtype=F64)
    params, direction, found = normalized(layer)
    masks = filters(layer)
    assert len(masks) == outputs
    assert torch.stack(masks).sum(dim=0).eq(1).all()  # each entry is in one filter
    assert_filters(found["weight"], direction["weight"], params["weight"], masks)
    assert found["bias"].count_nonzero() == 0


def test_depthwise_transposed_convolution_by_hand():
    layer = nn.ConvTranspose1d(2, 2, 2, groups=2, bias=False, dtype=F64)
    params = {"weight": torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]], dtype=F64)}
    direction = {"weight": torch.tensor([[[0.0, 1.0]], [[8.0, 6.0]]], dtype=F64)}
    found = filter_normalize(direction, params, filter_dims=filter_dims_of(layer))
    expected = torch.tensor([[[0.0, 5.0]], [[1.6, 1.2]]], dtype=F64)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-15, atol=0)


def test_grouped_transposed_convolution_by_hand():
    """Four inputs, two groups, two outputs each: two rows of the weight make a filter."""
    w = torch.tensor([[3.0, 1.0], [4.0, 0.0], [5.0, 8.0], [12.0, 6.0]])
    d = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0], [2.0, 4.0]])
    layer = nn.ConvTranspose1d(4, 4, 1, groups=2)
    found = filter_normalize(
        {"weight": d[..., None]}, {"weight": w[..., None]}, filter_dims=filter_dims_of(layer)
    )
    expected = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 6.0], [13.0, 8.0]])
    torch.testing.assert_close(found["weight"][..., 0], expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Bilinear(2, 4, 3),
        nn.Embedding(3, 4),
        nn.EmbeddingBag(3, 4),
        nn.RNN(2, 3),
        nn.LSTM(2, 3, num_layers=2, bidirectional=True),
        nn.LSTM(2, 4, proj_size=3),
        nn.GRU(2, 3),
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=2),
    ],
)
def test_filters_of_other_layers_are_rows(layer):
    """A neuron, a token, a gate of a unit, a row of a projection."""
    params, direction, found = normalized(layer.to(F64))
    assert filter_dims_of(layer) == {}
    for name, weight in params.items():
        for row, (d, made) in zip(
            weight, zip(direction[name], found[name], strict=True), strict=True
        ):
            expected = torch.zeros_like(d) if weight.ndim < 2 else d / d.norm() * row.norm()
            torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)


def test_complex_filters():
    """The norm of (3, 4i) is 5; that of the direction (i, 0) is 1."""
    w = torch.tensor([[3, 4j], [0, 1 + 1j]])
    d = torch.tensor([[1j, 0], [2, 0]])
    found = filter_normalize({"w": d}, {"w": w})["w"]
    torch.testing.assert_close(found, torch.tensor([[5j, 0], [2**0.5, 0]], dtype=d.dtype))
    layer = nn.ConvTranspose1d(4, 4, 2, groups=2, dtype=torch.complex128)
    params, direction, found = normalized(layer)
    masks = filters(nn.ConvTranspose1d(4, 4, 2, groups=2, dtype=F64))
    assert_filters(found["weight"], direction["weight"], params["weight"], masks)


# -- the weight under other names -----------------------------------------------------------------


class Permuted(nn.Module):
    """Keeps the weight with its first two dimensions exchanged."""

    def forward(self, original):
        return original.transpose(0, 1)

    def right_inverse(self, weight):
        return weight.transpose(0, 1).contiguous()


class Sum(nn.Module):
    """Two originals of the weight's shape."""

    def forward(self, one, two):
        return one + two

    def right_inverse(self, weight):
        return weight / 2, weight / 2


class LowRank(nn.Module):
    """Rank one: the originals are (out, 1) and (1, in)."""

    def forward(self, b, a):
        return b @ a

    def right_inverse(self, weight):
        return weight[:, :1], weight[:1]


class Doubled(nn.Module):
    def forward(self, original):
        return 2 * original


def with_hook(wrap, layer, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight_norm
        return wrap(layer, *args)


def masked_twice(layer):
    with_hook(nn.utils.weight_norm, layer)
    prune.random_unstructured(layer, "weight_v", 0.2)
    prune.random_unstructured(layer, "weight_g", 0.2)


def doubled(name):
    def wrap(layer):
        parametrizations.weight_norm(layer)
        parametrize.register_parametrization(layer.parametrizations.weight, name, Doubled())

    return wrap


IN_WEIGHT = "parametrizations.weight."
UNDER = {
    "weight_norm": (parametrizations.weight_norm, [f"{IN_WEIGHT}original1"]),
    "spectral_norm": (parametrizations.spectral_norm, [f"{IN_WEIGHT}original"]),
    "orthogonal": (parametrizations.orthogonal, [f"{IN_WEIGHT}original"]),
    "weight_norm hook": (lambda m: with_hook(nn.utils.weight_norm, m), ["weight_v"]),
    "spectral_norm hook": (lambda m: with_hook(nn.utils.spectral_norm, m), ["weight_orig"]),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), ["weight_orig"]),
    "weight_norm hook, pruned": (masked_twice, ["weight_v_orig"]),
    "own": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
            [f"{IN_WEIGHT}original"]),
    "own of two": (lambda m: parametrize.register_parametrization(m, "weight", Sum()),
                   [f"{IN_WEIGHT}original0", f"{IN_WEIGHT}original1"]),
    "nested": (doubled("original1"), [f"{IN_WEIGHT}parametrizations.original1.original"]),
    "nested magnitude": (doubled("original0"), [f"{IN_WEIGHT}original1"]),
}  # fmt: skip
LAYERS = {
    "Conv2d, groups": lambda: nn.Conv2d(4, 4, 2, groups=2, dtype=F64),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3, dtype=F64),
    "ConvTranspose2d, groups": lambda: nn.ConvTranspose2d(4, 8, 2, groups=2, dtype=F64),
    "ConvTranspose3d, depthwise": lambda: nn.ConvTranspose3d(4, 4, 2, groups=4, dtype=F64),
    "ConvTranspose2d, depthwise, 1 x 1": lambda: nn.ConvTranspose2d(4, 4, 1, groups=4, dtype=F64),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("under", UNDER)
def test_weights_under_other_names(under, layer):
    """Normalised like the weight of the plain layer; everything else gets 0."""
    wrap, names = UNDER[under]
    layer = LAYERS[layer]()
    masks = filters(layer)
    wrap(layer)
    params, direction, found = normalized(layer)
    assert filter_dims_of(layer).keys() <= params.keys()
    for name, made in found.items():
        if name in names:
            assert_filters(made, direction[name], params[name], masks)
        else:
            assert made.count_nonzero() == 0, name
    assert set(names) < found.keys()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("hook", [False, True])
def test_magnitudes_of_weight_norm_have_no_filters(hook, dim):
    """For any layer; besides biases they are the only zero entries."""
    for layer, tensor in (
        (nn.Linear(3, 2), "weight"),
        (nn.ConvTranspose1d(3, 2, 2), "weight"),
        (nn.LSTM(2, 3), "weight_hh_l0"),
        (nn.Embedding(3, 2), "weight"),
    ):
        wrap = nn.utils.weight_norm if hook else parametrizations.weight_norm
        with_hook(wrap, layer, tensor, dim)
        _, _, found = normalized(nn.Sequential(layer))
        at_zero = {name for name, made in found.items() if not made.any()}
        g = f"0.{tensor}_g" if hook else f"0.parametrizations.{tensor}.original0"
        assert at_zero == {g, *(name for name in found if "bias" in name)}


def test_scaling_v_changes_neither_the_function_nor_the_share_of_a_step():
    """``w = g v/|v|``: a step along the direction moves the weight as before."""
    layer = parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 2, dtype=F64))
    moved = []
    for factor in (1.0, 10.0):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.parametrizations.weight.original1.mul_(factor)
        _, _, found = normalized(twin)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.add_(found[name], alpha=0.1)
        moved.append(twin.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-12, atol=0)


def test_rank_one_factors_are_no_magnitudes():
    """They look like weight norm's ``g``; each has its filters along dimension 0."""
    layer = nn.Linear(3, 2, bias=False, dtype=F64)
    parametrize.register_parametrization(layer, "weight", LowRank())
    params, direction, found = normalized(layer)
    for name, made in found.items():
        norms = [t[name].norm(dim=1) for t in (params, direction)]
        torch.testing.assert_close(made, direction[name] * (norms[0] / norms[1])[:, None])
    assert filter_dims_of(layer) == {}


def test_originals_of_another_shape_have_their_filters_along_dimension_zero():
    layer = nn.ConvTranspose1d(2, 3, 2, dtype=F64)
    parametrize.register_parametrization(layer, "weight", Permuted(), unsafe=True)
    assert filter_dims_of(layer) == {}
    params, _, found = normalized(layer)
    name = f"{IN_WEIGHT}original"
    torch.testing.assert_close(found[name].norm(dim=(1, 2)), params[name].norm(dim=(1, 2)))


class Counted(nn.Module):
    calls = 0

    def forward(self, original):
        self.calls += 1
        return original


def test_parametrizations_are_not_run():
    """Spectral norm's would move its vectors."""
    layer = nn.ConvTranspose1d(2, 3, 2)
    counted = Counted()
    parametrize.register_parametrization(layer, "weight", counted)
    before = counted.calls
    filter_dims_of(layer)
    assert counted.calls == before


# -- names ----------------------------------------------------------------------------------------


def test_lazy_modules_have_the_filters_of_the_built_ones():
    lazy = nn.Sequential(nn.LazyConvTranspose1d(4, 2, groups=2), nn.LazyConv1d(2, 2))
    before = filter_dims_of(lazy)
    lazy(torch.ones(1, 4, 3))
    assert before == filter_dims_of(lazy) == {"0.weight": (1, 2)}


@pytest.mark.parametrize("transposed_first", [True, False])
def test_tied_weights_follow_the_layer_that_names_them(transposed_first):
    down, up = nn.Conv1d(2, 3, 2, bias=False), nn.ConvTranspose1d(3, 2, 2, bias=False)
    up.weight = down.weight
    module = nn.Sequential(*([up, down] if transposed_first else [down, up]))
    assert [name for name, _ in module.named_parameters()] == ["0.weight"]
    assert filter_dims_of(module) == ({"0.weight": 1} if transposed_first else {})
    params, _, found = normalized(module)
    rest = (0, 2) if transposed_first else (1, 2)
    torch.testing.assert_close(found["0.weight"].norm(dim=rest), params["0.weight"].norm(dim=rest))


def test_module_used_twice_is_named_once():
    up = parametrizations.weight_norm(nn.ConvTranspose1d(2, 2, 2, groups=2))
    module = nn.ModuleDict({"a": up, "b": up})
    assert filter_dims_of(module) == {
        "a.parametrizations.weight.original0": None,
        "a.parametrizations.weight.original1": (1, 2),
    }


def test_frozen_parameters_are_listed_and_left_out():
    """A direction of the trainable parameters only is normalised as in the full one."""
    module = nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.ConvTranspose1d(2, 2, 2))
    module[0].requires_grad_(False)
    assert filter_dims_of(module) == {"0.weight": 1, "1.weight": 1}
    _, direction, full = normalized(module)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    part = {name: direction[name] for name in params}
    found = filter_normalize(part, params, filter_dims=filter_dims_of(module))
    assert found.keys() == params.keys()
    assert all(torch.equal(found[name], full[name]) for name in found)


def test_lora_matrices_are_normalised_row_by_row():
    lora = nn.ParameterDict({"a": nn.Parameter(normal(2, 5)), "b": nn.Parameter(normal(3, 2))})
    with torch.no_grad():
        lora["b"][1:] = 0  # rows that have not moved yet stay where they are
    params, direction, found = normalized(lora)
    for name, rows in (("a", 2), ("b", 1)):
        for i in range(rows):
            expected = direction[name][i] / direction[name][i].norm() * params[name][i].norm()
            torch.testing.assert_close(found[name][i], expected, rtol=1e-12, atol=0)
    assert found["b"][1:].count_nonzero() == 0


BY_ROW, BY_COLUMN = [[3.0, 4.0], [9.6, 7.2]], [[7.2, 4.0], [9.6, 3.0]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, BY_ROW),
        (np.int64(0), BY_ROW),
        ((0, 2), BY_ROW),
        (1, BY_COLUMN),
        ((1, 1), BY_COLUMN),
        ((1, 2), [[0.0, 5.0], [12.0, 0.0]]),  # each entry by itself
        (None, [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_dimensions_groups_and_none(given, expected):
    """The weight has rows of norm 5 and 12, columns of 12 and 5; the direction 10 throughout."""
    w = torch.tensor([[0.0, 5.0], [12.0, 0.0]])
    d = torch.tensor([[6.0, 8.0], [8.0, 6.0]])
    found = filter_normalize({"w": d}, {"w": w}, filter_dims={"w": given})["w"]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    "given", [2, -1, True, "0", 1.0, (1,), (1, 2, 3), (2, 1), (1, 0), (1, -1), (1, 3), (1, True)]
)
def test_invalid_filter_dims_raise(given):
    w = {"w": torch.ones(4, 2)}
    with pytest.raises(
        ValueError, match=r"filter_dims\['w'\]=.* from 0 to 1, .* of size 4, or None"
    ):
        filter_normalize(w, w, filter_dims={"w": given})
