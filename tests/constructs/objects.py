"""Plain Python state: of the standard library's types, of classes, of functions."""

from __future__ import annotations

import argparse
import array
import collections
import csv
import functools
import io
import tempfile
import types
import typing
import weakref
from dataclasses import dataclass, field
from unittest.mock import Mock

import numpy as np
import torch

from tests.constructs.base import Construct


class Namespace(Construct):
    """argparse.Namespace"""

    def start(self):
        self.args = argparse.Namespace(temperature=1.0)

    def factor(self, batch):
        self.args.temperature *= 0.999
        return self.args.temperature


class Simple(Construct):
    """types.SimpleNamespace, nested"""

    def start(self):
        self.state = types.SimpleNamespace(inner=types.SimpleNamespace(scale=1.0))

    def factor(self, batch):
        self.state.inner.scale *= 0.999
        return self.state.inner.scale


class OwnDict(collections.UserDict):
    pass


class UserDictionary(Construct):
    """collections.UserDict"""

    def start(self):
        self.state = OwnDict(scale=1.0)

    def factor(self, batch):
        self.state["scale"] *= 0.999
        return self.state["scale"]


class UserLists(Construct):
    """collections.UserList"""

    def start(self):
        self.losses = collections.UserList()

    def factor(self, batch):
        self.losses.append(len(self.losses))
        return 1 / (1 + 0.01 * len(self.losses))


class Defaults(Construct):
    """collections.defaultdict"""

    def start(self):
        self.counts = collections.defaultdict(int)

    def factor(self, batch):
        self.counts[int(batch[1][0])] += 1
        return 1 / (1 + 0.01 * self.counts[0])


class Ordered(Construct):
    """OrderedDict, move_to_end"""

    def start(self):
        self.order = collections.OrderedDict((i, 1 + 0.1 * i) for i in range(5))

    def factor(self, batch):
        first = next(iter(self.order))
        self.order.move_to_end(first)
        return self.order[first]


class Counts(Construct):
    """collections.Counter"""

    def start(self):
        self.labels = collections.Counter()

    def factor(self, batch):
        self.labels.update(batch[1].tolist())
        return 1 / (1 + 0.001 * self.labels[1])


class Chained(Construct):
    """collections.ChainMap"""

    def start(self):
        self.options = collections.ChainMap({}, {"scale": 1.0})

    def factor(self, batch):
        self.options["scale"] = self.options["scale"] * 0.999
        return self.options["scale"]


class Recent(Construct):
    """deque with a maximal length"""

    def start(self):
        self.recent = collections.deque([1.0], maxlen=4)

    def factor(self, batch):
        self.recent.append(self.recent[-1] * 0.999)
        return sum(self.recent) / len(self.recent)


class Settings(dict):
    extra = 0


class DictSubclass(Construct):
    """a subclass of dict with an attribute"""

    def start(self):
        self.settings = Settings(scale=1.0)

    def factor(self, batch):
        self.settings["scale"] *= 0.999
        self.settings.extra += 1
        return self.settings["scale"] + 0.001 * self.settings.extra


class Stack(list):
    depth = 0


class ListSubclass(Construct):
    """a subclass of list with an attribute"""

    def start(self):
        self.stack = Stack()

    def factor(self, batch):
        self.stack.append(1)
        self.stack.depth += 1
        return 1 / (1 + 0.001 * self.stack.depth * len(self.stack))


class Numbers(Construct):
    """array.array"""

    def start(self):
        self.scale = array.array("d", [1.0, 0.5])

    def factor(self, batch):
        self.scale[0] *= 0.999
        return self.scale[0]


class Bytes(Construct):
    """bytearray"""

    def start(self):
        self.flags = bytearray(8)

    def factor(self, batch):
        self.flags[int(batch[1][0])] = (self.flags[int(batch[1][0])] + 1) % 256
        return 1 + 0.001 * sum(self.flags)


class ArrayInPlace(Construct):
    """a NumPy array, in place"""

    def start(self):
        self.weights = np.ones(3)

    def factor(self, batch):
        self.weights *= 0.999
        return float(self.weights[0])


class ArrayViews(Construct):
    """two NumPy views of one array"""

    def start(self):
        self.both = np.ones(4)
        self.first, self.second = self.both[:2], self.both[2:]

    def factor(self, batch):
        self.first *= 0.999
        self.second[:] = self.first
        return float(self.both.sum()) / 4


