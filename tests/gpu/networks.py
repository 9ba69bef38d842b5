"""Networks with different kernels on a GPU and on the CPU, and their Hessians in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


class Images(nn.Module):
    """Convolutions by cuDNN, BatchNorm in train mode."""

    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.GELU(),
            nn.Conv2d(4, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Attention(nn.Module):
    """Fused attention, which has no second derivative, and layer norms."""

    shape = (6, 8)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inward = nn.LayerNorm(8), nn.Linear(8, 24)
        self.outward = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(self.norm(x)).unflatten(-1, (3, 2, 4)).unbind(-3)
        heads = (t.transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.outward((x + mixed.transpose(1, 2).flatten(2)).mean(1))


class Recurrent(nn.Module):
    """cuDNN's recurrent kernels have no second derivative."""

    shape = (5, 3)
    kind: type[nn.Module] = nn.LSTM

    def __init__(self) -> None:
        super().__init__()
        self.cell = self.kind(3, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Gru(Recurrent):
    kind = nn.GRU


class Deep(Recurrent):
    """Dropout between layers, for which cuDNN keeps random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, num_layers=2, dropout=0.3, batch_first=True)


class Dense(nn.Module):
    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETWORKS: dict[str, Callable[[], Any]] = {
    "dense": Dense,
    "images": Images,
    "attention": Attention,
    "lstm": Recurrent,
    "gru": Gru,
}


@dataclass
class Problem:
    """A network that has trained a little, and a batch."""

    net: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """A copy."""
        net = copy.deepcopy(self.net).to(device, dtype)
        return Problem(net, self.x.to(device, dtype), self.y.to(device))


def trained(name: str, examples: int = 24) -> Problem:
    """In float64 on the CPU."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    x = torch.randn(examples, *net.shape)
    problem = Problem(net, x, torch.arange(examples) % CLASSES).to("cpu", torch.float64)
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    return problem


def flat_loss(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss of flat weights by torch alone, and where the weights are."""
    params, net = problem.params, problem.net
    sizes = [p.numel() for p in params.values()]

    def loss(w: Tensor) -> Tensor:
        pieces = zip(params.items(), w.split(sizes), strict=True)
        named = {name: piece.view(p.shape) for (name, p), piece in pieces}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.cross_entropy(torch.func.functional_call(net, named, (problem.x,)), problem.y)

    return loss, torch.cat([p.detach().reshape(-1) for p in params.values()])


def hessian(problem: Problem) -> Tensor:
    """By two reverse derivatives of torch's, on the CPU in float64."""
    loss, w = flat_loss(problem)
    return torch.autograd.functional.hessian(loss, w)
