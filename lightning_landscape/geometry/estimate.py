"""Means of random samples, with standard errors that are valid for few samples too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lightning_landscape.geometry.checks import check_count

# Two standard errors of a normal distribution hold this share of it.
_TWO_SIGMA = math.erf(math.sqrt(2.0))


@dataclass(frozen=True)
class Estimate:
    """A mean of random samples.

    Attributes:
        value: the estimate.
        stderr: its standard error, widened by Student's t: ``value +- 2 stderr`` covers the truth
            about 95 % of the time for any number of samples, if they are roughly normal.
        samples: number of samples.
        hvps: number of products with the Hessian, including those shared with other estimates.
    """

    value: float
    stderr: float
    samples: int
    hvps: int


def mean_and_stderr(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over dimension 0 and its standard error, widened by :func:`student_factor`."""
    count = len(samples)
    deviation = samples.std(dim=0, unbiased=True)
    return samples.mean(dim=0), student_factor(count) * deviation / math.sqrt(count)


@lru_cache
def student_factor(samples: int) -> float:
    r"""The factor by which a standard error is widened so that 2 stderr cover 95.45 %.

    Half the quantile of Student's t: 6.98 for 2 samples, 1.43 for 5, 1.16 for 10, 1.05 for 30.

    Source: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    freedom = samples - 1
    low, high = 0.0, math.pi / 2  # angles whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        if _student_share(middle, freedom) < _TWO_SIGMA:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low) / 2


def _student_share(angle: float, freedom: int) -> float:
    """The probability of Student's t within ``+- sqrt(freedom) tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def check_samples(samples: int) -> None:
    """Raise unless ``samples`` is at least 2, as a standard error needs."""
    check_count("", "samples", samples, 2, ", as one sample has no standard error")
