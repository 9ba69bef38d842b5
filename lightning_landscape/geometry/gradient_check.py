"""Whether the gradient that autograd gives is the derivative of the loss."""

from __future__ import annotations

import math

import torch

from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import norm, working_dtype

# The loss is moved by this share of itself, but weights by no more than that share of theirs.
_CHANGE, _LONGEST = 1e-3, 1e-2
# A change of the loss that is not this many units of its precision is lost in rounding.
_ROUNDING = 1000


def gradient_mismatch(objective: Objective, scale: float = 1.0) -> float | None:
    r"""How far the derivative of the loss along its gradient is from the gradient's square.

    .. math:: \left| \frac{L(w + s g) - L(w - s g)}{2 s \|g\|^2} - 1 \right|

    It is 0, but for rounding and third derivatives, where ``g`` is the gradient of ``L``.  It is
    larger where a hook on an activation, a module's backward hook, gradient reversal or a
    straight-through estimator changes what autograd passes on.

    Args:
        objective: the loss.
        scale: of the step ``s``, which by default changes the loss by 0.1 %.

    Returns:
        The mismatch, at least 0; None where it cannot be seen: a gradient of 0 or not finite, or a
        change of the loss that would be lost in rounding.

    Cost: one gradient and two forwards.
    """
    gradient = objective.gradient(products_follow=True)
    length, loss = norm(gradient), float(objective.loss())
    if not (0.0 < length < math.inf and math.isfinite(loss)):
        return None
    size = norm({name: param.detach() for name, param in objective.params.items()})
    step = scale * min(_CHANGE * abs(loss) / length, _LONGEST * size)
    expected = 2 * step * length
    dtypes = {working_dtype(param.dtype) for param in objective.params.values()}
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    if not expected > _ROUNDING * precision * abs(loss):
        return None
    ahead, behind = objective.losses_at([gradient], [(step / length,), (-step / length,)])
    return abs(float(ahead - behind) / expected - 1)
