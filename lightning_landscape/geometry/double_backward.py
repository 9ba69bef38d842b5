"""Detect losses that cannot be differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_landscape.geometry.errors import NoDoubleBackward, OtherRankError, out_of_memory

# The code object of every backward decorated with ``once_differentiable``, and the name of the node
# that the decorator puts into the graph of a gradient.
_DECORATED = once_differentiable(lambda ctx, *grads: grads).__code__
_ERROR_NODE = "torch::autograd::Error"


@contextlib.contextmanager
def translate_double_backward_errors() -> Iterator[None]:
    """Turn the error of a missing double backward into NoDoubleBackward; keep out of memory."""
    try:
        yield
    except OtherRankError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        if out_of_memory(error):
            raise
        raise NoDoubleBackward(str(error).strip().split("\n")[0]) from error


def uses_once_differentiable(tensors: Sequence[Tensor]) -> bool:
    """Whether the graph of a loss or its gradient contains a ``once_differentiable`` function.

    In the graph of the loss it is recognized by its backward.  In the graph of the gradient it
    leaves a node that raises, but without a path to the parameters, or no node at all if its input
    was constant.  Autograd skips both when it differentiates by the parameters alone, and silently
    omits part of the Hessian.
    """
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _DECORATED or node.name() == _ERROR_NODE:
            return True
        following = {following for following, _ in node.next_functions if following is not None}
        pending += following - seen
        seen |= following
    return False
