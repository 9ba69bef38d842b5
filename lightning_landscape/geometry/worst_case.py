"""The largest rise of the loss within a ball or a box around the weights."""

from __future__ import annotations

import math

import torch

from lightning_landscape.geometry.ascent import Norm, largest_rise
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
    check_objective,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sharpness import Sharpness
from lightning_landscape.geometry.vectors import Layout


def worst_case_sharpness(
    objective: Objective,
    rho: float = 0.05,
    norm: Norm = "l2",
    steps: int = 20,
    per_batch: bool = False,
    adaptive: bool = False,
) -> Sharpness:
    r"""The largest rise of the loss within distance ``rho``, by projected gradient ascent.

    .. math:: \max_{\|d / c\|_p \le \rho} L(w + d) - L(w), \quad c = 1
       \quad\text{or, adaptive,}\quad c = |w|

    The ascent starts where one step of length ``rho`` along the gradient ends (SAM's, in the ball)
    and, if that is no rise, at the weights too.  It keeps the best point seen: never below 0 and,
    in the ball, never below :func:`sam_sharpness`.  It is a lower bound of the true maximum.

    Args:
        objective: the loss.
        rho: radius: in units of the weights, a share of each weight when adaptive.
        norm: ``"l2"``: a ball; ``"linf"``: a box, every weight moves by up to ``rho``.
        steps: points tried from each start; 1 is SAM's.
        per_batch: the mean, by weight, of each batch's own worst case (m-sharpness).  Larger than
            that of the whole, the more so the smaller the batches: fix their size and say it.
        adaptive: scale to each weight.  The value does not change when a layer of a ReLU network
            is scaled up and the next one down; weights at 0 stay there.

    Returns:
        A :class:`Sharpness` with the displacement found (none with ``per_batch``); NaN where the
        loss or its gradient is not finite.

    Raises:
        ValueError: an argument out of its range.

    Cost: up to ``steps`` forwards and as many gradients, one forward more for ``L(w)`` unless the
    objective knows it; up to twice that where the first step does not raise the loss.

    Source: Andriushchenko et al., A Modern Look at the Relationship between Sharpness and
    Generalization, ICML 2023, eq. 1; Foret et al., ICLR 2021, section 4.2 for m-sharpness.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> loss = Objective(lambda: (w**2).sum() / 2, {"w": w})
        >>> round(worst_case_sharpness(loss, rho=0.1).value, 6)  # .1 * 5 + .1^2 / 2
        0.505
        >>> round(worst_case_sharpness(loss, rho=0.1, norm="linf").value, 6)  # .1 * 7 + .1^2
        0.71
    """
    _check_ascent(objective, "rho", rho, steps)
    check_choice("", "norm", norm, ("l2", "linf"))
    check_flags("", per_batch=per_batch, adaptive=adaptive)
    layout = Layout(objective.params)
    weights = layout.flatten(objective.params)
    scale = weights.abs() if adaptive else torch.ones_like(weights)
    ball = f"{norm} ball of radius {rho:g}{' |w|' if adaptive else ''}"
    definition = f"worst case in an {ball}, {steps} ascent steps"
    if per_batch:
        rise = objective.batch_mean(lambda batch: largest_rise(batch, scale, rho, norm, steps)[0])
        return Sharpness(rise, f"{definition}, one batch a group", {})
    rise, move = largest_rise(objective, scale, rho, norm, steps)
    return Sharpness(rise, definition, layout.unflatten(move))


def keskar_sharpness(objective: Objective, epsilon: float = 1e-3, steps: int = 20) -> Sharpness:
    r"""The largest rise within a box around the weights, in per cent of ``1 + L``.

    .. math:: 100 \frac{\max_{|z_i| \le \epsilon (|w_i| + 1)} L(w + z) - L(w)}{1 + L(w)}

    Args:
        objective: a loss above -1.
        epsilon: size of the box; Keskar et al. use 1e-3 and 5e-4.
        steps: points tried by the projected ascent, see :func:`worst_case_sharpness`.

    Returns:
        A :class:`Sharpness` in per cent; NaN where the loss is not finite or not above -1.

    Raises:
        ValueError: an argument out of its range.

    Cost: as :func:`worst_case_sharpness`; less where the ascent meets a corner of the box that it
    cannot leave.

    Source: Keskar et al., On Large-Batch Training for Deep Learning, ICLR 2017, metric 2.1 (over
    the full space).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -3.0], dtype=torch.float64))
        >>> loss = Objective(lambda: (w**2).sum() / 2, {"w": w})
        >>> round(keskar_sharpness(loss, epsilon=0.1).value, 6)  # (1.2^2 + 3.4^2 - 10) / 2 of 6
        25.0
    """
    _check_ascent(objective, "epsilon", epsilon, steps)
    definition = f"Keskar, epsilon {epsilon:g}, {steps} ascent steps, per cent of 1 + L"
    base = float(objective.loss())
    if base <= -1.0:
        note = f"the loss is {base:.4g}: the definition divides by 1 + L, which must be above 0"
        return Sharpness(math.nan, definition, {}, note)
    layout = Layout(objective.params)
    scale = layout.flatten(objective.params).abs() + 1.0
    rise, move = largest_rise(objective, scale, epsilon, "linf", steps)
    return Sharpness(100.0 * rise / (1.0 + base), definition, layout.unflatten(move))


def _check_ascent(objective: Objective, name: str, radius: float, steps: int) -> None:
    check_objective(objective, "params", "loss", "gradient_at")
    check_number("", name, radius, "a finite number > 0", lambda x: 0.0 < x < math.inf)
    check_count("", "steps", steps)
