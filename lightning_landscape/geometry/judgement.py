"""One sentence on the distance of a run to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Ratios to the edge that count as near 1, and how many of the last values must agree.
_NEAR, _ABOVE, LAST_VALUES = 0.8, 1.3, 3


def edge_judgement(name: str, ratios: Sequence[tuple[int, float]]) -> str:
    """One sentence on the ratios to the edge, ``(step, ratio)`` in the order of the steps.

    Pass converged ratios only.  Empty for fewer than three finite ones, unless the last is NaN or
    infinite.

    Example:
        >>> edge_judgement("the ratio", [(10, 0.2), (20, 0.9), (30, 1.1), (40, 1.0)])
        'the ratio stayed near 1 from step 20: this learning rate is at its stability limit'
    """
    found = [(step, ratio) for step, ratio in ratios if math.isfinite(ratio)]
    if ratios and not math.isfinite(ratios[-1][1]):
        return (
            f"{name} was not finite at step {ratios[-1][0]}, the last measurement: the loss or its "
            f"derivatives are not finite there"
        )
    if len(found) < LAST_VALUES:
        return ""
    last = [ratio for _, ratio in found[-LAST_VALUES:]]
    if min(last) > _ABOVE:
        step = _since(found, lambda ratio: ratio > _ABOVE)
        return (
            f"{name} was above {_ABOVE:g} from step {step}: steps overshoot along the top "
            f"eigenvector; if the loss rises too, lower the learning rate or warm up longer"
        )
    if min(last) >= _NEAR and max(last) <= _ABOVE:
        step = _since(found, lambda ratio: _NEAR <= ratio <= _ABOVE)
        return (
            f"{name} stayed near 1 from step {step}: this learning rate is at its stability limit"
        )
    if max(last) >= _NEAR:
        return (
            f"{name} varied from {min(last):.2g} to {max(last):.2g} in the last {len(last)} "
            f"values: around the edge of stability"
        )
    step, highest = max(found, key=lambda pair: pair[1])
    return (
        f"{name} ended at {last[-1]:.2g}, at most {highest:.2g} at step {step}: below the edge "
        f"of the full batch; with small batches and momentum that does not say how much higher "
        f"the learning rate can be"
    )


def _since(found: Sequence[tuple[int, float]], holds: Callable[[float], bool]) -> int:
    """The first step from which ``holds`` is true of all values."""
    since = found[-1][0]
    for step, value in reversed(found):
        if not holds(value):
            break
        since = step
    return since
