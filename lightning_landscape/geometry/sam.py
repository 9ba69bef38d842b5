"""SAM sharpness, curvature along a direction, and the result of all sharpness measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import (
    check_flags,
    check_number,
    check_objective,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import Vector, check_vector, inner, norm


@dataclass(frozen=True)
class Sharpness:
    """A rise of the loss.

    Attributes:
        value: the rise, in units of the loss.
        definition: what was measured, with its radius.
        displacement: where the loss was evaluated, name -> tensor; empty where there are many.
        note: why ``value`` is NaN, or another remark; else empty.
        settled: for a search, whether a longer one is not expected to find a larger value; else
            ``None``.
    """

    value: float
    definition: str
    displacement: dict[str, Tensor]
    note: str = ""
    settled: bool | None = None


def sam_sharpness(
    objective: Objective,
    rho: float | None = None,
    adaptive: bool = False,
    eta: float = 0.0,
) -> Sharpness:
    r"""The rise of the loss after one ascent step of length ``rho``, as in SAM and ASAM.

    .. math:: S = L(w + e) - L(w), \quad e = \rho \frac{g}{\|g\|_2}
       \quad\text{or, adaptive,}\quad e = \rho \frac{T^2 g}{\|T g\|_2}, \; T = |w| + \eta

    To second order SAM's is ``rho ||g|| + rho^2/2 g'Hg/||g||^2``: during training it is mostly the
    norm of the gradient.  Log :func:`curvature_along` the gradient next to it.

    Args:
        objective: the loss.
        rho: radius, in units of the weights; ``None`` is .05, adaptive .5 (a relative radius).
        adaptive: scale the step by the size of each weight.  With ``eta=0`` the value does not
            change when a layer of a ReLU network is scaled up and the next one down.
        eta: added to ``|w|``, so that weights at zero move too.

    Returns:
        A :class:`Sharpness`; 0 if the gradient is exactly 0, NaN if it is not finite.

    Raises:
        ValueError: ``rho`` is not above 0, ``eta`` is below 0, or one of them is not finite.
        TypeError: an argument has another type.

    Cost: one gradient and two forwards, minus what the objective has cached.

    Source: Foret et al., ICLR 2021, eq. 2; Kwon et al., ICML 2021, eq. 9.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> loss = Objective(lambda: (w**2).sum() / 2, {"w": w})
        >>> round(sam_sharpness(loss, rho=0.1).value, 6)  # .1 * 5 + .1^2 / 2
        0.505
    """
    check_objective(objective, "params", "gradient", "loss_at")
    check_flags("", adaptive=adaptive)
    radius = (0.5 if adaptive else 0.05) if rho is None else rho
    expected = "a finite number > 0, or None for .05 (adaptive .5)"
    check_number("", "rho", radius, expected, lambda x: 0.0 < x < math.inf)
    check_number("", "eta", eta, "a number >= 0, not infinite", lambda x: 0.0 <= x < math.inf)
    gradient = objective.gradient()
    if adaptive:
        scale = {n: p.detach().abs().to(gradient[n]) + eta for n, p in objective.params.items()}
        length = norm({n: scale[n] * g for n, g in gradient.items()})
        step = {n: scale[n] ** 2 * g for n, g in gradient.items()}
    else:
        length, step = norm(gradient), gradient
    if length == 0.0:
        displacement = {n: torch.zeros_like(g) for n, g in gradient.items()}
    else:
        displacement = {n: radius / length * s for n, s in step.items()}
    rise = float(objective.loss_at(displacement) - objective.loss())
    kind = f"ASAM (eta {eta:g})" if adaptive else "SAM"
    return Sharpness(rise, f"{kind}, one ascent step, rho {radius:g}", displacement)


def curvature_along(objective: Objective, direction: Vector) -> float:
    """``d'Hd / d'd``: the second derivative of the loss along ``direction`` at unit length.

    It lies between the smallest and the largest eigenvalue.  NaN if the direction is zero.
    Cost: one HVP.
    """
    check_objective(objective, "params", "hvp")
    check_vector("direction", direction, objective.params)
    squared = inner(direction, direction)
    if squared == 0.0:
        return float("nan")
    return inner(objective.hvp(direction), direction) / squared
