"""Restoring the state of modules: what is restored, and warnings where that is impossible."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from lightning_landscape.training.isolation import module_state
from lightning_landscape.training.isolation.errors import TouchedError, TrainingChangedError
from lightning_landscape.training.isolation.iterators import Recordings, copy_iterator
from lightning_landscape.training.isolation.module_state import ModuleState, record_iterators
from lightning_landscape.training.isolation.snapshots import Items


def evaluations(state, change, count=2, kind="loss"):
    for _ in range(count):
        state.begin_evaluation(kind=kind)
        try:
            change()
        finally:
            state.end_evaluation()


def test_only_changed_keys_of_a_dict_are_written():
    module = nn.Linear(2, 2)
    module.counts = {"a": 1, "b": 2}
    reading = iter(module.counts)
    next(reading)
    evaluations(ModuleState(module), lambda: None)
    assert next(reading) == "b"  # it would raise if the dict had been refilled

    def change():
        module.counts["a"], module.counts["c"] = 5, 3

    evaluations(ModuleState(module), change)
    assert module.counts == {"a": 1, "b": 2}

    def reorder():
        module.counts["a"] = module.counts.pop("a")

    evaluations(ModuleState(module), reorder)
    assert list(module.counts) == ["a", "b"]


def test_tuple_replaced_at_each_evaluation_is_restored_after_each():
    module = nn.Linear(2, 2)
    module.holder = SimpleNamespace(pair=(torch.zeros(2), 1))
    pair = module.holder.pair
    state = ModuleState(module)
    for _ in range(3):
        evaluations(state, lambda: vars(module.holder).update(pair=5), count=1)
        assert module.holder.pair is pair


def test_change_of_a_large_tensor_outside_of_modules_warns(monkeypatch):
    monkeypatch.setattr(module_state, "_LARGE_OUTSIDE", 32)
    module = nn.Linear(2, 2)
    module.small, module.banks = torch.zeros(100), {"keys": [torch.zeros(100), torch.zeros(4)]}
    state = ModuleState(module)
    evaluations(state, lambda: (module.small.add_(1), module.banks["keys"][1].add_(1)))
    assert not module.small.any()
    assert not module.banks["keys"][1].any()
    with pytest.raises(TrainingChangedError, match=r"self\.banks\['keys'\]\[0\]"):
        evaluations(state, lambda: module.banks["keys"][0].add_(1), kind="another loss")
    assert module.banks["keys"][0].all()  # not restored, hence the warning


def test_change_by_a_later_evaluation_is_restored_at_the_end():
    module = nn.Linear(2, 2)
    module.rows, module.scale = [], torch.ones(2)
    state = ModuleState(module)
    evaluations(state, lambda: None, 1)
    evaluations(state, lambda: (module.rows.append(1), module.scale.mul_(2)), 1)
    assert state.restore() is None
    assert module.rows == []
    assert module.scale.tolist() == [1.0, 1.0]


def test_change_that_cannot_be_restored_is_reported_at_the_end(monkeypatch):
    monkeypatch.setattr(module_state, "_LARGE_OUTSIDE", 32)
    module = nn.Linear(2, 2)
    module.banks = [torch.zeros(100)]
    state = ModuleState(module)
    evaluations(state, lambda: None, 1)
    evaluations(state, lambda: module.banks[0].add_(1), 1)
    assert "self.banks[0]" in str(state.restore())


def test_copies_of_tensors_that_share_memory_share_memory():
    module = nn.Linear(2, 2)
    module.register_buffer("whole", torch.zeros(2, 3))
    module.row = module.whole[1]
    seen = []

    def change():
        module.row.fill_(1.0)
        seen.append(module.whole.sum().item())

    evaluations(ModuleState(module), change)
    assert seen == [3.0, 3.0]
    assert not module.whole.any()


def test_each_evaluation_starts_from_the_same_state():
    module = nn.Linear(2, 2)
    module.count, seen = 0, []

    def change():
        seen.append(module.count)
        module.count += 1

    evaluations(ModuleState(module), change, 3)
    assert seen == [0, 0, 0]


def test_mode_is_restored_without_refilling_dicts(monkeypatch):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    monkeypatch.setattr(Items, "restore", Mock())
    state = ModuleState(module)
    state.set_mode(False)
    assert state.restore() is None
    assert all(m.training for m in module.modules())
    Items.restore.assert_not_called()


def test_copy_of_a_set_has_the_order_of_the_original():
    module = nn.Linear(2, 2)
    module.members = set(range(100))
    module.members -= set(range(100)) - {2, 9}
    assert list(module.members) == [2, 9]
    assert list(set(module.members)) == [9, 2]  # by their places in a small table
    seen = []
    evaluations(ModuleState(module), lambda: seen.append(list(module.members)))
    assert seen == [[2, 9], [2, 9]]


def test_retained_graph_keeps_its_buffers():
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(2))
    losses = []

    def change():
        module.scale.mul_(2)
        losses.append((module.weight.square() * module.scale).sum())

    evaluations(ModuleState(module), change)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, module.weight)
        assert torch.equal(gradient, 4 * module.weight)


def test_loss_with_its_own_backward_keeps_the_gradients_of_training():
    module = nn.Linear(2, 2)
    module.weight.grad = gradient = torch.ones(2, 2)
    state = ModuleState(module)
    evaluations(state, lambda: module(torch.ones(1, 2)).sum().backward())
    assert state.restore() is None
    assert module.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(2, 2))
    assert module.bias.grad is None


def test_tensors_are_compared_bitwise():
    module = nn.Linear(2, 2)
    module.zero = [torch.zeros(2), torch.tensor([float("nan")])]
    before = [tensor.view(torch.int32).tolist() for tensor in module.zero]
    for tensor in module.zero:
        evaluations(ModuleState(module), tensor.neg_)  # not through ``module.zero``
    assert [tensor.view(torch.int32).tolist() for tensor in module.zero] == before
    state = ModuleState(module)
    versions = [tensor._version for tensor in module.zero]
    evaluations(state, lambda: None)
    state.restore()
    assert [tensor._version for tensor in module.zero] == versions  # not written


def made(name):
    """An iterator and the values it gives next."""
    return {
        "list": lambda: iter([1, 2, 3]),
        "range": lambda: iter(range(3)),
        "dict": lambda: iter({"a": 1, "b": 2}),
        "string": lambda: iter("abc"),
        "array": lambda: iter(np.arange(3).tolist()),
        "reversed": lambda: reversed([1, 2, 3]),
        "count": lambda: itertools.islice(itertools.count(2, 3), 4),
        "cycle": lambda: itertools.islice(itertools.cycle([1, 2]), 5),
        "chain": lambda: itertools.chain([1], (2, 3)),
        "zip": lambda: zip([1, 2, 3], itertools.count(), strict=False),
        "enumerate": lambda: enumerate("abc"),
        "map": lambda: map(str, iter([1, 2, 3])),
        "filter": lambda: filter(None, [0, 1, 2, 3]),
        "accumulate": lambda: itertools.accumulate([1, 2, 3]),
        "product": lambda: itertools.product([1, 2], "ab"),
        "permutations": lambda: itertools.permutations([1, 2, 3], 2),
        "takewhile": lambda: itertools.takewhile(bool, [1, 2, 3]),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        *("list", "range", "dict", "string", "array", "reversed", "count", "cycle", "chain", "zip"),
        *("enumerate", "map", "filter", "accumulate", "product", "permutations", "takewhile"),
    ],
)
def test_copy_of_an_iterator_has_its_position(name):
    for read in range(3):
        iterator, expected = made(name), list(made(name))[read:]
        for _ in range(read):
            next(iterator, None)
        copy = copy_iterator(iterator)
        assert list(copy) == expected
        assert list(iterator) == expected


def test_iterators_that_cannot_be_copied():
    generator = (i for i in range(3))
    for iterator in (
        generator,
        map(str, generator),
        zip(generator, [1], strict=False),
        iter([generator]),
        itertools.chain.from_iterable([iter([1])]),
        itertools.groupby([1, 1]),
        itertools.tee([1, 2])[0],
    ):
        assert copy_iterator(iterator) is None
    assert list(generator) == [0, 1, 2]


def test_items_drawn_by_training_are_read_again():
    module = nn.Linear(2, 2)
    module.stream = (torch.full((1,), float(i)) for i in itertools.count())
    generator = module.stream
    recordings = Recordings()
    record_iterators(module, recordings)
    drawn = [next(module.stream) for _ in range(3)]
    drawn[0].add_(100)  # training modifies the item
    state = ModuleState(module, recordings=recordings)
    for index in range(2):
        state.begin_evaluation(index, kind="loss")
        read = [next(module.stream).item() for _ in range(4)]
        assert read == [[0.0, 1.0, 2.0, 0.0], [1.0, 2.0, 0.0, 1.0]][index]
        state.end_evaluation()
    state.begin_evaluation(kind="loss")
    with pytest.raises(TouchedError, match=r"read more than 1000 items from self\.stream"):
        list(module.stream)
    state.end_evaluation()
    state.restore()
    assert next(module.stream).item() == 3.0
    recordings.remove()
    assert module.stream is generator
    assert next(module.stream).item() == 4.0


def test_unregistered_modules_keep_their_modes():
    module = nn.Sequential(nn.Dropout())
    module.hidden = [nn.Dropout()]
    state = ModuleState(module)
    state.set_mode(False)
    assert (module[0].training, module.hidden[0].training) == (False, True)
    state.restore()
    assert (module.training, module[0].training, module.hidden[0].training) == (True, True, True)


class Table:
    """The methods of a pandas table that isolation uses; its content is not an attribute."""

    contents: ClassVar[Mock] = Mock()  # which isolation leaves alone

    def __init__(self, rows):
        Table.contents.tables[id(self)] = list(rows)

    @property
    def rows(self):
        return Table.contents.tables[id(self)]

    def copy(self):
        return Table(self.rows)

    def equals(self, other):
        return self.rows == other.rows


def test_pandas_tables_are_copied(monkeypatch):
    Table.contents.tables = {}
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Table, Series=Table))
    module = nn.Linear(2, 2)
    module.log_table, read = Table([1]), []

    def change():
        module.log_table.rows.append(2)
        read.append(len(module.log_table.rows))

    own = module.log_table
    evaluations(ModuleState(module), change)
    assert module.log_table is own
    assert own.rows == [1]
    assert read == [2, 2]


def test_failed_evaluation_is_not_used_for_later_ones():
    module = nn.Linear(2, 2)
    module.rows, module.more = [], {}
    state = ModuleState(module)
    state.begin_evaluation(kind="loss")
    module.rows.append(1)
    state.end_evaluation(complete=False)  # it raised before it touched the dict
    evaluations(state, lambda: (module.rows.append(1), module.more.update(a=1)))
    assert (module.rows, module.more) == ([], {})


class Unbound:
    """A proxy without its object."""

    @property
    def __dict__(self):
        raise RuntimeError("outside of its context")


def test_object_that_cannot_be_inspected_is_skipped():
    module = nn.Linear(2, 2)
    module.proxy, module.rows = Unbound(), []
    evaluations(ModuleState(module), lambda: module.rows.append(1))
    assert module.rows == []


def test_recorders_have_the_truth_value_and_length_of_iterators():
    module = nn.Linear(2, 2)
    module.stream = (i for i in range(3))
    loader = torch.utils.data.DataLoader(torch.arange(6), batch_size=2)
    module.batches = iter(loader)
    recordings = Recordings()
    record_iterators(module, recordings)
    assert module.stream
    assert len(module.batches) == 3
    next(module.stream), next(module.batches)
    state = ModuleState(module, recordings=recordings)
    state.begin_evaluation()
    assert module.stream
    assert len(module.batches) == 3
    state.end_evaluation()
    state.restore()
    recordings.remove()
    assert module.batches._num_yielded == 1


def test_iterators_are_unchanged_without_recordings():
    module = nn.Linear(2, 2)
    module.stream = (i for i in range(3))
    generator = module.stream
    state = ModuleState(module)
    state.begin_evaluation()
    state.restore()
    assert module.stream is generator


def test_set_enlarged_by_an_evaluation_keeps_its_order():
    module = nn.Linear(2, 2)
    module.left = {487 * i + 3 for i in range(60)}
    for i in range(7, 60):  # what is left lies in a table of the former size
        module.left.discard(487 * i + 3)
    before, seen = list(module.left), []
    state = ModuleState(module)

    def change():
        seen.append(list(module.left))
        module.left.update(range(1000))

    evaluations(state, change)
    assert state.restore() is None
    assert list(module.left) == before
    assert seen == [before, before]
