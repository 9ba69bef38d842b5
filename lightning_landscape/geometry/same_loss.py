"""Whether two ways to evaluate a loss are the same function of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_landscape.geometry.vectors import Vector, random_vector, real, working_dtype

# Size of the random displacement, relative to the weights, and the largest relative difference.
_SHARE, _TOLERANCE = 0.5, 1e-5


def random_displacement(params: Vector) -> dict[str, Tensor]:
    """A random step of half the size of the weights, the same every time.

    Losses that coincide at special weights, such as those of all examples where the last layer is
    zero, differ there.  A tensor of zeros is moved as far as the others on average.
    """
    rms = {name: _root_mean_square(param) for name, param in params.items()}
    typical = sum(rms.values()) / max(sum(value > 0.0 for value in rms.values()), 1) or 1.0
    return {
        name: draw * (_SHARE * (rms[name] or typical))
        for name, draw in random_vector(params, 0).items()
    }


def agree(one: Tensor, other: Tensor) -> bool | None:
    """Whether two losses are equal at the same weights, to rounding.

    Args:
        one: ``(n,)``: a loss at the weights, and at displaced ones.
        other: ``(n,)``: the other loss at the same points.

    Returns:
        None where the first entries are not finite, because other weights may show more.
    """
    one, other = one.double().cpu(), other.double().cpu()
    if not bool(one[0].isfinite() & other[0].isfinite()):
        return None
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one[~finite].isfinite(), other[~finite].isfinite()):
        return False
    one, other = one[finite], other[finite]
    return bool((one - other).abs().max() <= _TOLERANCE * torch.cat([one, other]).abs().max())


def _root_mean_square(tensor: Tensor) -> float:
    values = real(tensor.detach())
    if values.numel() == 0:
        return 0.0
    length = torch.linalg.vector_norm(values.to(working_dtype(values.dtype)))
    return float(length) / math.sqrt(values.numel())
