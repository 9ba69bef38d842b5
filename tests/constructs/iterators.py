"""Iterators that training_step draws from."""

from __future__ import annotations

import collections
import itertools

import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import Dataset, IterableDataset

from tests.constructs.base import Construct, loader


class _Drawing(Construct):
    """(the base of those that draw batches)"""

    attributes = False

    def start(self):
        self.drawn = []

    def on_fit_start(self):
        self.stream = self.make_stream()

    def make_stream(self):
        return iter(loader(400))

    def draw(self):
        return next(self.stream)

    def factor(self, batch):
        inputs, labels = self.draw()
        self.drawn.append(int(labels.sum()))
        return 1 + 0.1 * self.net(inputs).square().mean()

    def seen(self):
        return self.drawn


class Loader(_Drawing):
    """iter(loader)"""


class Workers(_Drawing):
    """iter(loader) with a worker process"""

    def make_stream(self):
        return iter(loader(400, num_workers=1))


class Tested(_Drawing):
    """a generator of which the truth is tested"""

    def make_stream(self):
        return (batch for batch in loader(400))

    def draw(self):
        if not self.stream:
            raise ValueError("there is no stream")
        return next(self.stream)


class Restarted(_Drawing):
    """iter(loader), made anew at its end"""

    def make_stream(self):
        return iter(loader(80))

    def draw(self):
        try:
            return next(self.stream)
        except StopIteration:
            self.stream = self.make_stream()
            return next(self.stream)


class Seeded(_Drawing):
    """iter(loader) with a generator of its own"""

    def make_stream(self):
        return iter(loader(400, generator=torch.Generator().manual_seed(3)))


class Augmented(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        return torch.randn(6), index % 3


class GlobalNoise(_Drawing):
    """a data set that draws from the global generator"""

    def make_stream(self):
        return iter(torch.utils.data.DataLoader(Augmented(), batch_size=8, shuffle=True))


class Stream(IterableDataset):
    def __iter__(self):
        for i in itertools.count():
            yield torch.randn(6), i % 3


class Endless(_Drawing):
    """an endless data set"""

    def make_stream(self):
        return iter(torch.utils.data.DataLoader(Stream(), batch_size=8))


class Cycled(_Drawing):
    """itertools.cycle(loader)"""

    def make_stream(self):
        return itertools.cycle(loader(64))


class Generated(_Drawing):
    """a generator function"""

    def make_stream(self):
        def batches():
            while True:
                yield from loader(64)

        return batches()


def _doubled(batch):
    return 2 * batch[0], batch[1]


class Mapped(_Drawing):
    """map over a generator"""

    def make_stream(self):
        def batches():
            while True:
                yield from loader(64)

        return map(_doubled, batches())


class Zipped(_Drawing):
    """zip of a loader and a counter"""

    def make_stream(self):
        return zip(loader(400), itertools.count(), strict=False)

    def draw(self):
        (inputs, labels), number = next(self.stream)
        return inputs / (1 + 0.01 * number), labels


class Enumerated(_Drawing):
    """enumerate(loader)"""

    def make_stream(self):
        return enumerate(loader(400))

    def draw(self):
        number, (inputs, labels) = next(self.stream)
        return inputs / (1 + 0.01 * number), labels


class Combined(_Drawing):
    """Lightning's CombinedLoader"""

    def make_stream(self):
        return iter(CombinedLoader({"a": loader(400), "b": loader(80)}, "max_size_cycle"))

    def draw(self):
        batches, *_ = next(self.stream)
        return batches["b"]


class InTuple(_Drawing):
    """two streams in a tuple"""

    def make_stream(self):
        return (iter(loader(400)), iter(loader(400, shuffle=False)))

    def draw(self):
        next(self.stream[1])
        return next(self.stream[0])


class InDict(_Drawing):
    """streams in a dict"""

    def make_stream(self):
        return {"weak": iter(loader(400)), "strong": iter(loader(400))}

    def draw(self):
        next(self.stream["weak"])
        return next(self.stream["strong"])


class Late(_Drawing):
    """a stream made in the first training_step"""

    def on_fit_start(self):
        self.stream = None

    def draw(self):
        if self.stream is None:
            self.stream = self.make_stream()
        return next(self.stream)


class Holder:
    def __init__(self, stream):
        self.stream = stream
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return next(self.stream)


class OwnIterator(_Drawing):
    """an iterator class of one's own around a loader"""

    def make_stream(self):
        return Holder(iter(loader(400)))

    def seen(self):
        return self.drawn, self.stream.count


class InClosure(_Drawing):
    """a stream in a closure"""

    def on_fit_start(self):
        stream = self.make_stream()
        self.draw = lambda: next(stream)


class Counted(Construct):
    """itertools.count"""

    attributes = False

    def start(self):
        self.steps = itertools.count(1)

    def factor(self, batch):
        return 1 / (1 + 0.001 * next(self.steps))

    def seen(self):
        return next(self.steps)


class Cyclic(Construct):
    """itertools.cycle of a list"""

    attributes = False

    def start(self):
        self.scales = itertools.cycle([1.0, 0.9, 0.8])

    def factor(self, batch):
        return next(self.scales)

    def seen(self):
        return next(self.scales)


class ListIterator(Construct):
    """iter of a list"""

    attributes = False

    def start(self):
        self.scales = iter([1 / (1 + 0.001 * i) for i in range(500)])

    def factor(self, batch):
        return next(self.scales)

    def seen(self):
        return next(self.scales)


class Composed(Construct):
    """chain, islice, map and enumerate of simple iterators"""

    attributes = False

    def start(self):
        chained = itertools.chain(range(3), itertools.islice(itertools.count(3), 500))
        self.scales = enumerate(map(float, chained))

    def factor(self, batch):
        number, value = next(self.scales)
        return 1 / (1 + 0.001 * number + 0.001 * value)

    def seen(self):
        return next(self.scales)


class Sender(Construct):
    """a generator that is sent values"""

    attributes = False

    def start(self):
        def average():
            mean = 1.0
            while True:
                value = yield mean
                mean = 0.9 * mean + 0.1 * (mean if value is None else value)

        self.average = average()
        next(self.average)

    def factor(self, batch):
        return 1 + 0.1 * self.average.send(float(batch[1].sum()))

    def seen(self):
        return next(self.average)


class Rotated(Construct):
    """a deque that is rotated"""

    def start(self):
        self.ring = collections.deque([1.0, 0.9, 0.8])

    def factor(self, batch):
        self.ring.rotate(1)
        return self.ring[0]


class Drained(Construct):
    """an iterator that each step makes and drains"""

    attributes = False

    def start(self):
        self.pending = iter(())
        self.total = 0

    def factor(self, batch):
        self.pending = iter(batch[1].tolist())
        for label in self.pending:
            self.total += label
        return 1 / (1 + 0.001 * self.total)

    def seen(self):
        return self.total
