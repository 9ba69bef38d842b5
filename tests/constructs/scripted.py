"""TorchScript submodules, whose state lives in C++."""

import io

import torch
from torch import Tensor, nn

from tests.constructs.base import Construct


def _network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class _Scripted(Construct):
    """(the base: its whole network is scripted)"""

    attributes = False

    def start(self):
        self.net = self.make()

    def make(self):
        return torch.jit.script(_network())

    def training_step(self, batch, batch_idx):
        # Optimized code is used after some calls, of which a measurement makes more.
        with torch.jit.optimized_execution(False):
            return super().training_step(batch, batch_idx)

    def seen(self):
        return {name: buffer.clone() for name, buffer in self.net.named_buffers()}


class Scripted(_Scripted):
    """a scripted network with BatchNorm"""


class Traced(_Scripted):
    """a traced network with BatchNorm"""

    def make(self):
        return torch.jit.trace(_network(), torch.randn(4, 6))


class Loaded(_Scripted):
    """a scripted network, saved and loaded"""

    def make(self):
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(_network()), file)
        file.seek(0)
        return torch.jit.load(file)


class Nested(_Scripted):
    """a scripted layer among others"""

    def make(self):
        layer = torch.jit.script(nn.BatchNorm1d(8))
        return nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(8, 3))


class _CountsCalls(nn.Module):
    calls: int

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) / (1.0 + 0.001 * self.calls)


class Integer(_Scripted):
    """an integer attribute of a scripted module"""

    def make(self):
        return torch.jit.script(_CountsCalls())

    def seen(self):
        return self.net.calls


class _Remembers(nn.Module):
    seen: list[float]
    sums: dict[str, float]

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen = [1.0]
        self.sums = {"all": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(0.999 * self.seen[-1])
        self.sums["all"] = self.sums["all"] + self.seen[-1]
        return self.layer(x) * self.seen[-1]


class Containers(_Scripted):
    """a list and a dict of a scripted module"""

    def make(self):
        return torch.jit.script(_Remembers())

    def seen(self):
        return list(self.net.seen), dict(self.net.sums)


class _Rebinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(1))
        self.plain = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 0.999
        self.plain.mul_(0.999)
        return self.layer(x) * self.scale * self.plain


class Rebound(_Scripted):
    """a buffer of a scripted module that is rebound, and a tensor in place"""

    def make(self):
        return torch.jit.script(_Rebinds())

    def seen(self):
        return self.net.scale.clone(), self.net.plain.clone()
