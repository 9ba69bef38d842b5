"""The mean rise of the loss under random displacements of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_landscape.geometry.checks import check_flags, check_number, check_objective
from lightning_landscape.geometry.estimate import check_samples, mean_and_stderr
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import Sharpness
from lightning_landscape.geometry.vectors import random_vector, seed_from


@dataclass(frozen=True, kw_only=True)
class AverageSharpness(Sharpness):
    """A mean rise of the loss.

    Attributes:
        stderr: standard error of ``value``, widened by Student's t: ``value +- 2 stderr`` covered
            the truth 94 to 95 % of the time at 5 to 30 samples of a spread-out spectrum; where one
            direction carries the Hessian 82 % at 5, 93 % at 30.
        samples: number of pairs of displacements.
    """

    stderr: float
    samples: int


def average_sharpness(
    objective: Objective,
    sigma: float = 0.01,
    samples: int = 30,
    adaptive: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> AverageSharpness:
    r"""The mean rise of the loss under Gaussian noise on the weights.

    .. math:: E[L(w + d) - L(w)], \quad d \sim N(0, \sigma^2 diag(c^2)), \quad c = 1
       \quad\text{or, adaptive,}\quad c = |w|

    Close to ``sigma^2 tr(H) / 2`` if the loss is smooth at the scale of the noise.  That of a ReLU
    network is not: its kinks, which the Hessian does not contain, add to the rise (a factor of 1.5
    to 3 at ``sigma=0.01`` on the digits).  Every draw is used as ``d`` and ``-d``, which cancels
    the gradient: it adds nothing to the mean, but most of the variance during training.

    Args:
        objective: the loss.
        sigma: standard deviation of the noise, in units of the weights; a share of each weight
            when adaptive.
        samples: pairs ``d``, ``-d`` to average over, at least 2.
        adaptive: scale the noise to each weight.  The value does not change when a layer of a ReLU
            network is scaled up and the next one down.
        generator: seeds the noise; the same noise every time without one, so that a change from
            one call to the next is a change of the loss.

    Returns:
        An :class:`AverageSharpness`, without a displacement.  If a loss is not finite the value is
        NaN, and ``note`` gives the number of such draws (pairs).

    Raises:
        ValueError: an argument is out of range.

    Cost: 2 forwards per sample, and one for ``L(w)`` unless it is cached.

    Source: Andriushchenko et al., A Modern Look at the Relationship between Sharpness and
    Generalization, ICML 2023, eq. 1.

    Example:
        >>> w = torch.nn.Parameter(torch.full((50_000,), 3.0, dtype=torch.float64))
        >>> found = average_sharpness(Objective(lambda: (w**2).sum() / 2, {"w": w}), sigma=0.1)
        >>> abs(found.value - 0.1**2 * 50_000 / 2) < 2 * found.stderr < 1.0  # of 250
        True
    """
    check_objective(objective, "params", "losses_at")
    check_number("", "sigma", sigma, "a finite number > 0", lambda x: 0.0 < x < math.inf)
    check_samples(samples)
    check_flags("", adaptive=adaptive)
    seed = seed_from(generator)
    base = float(objective.loss())
    rises = []
    for index in range(samples):
        noise = random_vector(objective.params, seed + index)
        if adaptive:
            for name, param in objective.params.items():
                noise[name] *= param.detach().abs().to(noise[name])
        ahead, behind = objective.losses_at([noise], [(sigma,), (-sigma,)]).tolist()
        rises.append((ahead - base + (behind - base)) / 2)
    value, stderr = mean_and_stderr(torch.tensor(rises, dtype=torch.float64, device="cpu"))
    noise_size = f"sigma {sigma:g}{' |w|' if adaptive else ''}"
    lost = sum(not math.isfinite(rise) for rise in rises)
    if not math.isfinite(base):
        note = f"the loss at the weights is {base}"
    elif lost:
        note = f"{lost} of {len(rises)} draws gave a loss that is not finite"
    else:
        note = ""
    return AverageSharpness(
        math.nan if note else float(value),
        f"average case, Gaussian noise of {noise_size}, {len(rises)} pairs",
        {},
        note,
        stderr=math.nan if note else float(stderr),
        samples=len(rises),
    )
