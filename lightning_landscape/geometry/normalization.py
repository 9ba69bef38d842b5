"""Normalizations: explicit second derivatives of batch and instance norm, correct third of all.

All compute ``y = w xhat + b`` with ``xhat = r (x - mean)``, ``r = (var + eps)^-1/2`` over a group
of entries.  With ``<>`` the mean over a group, ``P u = u - <u> - xhat <u xhat>`` and
``g = dL/dy``, the gradients are ``G = r P(w g)`` by ``x``, ``sum g xhat`` by ``w`` and ``sum g`` by
``b``.  If ``w`` is one number per group, the inner product of these gradients with cotangents
``c, c_w, c_b`` has the derivatives

    by g:  w r P c + c_w xhat + c_b
    by w:  sum g r P c
    by x:  r P(c_w g) - r <c xhat> G - r <w g xhat> r P c - r <c G> xhat

and torch's kernel of the first derivative computes each ``r P u``.  (For layer norm torch's own
second derivative is as fast.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_landscape.geometry.operation import (
    BoundOperation,
    ExplicitOperation,
    Inputs,
    Operation,
    Tensors,
    supports,
)

_aten = torch.ops.aten


class BatchNorm(ExplicitOperation):
    """A group is one channel over all examples; ``w`` is one number per group.

    In eval mode mean and variance are constants, and ``P`` is the identity.
    """

    def __init__(
        self,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        momentum: float,
        eps: float,
    ) -> None:
        self._running, self._training = running, training
        self._momentum, self._eps = momentum, eps
        self._mean = self._r = torch.empty(0)

    def value(self, inputs: Inputs) -> Tensor:
        """``y``; in train mode the running statistics are updated, as torch does."""
        x, weight, bias = inputs
        result: tuple[Tensor, Tensor, Tensor] = _aten.native_batch_norm(
            x, weight, bias, *self._running, self._training, self._momentum, self._eps
        )
        y, self._mean, self._r = result
        mean, variance = self._running
        if not self._training and mean is not None and variance is not None:
            self._mean, self._r = mean.clone(), torch.rsqrt(variance + self._eps)
        return y

    def gradient(self, grad: Tensor, inputs: Inputs, needs: Sequence[bool]) -> Tensors:
        """By one kernel."""
        return self._backward(grad, inputs.x, inputs.weight, needs[0])

    def saved_sums(self, gradient: Tensors) -> tuple[Tensor, ...]:
        """``sum g xhat`` and ``sum g`` of each channel: the gradients by weight and bias."""
        return tuple(t for t in gradient[1:] if t is not None) if self._training else ()

    def second_derivative(
        self,
        cotangents: Tensors,
        grad: Tensor,
        inputs: Inputs,
        sums: tuple[Tensor, ...],
        needs: Sequence[bool],
    ) -> Tensors:
        """The formulas at the top of this file."""
        x, weight, _ = inputs
        c, c_weight, c_bias = cotangents
        r = self._r
        count = x.numel() // x.shape[1]
        w = self._ones if weight is None else weight
        c_w = self._zeros if c_weight is None else c_weight
        c_b = self._zeros if c_bias is None else c_bias

        by_grad = self._combined(x, c_w, c_b)
        if c is None:
            by_x = self._backward(grad, x, c_w, True)[0] if needs[1] else None
            return by_grad, by_x, None, None
        if not self._training:
            _add(by_grad, c, w * r)
            by_x = _scaled(grad, c_w * r) if needs[1] else None
            by_weight = r * self._sums(c, grad) if needs[2] else None
            return by_grad, by_x, by_weight, None
        projected, c_xhat, _ = self._backward(c, x, None, True)  # r P c
        _add(by_grad, projected, w)
        by_weight = self._sums(projected, grad)
        by_x = None
        if needs[1]:
            # r P g is expanded, because saving it next to g would take memory.
            g_xhat, g_one = sums
            of_grad = r * (c_w - w * r * c_xhat / count)
            of_xhat = -(of_grad * g_xhat + w * r * by_weight) / count
            by_x = self._combined(x, of_xhat, -of_grad * g_one / count)
            _add(_add(by_x, grad, of_grad), projected, -w * r * g_xhat / count)
        return by_grad, by_x, by_weight if needs[2] else None, None

    def decomposed(self, inputs: Inputs) -> Tensor:
        """``y``, with the statistics as functions of ``x``."""
        x, weight, bias = inputs
        if self._training:
            xhat = _normalized(x, [0, *range(2, x.dim())], self._eps)
        else:
            xhat = (x - _per_channel(self._mean, x)) * _per_channel(self._r, x)
        weight, bias = (None if t is None else _per_channel(t, x) for t in (weight, bias))
        return _affine(xhat, weight, bias)

    @cached_property
    def _zeros(self) -> Tensor:
        return torch.zeros_like(self._r)

    @cached_property
    def _ones(self) -> Tensor:
        return torch.ones_like(self._r)

    def _combined(self, x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
        """``slope xhat + constant``, numbers per channel, in one pass by the kernel of ``y``."""
        slope = slope * self._r
        constant = constant - slope * self._mean
        statistics = self._zeros, self._ones
        found: Tensor = _aten.native_batch_norm(x, slope, constant, *statistics, False, 0.0, 0.0)[0]
        return found

    def _sums(self, a: Tensor, b: Tensor) -> Tensor:
        """``sum a b`` of each channel, in one pass, by the kernel of the gradient by ``w``."""
        statistics = (self._zeros, self._ones) * 2
        found: Tensor = _aten.native_batch_norm_backward(
            a, b, self._ones, *statistics, False, 0.0, [False, True, False]
        )[1]
        return found

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, by_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``w r P grad``, and the sums of ``grad xhat`` and of ``grad``."""
        found: tuple[Tensor, Tensor, Tensor] = _aten.native_batch_norm_backward(
            grad,
            x,
            self._ones if weight is None else weight,
            *self._running,
            self._mean,
            self._r,
            self._training,
            self._eps,
            [by_x, True, True],
        )
        return found


