"""Conditions under which a loss can be differentiated twice, and rightly.

Four kernels in torch either have no second derivative or a wrong one.  While a loss is evaluated
they are replaced by plain operations that compute the same function.
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

# Where parametrizations and the older hooks look up the fused weight norm.
_WEIGHT_NORM_PLACES: tuple[Any, ...] = (torch, sys.modules["torch.nn.utils.weight_norm"])


@contextlib.contextmanager
def plain_kernels(cudnn: bool = True) -> Iterator[None]:
    """Run what follows with kernels that can be differentiated twice.

    Attention in plain operations instead of fused kernels, compiled functions eagerly, activation
    checkpoints without re-entering autograd, and with ``cudnn=False`` recurrent layers without
    cuDNN (its other flags as they are).  Every evaluation uses them, so that a loss and a gradient
    taken together belong to the same function.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        # Without a graph, transformer layers in eval mode take a path that zeroes padded positions.
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        # The fused weight norm's second derivative takes the norms for constants, silently.
        for place in _WEIGHT_NORM_PLACES:
            exchange(stack, place, "_weight_norm", _weight_norm)
        # A re-entrant checkpoint refuses torch.autograd.grad, with or without a second derivative.
        exchange(stack, checkpointing, "CheckpointFunction", _Checkpoint)
        if not cudnn:
            flags = torch.backends.cudnn
            stack.enter_context(
                flags.flags(
                    enabled=False,
                    benchmark=flags.benchmark,
                    benchmark_limit=flags.benchmark_limit,
                    deterministic=flags.deterministic,
                    allow_tf32=flags.allow_tf32,
                )
            )
        # Nothing was compiled unless dynamo is loaded, and loading it takes seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def saved_dtypes(compute: Callable[[], object]) -> set[torch.dtype]:
    """The types of what ``compute()`` saves for its derivatives: what autocast made of them."""
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


def exchange(stack: contextlib.ExitStack, place: Any, name: str, stand_in: object) -> None:
    """``place.name`` is ``stand_in`` until the stack ends."""
    stack.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, stand_in)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _Checkpoint:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            # As in training: no gradient reaches the weights inside.
            with torch.no_grad():
                return function(*args)
        return checkpointing.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
