"""Whether the gradient that autograd gives is the derivative of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import inner, norm, working_dtype

# The loss is moved by this share of itself, but weights by no more than that share of theirs.
_CHANGE, _LONGEST = 1e-3, 1e-2
# A change of the loss that is not this many units of its precision is lost in rounding.
_ROUNDING = 1000


def gradient_mismatch(objective: Objective, scale: float = 1.0) -> float | None:
    r"""How far derivatives of the loss are from what the gradient ``g`` gives for them.

    .. math:: \max_d \left| \frac{L(w + s d) - L(w - s d)}{2 s \, \langle g, d \rangle} - 1 \right|

    It is 0, but for rounding and third derivatives, where ``g`` is the gradient of ``L``.  It is
    larger where a hook on an activation, a module's backward hook, gradient reversal or a
    straight-through estimator changes what autograd passes on.  The directions ``d`` are ``g``, and
    ``g`` over the first and the second half of the parameters with each tensor scaled to length 1:
    what changes a gradient on its way changes those of the layers before.

    Args:
        objective: the loss.
        scale: of the steps ``s``, which by default change the loss by 0.1 %.

    Returns:
        The mismatch, at least 0; None where it cannot be seen: a gradient of 0 or not finite, or
        changes of the loss that would be lost in rounding.

    Cost: one gradient and six forwards.
    """
    gradient, loss = objective.gradient(products_follow=True), float(objective.loss())
    if not (0.0 < norm(gradient) < math.inf and math.isfinite(loss)):
        return None
    size = norm({name: param.detach() for name, param in objective.params.items()})
    dtypes = {working_dtype(param.dtype) for param in objective.params.values()}
    rounding = _ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * abs(loss)
    found = []
    for direction in _directions(gradient):
        length = norm(direction)
        slope = inner(gradient, direction) / length
        step = scale * min(_CHANGE * abs(loss) / slope, _LONGEST * size)
        if 2 * step * slope > rounding:
            ends = [(step / length,), (-step / length,)]
            ahead, behind = objective.losses_at([direction], ends)
            found.append(abs(float(ahead - behind) / (2 * step * slope) - 1))
    return max(found, default=None)


def _directions(gradient: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield gradient
    lengths = {name: float(torch.linalg.vector_norm(g)) for name, g in gradient.items()}
    names = [name for name, length in lengths.items() if length > 0.0]
    half = (len(names) + 1) // 2
    for part in (names[:half], names[half:]):
        if part:
            yield {
                name: g / lengths[name] if name in part else torch.zeros_like(g)
                for name, g in gradient.items()
            }