class ObjectArray(Construct):
    """a NumPy array of objects"""

    attributes = False

    def start(self):
        self.cells = np.array([[1.0], [2.0], None], dtype=object)

    def factor(self, batch):
        self.cells[0].append(1)
        self.cells[2] = len(self.cells[0])
        return 1 / (1 + 0.001 * self.cells[2])

    def seen(self):
        return self.cells.tolist()


class Node:
    def __init__(self, value):
        self.value = value


class WeakKeys(Construct):
    """WeakKeyDictionary"""

    def start(self):
        self.nodes = [Node(i) for i in range(3)]
        self.scale = weakref.WeakKeyDictionary(dict.fromkeys(self.nodes, 1.0))

    def factor(self, batch):
        node = self.nodes[0]
        self.scale[node] = self.scale[node] * 0.999
        return self.scale[node]


class WeakValues(Construct):
    """WeakValueDictionary"""

    def start(self):
        self.nodes = [Node(1.0 + i) for i in range(3)]
        self.current = weakref.WeakValueDictionary(now=self.nodes[0])
        self.index = 0

    def factor(self, batch):
        self.index = (self.index + 1) % 3
        value = self.current["now"].value
        self.current["now"] = self.nodes[self.index]
        return value


class WeakMembers(Construct):
    """WeakSet"""

    attributes = False

    def start(self):
        self.nodes = [Node(i) for i in range(50)]
        self.alive = weakref.WeakSet(self.nodes)

    def factor(self, batch):
        if self.alive:
            self.alive.discard(self.nodes[len(self.alive) - 1])
        return 1 + 0.01 * len(self.alive)

    def seen(self):
        return len(self.alive)


class Referenced(Construct):
    """an object behind a weak reference"""

    attributes = False

    def start(self):
        _KEEPER.node = Node(1.0)
        self.node = weakref.ref(_KEEPER.node)

    def factor(self, batch):
        self.node().value *= 0.999
        return self.node().value

    def seen(self):
        return self.node().value


_KEEPER = Mock()  # isolation leaves mocks alone


class Shared(Construct):
    """one dict with two owners"""

    def start(self):
        shared = {"scale": 1.0}
        self.a, self.b = Node(shared), Node(shared)

    def factor(self, batch):
        self.a.value["scale"] *= 0.999
        return self.b.value["scale"]

    def seen(self):
        return self.a.value is self.b.value


class Cycle(Construct):
    """objects that refer to each other"""

    def start(self):
        self.one, self.two = Node(1.0), Node(1.0)
        self.one.other, self.two.other = self.two, self.one

    def factor(self, batch):
        self.one.value *= 0.999
        self.one.other.other.other.value = self.one.value
        return self.two.value


class Slotted:
    __slots__ = ("__hidden", "value")

    def __init__(self):
        self.value = 1.0
        self.__hidden = 0

    def step(self):
        self.value *= 0.999
        self.__hidden += 1
        return self.value + 0.001 * self.__hidden

    def __eq__(self, other):
        return (self.value, self.__hidden) == (other.value, other.__hidden)

    __hash__ = object.__hash__


class Slots(Construct):
    """__slots__, private ones too"""

    def start(self):
        self.state = Slotted()

    def factor(self, batch):
        return self.state.step()


class SlotAdded(Construct):
    """a slot that is empty at first"""

    attributes = False

    def start(self):
        self.state = Slotted()
        del self.state.value

    def factor(self, batch):
        self.state.value = getattr(self.state, "value", 1.0) * 0.999
        return self.state.value

    def seen(self):
        return self.state.value


@dataclass
class Meter:
    total: float = 0.0
    rows: list = field(default_factory=list)


class Data(Construct):
    """a dataclass"""

    def start(self):
        self.meter = Meter()

    def factor(self, batch):
        self.meter.total += 1
        self.meter.rows.append(self.meter.total)
        return 1 / (1 + 0.001 * len(self.meter.rows))


@dataclass(frozen=True)
class Frozen:
    rows: list = field(default_factory=list)


class FrozenData(Construct):
    """a list in a frozen dataclass"""

    def start(self):
        self.state = Frozen()

    def factor(self, batch):
        self.state.rows.append(1)
        return 1 / (1 + 0.001 * len(self.state.rows))


@dataclass(slots=True)
class SlottedData:
    total: float = 1.0


class SlotsData(Construct):
    """a dataclass with slots"""

    def start(self):
        self.state = SlottedData()

    def factor(self, batch):
        self.state.total *= 0.999
        return self.state.total


class Pair(typing.NamedTuple):
    name: str
    values: list


