"""Three networks in real training, each with its data, its optimizer and a fixed probe.

All data is offline and real: scikit-learn's 8 x 8 digits.  Attention is written out in plain
operations, because the fused kernel has no derivative that curvlinops (forward mode) or PyHessian
(double backward) could use: so every method differentiates the very same operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.runs import Batch, digits, half_squared_error
from benchmarks.runs import mlp as layers


@dataclass(frozen=True)
class Problem:
    """A network, its training loss, and the examples of the probe."""

    name: str
    module: nn.Module
    loss: nn.Module
    data: Batch
    probe: Batch
    make_optimizer: Callable[[nn.Module], Optimizer]
    batch_size: int | None  # None: all of the data at every step
    every: int  # steps between two measurements
    measurements: int
    start: int = 0  # steps before the first measurement
    note: str = ""

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.probe[0].device

    @property
    def title(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return f"{self.name}, {count / 1000:.0f} k parameters, probe of {len(self.probe[0])}"

    def probe_loss(self) -> Tensor:
        inputs, targets = self.probe
        loss: Tensor = self.loss(self.module(inputs), targets)
        return loss

    def training(self, measurements: int) -> Iterator[int]:
        """Train, and yield at each measurement: in eval mode, without gradients."""
        inputs, targets = self.data
        optimizer = self.make_optimizer(self.module)
        draw = torch.Generator().manual_seed(0)
        for index in range(measurements):
            self.module.train()
            for _ in range(self.every if index else self.start + self.every):
                rows: Tensor | slice = slice(None)
                if self.batch_size is not None:
                    rows = torch.randint(len(inputs), (self.batch_size,), generator=draw)
                optimizer.zero_grad()
                self.loss(self.module(inputs[rows]), targets[rows]).backward()
                optimizer.step()
            optimizer.zero_grad()
            self.module.eval()
            yield index


def mlp(device: str = "cpu") -> Problem:
    """64-256-256-10, ReLU; the probe is 512 digits."""
    torch.manual_seed(0)
    return _on_digits(
        "MLP",
        layers([64, 256, 256, 10], nn.ReLU),
        digits(),
        512,
        lambda net: SGD(net.parameters(), lr=0.02, momentum=0.9),
        device,
        every=25,
        measurements=41,
    )


def resnet20(device: str = "cpu") -> Problem:
    """The ResNet-20 of He et al. for CIFAR, on digits enlarged to 16 x 16; 128 of them probed.

    At 32 x 32 one measurement by all methods would take some five minutes.
    """
    torch.manual_seed(0)
    inputs, targets = digits()
    images = nn.functional.interpolate(
        inputs.view(-1, 1, 8, 8), scale_factor=2, mode="bilinear", align_corners=False
    )
    return _on_digits(
        "ResNet-20",
        ResNet20(channels=1),
        (images, targets),
        128,
        lambda net: SGD(net.parameters(), lr=0.02, momentum=0.9),
        device,
        every=10,
        measurements=6,
        note="BatchNorm in eval mode for all, because PyHessian forces it",
    )


def transformer(device: str = "cpu") -> Problem:
    """Three pre-norm encoder layers of width 64; each of the eight pixel rows is one token."""
    torch.manual_seed(0)
    inputs, targets = digits()
    return _on_digits(
        "transformer",
        Encoder(tokens=8, features=8, width=64, heads=4, layers=3),
        (inputs.view(-1, 8, 8), targets),
        128,
        lambda net: SGD(net.parameters(), lr=0.05, momentum=0.9),
        device,
        every=25,
        measurements=8,
    )


def edge(device: str = "cpu") -> Problem:
    """Full-batch gradient descent at the edge of stability, where top eigenvalues crowd.

    The run of benchmarks/runs.py with SGD at .2: the edge 2/lr = 10 is reached by step 640.
    """
    torch.manual_seed(0)
    inputs, labels = digits()
    batch = inputs[:500], nn.functional.one_hot(labels[:500], 10).float()
    return _on_digits(
        "tanh MLP at the edge of stability",
        layers([64, 64, 64, 10], nn.Tanh),
        batch,
        500,
        lambda net: SGD(net.parameters(), lr=0.2),
        device,
        loss=_HalfSquaredError(),
        batch_size=None,
        every=20,
        start=700,
        measurements=41,
    )


def tiny(device: str = "cpu") -> Problem:
    """For first calls, which import and compile."""
    return dataclasses.replace(edge(device), module=layers([64, 8, 10], nn.Tanh).to(device))


NETWORKS: Mapping[str, Callable[[str], Problem]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "transformer": transformer,
    "edge": edge,
}


class _HalfSquaredError(nn.Module):
    reduction = "mean"  # required by curvlinops

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return half_squared_error(outputs, targets)


def _on_digits(
    name: str,
    module: nn.Module,
    data: Batch,
    probe: int,
    make_optimizer: Callable[[nn.Module], Optimizer],
    device: str,
    *,
    loss: nn.Module | None = None,
    batch_size: int | None = 64,
    every: int,
    measurements: int,
    start: int = 0,
    note: str = "",
) -> Problem:
    inputs, targets = (tensor.to(device) for tensor in data)
    return Problem(
        name=name,
        module=module.to(device),
        loss=nn.CrossEntropyLoss() if loss is None else loss,
        data=(inputs, targets),
        probe=(inputs[:probe].clone(), targets[:probe].clone()),
        make_optimizer=make_optimizer,
        batch_size=batch_size,
        every=every,
        measurements=measurements,
        start=start,
        note=note,
    )


# -- ResNet-20 ------------------------------------------------------------------------------------


class _Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which is a 1 x 1 convolution where sizes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """Three stages of three blocks, 16, 32 and 64 channels."""

    def __init__(self, channels: int, classes: int = 10) -> None:
        stages = [
            _Block(before if block == 0 else after, after, stride if block == 0 else 1)
            for before, after, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
            for block in range(3)
        ]
        super().__init__(
            nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )


# -- transformer ----------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.inward(x).unflatten(-1, (3, self.heads, -1))  # (batch, token, 3, head, part)
        query, key, value = split.transpose(1, 3).unbind(2)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        mixed = scores.softmax(-1) @ value  # (batch, head, token, part)
        return self.outward(mixed.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Encoder(nn.Module):
    """A linear map of each token, learned positions, ``layers`` layers, the mean over tokens."""

    def __init__(
        self, tokens: int, features: int, width: int, heads: int, layers: int, classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*[_Layer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.layers(self.embed(x) + self.position)).mean(1))
        return out


class LanguageModel(nn.Module):
    """A causal language model: logits of the next token at each place."""

    def __init__(self, vocabulary: int, width: int, heads: int, depth: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.tokens(tokens) + self.places[:length]
        return self.head(self.layers(x, mask=mask, is_causal=True)).transpose(1, 2)


def language_model(
    vocabulary: int = 64, width: int = 64, heads: int = 4, depth: int = 2, length: int = 32
) -> LanguageModel:
    """Two layers of width 64 over 32 tokens; 0.11 million parameters."""
    return LanguageModel(vocabulary, width, heads, depth, length)
