"""Which steps were made with a clipped gradient, whoever clipped it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor

_WINDOW = 20  # steps that are remembered
# Steps from one that is watched to the next, at least, and if a measurement follows.
_EVERY, _BEFORE_MEASURING = 20, 5
_CHANGED = 1e-3  # a norm that falls by less than this share was not clipped


class ClippedSteps:
    """Compares the norm of the gradient before and after clipping, at the steps that it sees.

    Before: at the end of the backward pass, or, where a GradScaler has scaled the gradient there,
    in ``on_before_optimizer_step``, which Lightning calls of callbacks before it clips.  After: in
    automatic optimization when the batch ends, and in manual optimization, where the gradient may
    be gone by then, in ``on_before_optimizer_step``, which comes after clipping there.

    Attributes:
        watching: whether the next step is compared: one in 20, and those that are measured.
    """

    def __init__(self) -> None:
        self.watching = False
        self._watch: Callable[[bool], None] | None = None
        self._watched = True  # the hooks are enabled
        self._watched_at = 0
        self._seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=_WINDOW)
        self._before: dict[int, tuple[Any, Tensor]] = {}  # id of an optimizer -> it, and the norm
        self._stepped = False
        self._waiting = False  # for the end of a step, or for one with a loss

    def start(self, watch: Callable[[bool], None]) -> None:
        """Watch the first step; ``watch(enabled)`` enables or disables the hooks of a step."""
        self._watch, self.watching = watch, True
        watch(True)

    def after_backward(self, optimizers: list[Any], scaled: bool) -> None:
        """The gradients before clipping; ``scaled``: not by a GradScaler."""
        for optimizer in optimizers if self.watching and not scaled else ():
            if (norm := _gradient_norm(optimizer)) is not None:
                self._before[id(optimizer)] = optimizer, norm

    def before_step(self, optimizer: Any, automatic: bool, scaled: bool) -> None:
        """The gradient without its scale, or what the optimizer is given in manual optimization."""
        norm = _gradient_norm(optimizer) if self.watching else None
        if norm is None:
            return
        self._stepped = True
        if scaled and automatic:
            self._before[id(optimizer)] = optimizer, norm
        elif not automatic and id(optimizer) in self._before:
            _, before = self._before.pop(id(optimizer))
            self._seen.append((before, norm))

    def end_batch(self, step: int, next_measurement: float, automatic: bool) -> None:
        """Compare with what the optimizers were given, and decide whether the next is watched.

        Args:
            step: that of the batch.
            next_measurement: the step of the next one.
            automatic: whether Lightning steps the optimizer.
        """
        if self._watch is None:
            return  # nothing needs them
        if self.watching:
            before, stepped = list(self._before.values()), self._stepped
            self._before.clear()
            self._stepped, self._waiting = False, not stepped
            if not stepped:
                return
            for optimizer, norm in before if automatic else ():
                if (after := _gradient_norm(optimizer)) is not None:
                    self._seen.append((norm, after))
            self.watching, self._watched_at = False, step
        self.plan(step, next_measurement)

    def plan(self, step: int, next_measurement: float) -> None:
        """Decide whether the step after ``step`` is watched."""
        if self._watch is None or self._waiting:  # nothing needs it, or it is watched already
            return
        passed = step + 1 - self._watched_at
        due = step + 1 >= next_measurement and passed >= _BEFORE_MEASURING
        self.watching = due or passed >= _EVERY
        if self.watching is not self._watched:
            self._watched = self.watching
            self._watch(self.watching)

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


def is_scaled(trainer: Trainer) -> bool:
    """Whether a GradScaler scales gradients."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None
