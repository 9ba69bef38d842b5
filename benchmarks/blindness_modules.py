"""Small modules whose Hessians have decoupled or suddenly changing parts, and coupled controls.

The loss of each is a function of a batch and of the step, so that a dense Hessian can be taken of
exactly what a callback measures.  All have fewer than 300 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.runs import Batch, mlp

JUMP = 105  # the step of what changes at once; between two measurements

# name -> the optimizer for parameter groups, from the learning rates for SGD and Adam
OPTIMIZERS: dict[str, Callable[[Iterable[Any], float, float], Optimizer]] = {
    "SGD": lambda groups, rate, _: SGD(_rated(groups, rate)),
    "momentum": lambda groups, rate, _: SGD(_rated(groups, rate / 5), momentum=0.9),
    "Adam": lambda groups, _, rate: Adam(_rated(groups, rate)),
}


def _rated(groups: Iterable[tuple[nn.Module, float]], rate: float) -> list[dict[str, Any]]:
    return [{"params": list(part.parameters()), "lr": rate * factor} for part, factor in groups]


class Kind(pl.LightningModule):
    """A regression of six inputs on one output; subclasses differ in the network and the loss.

    Attributes:
        coupled: one network whose parts all interact: a control.
        rate: the learning rate of SGD.
        adam_rate: the learning rate of Adam.
        jumps: the steps at which the loss changes at once.
    """

    coupled: ClassVar[bool] = False
    rate: ClassVar[float] = 0.07
    adam_rate: ClassVar[float] = 0.01
    jumps: ClassVar[tuple[int, ...]] = ()

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def data(self, generator: torch.Generator) -> Batch:
        """All examples."""
        inputs = torch.randn(64, 6, generator=generator)
        return inputs, 3 * torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The mean over the batch, as it is after ``step`` steps."""
        raise NotImplementedError

    def groups(self) -> list[tuple[nn.Module, float]]:
        """Parts of the module, and by how much their learning rate is larger."""
        return [(self, 1.0)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch, self.global_step)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.groups(), self.rate, self.adam_rate)


def _squared(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean()


# -- decoupled, or changing at once ---------------------------------------------------------------


class _Several(Kind):
    """Networks side by side: the Hessian is block diagonal.  ``weights``: of their losses."""

    count: ClassVar[int] = 2

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.networks = nn.ModuleList(mlp([6, 8, 1], nn.Tanh) for _ in range(self.count))

    def weights(self, step: int) -> list[float]:
        return [1.0] * self.count

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        targets = [target, torch.cos(target), 2 * torch.sin(target), target][: self.count]
        parts = zip(self.weights(step), self.networks, targets, strict=True)
        losses = [weight * _squared(network(inputs), wanted) for weight, network, wanted in parts]
        return torch.stack(losses).sum()


class Networks(_Several):
    """Four networks, one with small initial weights: the top eigenvalue moves to another one."""

    count = 4

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        with torch.no_grad():
            for parameter in self.networks[-1].parameters():
                parameter.mul_(0.1)


class Ramp(_Several):
    """An auxiliary network whose loss weight grows from 0 to 3 in 100 steps."""

    def weights(self, step: int) -> list[float]:
        return [1.0, 3 * min(1.0, step / 100)]


class Switch(_Several):
    """An auxiliary network whose loss is added at once."""

    jumps = (JUMP,)

    def weights(self, step: int) -> list[float]:
        return [1.0, 3.0 if step >= JUMP else 0.0]


class Scale(_Several):
    """The whole loss becomes four times as large at once."""

    rate, jumps = 0.03, (JUMP,)

    def weights(self, step: int) -> list[float]:
        return [4.0 if step >= JUMP else 1.0] * self.count


class Rates(_Several):
    """Three networks, each with its own learning rate."""

    count, rate, adam_rate = 3, 0.04, 0.007

    def groups(self) -> list[tuple[nn.Module, float]]:
        return list(zip(self.networks, (0.3, 1.0, 2.5), strict=True))


class RateJump(_Several):
    """Three networks; the learning rate becomes five times as large at once."""

    count, rate, adam_rate, jumps = 3, 0.015, 0.004, (JUMP,)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda step: 5.0 if step >= JUMP else 1.0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Growth(Kind):
    """A path that is gated by a factor: 0 at first, growing to 1 in 40 steps later."""

    rate, jumps = 0.04, (JUMP,)

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.old, self.new = (mlp([6, 10, 1], nn.Tanh) for _ in range(2))

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        gate = min(max(step - JUMP + 1, 0) / 40, 1.0)
        return _squared(self.old(inputs) + gate * self.new(3 * inputs), target)


class Towers(Kind):
    """Two towers, multiplied, under a head that starts at zero."""

    rate = 0.15

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.left, self.right = (nn.Linear(6, 10) for _ in range(2))
        self.head = nn.Linear(10, 1)
        nn.init.zeros_(self.head.weight)

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        product = torch.tanh(self.left(inputs)) * torch.tanh(2 * self.right(inputs))
        return _squared(self.head(product), target)


class Experts(Kind):
    """Four networks, each for the inputs of its own region."""

    rate = 0.1

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.experts = nn.ModuleList(mlp([6, 8, 1], nn.Tanh) for _ in range(4))

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        region = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0.7).long()
        outputs = torch.cat([expert(inputs) for expert in self.experts], 1)
        return _squared(outputs.gather(1, region[:, None]), target)


class FrozenByDetach(Kind):
    """The first layer gets no gradient until step 85: its output is detached."""

    rate, jumps, until = 0.05, (85,), 85

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.first, self.rest = nn.Linear(6, 12), mlp([12, 6, 1], nn.Tanh)

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        hidden = self.first(inputs)
        if step < self.until:
            hidden = hidden.detach()
        return _squared(self.rest(torch.tanh(hidden)), target)


