"""Directions: filter normalisation, planes, signs."""

import math

import pytest
import torch
from torch import nn

from lightning_landscape.geometry.directions import (
    aligned,
    filter_dims_of,
    filter_normalize,
    orthogonal_to,
    random_direction,
    unit,
)
from lightning_landscape.geometry.vectors import inner, norm
from tests.oracles import F64, generator, normal


def weights(module):
    return {name: p.detach() for name, p in module.named_parameters()}


# -- random ---------------------------------------------------------------------------------------


def test_random_direction_is_repeatable():
    params = weights(nn.Linear(3, 2))
    state = torch.get_rng_state()
    one, same = random_direction(params), random_direction(dict(reversed(params.items())))
    seeded = [random_direction(params, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["weight"], same["weight"])
    assert torch.equal(seeded[0]["weight"], seeded[1]["weight"])
    assert not torch.equal(seeded[0]["weight"], seeded[2]["weight"])
    assert not torch.equal(one["weight"], seeded[0]["weight"])
    assert {name: d.shape for name, d in one.items()} == {"weight": (2, 3), "bias": (2,)}


# -- filter normalisation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Conv1d(4, 3, 2),
        nn.Conv2d(4, 3, 2),
        nn.Conv3d(4, 3, 2),
        nn.Embedding(3, 4),
    ],
)
def test_each_filter_gets_the_norm_of_the_weights(layer):
    layer = layer.to(F64)
    params = weights(layer)
    direction = random_direction(params)
    normalized = filter_normalize(direction, params, filter_dims=filter_dims_of(layer))
    for i in range(3):
        expected = direction["weight"][i] * (
            params["weight"][i].norm() / direction["weight"][i].norm()
        )
        torch.testing.assert_close(normalized["weight"][i], expected, rtol=1e-12, atol=0)
    if "bias" in params:
        assert normalized["bias"].count_nonzero() == 0
        assert normalized["bias"].shape == params["bias"].shape


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolution_has_its_filters_along_dimension_one(kind):
    layer = kind(2, 5, 3, dtype=F64)  # two inputs, five outputs: the weight is (2, 5, ...)
    params = weights(layer)
    assert filter_dims_of(layer) == {"weight": 1}
    normalized = filter_normalize(
        random_direction(params), params, filter_dims=filter_dims_of(layer)
    )
    for i in range(5):
        assert float(normalized["weight"][:, i].norm()) == pytest.approx(
            float(params["weight"][:, i].norm()), rel=1e-12
        )


def test_filter_dims_by_parameter_name():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ConvTranspose2d(2, 1, 3)))
    assert filter_dims_of(module) == {"1.0.weight": 1}
    assert filter_dims_of(module).keys() <= dict(module.named_parameters()).keys()


def test_parameters_with_fewer_than_two_dimensions_get_zero():
    params = {"scale": torch.tensor(2.0), "norm": torch.ones(3), "w": torch.ones(1, 3)}
    normalized = filter_normalize(random_direction(params), params)
    assert normalized["scale"] == 0
    assert normalized["norm"].tolist() == [0, 0, 0]
    assert normalized["w"].abs().min() > 0


def test_zeros_give_no_nan():
    """A pruned filter, a direction that leaves one out, a fresh LoRA matrix."""
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    d = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    normalized = filter_normalize({"w": d, "bias": torch.zeros(2)}, {"w": w, "bias": torch.ones(2)})
    assert normalized["w"].tolist() == [[5, 0], [0, 0], [0, 0], [0, 0]]
    assert normalized["bias"].tolist() == [0, 0]


def test_missing_names_stay_missing_and_arguments_are_unchanged():
    params = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    direction = {"a": torch.full((2, 2), 3.0)}
    normalized = filter_normalize(direction, params)
    assert list(normalized) == ["a"]
    torch.testing.assert_close(normalized["a"], torch.ones(2, 2))
    assert direction["a"].eq(3).all()
    assert params["a"].eq(1).all()


def test_normalisation_does_not_depend_on_the_length():
    params = {"w": normal(4, 5, seed=1)}
    d = normal(4, 5, seed=2)
    one, tiny = (filter_normalize({"w": factor * d}, params)["w"] for factor in (1.0, 1e-30))
    torch.testing.assert_close(one, tiny, rtol=1e-12, atol=0)


# -- lengths and angles ---------------------------------------------------------------------------


def test_unit():
    assert unit({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})["b"] == pytest.approx(0.8)
    for length, value in [("0.0", 0.0), ("nan", math.nan), ("inf", math.inf)]:
        with pytest.raises(ValueError, match=f"length {length}: expected a finite one above 0"):
            unit({"a": torch.full((2,), value)})
    with pytest.raises(ValueError, match=r"length 0\.0"):
        unit({})


def test_orthogonal_to_is_gram_schmidt():
    d, other = {"a": normal(3), "b": normal(2, seed=1)}, {"a": normal(3, seed=2)}
    rest = orthogonal_to(d, other)
    assert abs(inner(rest, other)) < 1e-14
    assert norm(rest) == pytest.approx(norm(d), rel=1e-12)
    plain = d["a"] - (d["a"] @ other["a"]) / (other["a"] @ other["a"]) * other["a"]
    ratio = rest["a"] / plain
    torch.testing.assert_close(ratio, ratio[:1].expand(3))  # in the plane of the two
    torch.testing.assert_close(rest["b"] / d["b"], ratio[:1].expand(2))


def test_orthogonal_to_names_of_the_other():
    """Names missing in the direction are zero there, and get their part of the result."""
    rest = orthogonal_to(
        {"a": torch.ones(1, dtype=F64)},
        {"a": torch.ones(1, dtype=F64), "b": torch.ones(1, dtype=F64)},
    )
    assert rest["a"].item() == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert rest["b"].item() == pytest.approx(-math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4, 1e-5])
def test_nearly_parallel_directions_become_orthogonal(angle):
    """In float32, where subtracting once leaves a cosine of 1e-7/angle."""
    other = {"w": normal(1000).float()}
    d = {"w": other["w"] + angle * normal(1000, seed=1).float()}
    rest = orthogonal_to(d, other)
    assert abs(inner(rest, other)) < 1e-6 * norm(rest) * norm(other)
    assert norm(rest) == pytest.approx(norm(d), rel=1e-5)


@pytest.mark.parametrize(
    ("d", "other"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-3.0, -6.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1.0, 1.0], [0.0, 0.0]),
    ],
)
def test_parallel_directions_raise(d, other):
    with pytest.raises(ValueError, match="parallel: expected two that span a plane"):
        orthogonal_to({"w": torch.tensor(d)}, {"w": torch.tensor(other)})
    with pytest.raises(ValueError, match="parallel"):
        orthogonal_to({"w": torch.tensor(d)}, {})


def test_aligned_flips_opposite_directions():
    v, other = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -1.0])}
    assert aligned(v, other)["w"].tolist() == [1, 2]
    assert aligned(v, {"w": -other["w"]})["w"].tolist() == [-1, -2]
    assert aligned(v, {})["w"].tolist() == [1, 2]
