"""Vectors by name: products, random draws, and the flat layout."""

import math

import pytest
import torch

from lightning_landscape.geometry.vectors import (
    Layout,
    inner,
    norm,
    random_signs,
    random_vector,
    scaled,
    seed_from,
    working_dtype,
)
from tests.oracles import F64, generator, normal

# -- products -------------------------------------------------------------------------------------


def test_inner_norm_scaled():
    a = {"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor(3.0)}
    b = {"y": torch.tensor(5.0), "x": torch.tensor([[7.0, 11.0]])}
    assert inner(a, b) == 7 + 22 + 15
    assert norm(a) == math.sqrt(14)
    assert scaled(a, -2.0)["y"] == -6
    assert inner(a, {"y": torch.tensor(2.0), "z": torch.ones(9)}) == 6  # a missing name is zero
    assert inner(a, {}) == norm({}) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_inner_does_not_overflow_where_its_type_would(dtype):
    v = {"x": torch.full((4,), 300.0, dtype=dtype)}  # 300^2 is above the largest float16
    assert norm(v) == pytest.approx(2 * float(v["x"][0]), rel=1e-6)


def test_inner_adds_in_the_order_of_the_first():
    """The order of a set of names differs between processes, and with it the last bits."""
    terms = [1e16, 1.0, -1e16, 1.0] * 20
    a = {str(i): torch.tensor(term, dtype=F64) for i, term in enumerate(terms)}
    b = {name: torch.ones((), dtype=F64) for name in reversed(a)}
    one_after_the_other = 0.0
    for term in terms:
        one_after_the_other += term
    assert inner(a, b) == one_after_the_other != math.fsum(terms)


# -- random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [random_vector, random_signs])
def test_draws_depend_on_name_and_seed_alone(draw):
    params = {"a": torch.zeros(50), "b": torch.zeros(5, 10)}
    state = torch.get_rng_state()
    first, again = draw(params, 1), draw(dict(reversed(params.items())), 1)
    alone, other = draw({"b": params["b"]}, 1), draw(params, 2)
    assert torch.equal(torch.get_rng_state(), state)
    for name in params:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert torch.equal(alone["b"], first["b"])
    assert not torch.equal(first["a"], first["b"].flatten())


def test_draws_have_the_distribution():
    """Five standard errors of mean, variance and fourth moment of 10^5 draws."""
    v = random_vector({"w": torch.zeros(100_000, dtype=F64)}, 0)["w"]
    signs = random_signs({"w": torch.zeros(100_000, dtype=F64)}, 0)["w"]
    step = 5 / math.sqrt(1e5)
    assert abs(float(v.mean())) < step
    assert abs(float(v.square().mean()) - 1) < step * math.sqrt(2)
    assert abs(float(v.pow(4).mean()) - 3) < step * math.sqrt(96)
    assert abs(float(signs.mean())) < step
    assert signs.abs().unique().tolist() == [1.0]


def test_seed_from():
    assert seed_from(None) == 0
    state = torch.get_rng_state()
    assert seed_from(generator(3)) == seed_from(generator(3)) != seed_from(generator(4))
    assert torch.equal(torch.get_rng_state(), state)
    shared = generator(3)
    assert seed_from(shared) != seed_from(shared)  # its state advances


@pytest.mark.parametrize(
    ("dtype", "working"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (F64, F64),
    ],
)
def test_draws_come_in_the_working_type(dtype, working):
    assert working_dtype(dtype) == working
    assert random_vector({"w": torch.zeros(2, dtype=dtype)}, 0)["w"].dtype == working


# -- flat -----------------------------------------------------------------------------------------

PARAMS = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(2), "none": torch.zeros(0)}


def test_layout_round_trip():
    layout, flat = Layout(PARAMS), torch.arange(9.0)
    vector = layout.unflatten(flat)
    assert {name: tensor.shape for name, tensor in vector.items()} == layout.shapes
    assert vector["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert vector["b"].item() == 6
    assert torch.equal(layout.flatten(dict(reversed(vector.items()))), flat)
    assert layout.size == 9


def test_layout_of_numbers_and_missing_names():
    flat = Layout(PARAMS).flatten({"a": 2.0, "c": torch.tensor([3.0, 4.0], requires_grad=True)})
    assert flat.tolist() == [2, 2, 2, 2, 2, 2, 0, 3, 4]
    assert not flat.requires_grad


def test_layout_takes_the_widest_type():
    assert Layout({"a": torch.zeros(1), "b": torch.zeros(1, dtype=F64)}).dtype == F64
    assert Layout({"a": torch.zeros(1, dtype=torch.bfloat16)}).dtype == torch.float32
    values = normal(1)
    kept = Layout({"a": torch.zeros(1), "b": torch.zeros(1, dtype=F64)}).flatten({"b": values})
    assert kept[1] == values[0]


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ({"x": torch.zeros(1)}, r"vector names \['x'\] .*names among \['a', 'b', 'c', 'none'\]"),
        ({"x": 1.0, "y": 1.0}, r"vector names \['x', 'y'\]"),
        ({"c": torch.zeros(3)}, r"vector\['c'\] has shape \(3,\): .* shape \(2,\)"),
        ({"a": torch.zeros(3, 2)}, r"vector\['a'\] has shape \(3, 2\): .* shape \(2, 3\)"),
    ],
)
def test_invalid_vectors_of_a_layout(vector, message):
    with pytest.raises(ValueError, match=message):
        Layout(PARAMS).flatten(vector)


def test_long_lists_of_names_are_shortened():
    many = Layout({f"layer{i}": torch.zeros(1) for i in range(10)})
    with pytest.raises(ValueError, match=r"'layer3'\] and 6 more$"):
        many.flatten({"x": 1.0})