class FrozenByFlag(FrozenByDetach):
    """The first layer has ``requires_grad=False`` until step 85: other parameters are measured."""

    until = 0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.first.requires_grad_(self.global_step >= self.jumps[0])


class Heads(Kind):
    """A shared trunk and two heads; the loss alternates between the heads every 45 steps."""

    rate, jumps = 0.05, (45, 90, 135, 180)

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.trunk = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
        self.heads = nn.ModuleList(mlp([10, 6, 1], nn.Tanh) for _ in range(2))

    def loss(self, batch: Batch, step: int) -> Tensor:
        inputs, target = batch
        turn = step // 45 % 2
        return _squared(self.heads[turn](self.trunk(inputs)), torch.cos(target) if turn else target)


class Rows(Kind):
    """A bigram model: the logits of an example are the row of its token, so each row is a block."""

    rate, adam_rate = 4.0, 0.1

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.table = nn.Embedding(40, 6)
        nn.init.normal_(self.table.weight, std=0.1)

    def data(self, generator: torch.Generator) -> Batch:
        frequency = 1 / torch.arange(2, 42).float()
        tokens = torch.multinomial(frequency, 256, replacement=True, generator=generator)
        noise = torch.randint(6, (256,), generator=generator)
        noisy = torch.rand(256, generator=generator) < 0.1 + 0.1 * (tokens % 4)
        return tokens, torch.where(noisy, noise, tokens % 6)

    def loss(self, batch: Batch, step: int) -> Tensor:
        return cross_entropy(self.table(batch[0]), batch[1])


class Diagonal(Kind):
    """A quadratic with a diagonal Hessian, whose entries rise and fall at different times."""

    rate, adam_rate = 0.1, 0.02

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.point = nn.Parameter(torch.randn(100))
        self.register_buffer("height", 0.5 + 8 * torch.rand(100) ** 2)
        self.register_buffer("period", 150 + 450 * torch.rand(100))
        self.register_buffer("phase", 2 * math.pi * torch.rand(100))

    def data(self, generator: torch.Generator) -> Batch:
        centres = 0.3 * torch.randn(64, 100, generator=generator)
        return centres, torch.zeros(64)

    def loss(self, batch: Batch, step: int) -> Tensor:
        wave = torch.cos(2 * math.pi * step / self.period + self.phase)
        entries = self.height * (1 + 0.9 * wave)
        return (entries * (self.point - batch[0]).square()).sum(1).mean() / 2


# -- coupled controls -----------------------------------------------------------------------------


class TanhRegression(Kind):
    """A tanh network, squared error."""

    coupled = True

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.network = mlp([6, 14, 8, 1], nn.Tanh)

    def loss(self, batch: Batch, step: int) -> Tensor:
        return _squared(self.network(batch[0]), batch[1])


class LinearRegression(TanhRegression):
    """A deep linear network, squared error."""

    rate = 0.03

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.network = mlp([6, 8, 8, 6, 1], nn.Identity)


class ReLUClassifier(Kind):
    """A ReLU network, three classes."""

    coupled, rate = True, 0.2

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.network = mlp([6, 12, 8, 3], nn.ReLU)

    def data(self, generator: torch.Generator) -> Batch:
        inputs, target = super().data(generator)
        return inputs, (target[:, 0] > -1).long() + (target[:, 0] > 1).long()

    def loss(self, batch: Batch, step: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])


class Convolutions(ReLUClassifier):
    """Two convolutions and a linear layer on pictures of 6 x 6; the brightest quadrant."""

    rate = 0.3

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        layers += [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)]
        self.network = nn.Sequential(*layers)

    def data(self, generator: torch.Generator) -> Batch:
        pictures = torch.randn(64, 1, 6, 6, generator=generator)
        return pictures, nn.functional.avg_pool2d(pictures, 3).flatten(1).argmax(1)


class Attention(ReLUClassifier):
    """One block of attention with layer norm: which class the token of the largest key has."""

    rate = 0.2

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.embed, self.project = nn.Linear(4, 6), nn.Linear(6, 18, bias=False)
        self.mix, self.network = nn.Linear(6, 6), mlp([6, 6, 3], nn.GELU)

    def data(self, generator: torch.Generator) -> Batch:
        tokens = torch.randn(64, 5, 4, generator=generator)
        chosen = tokens[torch.arange(64), tokens[:, :, 0].argmax(1)]
        return tokens, chosen[:, 1:].argmax(1)

    def loss(self, batch: Batch, step: int) -> Tensor:
        hidden = self.embed(batch[0])
        query, key, value = self.project(layer_norm(hidden, (6,))).chunk(3, -1)
        shares = torch.softmax(query @ key.mT / math.sqrt(6), -1)
        hidden = hidden + self.mix(shares @ value)
        return cross_entropy(self.network(layer_norm(hidden, (6,)).mean(1)), batch[1])


KINDS: dict[str, type[Kind]] = {
    "networks": Networks,
    "ramp": Ramp,
    "switch": Switch,
    "scale": Scale,
    "rates": Rates,
    "rate-jump": RateJump,
    "growth": Growth,
    "towers": Towers,
    "experts": Experts,
    "frozen-detach": FrozenByDetach,
    "frozen-flag": FrozenByFlag,
    "heads": Heads,
    "rows": Rows,
    "diagonal": Diagonal,
    "tanh": TanhRegression,
    "relu": ReLUClassifier,
    "convolutions": Convolutions,
    "attention": Attention,
    "linear": LinearRegression,
}