class Named(Construct):
    """a list in a NamedTuple"""

    def start(self):
        self.pair = Pair("losses", [])

    def factor(self, batch):
        self.pair.values.append(1)
        return 1 / (1 + 0.001 * len(self.pair.values))


class WithProperty(Construct):
    """a property over a private attribute"""

    def start(self):
        self._scale = 1.0

    @property
    def scale(self):
        self._scale *= 0.999
        return self._scale

    def factor(self, batch):
        return self.scale


class Cached(Construct):
    """cached_property, reset by a counter"""

    attributes = False

    def start(self):
        self.count = 0

    @functools.cached_property
    def table(self):
        return [self.count]

    def factor(self, batch):
        self.count += 1
        self.table.append(self.count)
        return 1 / (1 + 0.001 * len(self.table))

    def seen(self):
        return self.table


class ClassAttribute(Construct):
    """a counter on the class"""

    steps = 0

    def start(self):
        type(self).steps = 0

    def factor(self, batch):
        type(self).steps += 1
        return 1 / (1 + 0.001 * type(self).steps)

    def seen(self):
        return type(self).steps


class Registry:
    entries: typing.ClassVar[list] = []


class ClassList(Construct):
    """a list on a class that is not the module's"""

    def start(self):
        Registry.entries.clear()
        self.registry = Registry()

    def factor(self, batch):
        self.registry.entries.append(1)
        return 1 / (1 + 0.001 * len(self.registry.entries))

    def seen(self):
        return len(Registry.entries)


STATE = {"scale": 1.0}
COUNTER = 0


class GlobalDict(Construct):
    """a global dict"""

    def start(self):
        STATE["scale"] = 1.0

    def factor(self, batch):
        STATE["scale"] *= 0.999
        return STATE["scale"]

    def seen(self):
        return STATE["scale"]


class GlobalName(Construct):
    """a global variable that is rebound"""

    def start(self):
        global COUNTER
        COUNTER = 0

    def factor(self, batch):
        global COUNTER
        COUNTER += 1
        return 1 / (1 + 0.001 * COUNTER)

    def seen(self):
        return COUNTER


def make_counter():
    count = 0

    def step():
        nonlocal count
        count += 1
        return count

    return step


class Closure(Construct):
    """nonlocal in a closure"""

    def start(self):
        self.step = make_counter()

    def factor(self, batch):
        return 1 / (1 + 0.001 * self.step())

    def seen(self):
        return self.step.__closure__[0].cell_contents


def with_default(value, seen=[]):  # noqa: B006
    seen.append(value)
    return len(seen)


class Default(Construct):
    """a mutable default argument"""

    def start(self):
        with_default.__defaults__[0].clear()

    def factor(self, batch):
        return 1 / (1 + 0.001 * with_default(1))

    def seen(self):
        return len(with_default.__defaults__[0])


def with_attribute():
    with_attribute.calls += 1
    return with_attribute.calls


class FunctionAttribute(Construct):
    """an attribute of a function"""

    def start(self):
        with_attribute.calls = 0

    def factor(self, batch):
        return 1 / (1 + 0.001 * with_attribute())

    def seen(self):
        return with_attribute.calls


@functools.lru_cache(maxsize=4)
def noise(number):
    return float(torch.rand(()))


@functools.cache
def forever(number):
    return float(torch.rand(()))


@functools.lru_cache(maxsize=4)
def table(number):
    return {i: float(torch.rand(())) for i in range(number)}


class CachedDicts(Construct):
    """lru_cache, whose results are dicts"""

    def start(self):
        table.cache_clear()
        table(1)

    def factor(self, batch):
        return 1 + table(1 + int(batch[1].sum()) % 4)[0]

    def seen(self):
        return table.cache_info().currsize, table.cache_info().misses


class LruCache(Construct):
    """lru_cache, of a function that draws"""

    def start(self):
        noise.cache_clear()

    def factor(self, batch):
        return 1 + noise(int(batch[1].sum()) % 5)

    def seen(self):
        return noise.cache_info().currsize, noise.cache_info().misses


class Forever(Construct):
    """functools.cache, of a function that draws"""

    def start(self):
        forever.cache_clear()

    def factor(self, batch):
        return 1 + forever(int(batch[1].sum()))

    def seen(self):
        return forever.cache_info().currsize


class SetAdded(Construct):
    """a set that grows"""

    attributes = False

    def start(self):
        self.labels = {f"label {i}" for i in range(20)}

    def factor(self, batch):
        self.labels.add(f"sum {int(batch[1].sum())}")
        return sum(1 + 0.01 * len(label) / (1 + i) for i, label in enumerate(self.labels)) / 20

    def seen(self):
        return list(self.labels)


