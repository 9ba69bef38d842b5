"""Random sources of one's own, wherever they are kept."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import qmc

from tests.constructs.base import Construct


class Legacy(Construct):
    """numpy.random.RandomState"""

    attributes = False

    def start(self):
        self.noise = np.random.RandomState(3)
        self.gauss = self.noise.normal()  # it keeps a second one

    def factor(self, batch):
        return 1 + 0.1 * self.noise.normal()

    def seen(self):
        return self.noise.normal()


class NumPy(Construct):
    """numpy.random.Generator"""

    def start(self):
        self.noise = np.random.default_rng(3)

    def factor(self, batch):
        return 1 + 0.1 * self.noise.random(dtype=np.float32)


class Mersenne(Construct):
    """a Generator over MT19937, in a dict"""

    def start(self):
        self.noise = {"mixup": np.random.Generator(np.random.MT19937(3))}

    def factor(self, batch):
        return 1 + 0.1 * self.noise["mixup"].beta(0.4, 0.4)


class Spawned(Construct):
    """a generator that spawns others"""

    def start(self):
        self.parent = np.random.default_rng(3)

    def factor(self, batch):
        return 1 + 0.1 * self.parent.spawn(1)[0].random()

    def seen(self):
        return self.parent.spawn(1)[0].random()


class Seeds(Construct):
    """a SeedSequence"""

    attributes = False

    def start(self):
        self.seeds = np.random.SeedSequence(3)

    def factor(self, batch):
        return 1 + 0.1 * np.random.default_rng(self.seeds.spawn(1)[0]).random()

    def seen(self):
        return self.seeds.n_children_spawned


class Python(Construct):
    """random.Random"""

    def start(self):
        self.noise = random.Random(3)

    def factor(self, batch):
        return 1 + 0.1 * self.noise.gauss(0, 1)


class Counted(random.Random):
    calls = 0

    def random(self):
        self.calls += 1
        return super().random()


class PythonSubclass(Construct):
    """a subclass of random.Random that counts"""

    attributes = False

    def start(self):
        self.noise = Counted(3)

    def factor(self, batch):
        return 1 + 0.1 * self.noise.random()

    def seen(self):
        return self.noise.calls, self.noise.getstate()


class System(Construct):
    """random.SystemRandom, for a name"""

    attributes = False

    def start(self):
        self.source = random.SystemRandom()
        self.steps = 0

    def factor(self, batch):
        self.source.random()
        self.steps += 1
        return 1 / (1 + 0.001 * self.steps)

    def seen(self):
        return self.steps


class Torch(Construct):
    """torch.Generator"""

    def start(self):
        self.noise = torch.Generator().manual_seed(3)

    def factor(self, batch):
        return 1 + 0.1 * torch.rand((), generator=self.noise)


def _new():
    return torch.Generator().manual_seed(3)


class _Draws(Construct):
    """(the base of those with a function that draws)"""

    attributes = False

    def factor(self, batch):
        return 1 + 0.1 * self.draw()

    def seen(self):
        return self.draw()


class Partial(_Draws):
    """a torch.Generator in a partial"""

    def start(self):
        self.draw = functools.partial(torch.rand, (), generator=_new())


class Closure(_Draws):
    """a torch.Generator in a closure"""

    def start(self):
        generator = _new()
        self.draw = lambda: torch.rand((), generator=generator)


class Default(_Draws):
    """a torch.Generator in a default argument"""

    def start(self):
        def draw(generator=_new()):  # noqa: B008
            return torch.rand((), generator=generator)

        self.draw = draw


class KeywordDefault(_Draws):
    """a torch.Generator in a keyword-only default"""

    def start(self):
        def draw(*, generator=_new()):  # noqa: B008
            return torch.rand((), generator=generator)

        self.draw = draw


@dataclass
class Augmentation:
    generator: torch.Generator
    strength: float = 0.1

    def __call__(self):
        return 1 + self.strength * torch.rand((), generator=self.generator)


class Data(Construct):
    """a torch.Generator in a dataclass"""

    def start(self):
        self.augment = Augmentation(_new())

    def factor(self, batch):
        return self.augment()


GENERATOR = _new()


class Global(Construct):
    """a global torch.Generator"""

    def start(self):
        GENERATOR.manual_seed(3)

    def factor(self, batch):
        return 1 + 0.1 * torch.rand((), generator=GENERATOR)

    def seen(self):
        return GENERATOR.get_state()


class InTuple(Construct):
    """generators in a tuple and in a list"""

    def start(self):
        self.both = (_new(), [np.random.default_rng(3)])

    def factor(self, batch):
        return 1 + 0.1 * torch.rand((), generator=self.both[0]) + 0.1 * self.both[1][0].random()


class Sobol(Construct):
    """torch's SobolEngine"""

    def start(self):
        self.points = torch.quasirandom.SobolEngine(2, scramble=True, seed=3)

    def factor(self, batch):
        return 1 + 0.1 * float(self.points.draw(1)[0, 0])

    def seen(self):
        return self.points.num_generated


class Scipy(Construct):
    """scipy's Sobol and Halton"""

    attributes = False

    def start(self):
        self.points = qmc.Sobol(2, seed=3), qmc.Halton(2, seed=3)

    def factor(self, batch):
        return 1 + 0.1 * sum(float(p.random(1)[0, 0]) for p in self.points)

    def seen(self):
        return [p.num_generated for p in self.points]


class Distribution(Construct):
    """draws from the three global sources"""

    def factor(self, batch):
        beta = torch.distributions.Beta(2.0, 2.0).sample()
        return 1 + 0.1 * beta + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
