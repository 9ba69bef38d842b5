"""The density of the Hessian's eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_landscape.geometry.checks import (
    check_count,
    check_number,
    check_objective,
    check_path,
    check_span,
)
from lightning_landscape.geometry.estimate import check_samples, mean_and_stderr
from lightning_landscape.geometry.hessian import HessianLike, Matvec, flat_products
from lightning_landscape.geometry.subspace import without
from lightning_landscape.geometry.vectors import Layout, random_signs, seed_from

# How far the grid reaches beyond the outermost Ritz values, in units of sigma: what lies further
# out is 1e-9 of a Gaussian.
_MARGIN = 6.0

# The Krylov space is exhausted where what is new is this power of the precision: rounding grows on
# the way there, and the nodes move by no more than what is dropped.
_EXHAUSTED = 2 / 3

# With these the spacing is below the default sigma, 1 % of the width without the margins.
_FEWEST_POINTS = 128


@dataclass(frozen=True)
class SpectralDensity:
    """The share of the Hessian's eigenvalues per unit of their value, smoothed by a Gaussian.

    Attributes:
        grid: ``(points,)`` float64, evenly spaced eigenvalues.
        density: ``(points,)`` float64; its sum times the grid's spacing is 1.
        stderr: ``(points,)`` float64, the standard error of ``density`` over the samples, widened
            by Student's t; 2 of it covered the truth 95 % of the time in the bulk and 87 % at
            outliers, at 10 samples.  It does not hold the bias of too few ``steps``.
        sigma: the Gaussian's standard deviation.
        ritz_values: ``(samples, steps)`` float64, ascending: where each sample saw the spectrum.
        ritz_weights: ``(samples, steps)`` float64, the share of the spectrum at each Ritz value;
            every row sums to 1, with zeros at the end where the Krylov space was exhausted.
        hvps: products with ``H`` that were made.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    sigma: float
    ritz_values: Tensor
    ritz_weights: Tensor
    hvps: int

    @property
    def value(self) -> Tensor:
        """The density, under the name that every estimate has."""
        return self.density

    def save(self, path: str | Path) -> None:
        """Write all attributes to a ``.npz`` file that plain ``numpy.load`` reads."""
        check_path("", "path", path, "the path of a file, e.g. 'density.npz'")
        values = {k: np.asarray(v) for k, v in vars(self).items()}
        with open(path, "wb") as file:  # given a name, numpy would add ".npz" to it
            np.savez_compressed(file, allow_pickle=False, **values)

    @classmethod
    def load(cls, path: str | Path) -> SpectralDensity:
        """Read what :meth:`save` wrote.  Nothing is unpickled.

        Raises:
            ValueError: the file is not a density.
        """
        check_path("", "path", path, "the path of a file that SpectralDensity.save wrote")
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in cls.__dataclass_fields__}
                tensors = ("grid", "density", "stderr", "ritz_values", "ritz_weights")
                return cls(
                    **{name: torch.from_numpy(values[name].astype(np.float64)) for name in tensors},
                    sigma=float(values["sigma"]),
                    hvps=int(values["hvps"]),
                )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"path={str(path)!r}: no such file; expected one that SpectralDensity.save wrote"
            ) from error
        except Exception as error:  # a damaged archive raises any of a dozen types
            raise ValueError(
                f"path={str(path)!r}: not a saved SpectralDensity ({error}); expected what "
                f"SpectralDensity.save wrote"
            ) from error


