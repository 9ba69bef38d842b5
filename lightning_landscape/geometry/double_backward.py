"""Whether a loss can be differentiated twice: found out, never assumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_landscape.geometry.errors import NoDoubleBackward, OtherRankError, out_of_memory

# What torch's decorator makes of any backward, and the node that it puts into a gradient's graph.
_MARKED = once_differentiable(lambda ctx, *grads: grads).__code__
_ERROR = "torch::autograd::Error"


@contextlib.contextmanager
def translate_double_backward_errors() -> Iterator[None]:
    """Name the error of a loss that cannot be differentiated twice; out of memory is another."""
    try:
        yield
    except OtherRankError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        if out_of_memory(error):
            raise
        raise NoDoubleBackward(str(error).strip().split("\n")[0]) from error


def uses_once_differentiable(tensors: Sequence[Tensor]) -> bool:
    """Whether a function marked ``once_differentiable`` had a part in a loss or its gradient.

    In the loss it is seen by its backward.  In the gradient it leaves a node that raises, but no
    way from there to the parameters; or, where what flowed into it was constant, nothing at all.
    Autograd, asked for the derivatives by the parameters alone, passes both by and leaves part of
    the Hessian out without a word.
    """
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _MARKED or node.name() == _ERROR:
            return True
        following = {following for following, _ in node.next_functions if following is not None}
        pending += following - seen
        seen |= following
    return False
