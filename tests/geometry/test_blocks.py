"""Blocks by module, and the top eigenvalues of the diagonal blocks of known matrices."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_landscape.geometry.blocks import block_eigenvalues, module_blocks
from lightning_landscape.geometry.eigen import top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from tests.geometry.forms import Matrix
from tests.oracles import F64, Quadratic, bits, flat, generator, normal, symmetric

SPECTRUM = [20 / (i + 1) - 1 for i in range(24)]
SHAPES = {"a.weight": (3, 3), "a.bias": (3,), "b.deep.weight": (2, 5), "scale": (2,)}
PARTS = {"a": slice(0, 12), "b.deep": slice(12, 22), "scale": slice(22, 24)}


def matrix():
    return Matrix(symmetric(SPECTRUM), SHAPES)


# -- grouping -------------------------------------------------------------------------------------


def test_modules_with_parameters_are_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.body = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))
            self.rnn = nn.LSTM(3, 2)
            self.attention = nn.MultiheadAttention(4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    names = [name for name, _ in Net().named_parameters()]
    blocks = module_blocks(names)
    assert list(blocks) == names
    assert set(blocks.values()) == {
        "scale",
        "body.0",
        "body.2",
        "rnn",
        "attention",
        "attention.out_proj",
        "normed",
    }
    assert blocks["normed.parametrizations.weight.original0"] == "normed"
    assert blocks["rnn.bias_hh_l0"] == "rnn"
    assert blocks["attention.in_proj_weight"] == "attention"
    assert blocks["attention.out_proj.bias"] == "attention.out_proj"


# -- eigenvalues ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "end"), [("LA", -1), ("SA", 0)])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_each_block_has_the_extreme_eigenvalue_of_its_submatrix(which, end, method):
    problem = matrix()
    found = block_eigenvalues(problem, which=which, method=method, tol=1e-7, max_hvps=2000)
    assert list(found) == list(PARTS)
    for block, part in PARTS.items():
        truth = np.linalg.eigvalsh(problem.matrix[part, part].numpy())[end]
        assert float(found[block].eigenvalues[0]) == pytest.approx(truth, rel=1e-6)
        assert found[block].converged
    assert problem.hvps == sum(result.hvps for result in found.values())


def test_vectors_are_zero_outside_their_block():
    problem = matrix()
    found = block_eigenvalues(problem, tol=1e-8)
    assert list(found["a"].eigenvectors[0]) == ["a.weight", "a.bias"]
    assert found["b.deep"].eigenvectors[0]["b.deep.weight"].shape == (2, 5)
    v, value = flat(found["a"].eigenvectors[0]), found["a"].eigenvalues[0]
    block = problem.matrix[:12, :12]
    assert float((block @ v - value * v).norm()) < 1e-6 * float(value)


def test_blocks_do_not_exceed_the_top_eigenvalue():
    problem = matrix()
    top = float(top_eigenvalues(problem, tol=1e-8).eigenvalues[0])
    for result in block_eigenvalues(problem, tol=1e-8).values():
        assert float(result.eigenvalues[0]) < top


def test_several_eigenvalues_per_block():
    problem = matrix()
    found = block_eigenvalues(problem, k=3, tol=1e-8)
    for block, part in PARTS.items():
        truth = np.linalg.eigvalsh(problem.matrix[part, part].numpy())[::-1][:3]
        assert found[block].eigenvalues.tolist() == pytest.approx(truth.tolist(), rel=1e-6)
    assert len(found["scale"].eigenvalues) == 2


def test_given_blocks():
    problem = matrix()
    found = block_eigenvalues(problem, {"a.bias": "small", "scale": "small"}, tol=1e-8)
    assert list(found) == ["small"]
    index = [9, 10, 11, 22, 23]
    truth = np.linalg.eigvalsh(problem.matrix[index][:, index].numpy())[-1]
    assert float(found["small"].eigenvalues[0]) == pytest.approx(truth, rel=1e-6)


def test_scalar_chain():
    # H = E[x^2] c^2 (1/w_i)(1/w_j) where it fits: each weight's own block is E[x^2] c^2 / w_i^2.
    values, x = [0.5, 2.0, -1.5], normal(20, 1)
    params = {f"{i}.w": nn.Parameter(torch.tensor(v, dtype=F64)) for i, v in enumerate(values)}
    c = math.prod(values)

    def loss():
        return (torch.stack(list(params.values())).prod() * x - c * x).square().mean() / 2

    before = bits(params)
    found = block_eigenvalues(Objective(loss, params), tol=1e-8)
    for i, w in enumerate(values):
        truth = float(x.square().mean()) * c**2 / w**2
        assert float(found[str(i)].eigenvalues[0]) == pytest.approx(truth, rel=1e-6)
        assert found[str(i)].hvps == 1
    assert bits(params) == before


def test_warm_start_needs_fewer_products():
    first = block_eigenvalues(matrix(), generator=generator(1))
    problem = matrix()
    problem.matrix = problem.matrix + 0.01 * symmetric(SPECTRUM, seed=5)
    again = block_eigenvalues(problem, init=first)
    cold = block_eigenvalues(problem)
    for block in ("a", "b.deep"):
        assert again[block].hvps < cold[block].hvps
        truth = np.linalg.eigvalsh(problem.matrix[PARTS[block], PARTS[block]].numpy())[-1]
        assert float(again[block].eigenvalues[0]) == pytest.approx(truth, rel=1e-3)
    # A block that is not in the last result starts cold.
    del first["a"]
    partly = block_eigenvalues(problem, init=first)
    assert partly["a"].hvps == cold["a"].hvps
    assert partly["b.deep"].hvps == again["b.deep"].hvps


def test_only_products_are_computed():
    problem = Quadratic(symmetric(SPECTRUM), shapes=SHAPES)
    objective = Objective(problem.loss, problem.params, check_deterministic=False)
    found = block_eigenvalues(objective)
    assert objective.hvps == sum(result.hvps for result in found.values())
    assert (objective.gradients, objective.forwards) == (1, 0)


def test_max_hvps_holds_per_block():
    found = block_eigenvalues(matrix(), tol=1e-12, max_hvps=2)
    assert [result.hvps for result in found.values()] == [2, 2, 2]
    assert not found["a"].converged


@pytest.mark.parametrize("blocks", [{}, {"a.weight": "a", "nowhere": "b"}])
def test_unknown_names_and_no_blocks_raise(blocks):
    with pytest.raises(ValueError, match="expected a mapping from trainable parameters"):
        block_eigenvalues(matrix(), blocks)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_invalid_k(k):
    with pytest.raises(ValueError, match=f"k={k}: expected an integer >= 1"):
        block_eigenvalues(matrix(), k=k)


def test_invalid_arguments_of_the_solver():
    with pytest.raises(ValueError, match="which='LM'"):
        block_eigenvalues(matrix(), which="LM")
    with pytest.raises(ValueError, match="tol=0"):
        block_eigenvalues(matrix(), tol=0)
