"""Convolutions whose second derivative uses the kernels of the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_landscape.geometry.operation import (
    BoundOperation,
    ExplicitOperation,
    Inputs,
    Tensors,
    is_large_enough,
    supports,
)

_Size = int | Sequence[int]


class Convolution(ExplicitOperation):
    """``y = x * w + b``, bilinear in ``(x, w)``; transposed, grouped and dilated ones too.

    torch's own second derivative runs convolutions with kernels as large as the image, in a loop
    over the groups.
    """

    def __init__(self, *settings: Any) -> None:
        # stride, padding, dilation, transposed, output_padding, groups
        self._settings = settings

    def value(self, inputs: Inputs) -> Tensor:
        """``y``."""
        x, weight, bias = inputs
        return self._convolve(x, weight, bias)

    def gradient(self, grad: Tensor, inputs: Inputs, needs: Sequence[bool]) -> Tensors:
        """By one kernel."""
        x, weight, _ = inputs
        return self._backward(grad, x, weight, needs)

    def second_derivative(
        self,
        cotangents: Tensors,
        grad: Tensor,
        inputs: Inputs,
        sums: tuple[Tensor, ...],
        needs: Sequence[bool],
    ) -> Tensors:
        """The gradient ``(w^T g, x^T g, sum g)`` is bilinear: its derivatives are convolutions."""
        along_x, along_weight, along_bias = cotangents
        x, weight, _ = inputs
        by_grad = by_x = by_weight = None
        if along_weight is not None:
            by_grad = self._convolve(x, along_weight, along_bias)
            if needs[1]:
                by_x = self._backward(grad, x, along_weight, (True, False, False))[0]
        if along_x is not None:
            image = self._convolve(along_x, weight, along_bias if by_grad is None else None)
            by_grad = image if by_grad is None else by_grad.add_(image)
            if needs[2]:
                by_weight = self._backward(grad, along_x, weight, (False, True, False))[1]
        if by_grad is None and along_bias is not None:
            by_grad = along_bias.view(-1, *[1] * (grad.dim() - 2)).expand_as(grad)
        return by_grad, by_x, by_weight, None

    def decomposed(self, inputs: Inputs) -> Tensor:
        """The convolution itself: torch's third derivative of it is correct."""
        return self.value(inputs)

    def _convolve(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.aten.convolution(x, weight, bias, *self._settings)
        return result

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, needs: Sequence[bool]
    ) -> Tensors:
        found: Tensors = torch.ops.aten.convolution_backward(
            grad, x, weight, [grad.shape[1]], *self._settings, list(needs)
        )
        return found


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> BoundOperation | None:
    """Bind the arguments of ``torch.conv1d`` to ``conv3d``."""
    none = [0] * (weight.dim() - 2)
    return _convolution(input, weight, bias, stride, padding, dilation, False, none, groups)


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> BoundOperation | None:
    """Bind the arguments of ``torch.conv_transpose1d`` to ``conv_transpose3d``."""
    rest = (dilation, True, output_padding, groups)
    return _convolution(input, weight, bias, stride, padding, *rest)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Size,
    padding: _Size | str,
    dilation: _Size,
    transposed: bool,
    output_padding: _Size,
    groups: int,
) -> BoundOperation | None:
    if not (
        transposed or is_large_enough(x)
    ):  # torch cannot differentiate some transposed ones twice
        return None
    if x.dim() != weight.dim() or isinstance(padding, str) or not supports(x, weight, bias):
        return None

    def each(size: _Size) -> list[int]:
        sizes = list(size) if isinstance(size, Sequence) else [size]
        return sizes * (x.dim() - 2) if len(sizes) == 1 else sizes

    settings = (each(stride), each(padding), each(dilation), transposed, each(output_padding))
    return BoundOperation(Convolution(*settings, groups), Inputs(x, weight, bias))
