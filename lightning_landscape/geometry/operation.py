"""A differentiable operation whose second derivative is written out, for autograd to use."""

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

# Numbers in what an operation is applied to.  With fewer, the time that Python takes for what is
# written out here is more than what it saves (residual networks: 2 % and 20 % of a product).
_MIN_NUMEL = {"cpu": 2**16, "cuda": 2**20}


class Inputs(NamedTuple):
    """What a layer is a function of; a weight or bias may not be there."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Operation(ABC):
    """``y = f(x, weight, bias)`` and its gradient; one object per evaluation.

    ``gradient`` is made of one kernel, which autograd differentiates once more, and ``plain`` of
    operations that it differentiates any number of times.
    """

    @abstractmethod
    def value(self, inputs: Inputs) -> Tensor:
        """``y``."""

    @abstractmethod
    def gradient(self, grad: Tensor, inputs: Inputs, needs: Sequence[bool]) -> Tensors:
        """``grad' dy/d...`` of each input, at least where needed."""

    @abstractmethod
    def plain(self, inputs: Inputs) -> Tensor:
        """``y`` by operations that torch differentiates rightly any number of times."""


class ExplicitOperation(Operation):
    """One whose second derivative autograd does not have to find."""

    def summary(self, gradient: Tensors) -> tuple[Tensor, ...]:
        """Small tensors of the gradient that ``second`` wants again."""
        return ()

    @abstractmethod
    def second(
        self,
        cotangents: Tensors,
        grad: Tensor,
        inputs: Inputs,
        summary: tuple[Tensor, ...],
        needs: Sequence[bool],
    ) -> Tensors:
        """The derivatives of ``sum_i cotangent_i' gradient_i`` by ``grad`` and by each input.

        A cotangent of None is zero; ``needs`` counts ``grad`` first.
        """


class BoundOperation(NamedTuple):
    """An operation, what it is applied to, and the shape of the result where that is another."""

    operation: Operation
    inputs: Inputs
    shape: torch.Size | None = None


def apply(operation: Operation, inside_loss: Callable[[], bool], inputs: Inputs) -> Tensor:
    """``y`` with a graph that uses all of these.

    ``inside_loss()`` tells whether the loss that it is part of is still being evaluated.  A
    gradient with a graph asked for then belongs to a gradient penalty, which will be differentiated
    twice more: it is torch's own, of ``plain``.
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
            found = _plain_gradient(operation, grad, inputs, needs)
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
        ctx.save_for_backward(grad, *inputs, *operation.summary(gradient))
        return _needed(gradient, needs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx.operation).__name__}: a third derivative outside of the loss"
            )
        operation, needs = ctx.operation, ctx.needs_input_grad[2:]
        grad, x, weight, bias, *summary = ctx.saved_tensors
        inputs = Inputs(x, weight, bias)
        found = operation.second(cotangents, grad, inputs, tuple(summary), needs)
        return None, None, *found


def _needed(gradient: Tensors, needs: Sequence[bool]) -> Tensors:
    return tuple(t if need else None for t, need in zip(gradient, needs, strict=True))


def _plain_gradient(
    operation: Operation, grad: Tensor, inputs: Inputs, needs: Sequence[bool]
) -> Tensors:
    # Views, or the derivatives would include the way from ``grad`` to the inputs.
    views = Inputs._make(None if x is None else x.view_as(x) for x in inputs)
    wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
    found = iter(torch.autograd.grad(operation.plain(views), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def is_large_enough(x: Tensor) -> bool:
    """Whether writing a second derivative out saves time."""
    return x.numel() >= _MIN_NUMEL.get(x.device.type, 0)


def supports(*tensors: Tensor | None) -> bool:
    """Whether what is written out here can stand for torch's own on these.

    Not in half precision or under autocast, for tensor subclasses, inside ``torch.func`` or in
    forward mode; and nowhere where no gradient flows.
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
