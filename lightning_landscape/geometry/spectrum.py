"""The density of the Hessian's eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_landscape.geometry.archive import load_arrays
from lightning_landscape.geometry.checks import (
    check_count,
    check_number,
    check_objective,
    check_path,
    check_span,
)
from lightning_landscape.geometry.estimate import check_samples, mean_and_stderr
from lightning_landscape.geometry.matvec import HessianLike, Matvec, flat_products
from lightning_landscape.geometry.subspace import without
from lightning_landscape.geometry.vectors import Layout, random_signs, seed_from

# Margin of the grid beyond the outermost Ritz values, in units of sigma: the tail of a Gaussian
# beyond it is 1e-9.
_MARGIN = 6.0

# The Krylov space is exhausted when the norm of the next vector, relative to the operator, is below
# this power of the machine epsilon.  Dropping it moves the nodes by no more than that norm.
_EXHAUSTED = 2 / 3

# Smallest default sigma, and the smallest sigma tried for the resolution, as fractions of the width
# of the spectrum.
_NARROW = 1e-2
_NARROWEST = 1e-3

# A Gaussian is resolved if the last Lanczos step moves at most this fraction of the density.
_MOVED = 1e-3

# With these points the spacing is below the smallest default sigma, including the margins.
_FEWEST_POINTS = 128

# Nodes and weights of a quadrature.
_Quadrature = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SpectralDensity:
    """The density of the Hessian's eigenvalues, smoothed by a Gaussian.

    Attributes:
        grid: ``(points,)`` float64, evenly spaced eigenvalues.
        density: ``(points,)`` float64; its sum times the grid's spacing is 1.
        stderr: ``(points,)`` float64: the root of the sum of squares of the standard error of
            ``density`` over the samples, widened by Student's t, and of what the last Lanczos step
            changed.  At 10 samples and the default ``sigma``, 2 of it covered the exact density at
            95 % of the points on spread-out spectra, 93 % on the Hessians of networks, and 87 % of
            the time at single outliers.  With a third of ``resolution`` for ``sigma`` it covered
            as much, with a tenth three quarters.
        sigma: the Gaussian's standard deviation.
        ritz_values: ``(samples, steps)`` float64, the quadrature nodes of each sample, ascending.
        ritz_weights: ``(samples, steps)`` float64, the quadrature weights; every row sums to 1,
            with zeros at the end if the Krylov space was exhausted.
        hvps: number of products with ``H``.
        resolution: the smallest ``sigma`` that the steps resolve: the last step moves one
            thousandth of the density.  Searched from one thousandth of the spectrum's width, to
            3 %; 0 if the quadrature is exact, infinite if no sigma up to the width is resolved, NaN
            if a product was not finite or the file is from a version without it.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    sigma: float
    ritz_values: Tensor
    ritz_weights: Tensor
    hvps: int
    resolution: float = math.nan

    @property
    def value(self) -> Tensor:
        """The density, under the name that all estimates use."""
        return self.density

    @property
    def note(self) -> str:
        """One sentence if ``sigma`` is below ``resolution``; else empty."""
        if not self.sigma < self.resolution:
            return ""
        steps, least = self.ritz_values.shape[1], self.resolution
        resolved = f"{least:.3g}" if least < math.inf else "no width up to the spectrum's"
        return (
            f"at sigma={self.sigma:.3g} peaks may be single Ritz values: {steps} Lanczos steps "
            f"resolve {resolved}; pass a larger sigma or more steps"
        )

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
            file = load_arrays(path)
            tensors = ("grid", "density", "stderr", "ritz_values", "ritz_weights")
            return cls(
                **{name: torch.from_numpy(file[name].astype(np.float64)) for name in tensors},
                sigma=float(file["sigma"]),
                hvps=int(file["hvps"]),
                # Files of older versions hold no resolution.
                resolution=float(file.get("resolution", np.array(math.nan))),
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
            the spectrum, or ``resolution`` if that is larger: 3 % with 30 steps on a uniform
            spectrum, 1 to 2.5 % on the Hessians of networks, about 1 % with 80 steps.  A smaller
            one gives peaks at single Ritz values; ``note`` then says what is resolved.  Compare
            with an exact density at the same ``sigma``.
        points: of the grid, at least 128, and enough for a spacing of at most ``sigma``.
        span: ends of the grid; ``None``: 6 sigma beyond the outermost Ritz values.  The density
            sums to 1 over a grid that contains the whole spectrum.
        generator: seeds the signs; without one they are the same in every call.

    Returns:
        A :class:`SpectralDensity`; NaN if a product is not finite.

    Raises:
        ValueError: an argument is out of range.

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
    rules, shorter, hvps = [], [], 0
    with flat_products(objective, layout) as product:
        for index in range(samples):
            start = layout.flatten(random_signs(objective.params, seed + index))
            diagonal, off_diagonal, exact = _lanczos(product, start, steps)
            hvps += len(diagonal)
            rules.append(_gauss_rule(diagonal, off_diagonal))
            shorter.append(rules[-1] if exact else _gauss_rule(diagonal[:-1], off_diagonal[:-1]))
    theta = torch.stack([_padded(values, steps, float(values[-1])) for values, _ in rules])
    omega = torch.stack([_padded(weights, steps, 0.0) for _, weights in rules])
    scale = _scale(theta)
    resolution = _resolution(rules, shorter, scale)
    width = max(_NARROW * scale, min(resolution, scale)) if sigma is None else float(sigma)
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
    density, of_samples = mean_and_stderr(_densities(grid, rules, width))
    of_steps = density - _densities(grid, shorter, width).mean(0)
    stderr = torch.hypot(of_samples, of_steps)
    return SpectralDensity(grid, density, stderr, width, theta, omega, hvps, resolution)


def _lanczos(matvec: Matvec, start: Tensor, steps: int) -> tuple[list[float], list[float], bool]:
    """Diagonal and off-diagonal of the Lanczos matrix, and whether the Krylov space was exhausted.

    With full reorthogonalization, as otherwise converged Ritz values reappear as ghosts.
    """
    basis = start.new_zeros(steps, start.numel())
    basis[0] = start / torch.linalg.vector_norm(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale = 0.0
    for index in range(steps):
        image = matvec(basis[index])
        diagonal.append(float(basis[index] @ image))
        if not bool(image.isfinite().all()):
            return [*diagonal[:-1], math.nan], off_diagonal, True
        scale = max(scale, float(torch.linalg.vector_norm(image)))
        known = basis[: index + 1]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            image = without(image, known)
        length = float(torch.linalg.vector_norm(image))
        if length <= torch.finfo(image.dtype).eps ** _EXHAUSTED * scale:
            return diagonal, off_diagonal, True  # the space is invariant: the rule is exact
        if index + 1 < steps:
            off_diagonal.append(length)
            basis[index + 1] = image / length
    return diagonal, off_diagonal, False


def _gauss_rule(diagonal: list[float], off_diagonal: list[float]) -> _Quadrature:
    """The quadrature of a Lanczos matrix; an empty matrix has no nodes."""
    if not all(map(math.isfinite, diagonal)):
        nan = torch.full((len(diagonal),), math.nan, dtype=torch.float64, device="cpu")
        return nan, nan
    matrix = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values, vectors[:1].square().sum(0)


def _padded(row: Tensor, length: int, value: float) -> Tensor:
    """``row`` padded to ``length`` with ``value``."""
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value)


def _resolution(rules: list[_Quadrature], shorter: list[_Quadrature], scale: float) -> float:
    """The smallest sigma that the last step leaves nearly unchanged; inf if above ``scale``."""
    if not math.isfinite(scale):
        return math.nan
    ends = [float(end) for values, _ in rules for end in (values[0], values[-1])]

    def moved(sigma: float) -> float:
        low, high = min(ends) - _MARGIN * sigma, max(ends) + _MARGIN * sigma
        points = math.ceil((high - low) / sigma) + 1
        grid = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
        change = (_densities(grid, rules, sigma) - _densities(grid, shorter, sigma)).mean(0)
        return float(change.abs().sum() * (grid[1] - grid[0])) / 2

    narrow, wide = _NARROWEST * scale, scale
    if moved(wide) > _MOVED:
        return math.inf
    at_narrowest = moved(narrow)
    if at_narrowest <= _MOVED:
        return narrow if at_narrowest else 0.0
    # The change decreases with sigma, because a wider Gaussian is a narrower one smoothed again.
    for _ in range(8):  # to 3 %
        middle = math.sqrt(narrow * wide)
        narrow, wide = (narrow, middle) if moved(middle) <= _MOVED else (middle, wide)
    return wide


def _densities(grid: Tensor, rules: list[_Quadrature], sigma: float) -> Tensor:
    """``(rules, points)``."""
    return torch.stack([_smoothed(grid, *rule, sigma) for rule in rules])


def _smoothed(grid: Tensor, values: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """``sum_j weights_j N(grid; values_j, sigma^2)``."""
    distance = (grid[:, None] - values) / sigma
    return (weights * torch.exp(-distance.square() / 2)).sum(1) / (sigma * math.sqrt(2 * math.pi))


def _scale(theta: Tensor) -> float:
    """The spectrum's width, or its magnitude if all eigenvalues are equal."""
    width, size = float(theta.max() - theta.min()), float(theta.abs().max())
    return width if width > 1e-4 * size else size or 1.0


def _check(
    samples: int, steps: int, sigma: float | None, points: int, span: tuple[float, float] | None
) -> None:
    check_samples(samples)
    check_count("", "steps", steps)
    if sigma is not None:
        expected = "a finite number > 0, or None"
        check_number("", "sigma", sigma, expected, lambda x: 0.0 < x < math.inf)
    check_count("", "points", points, _FEWEST_POINTS)
    if span is not None:
        check_span("", "span", span, ", or None")
