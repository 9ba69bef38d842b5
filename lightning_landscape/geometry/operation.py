"""Differentiable operations with an explicit second derivative, as autograd functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn import Parameter

Tensors = tuple[Tensor | None, ...]

# Smallest input, in entries, for which the explicit second derivative pays off.  Below it the
# overhead of Python exceeds the saving (residual networks: 2 % on CPU, 20 % on CUDA of a product).
_MIN_NUMEL = {"cpu": 2**16, "cuda": 2**20}


class Inputs(NamedTuple):
    """The inputs of a layer; weight and bias are None where the layer has none."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Operation(ABC):
    """``y = f(x, weight, bias)`` and its gradient; one object per evaluation.

    ``gradient`` calls one kernel, which autograd can differentiate once more; ``decomposed`` uses
    elementary operations, which autograd can differentiate any number of times.
    """

    @abstractmethod
    def value(self, inputs: Inputs) -> Tensor:
        """``y``."""

    @abstractmethod
    def gradient(self, grad: Tensor, inputs: Inputs, needs: Sequence[bool]) -> Tensors:
        """The vector-Jacobian product of each input, at least where needed."""

    @abstractmethod
    def decomposed(self, inputs: Inputs) -> Tensor:
        """``y`` by operations that torch differentiates correctly any number of times."""


class ExplicitOperation(Operation):
    """An operation with an explicit second derivative."""

    def saved_sums(self, gradient: Tensors) -> tuple[Tensor, ...]:
        """Small tensors of the gradient to save for ``second_derivative``."""
        return ()

    @abstractmethod
    def second_derivative(
        self,
        cotangents: Tensors,
        grad: Tensor,
        inputs: Inputs,
        sums: tuple[Tensor, ...],
        needs: Sequence[bool],
    ) -> Tensors:
        """The derivatives of ``sum_i cotangent_i' gradient_i`` by ``grad`` and by each input.

        A cotangent of None is zero.  ``needs`` and the result start with ``grad``.
        """


class BoundOperation(NamedTuple):
    """An operation, its inputs, and the shape of the result where it differs from the output's."""

    operation: Operation
    inputs: Inputs
    shape: torch.Size | None = None


def apply(operation: Operation, inside_loss: Callable[[], bool], inputs: Inputs) -> Tensor:
    """``y``, with a graph that uses the operation's derivatives.

    ``inside_loss()`` is true while the loss is still being computed.  A gradient with a graph that
    is requested then belongs to a gradient penalty and will be differentiated twice more: it is
    torch's own gradient of ``decomposed``.
    """
    result: Tensor = _Value.apply(operation, inside_loss, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Value(Function):
    @staticmethod
    def forward(
        ctx: Any, operation: Operation, inside_loss: Callable[[], bool], *inputs: Tensor | None
    ) -> Tensor:
        ctx.operation, ctx.inside_loss = operation, inside_loss
        ctx.save_for_backward(*inputs)
        return operation.value(Inputs._make(inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operation, needs = ctx.operation, ctx.needs_input_grad[2:]
        inputs = Inputs._make(ctx.saved_tensors)
        if torch.is_grad_enabled() and ctx.inside_loss():
            found = _decomposed_gradient(operation, grad, inputs, needs)
        elif (
            torch.is_grad_enabled()
            and isinstance(operation, ExplicitOperation)
            and is_large_enough(inputs.x)
        ):
            found = _Gradient.apply(operation, needs, grad, *inputs)  # type: ignore[no-untyped-call]
        else:
            found = _needed(operation.gradient(grad, inputs, needs), needs)
        return None, None, *found


class _Gradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        operation: ExplicitOperation,
        needs: Sequence[bool],
        grad: Tensor,
        *inputs: Tensor | None,
    ) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.operation = operation
        gradient = operation.gradient(grad, Inputs._make(inputs), needs)
        ctx.save_for_backward(grad, *inputs, *operation.saved_sums(gradient))
        return _needed(gradient, needs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx.operation).__name__}: third derivatives outside of the loss are not "
                f"supported"
            )
        operation, needs = ctx.operation, ctx.needs_input_grad[2:]
        grad, x, weight, bias, *sums = ctx.saved_tensors
        inputs = Inputs(x, weight, bias)
        found = operation.second_derivative(cotangents, grad, inputs, tuple(sums), needs)
        return None, None, *found


def _needed(gradient: Tensors, needs: Sequence[bool]) -> Tensors:
    return tuple(t if need else None for t, need in zip(gradient, needs, strict=True))


def _decomposed_gradient(
    operation: Operation, grad: Tensor, inputs: Inputs, needs: Sequence[bool]
) -> Tensors:
    # Views, so that the derivatives do not include a path from ``grad`` to the inputs.
    views = Inputs._make(None if x is None else x.view_as(x) for x in inputs)
    wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
    found = iter(torch.autograd.grad(operation.decomposed(views), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def is_large_enough(x: Tensor) -> bool:
    """Whether the explicit second derivative saves time."""
    return x.numel() >= _MIN_NUMEL.get(x.device.type, 0)


def supports(*tensors: Tensor | None) -> bool:
    """Whether these tensors can go through an :class:`Operation` instead of torch's own function.

    Not in half precision or under autocast, for tensor subclasses, inside ``torch.func`` or in
    forward mode, and not where no gradient is needed.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    first = present[0]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in present)
        and first.dtype in (torch.float32, torch.float64)
        and first.device.type in ("cpu", "cuda")
        and all(
            type(tensor) in (Tensor, Parameter)
            and tensor.dtype == first.dtype
            and tensor.device == first.device
            for tensor in present
        )
        and not torch.is_autocast_enabled(first.device.type)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