class SetOrder(Construct):
    """a set of which only the order matters"""

    attributes = False

    def start(self):
        self.left = {487 * i + 3 for i in range(60)}
        for i in range(7, 60):
            self.left.discard(487 * i + 3)

    def factor(self, batch):
        return sum(x * 0.1 ** (i + 1) for i, x in enumerate(self.left)) / 100

    def seen(self):
        return list(self.left)


class Tokens(set):
    pass


class SetSubclass(Construct):
    """a subclass of set in a tuple"""

    attributes = False

    def start(self):
        self.both = (Tokens({1}), [1])

    def factor(self, batch):
        self.both[0].add(int(batch[1].sum()))
        return 1 / (1 + 0.01 * len(self.both[0]))

    def seen(self):
        return sorted(self.both[0])


class Remembering(set):
    def __init__(self, *members):
        super().__init__(members)
        self.history = []

    def add(self, member):
        self.history.append(member)
        super().add(member)


class SetHistory(Construct):
    """a subclass of set with a list of its own"""

    attributes = False

    def start(self):
        self.sums = Remembering(0)

    def factor(self, batch):
        self.sums.add(int(batch[1].sum()))
        return 1 / (1 + 0.001 * len(self.sums.history))

    def seen(self):
        return sorted(self.sums), self.sums.history


class Deep(Construct):
    """five containers inside one another"""

    def start(self):
        self.state = {"a": [({"b": collections.deque([[1.0]])},)]}

    def factor(self, batch):
        inner = self.state["a"][0][0]["b"][0]
        inner.append(inner[-1] * 0.999)
        return inner[-1]


class Keys(Construct):
    """objects as keys of a dict"""

    attributes = False

    def start(self):
        self.table = {Node(1.0): "first"}

    def factor(self, batch):
        key = next(iter(self.table))
        key.value *= 0.999
        return key.value

    def seen(self):
        return [key.value for key in self.table]


class Buffer(Construct):
    """io.StringIO"""

    attributes = False

    def start(self):
        self.text = io.StringIO()

    def factor(self, batch):
        self.text.write("x")
        return 1 / (1 + 0.001 * len(self.text.getvalue()))

    def seen(self):
        return self.text.getvalue(), self.text.tell()


class LogFile(Construct):
    """a file to which each step writes"""

    attributes = False

    def start(self):
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def factor(self, batch):
        self.file.write(f"{int(batch[1].sum())}\n")
        return 1.0

    def seen(self):
        self.file.seek(0)
        return self.file.read()


class NamedFile(Construct):
    """a named temporary file, and its position"""

    attributes = False

    def start(self):
        self.file = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115

    def factor(self, batch):
        self.file.write("x")
        self.file.flush()
        return 1 / (1 + 0.001 * self.file.tell())

    def seen(self):
        return self.file.tell()


class CsvFile(Construct):
    """csv.writer"""

    attributes = False

    def start(self):
        self.file = io.StringIO()
        self.writer = csv.writer(self.file)

    def factor(self, batch):
        self.writer.writerow([int(batch[1].sum())])
        return 1.0

    def seen(self):
        return self.file.getvalue()


class ReadFile(Construct):
    """a file from which each step reads"""

    attributes = False
    refused = r"the loss uses self\.file, which only training may use"

    def start(self):
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.file.writelines(f"{1 + 0.01 * i}\n" for i in range(500))
        self.file.seek(0)

    def factor(self, batch):
        return float(self.file.readline())

    def seen(self):
        return self.file.readline()


class Guarded:
    def __init__(self):
        object.__setattr__(self, "value", 1.0)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    def step(self):
        object.__setattr__(self, "value", self.value * 0.999)
        return self.value


class OwnSetattr(Construct):
    """an object whose __setattr__ raises"""

    def start(self):
        self.state = Guarded()

    def factor(self, batch):
        return self.state.step()


class Forwarding:
    def __init__(self):
        self.__dict__["data"] = {"value": 1.0}

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self.data[name] = value


class OwnGetattr(Construct):
    """an object that forwards attributes to a dict"""

    def start(self):
        self.state = Forwarding()

    def factor(self, batch):
        self.state.value = self.state.value * 0.999
        return self.state.value


class BoundMethod(Construct):
    """a bound method of a list"""

    attributes = False

    def start(self):
        rows: list = []
        self.record, self.length = rows.append, rows.__len__

    def factor(self, batch):
        self.record(1)
        return 1 / (1 + 0.001 * self.length())

    def seen(self):
        return self.length()
