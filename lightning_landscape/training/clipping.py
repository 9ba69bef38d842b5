"""Which steps were made with a clipped gradient, whoever clipped it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

_WINDOW = 20  # steps that are remembered
_CHANGED = 1e-3  # a norm that falls by less than this share was not clipped


class ClippedSteps:
    """Compares the norm of the gradient before and after clipping, at the steps that it sees.

    In automatic optimization Lightning calls ``on_before_optimizer_step`` of callbacks before it
    clips, and before the module's own hook; what the optimizer was given is still there when the
    batch ends.  In manual optimization that hook comes after clipping, and the gradient before it
    is that at the end of the backward pass.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=_WINDOW)
        self._before: dict[int, tuple[Any, Tensor]] = {}  # id of an optimizer -> it, and the norm

    def after_backward(self, optimizers: list[Any]) -> None:
        """Of manual optimization: the gradients before clipping."""
        for optimizer in optimizers:
            if (norm := _gradient_norm(optimizer)) is not None:
                self._before[id(optimizer)] = optimizer, norm

    def before_step(self, optimizer: Any, automatic: bool) -> None:
        """The gradient before clipping, or what the optimizer is given in manual optimization."""
        norm = _gradient_norm(optimizer)
        if norm is None:
            return
        if automatic:
            self._before[id(optimizer)] = optimizer, norm
        elif (known := self._before.pop(id(optimizer), None)) is not None:
            self._seen.append((known[1], norm))

    def end_batch(self, automatic: bool) -> bool:
        """Compare with what the optimizers were given; whether a step was seen."""
        found = bool(self._before) if automatic else bool(self._seen)
        for optimizer, before in self._before.values() if automatic else ():
            after = _gradient_norm(optimizer)
            if after is not None:
                self._seen.append((before, after))
        self._before.clear()
        return found

    def counts(self) -> tuple[int, int]:
        """Steps that were clipped, of how many of the last ones that were seen."""
        pairs = [(float(before), float(after)) for before, after in self._seen]
        clipped = sum(after < (1 - _CHANGED) * before < float("inf") for before, after in pairs)
        return clipped, len(pairs)


def _gradient_norm(optimizer: Any) -> Tensor | None:
    """Over this process's part of all gradients; None without any.  Nothing is read from a GPU."""
    gradients = [
        getattr(parameter.grad, "_local_tensor", parameter.grad).detach()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if not gradients:
        return None
    norms = [torch.linalg.vector_norm(gradient, dtype=_wide(gradient)) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total


def _wide(gradient: Tensor) -> torch.dtype:
    """Half precision overflows where squares are added up."""
    return torch.promote_types(gradient.dtype, torch.float32)
