"""Random graphs of objects, of which an evaluation changes random parts, are restored."""

from __future__ import annotations

import array
import collections
import itertools
import queue
import random
import types
import typing

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_landscape.training.isolation.errors import TouchedError
from lightning_landscape.training.isolation.module_state import ModuleState


class Slotted:
    __slots__ = ("one", "other")

    def __init__(self, one, other):
        self.one, self.other = one, other


class Plain:
    def __init__(self, one, other):
        self.one, self.other = one, other


class Pair(typing.NamedTuple):
    one: object
    other: object


class Named(dict):
    pass


def object_array(content):
    array = np.empty(2, dtype=object)
    array[0] = content
    return array


def counter(content):
    count = 0

    def step(more=content):
        nonlocal count
        count += 1
        return count, more

    return step


LEAVES = st.one_of(
    st.integers(-3, 3),
    st.floats(allow_nan=True, width=32),
    st.sampled_from(["a", "b", b"c", None, True]),
    st.builds(lambda n: torch.arange(float(n)), st.integers(1, 4)),
    st.builds(lambda n: nn.Parameter(torch.ones(n)), st.integers(1, 3)),
    st.builds(lambda n: np.arange(n, dtype=np.float32), st.integers(1, 4)),
    st.builds(lambda n: array.array("i", range(n)), st.integers(1, 4)),
    st.builds(bytearray, st.integers(1, 4)),
    st.builds(random.Random, st.integers(0, 3)),
    st.builds(np.random.default_rng, st.integers(0, 3)),
    st.builds(np.random.RandomState, st.integers(0, 3)),
    st.builds(lambda n: torch.Generator().manual_seed(n), st.integers(0, 3)),
    st.builds(lambda n: {487 * i + 3 for i in range(n)}, st.integers(0, 30)),
    st.builds(lambda n: iter(list(range(n))), st.integers(0, 4)),
    st.builds(itertools.count, st.integers(0, 4)),
    st.builds(lambda: nn.BatchNorm1d(2)),
    st.builds(queue.SimpleQueue),
)


def containers(inner):
    pair = st.tuples(inner, inner)
    keys = st.sampled_from(["x", "y", "z", 1])
    return st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(Named),
        st.lists(inner, max_size=3).map(collections.deque),
        pair,
        pair.map(lambda p: Pair(*p)),
        pair.map(lambda p: Plain(*p)),
        pair.map(lambda p: Slotted(*p)),
        pair.map(lambda p: types.SimpleNamespace(one=p[0], other=p[1])),
        inner.map(counter),
        inner.map(lambda x: [x, x]),  # one object with two owners
        inner.map(object_array),
    )


GRAPHS = st.recursive(LEAVES, containers, max_leaves=12)


def parts(value):
    """What an object holds, to go on with."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, collections.deque)):
        return list(value)
    if isinstance(value, (Plain, types.SimpleNamespace)):
        return list(vars(value).values())
    if isinstance(value, Slotted):
        return [getattr(value, name) for name in ("one", "other") if hasattr(value, name)]
    if isinstance(value, types.FunctionType):
        return [*value.__defaults__, value.__closure__[0].cell_contents]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return list(value)
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    return []


def describe(value, seen=None):
    """Everything that can be seen of an object, with the identity of what is held twice."""
    seen = {} if seen is None else seen
    if isinstance(value, (int, float, str, bytes, type(None))):
        return repr(value)
    if id(value) in seen:
        return f"as {seen[id(value)]}"
    seen[id(value)] = len(seen)
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return kind, value.tolist().__repr__(), value.requires_grad, value.grad is None
    if isinstance(value, np.ndarray) and value.dtype != object:
        return kind, value.tobytes(), value.shape
    if isinstance(value, (array.array, bytearray, itertools.count)):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return kind, list(value)
    if isinstance(value, random.Random):
        return kind, value.getstate()
    if isinstance(value, np.random.Generator):
        return kind, repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return kind, repr(value.get_state())
    if isinstance(value, torch.Generator):
        return kind, value.get_state().tolist()
    if hasattr(value, "__length_hint__"):
        return kind, value.__length_hint__()
    if isinstance(value, queue.SimpleQueue):
        return kind, value.qsize()
    keys = list(value) if isinstance(value, dict) else list(getattr(value, "__dict__", ()))
    keys = [] if isinstance(value, nn.Module) else keys
    return kind, keys, [describe(part, seen) for part in parts(value)]


def mutate(value, rng, depth=0):
    """Change about half of what is reachable, in place."""
    held = parts(value)
    if rng.random() < 0.5:
        change(value, rng)
    for part in held if depth < 8 else ():
        mutate(part, rng, depth + 1)


def change(value, rng):
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.add_(1)
        if value.is_leaf and value.requires_grad:
            value.grad = torch.ones_like(value)
            value.data = value.data * 2.0
    elif isinstance(value, np.ndarray):
        value[:] = value[::-1].copy() if value.dtype == object else value + 1
    elif isinstance(value, dict):
        if value and rng.random() < 0.5:
            key = next(iter(value))
            value[key] = value.pop(key)
        else:
            value["new"] = rng.random()
    elif isinstance(value, (list, collections.deque)):
        value.append(rng.random()) if rng.random() < 0.5 else value.clear()
    elif isinstance(value, set):
        value.update(rng.randrange(10**6) for _ in range(40))
        value.discard(3)
    elif isinstance(value, array.array):
        value.append(7)
    elif isinstance(value, bytearray):
        value += b"x"
    elif isinstance(value, (random.Random, np.random.Generator)):
        value.random()
    elif isinstance(value, np.random.RandomState):
        value.normal()
    elif isinstance(value, torch.Generator):
        torch.rand((), generator=value)
    elif isinstance(value, types.FunctionType):
        value()
        value.calls = getattr(value, "calls", 0) + 1
    elif hasattr(type(value), "__next__"):
        next(value, None)
    elif isinstance(value, nn.BatchNorm1d):
        value(torch.randn(4, 2))
        value.note = rng.random()
    elif isinstance(value, queue.SimpleQueue):
        value.put(1)
    elif isinstance(value, types.SimpleNamespace):
        vars(value).pop("other", None)
        value.more = rng.random()
    elif isinstance(value, (Plain, Slotted)):
        value.one, value.other = value.other, 5
    elif hasattr(value, "put"):  # what stands in for a queue
        value.put(1)


class Holder(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state


def check(graph, seed):
    module = Holder(graph)
    before = describe(module.state)
    state = ModuleState(module)
    for evaluation in range(4):
        state.begin_evaluation(kind="loss")
        # The last one touches what the others have not: that is restored at the end.
        rng = random.Random(seed + (evaluation == 3))
        try:
            mutate(module.state, rng)
        except TouchedError:
            pass
        finally:
            state.end_evaluation()
        if evaluation < 3:
            assert describe(module.state) == before
    assert state.restore() is None
    assert describe(module.state) == before


OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=200, **OPTIONS)
@given(GRAPHS, st.integers(0, 1000))
def test_what_an_evaluation_changes_is_restored(graph, seed):
    check(graph, seed)


@pytest.mark.slow
@settings(max_examples=2000, **OPTIONS)
@given(GRAPHS, st.integers(1001, 10**6))
def test_what_an_evaluation_changes_is_restored_2000(graph, seed):
    check(graph, seed)
