"""How far the loss still falls along the optimizer's update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_landscape.geometry.checks import check_number, check_objective
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sharpness import Sharpness
from lightning_landscape.geometry.vectors import Vector, check_vector, norm, working_dtype

# Without a start: steps of this share of ||w||.
_FIRST_SHARE = 1e-2
# Doublings or halvings before the search gives up: twelve orders of magnitude.
_MAX_TRIES = 40
# Changes of the loss below this many units of its precision are rounding.
_ROUNDING = 8


@dataclass(frozen=True, kw_only=True)
class CriticalSharpness(Sharpness):
    """2 over the critical step size.

    Attributes:
        eta: the critical step size ``eta_c``, in units of the direction; NaN as ``value``.
        forwards: evaluations of the loss that were made.
    """

    eta: float
    forwards: int


def critical_sharpness(
    objective: Objective,
    direction: Vector,
    rtol: float = 0.05,
    *,
    start: float | None = None,
) -> CriticalSharpness:
    r"""``2 / eta_c``, with the smallest step that takes the loss above where it started.

    .. math:: \eta_c = \min \{\eta > 0 : L(w + \eta u) > L(w)\}

    On a quadratic, for ``u = -g``, it is ``g'Hg / ||g||^2``, at most the top eigenvalue: it tells
    that a run has arrived at the stability edge ``2 / lr``, not how far from it a run is.  Pass
    the update that a step made, divided by the learning rate, at the weights *before* that step:
    after it the update has already been taken.

    Args:
        objective: the loss.
        direction: ``u``, name -> tensor: the optimizer's update over the learning rate, downhill.
        rtol: relative error of ``eta_c`` and so of the value, above 0 and below 1.
        start: the first step size tried: the learning rate, or the last ``eta_c``.  ``None``: a
            step of 1 % of the weights' norm.

    Doubling (or halving) from ``start`` until the loss has crossed, then bisection.  Where the
    loss crosses several times the search may find another crossing than the first.

    Returns:
        A :class:`CriticalSharpness`, without a displacement.  NaN, with the reason in ``note``,
        where the loss falls nowhere along ``u``, never rises, or cannot be evaluated at ``w``.

    Raises:
        ValueError: an argument out of its range, or a direction that does not match.

    Cost: 5 to 7 forwards at the default ``rtol`` from a start within a factor 2, one more per
    further factor 2.

    Source: Kalra et al. 2026, arXiv 2601.16979.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> spectrum = torch.tensor([4.0, 2.0], dtype=torch.float64)
        >>> loss = Objective(lambda: (spectrum * w**2).sum() / 2, {"w": w})
        >>> found = critical_sharpness(loss, {"w": -w.detach() * spectrum}, rtol=1e-6)
        >>> round(found.value, 4)  # (4^3 + 2^3) / (4^2 + 2^2)
        3.6
    """
    check_objective(objective, "params", "losses_at")
    check_vector("direction", direction, objective.params)
    check_number("", "rtol", rtol, "a number above 0 and below 1", lambda x: 0.0 < x < 1.0)
    if start is not None:
        words = "a finite number > 0, or None"
        check_number("", "start", start, words, lambda x: 0.0 < x < math.inf)
    before = objective.forwards
    base = float(objective.loss())

    def change(eta: float) -> float:
        return float(objective.losses_at([direction], [(eta,)])[0]) - base

    def result(eta: float, note: str = "") -> CriticalSharpness:
        return CriticalSharpness(
            2.0 / eta,
            f"critical sharpness 2 / eta_c, rtol {rtol:g}",
            {},
            note,
            eta=eta,
            forwards=objective.forwards - before,
        )

    length = norm(direction)
    if not 0.0 < length < math.inf:
        return result(math.nan, f"the direction has length {length}")
    if not math.isfinite(base):
        return result(math.nan, f"the loss at the weights is {base}")
    size = norm({name: param.detach() for name, param in objective.params.items()}) or 1.0
    eta = _FIRST_SHARE * size / length if start is None else start
    dtypes = {working_dtype(param.dtype) for param in objective.params.values()}
    noise = _ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * abs(base)

    low = high = None
    unseen = 0  # steps in a row that changed the loss by no more than rounding
    for _ in range(_MAX_TRIES):
        found = change(eta)
        if not found <= noise:  # NaN and infinity are above as well
            high, eta, unseen = eta, eta / 2, 0
        elif found < -noise:
            low, eta, unseen = eta, 2 * eta, 0
        else:
            # Too short to see, or right at the crossing: then half of it shows the fall.
            unseen += 1
            eta = 2 * eta if high is None else eta / 2
        if (low is not None and high is not None) or (high is not None and unseen == 2):
            break
    if low is None:
        seen = "it rises" if high is not None else "it does not change"
        return result(math.nan, f"the loss falls nowhere along the direction: {seen}")
    if high is None:
        return result(math.nan, f"the loss does not rise along the direction up to step {low:.3g}")
    while high - low > 2 * rtol * low:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if change(middle) <= 0.0:
            low = middle
        else:
            high = middle
    return result((low + high) / 2)
