"""Critical sharpness: the step size along the optimizer's update that raises the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_landscape.geometry.checks import check_number, check_objective
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import Sharpness
from lightning_landscape.geometry.vectors import Vector, check_vector, norm, working_dtype

# Default first step, as a fraction of ||w||.
_FIRST_SHARE = 1e-2
# Maximum number of doublings or halvings: twelve orders of magnitude.
_MAX_TRIES = 40
# Halvings of the last step with a lower loss that are checked for an earlier rise.
_SCANNED = 3
# Changes of the loss below this many machine epsilons count as rounding.
_ROUNDING = 8


@dataclass(frozen=True, kw_only=True)
class CriticalSharpness(Sharpness):
    """2 over the critical step size.

    Attributes:
        eta: the critical step size ``eta_c``, in units of the direction; NaN as ``value``.
        forwards: number of evaluations of the loss.
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
    r"""``2 / eta_c`` with the smallest step size that raises the loss above its value at ``w``.

    .. math:: \eta_c = \min \{\eta > 0 : L(w + \eta u) > L(w)\}

    On a quadratic, for ``u = -g``, it is ``g'Hg / ||g||^2``, at most the top eigenvalue: it shows
    that a run has reached the stability edge ``2 / lr``, not how far it is from it.  Pass the
    update of a step, divided by the learning rate, at the weights *before* that step.

    The step is doubled or halved from ``start`` until it lowers the loss and its double raises it.
    Then an eighth, a quarter and a half of it are tried; if one of them raises the loss, the search
    continues below it.  Bisection follows.  So ``eta_c`` is the first crossing among steps a factor
    2 apart, from an eighth of it on; a narrower rise is not detected.

    Args:
        objective: the loss.
        direction: ``u``, name -> tensor: the optimizer's update over the learning rate, downhill.
        rtol: relative error of ``eta_c`` and so of the value, above 0 and below 1.
        start: the first step size tried: the learning rate, or the last ``eta_c``.  ``None``: a
            step of 1 % of the weights' norm.

    Returns:
        A :class:`CriticalSharpness`, without a displacement.  NaN, with the reason in ``note``, if
        the loss does not fall along ``u``, never rises, or is not finite at ``w``.  ``note`` also
        names a step beyond ``eta_c`` at which the loss was below ``L(w)`` again.

    Raises:
        ValueError: an argument is out of range, or the direction does not match.

    Cost: 8 to 10 forwards at the default ``rtol`` from a start within a factor 2, about one more
    per further factor 2 or crossing.

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
        expected = "a finite number > 0, or None"
        check_number("", "start", start, expected, lambda x: 0.0 < x < math.inf)
    before = objective.forwards
    base = float(objective.loss())
    changes: dict[float, float] = {}  # step -> change of the loss

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
    dtypes = {working_dtype(param.dtype) for param in objective.params.values()}
    noise = _ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * abs(base)

    step: float | None = _FIRST_SHARE * size / length if start is None else start
    while step is not None and len(changes) < _MAX_TRIES:
        changes[step] = float(objective.losses_at([direction], [(step,)])[0]) - base
        step = _next_step(changes, noise)
    low, high = _first_crossing(changes, noise)
    if low is None:
        seen = "it does not change" if high is None else "it rises"
        return result(math.nan, f"the loss falls nowhere along the direction: {seen}")
    if high is None:
        return result(math.nan, f"the loss does not rise along the direction up to step {low:.3g}")
    while high - low > 2 * rtol * low:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        changes[middle] = float(objective.losses_at([direction], [(middle,)])[0]) - base
        if changes[middle] <= 0.0:
            low = middle
        else:
            high = middle
    again = [step for step, change in changes.items() if change < -noise and step > high]
    note = (
        f"the loss crosses L(w) several times along the direction (it is below again at step "
        f"{min(again):.3g}); the value is of the first crossing seen"
        if again
        else ""
    )
    return result((low + high) / 2, note)


def _first_crossing(
    changes: Mapping[float, float], noise: float
) -> tuple[float | None, float | None]:
    """``(low, high)``: the smallest step that rises, and the largest one below it that falls.

    NaN and infinity count as a rise.  None where there is no such step; if no step rises, ``low``
    is the largest one that falls.
    """
    high = min((step for step, change in changes.items() if not change <= noise), default=None)
    falls = (step for step, change in changes.items() if change < -noise)
    low = max((step for step in falls if high is None or step < high), default=None)
    return low, high


def _next_step(changes: Mapping[float, float], noise: float) -> float | None:
    """The next step to try; None if the first crossing is bracketed, or there is none."""
    low, high = _first_crossing(changes, noise)
    if high is None:
        return 2 * max(changes)  # also if the change is below rounding
    if low is None:
        # At the crossing itself the change is below rounding too: then half of it shows the fall.
        shortest = sorted(changes)[:2]
        lost = len(shortest) == 2 and all(abs(changes[step]) <= noise for step in shortest)
        return None if lost else shortest[0] / 2
    scan = (low / 2**halvings for halvings in range(_SCANNED, 0, -1))
    return next((step for step in scan if step not in changes), None)
