"""Kernels whose second derivatives exist and are correct.

Four kernels of torch have no second derivative or a wrong one, and one draws random numbers from a
state that cannot be restored.  While a loss is evaluated they are replaced by elementary operations
that compute the same function.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.backends import mha
from torch.utils import checkpoint as checkpointing

# Where recurrent layers look up their kernels.
_RECURRENT: tuple[tuple[Any, str], ...] = tuple(
    (torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
)

# Where parametrizations and the older hooks look up the fused weight norm.
_WEIGHT_NORM_PLACES: tuple[Any, ...] = (torch, sys.modules["torch.nn.utils.weight_norm"])


@contextlib.contextmanager
def plain_kernels(cudnn: bool = True) -> Iterator[None]:
    """Use kernels that can be differentiated twice inside this context.

    Attention uses elementary operations instead of fused kernels, compiled functions run eagerly,
    activation checkpoints do not re-enter autograd, and with ``cudnn=False`` recurrent layers run
    without cuDNN (its other flags are unchanged).  Every evaluation uses them, so that a loss and
    a gradient taken together belong to the same function.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        # Without a graph, transformer layers in eval mode take a fast path that zeroes padding.
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        # The fused weight norm's second derivative silently treats the norms as constants.
        for place in _WEIGHT_NORM_PLACES:
            patch_attribute(stack, place, "_weight_norm", _weight_norm)
        # A re-entrant checkpoint does not support torch.autograd.grad.
        patch_attribute(stack, checkpointing, "CheckpointFunction", _Checkpoint)
        if not cudnn:
            patch_attribute(stack, torch.backends.cudnn, "enabled", False)
        elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for place, name in _RECURRENT:
                patch_attribute(stack, place, name, _without_cudnn_dropout(getattr(place, name)))
        # If dynamo is not loaded nothing was compiled, and loading it takes seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products and convolutions of float32 in full precision (24 bits).

    By default cuDNN convolves with 11 bits (TF32), and Lightning recommends 11 or 8 bits for matrix
    products.  That is enough for a gradient or a Hessian-vector product, but not for the difference
    of two nearly equal losses: for a residual network on an H100, a rise of 3 % of the loss was off
    by 1.6 %.
    """
    if float32_is_full():
        yield
        return
    with contextlib.ExitStack() as stack:
        # The older settings as well, otherwise torch raises when they are read.  Restored in
        # reverse order.
        for place in _precisions():
            stack.callback(setattr, place, "fp32_precision", place.fp32_precision)
        with contextlib.suppress(RuntimeError):  # raised if the user has set the new ones
            before = torch.backends.cudnn.allow_tf32
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", before)
            torch.backends.cudnn.allow_tf32 = False
        with contextlib.suppress(RuntimeError):
            precision = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        for place in _precisions():
            place.fp32_precision = "ieee"
        yield


def float32_is_full() -> bool:
    """Whether float32 products already have full precision."""
    return all(place.fp32_precision in ("none", "ieee") for place in _precisions())


def _precisions() -> list[Any]:
    """The objects that hold torch's ``fp32_precision`` settings."""
    backends: Any = torch.backends  # their members are not all in the stubs
    cpu, cudnn = backends.mkldnn, backends.cudnn
    places = [cpu.matmul, cpu.conv, cpu.rnn]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        places += [backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    return places


def saved_dtypes(compute: Callable[[], object]) -> set[torch.dtype]:
    """The dtypes of the tensors that ``compute()`` saves for backward, e.g. under autocast."""
    found: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        found.add(tensor.dtype)
        return tensor

    with (
        torch.enable_grad(),
        plain_kernels(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        compute()
    return found


def patch_attribute(stack: contextlib.ExitStack, place: Any, name: str, value: object) -> None:
    """Set ``place.name`` to ``value`` until the stack is closed."""
    stack.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)


def _without_cudnn_dropout(recurrent: Callable[..., Any]) -> Callable[..., Any]:
    """``recurrent`` without cuDNN's dropout, whose random state cannot be restored."""

    def call(*args: Any) -> Any:
        # Of plain and packed sequences: ..., has_biases, num_layers, dropout, train, ...
        biases = next(i for i, arg in enumerate(args) if isinstance(arg, bool))
        dropout, train = args[biases + 2 : biases + 4]
        if not (dropout > 0.0 and train and args[0].is_cuda):
            return recurrent(*args)
        with contextlib.ExitStack() as stack:
            patch_attribute(stack, torch.backends.cudnn, "enabled", False)
            return recurrent(*args)

    return call


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _Checkpoint:
    """Replaces ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            # As in training: no gradient reaches the weights inside.
            with torch.no_grad():
                return function(*args)
        return checkpointing.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