class LayerNorm(Operation):
    """A group is one example; ``w`` varies within a group."""

    def __init__(self, shape: Sequence[int], eps: float) -> None:
        self._shape, self._eps = list(shape), eps
        self._mean = self._r = torch.empty(0)

    def value(self, inputs: Inputs) -> Tensor:
        """``y``."""
        x, weight, bias = inputs
        found: tuple[Tensor, Tensor, Tensor] = _aten.native_layer_norm(
            x, self._shape, weight, bias, self._eps
        )
        y, self._mean, self._r = found
        return y

    def gradient(self, grad: Tensor, inputs: Inputs, needs: Sequence[bool]) -> Tensors:
        """By one kernel."""
        x, weight, bias = inputs
        found: Tensors = _aten.native_layer_norm_backward(
            grad, x, self._shape, self._mean, self._r, weight, bias, list(needs)
        )
        return found

    def decomposed(self, inputs: Inputs) -> Tensor:
        """``y``, with the statistics as functions of ``x``."""
        x, weight, bias = inputs
        inside = list(range(-len(self._shape), 0))
        return _affine(_normalized(x, inside, self._eps), weight, bias)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BoundOperation | None:
    """Bind the arguments of ``torch.batch_norm``."""
    running = running_mean, running_var
    if input.dim() < 2 or not supports(input, weight, bias, *running):
        return None
    # torch raises its own error where statistics are missing or a channel has a single value.
    if input.numel() <= input.shape[1] if training else any(t is None for t in running):
        return None
    return BoundOperation(BatchNorm(running, training, momentum, eps), Inputs(input, weight, bias))


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BoundOperation | None:
    """Bind the arguments of ``torch.instance_norm``: a batch norm of each example alone."""
    tracked = running_mean is not None or running_var is not None
    if tracked or not use_input_stats or input.dim() < 3 or not supports(input, weight, bias):
        return None
    weight, bias = (None if t is None else t.repeat(input.shape[0]) for t in (weight, bias))
    as_channels = input.reshape(1, -1, *input.shape[2:])
    found = batch_norm(as_channels, weight, bias, None, None, True, momentum, eps, cudnn_enabled)
    return None if found is None else found._replace(shape=input.shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> BoundOperation | None:
    """Bind the arguments of ``torch.layer_norm``."""
    if not supports(input, weight, bias) or input.numel() == 0:
        return None
    return BoundOperation(LayerNorm(normalized_shape, eps), Inputs(input, weight, bias))


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 2))


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x * _per_channel(factor, x)


def _add(total: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return total.addcmul_(x, _per_channel(factor, x))


def _normalized(x: Tensor, inside: list[int], eps: float) -> Tensor:
    mean = x.mean(inside, keepdim=True)
    centred = x - mean
    return centred * torch.rsqrt(centred.square().mean(inside, keepdim=True) + eps)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * weight
    return y if bias is None else y + bias