def spectral_density(
    objective: HessianLike,
    samples: int = 10,
    steps: int = 30,
    sigma: float | None = None,
    points: int = 1024,
    *,
    span: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    r"""The eigenvalue density of the Hessian, by stochastic Lanczos quadrature.

    .. math:: \phi(t) = \frac{1}{n} \sum_i N(t; \lambda_i, \sigma^2)
       \approx \frac{1}{m} \sum_{l=1}^{m} \sum_j \omega_{lj} N(t; \theta_{lj}, \sigma^2)

    with the Ritz values ``theta_l`` of ``steps`` Lanczos steps from the random signs ``v_l``, and
    the squared first entries ``omega_l`` of their vectors as weights.

    Args:
        objective: the loss, or anything with ``params`` and ``hvp``.
        samples: random starts to average over, at least 2.
        steps: Lanczos steps from each; at most the number of parameters.
        sigma: width of the Gaussian, in units of the eigenvalues; ``None``: 1 % of the width of
            the spectrum, for which 30 steps are enough; a third of that needs 80.  Too few steps
            bias the density: compare with an exact one under the same ``sigma``.
        points: of the grid, at least 128, and so many that its spacing is at most ``sigma``.
        span: ends of the grid; ``None``: 6 sigma beyond the outermost Ritz values.  The density
            sums to 1 over a grid that holds the whole spectrum.
        generator: seeds the signs; the same signs every time without one.

    Returns:
        A :class:`SpectralDensity`; NaN where a product was not finite.

    Raises:
        ValueError: an argument out of its range.

    Cost: ``samples * steps`` HVPs, about 2 gradients each, and the memory of ``steps`` vectors.

    Source: Ghorbani, Krishnan & Xiao, ICML 2019, section 2; Golub & Meurant, Matrices, Moments and
    Quadrature, ch. 7.

    Example:
        >>> from lightning_landscape.geometry.objective import Objective
        >>> w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        >>> spectrum = torch.tensor([0.0, 0.0, 0.0, 8.0], dtype=torch.float64)
        >>> found = spectral_density(Objective(lambda: (spectrum * w**2).sum() / 2, {"w": w}))
        >>> spacing = found.grid[1] - found.grid[0]
        >>> round((found.density[found.grid > 4].sum() * spacing).item(), 6)  # one in four is 8
        0.25
    """
    check_objective(objective, "params", "hvp")
    _check(samples, steps, sigma, points, span)
    layout = Layout(objective.params)
    steps = min(steps, layout.size)
    seed = seed_from(generator)
    rules, hvps = [], 0
    with flat_products(objective, layout) as product:
        for index in range(samples):
            start = layout.flatten(random_signs(objective.params, seed + index))
            values, weights, products = _gauss_rule(product, start, steps)
            rules.append((values, weights))
            hvps += products
    theta = torch.stack([values for values, _ in rules])
    omega = torch.stack([weights for _, weights in rules])
    width = _default_sigma(theta) if sigma is None else float(sigma)
    low, high = (
        (float(theta.min()) - _MARGIN * width, float(theta.max()) + _MARGIN * width)
        if span is None
        else (float(span[0]), float(span[1]))
    )
    spacing = (high - low) / (points - 1)
    if spacing > width:
        raise ValueError(
            f"points={points!r}: the grid's spacing {spacing:.3g} is above sigma={width:.3g}; "
            f"expected at least {math.ceil((high - low) / width) + 1} points, or a larger sigma"
        )
    grid = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
    per_sample = torch.stack([_smoothed(grid, *rule, width) for rule in rules])
    density, stderr = mean_and_stderr(per_sample)
    return SpectralDensity(grid, density, stderr, width, theta, omega, hvps)


def _gauss_rule(matvec: Matvec, start: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights ``(steps,)`` of the quadrature that Lanczos builds, and its products.

    Full reorthogonalisation: without it converged Ritz values come back as ghosts.
    """
    basis = start.new_zeros(steps, start.numel())
    basis[0] = start / torch.linalg.vector_norm(start)
    diagonal, off_diagonal = [], []
    scale = 0.0
    for index in range(steps):
        image = matvec(basis[index])
        diagonal.append(float(basis[index] @ image))
        if not bool(image.isfinite().all()):
            nan = torch.full((steps,), math.nan, dtype=torch.float64, device="cpu")
            return nan, nan, index + 1
        scale = max(scale, float(torch.linalg.vector_norm(image)))
        if index + 1 == steps:
            break
        known = basis[: index + 1]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            image = without(image, known)
        length = float(torch.linalg.vector_norm(image))
        if length <= torch.finfo(image.dtype).eps ** _EXHAUSTED * scale:
            break  # the space is invariant: the rule is exact
        off_diagonal.append(length)
        basis[index + 1] = image / length
    projected = np.diag(diagonal)
    beside = np.diag(off_diagonal, 1)
    values, vectors = torch.linalg.eigh(torch.from_numpy(projected + beside + beside.T))
    missing = (0, steps - len(values))
    weights = torch.nn.functional.pad(vectors[0].square(), missing)
    padded = torch.cat([values, values[-1].expand(missing[1])])
    return padded, weights, len(diagonal)


def _smoothed(grid: Tensor, values: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """``sum_j weights_j N(grid; values_j, sigma^2)``."""
    distance = (grid[:, None] - values) / sigma
    return (weights * torch.exp(-distance.square() / 2)).sum(1) / (sigma * math.sqrt(2 * math.pi))


def _default_sigma(theta: Tensor) -> float:
    """1 % of the spectrum's width, of its size where all eigenvalues are equal."""
    width, size = float(theta.max() - theta.min()), float(theta.abs().max())
    return 0.01 * (width if width > 1e-4 * size else size or 1.0)


def _check(
    samples: int, steps: int, sigma: float | None, points: int, span: tuple[float, float] | None
) -> None:
    check_samples(samples)
    check_count("", "steps", steps)
    if sigma is not None:
        words = "a finite number > 0, or None"
        check_number("", "sigma", sigma, words, lambda x: 0.0 < x < math.inf)
    check_count("", "points", points, _FEWEST_POINTS)
    if span is not None:
        check_span("", "span", span, ", or None")
