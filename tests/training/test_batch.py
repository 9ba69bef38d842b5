"""Splitting and concatenating batches."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_landscape.training.data.batch import (
    NotConcatenable,
    ProbeBatch,
    concat_batches,
    cut_batch,
)

X, Y = torch.arange(10.0).reshape(5, 2), torch.arange(5)


@dataclass
class Example:
    x: Any
    note: str = "kept"


class Graphs:
    """A graph library's batch: ``edges`` refer to ``nodes`` over all graphs."""

    num_graphs = 5

    def __init__(self):
        self.nodes = torch.zeros(5)

    def to(self, device):
        return self


Pair = namedtuple("Pair", "x y")


# -- cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "get"),
    [
        (X, lambda b: b),
        ((X, Y), lambda b: b[0]),
        ([X, [Y, "a word"]], lambda b: b[0]),
        ({"x": X, "deep": {"y": Y}}, lambda b: b["x"]),
        (Pair(X, Y), lambda b: b.x),
        (Example(X), lambda b: b.x),
    ],
    ids=["tensor", "tuple", "list", "dict", "namedtuple", "dataclass"],
)
def test_tensors_are_split_along_the_examples(batch, get):
    pieces = cut_batch(ProbeBatch(batch, 7, 5), 2)
    assert [piece.size for piece in pieces] == [2, 2, 1]
    assert [piece.index for piece in pieces] == [7, 7, 7]
    assert {type(piece.batch) for piece in pieces} == {type(batch)}
    assert torch.equal(torch.cat([get(piece.batch) for piece in pieces]), X)
    assert torch.equal(get(batch), X)  # the batch is unchanged


def test_labels_are_split_with_their_inputs():
    for piece in cut_batch(ProbeBatch((X, {"y": Y}), 0, 5), 3):
        assert torch.equal(piece.batch[0][:, 0], 2.0 * piece.batch[1]["y"])


def test_values_of_other_lengths_are_shared():
    weights, scale = torch.ones(3), torch.tensor(2.0)
    for piece in cut_batch(ProbeBatch((X, weights, scale, "text", None), 0, 5), 2):
        assert piece.batch[1] is weights
        assert piece.batch[2] is scale
        assert piece.batch[3:] == ("text", None)


@pytest.mark.parametrize(
    "batch",
    [
        Graphs(),
        (X, Graphs()),
        pack_sequence([torch.ones(3), torch.ones(2)]),
        {"words": ["a"] * 5},
        torch.ones(3),
        torch.eye(5).to_sparse(),
    ],
    ids=["graphs", "graphs within", "packed", "no tensor", "another length", "sparse"],
)
def test_batches_that_cannot_be_split(batch):
    assert cut_batch(ProbeBatch(batch, 0, 5), 2) == []


# -- concatenated ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [X, (X, Y), [X, Y], {"x": X, "y": [Y]}, Pair(X, Y), Example(X)],
    ids=["tensor", "tuple", "list", "dict", "namedtuple", "dataclass"],
)
def test_concatenated_pieces_equal_the_batch(batch):
    whole = concat_batches(cut_batch(ProbeBatch(batch, 7, 5), 2))
    assert (whole.index, whole.size, type(whole.batch)) == (7, 5, type(batch))
    assert repr(whole.batch) == repr(batch)


def test_strings_are_concatenated_and_constants_kept():
    weights = torch.ones(7)
    held = [
        ProbeBatch({"x": X[:2], "words": ["a", "b"], "weights": weights, "name": "n"}, 0, 2),
        ProbeBatch({"x": X[2:], "words": ["c", "d", "e"], "weights": weights, "name": "n"}, 1, 3),
    ]
    whole = concat_batches(held).batch
    assert torch.equal(whole["x"], X)
    assert whole["words"] == ["a", "b", "c", "d", "e"]
    assert torch.equal(whole["weights"], weights)
    assert whole["weights"] is not weights
    assert whole["name"] == "n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (X, X.double()),
        (torch.ones(5, 3), torch.ones(5, 4)),
        ((X, Y), (X,)),
        ({"x": X}, {"y": X}),
        ((X, 1), (X, 2)),
        ((X, torch.tensor(1.0)), (X, torch.tensor(2.0))),
        (X, (X,)),
        (Graphs(), Graphs()),
        (torch.eye(5).to_sparse(), torch.eye(5).to_sparse()),
        (pack_sequence([torch.ones(3)] * 5), pack_sequence([torch.ones(3)] * 5)),
    ],
    ids=[
        "types", "padding", "lengths", "keys", "numbers", "constants", "structures", "graphs",
        "sparse", "packed",
    ],
)  # fmt: skip
def test_batches_that_cannot_be_concatenated(first, second):
    with pytest.raises(NotConcatenable):
        concat_batches([ProbeBatch(first, 0, 5), ProbeBatch(second, 1, 5)])
