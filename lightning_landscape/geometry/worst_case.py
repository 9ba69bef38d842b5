"""The largest rise of the loss within a ball or a box around the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_landscape.geometry.ascent import Norm, largest_rise
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
    check_objective,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import Sharpness
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

    The ascent starts along the gradient, along the two top eigenvectors of the Hessian (in units of
    ``c``, with both signs) and along random vectors, and continues from the best point reached.
    The result is the best point found: never below 0 and, in the ball, never below
    :func:`sam_sharpness`.  It is a lower bound of the true maximum.

    ``settled`` is True if a longer search is not expected to find 3 % more: the ascent has
    converged, two starts led to the same point, and the loss is close to its second-order model.
    Of 846 balls and boxes on 91 trained networks 67 % were settled, none of them more than 3 %
    below the best of 16 to 20 ascents of 200 steps; of the others 88 % were that close too.

    Args:
        objective: the loss.
        rho: radius, in units of the weights; if adaptive a fraction of each weight.
        norm: ``"l2"``: a ball; ``"linf"``: a box, every weight moves by up to ``rho``.
        steps: points of the last ascent; more of them also mean more starts.  Below 5 the only
            start is the gradient, and the value is never settled; 1 is SAM's step.
        per_batch: the weighted mean of each batch's own worst case (m-sharpness).  It is larger
            than that of all batches together, the more the smaller the batches: report their size.
            Settled if that of every batch is.
        adaptive: scale by the size of each weight.  The value does not change when a layer
            of a ReLU network is scaled up and the next one down; weights at 0 stay there.

    Returns:
        A :class:`Sharpness` with the displacement found (none with ``per_batch``); NaN, with the
        reason in ``note``, if the loss or its gradient is not finite.

    Raises:
        ValueError: an argument is out of range.

    Cost: up to 3.5 gradients per step (of the 70 at the default, 16 are for 8 Hessian-vector
    products) and about one forward; 58 gradients on average, fewer if all starts lead to the same
    point.  Below 5 steps: one gradient and one forward per step, up to twice that if the first
    step does not raise the loss.

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
    if not per_batch:
        found = largest_rise(objective, scale, rho, norm, steps)
        return _sharpness(found.height, definition, found.settled, layout.unflatten(found.move))
    unsettled: list[bool] = []

    def rise_of(batch: Objective) -> float:
        found = largest_rise(batch, scale, rho, norm, steps)
        unsettled.append(not found.settled)
        return found.height

    rise = objective.batch_mean(rise_of)
    answers = iter(unsettled)
    share = objective.batch_mean(lambda batch: float(next(answers)))  # over processes too
    return _sharpness(rise, f"{definition}, one batch a group", share == 0.0, {})


def keskar_sharpness(objective: Objective, epsilon: float = 1e-3, steps: int = 20) -> Sharpness:
    r"""The largest rise within a box around the weights, in per cent of ``1 + L``.

    .. math:: 100 \frac{\max_{|z_i| \le \epsilon (|w_i| + 1)} L(w + z) - L(w)}{1 + L(w)}

    Args:
        objective: a loss above -1.
        epsilon: size of the box; Keskar et al. use 1e-3 and 5e-4.
        steps: points of the ascent, see :func:`worst_case_sharpness`.

    Returns:
        A :class:`Sharpness` in per cent, with ``settled`` as there; NaN, with the reason in
        ``note``, if the loss or its gradient is not finite, or the loss is not above -1.

    Raises:
        ValueError: an argument is out of range.

    Cost: as :func:`worst_case_sharpness`.

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
    found = largest_rise(objective, scale, epsilon, "linf", steps)
    value = 100.0 * found.height / (1.0 + base)
    return _sharpness(value, definition, found.settled, layout.unflatten(found.move))


def _sharpness(
    value: float, definition: str, settled: bool, displacement: dict[str, Tensor]
) -> Sharpness:
    if math.isnan(value):
        note = "the loss or its gradient at the weights is not finite"
        return Sharpness(value, definition, displacement, note)
    return Sharpness(value, definition, displacement, settled=settled)


def _check_ascent(objective: Objective, name: str, radius: float, steps: int) -> None:
    check_objective(objective, "params", "loss", "gradient_at", "hvp")
    check_number("", name, radius, "a finite number > 0", lambda x: 0.0 < x < math.inf)
    check_count("", "steps", steps)
