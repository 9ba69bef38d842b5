"""The networks that the benchmarks measure; random weights, sizes in the docstrings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int] = (64, 256, 256, 10)) -> nn.Sequential:
    """ReLU between linear layers; 85 thousand parameters."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the shortcut subsamples and pads with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(short, (0, 0, 0, 0, 0, self.missing)))


def resnet20(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """He et al. 2016 for 32 x 32 images: 3 stages of 3 basic blocks, 0.27 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    width = 16
    for outputs in (16, 32, 64):
        for index in range(3):
            stride = 2 if index == 0 and outputs > 16 else 1
            layers.append(_Block(width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Transformer(nn.Module):
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


def transformer(
    vocabulary: int = 64, width: int = 64, heads: int = 4, depth: int = 2, length: int = 32
) -> Transformer:
    """Two layers of width 64 over 32 tokens; 0.11 million parameters."""
    return Transformer(vocabulary, width, heads, depth, length)
