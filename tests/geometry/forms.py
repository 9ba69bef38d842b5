"""Hessians as matrices, and closed forms: maxima over balls and boxes, densities, traces."""

import itertools
import math

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq

from tests.oracles import F64, flat, generator, named, normal, orthogonal

TWO_SIGMA = stats.norm.cdf(2)  # t(n - 1) reaches this at twice the widened standard error


class Matrix:
    """A Hessian given as a matrix, with the interface that solvers need; counts its products."""

    def __init__(self, matrix, shapes=None):
        shapes = shapes or {"w": (len(matrix),)}
        self.matrix = matrix
        self.params = {
            name: torch.zeros(shape, dtype=matrix.dtype) for name, shape in shapes.items()
        }
        self.hvps = 0

    def hvp(self, vector):
        self.hvps += 1
        missing = {name: torch.zeros_like(p) for name, p in self.params.items()}
        product = self.matrix @ flat({**missing, **vector})
        return named(product, self.params)


def student(samples):
    """How much wider than normal an interval of two standard errors is at so few samples."""
    return stats.t.ppf(TWO_SIGMA, samples - 1) / 2


def ball_maximum(A, g, radius):
    """The maximum of ``g'd + d'Ad/2`` over ``||d|| <= radius``, from the secular equation.

    At the maximum ``(m - A) d = g`` with ``m >= lambda_max``, ``m >= 0``, and ``||d|| = radius``
    unless m = 0 (More & Sorensen 1983).  The gradient must have a component along the top vector.
    """
    values, vectors = (t.numpy() for t in torch.linalg.eigh(A))
    shares = vectors.T @ g.numpy()

    def move(m):
        return shares / (m - values)

    def excess(m):
        return np.linalg.norm(move(m)) - radius

    top = values[-1]
    low = max(top, 0.0) + 1e-14 * max(abs(top), 1.0)
    if top < 0 and excess(0.0) <= 0:
        d = move(0.0)
    else:
        high = max(top, 0.0) + np.linalg.norm(shares) / radius + 1.0
        d = move(brentq(excess, low, high, xtol=1e-15, rtol=1e-14))
    return float(shares @ d + d @ (values * d) / 2)


def corners(size):
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=F64)


def box_maximum(A, g, sides):
    """The maximum of ``g'd + d'Ad/2`` over ``|d_i| <= sides_i``, for A without negative directions.

    A convex function is maximal at a corner: all corners are evaluated.
    """
    d = corners(len(g)) * sides
    return float((d @ g + ((d @ A) * d).sum(1) / 2).max())


def smoothed_density(eigenvalues, grid, sigma):
    """The eigenvalue density under a Gaussian of width sigma."""
    values = torch.as_tensor(np.array(eigenvalues), dtype=F64)
    return torch.exp(-(((grid[:, None] - values) / sigma) ** 2) / 2).mean(1) / (
        sigma * math.sqrt(2 * math.pi)
    )


class ReluNetwork:
    """Two linear layers without biases, ReLU between, mean square error."""

    def __init__(self, inputs=4, hidden=6, outputs=3, examples=40, seed=0):
        self.x = normal(examples, inputs, seed=seed)
        self.y = normal(examples, outputs, seed=seed + 1)
        self.params = {
            "first.weight": torch.nn.Parameter(normal(hidden, inputs, seed=seed + 2) / 2),
            "second.weight": torch.nn.Parameter(normal(outputs, hidden, seed=seed + 3) / 2),
        }

    def loss(self):
        first, second = self.params.values()
        return (torch.relu(self.x @ first.T) @ second.T - self.y).square().mean()

    def rescale(self, factor):
        """Another network with the same loss."""
        with torch.no_grad():
            self.params["first.weight"].mul_(factor)
            self.params["second.weight"].div_(factor)

    def traces(self):
        """The trace of the Gauss-Newton matrix by block: with piecewise linear units the trace of
        the Hessian too, whose other part is zero on the diagonal.

        With ``f_o = sum_j V_oj relu(u_j'x)`` and the loss ``mean (f - y)^2`` over N examples and K
        outputs: ``2/(NK) sum ||df_o/du_j||^2 = 2/(NK) sum V_oj^2 [u_j'x > 0] ||x||^2``, and for V
        ``2/(NK) K sum relu(u_j'x)^2``.
        """
        first, second = (p.detach() for p in self.params.values())
        before = self.x @ first.T
        share = 2 / self.y.numel()
        lengths = (before > 0).to(F64) * second.square().sum(0) * self.x.square().sum(1)[:, None]
        active = torch.relu(before).square()
        return {
            "first": float(share * lengths.sum()),
            "second": float(share * self.y.shape[1] * active.sum()),
        }


class RaisesAt:
    """A loss that raises at its n-th evaluation."""

    def __init__(self, loss, call):
        self.loss, self.left = loss, call

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("half way")
        return self.loss()


# -- spectra and computed eigenpairs -------------------------------------------------------------


def spread(top, count, seed=0):
    """``top``, then ``count`` values of both signs below it in size."""
    rest = torch.rand(count, generator=generator(seed), dtype=F64, device="cpu") * 2 - 1
    return [*top, *(0.9 * min(abs(value) for value in top) * rest).tolist()]


def film(pace, seed=0, frames=30, size=60):
    """Quadratics whose top two eigenvalues cross in the middle, while all eigenvectors rotate.

    ``pace`` is about the angle in radians by which each rotates per frame.
    """
    generic = normal(size, size, seed=seed)
    turn = pace * (generic - generic.T) / math.sqrt(2 * size)
    basis, rest = orthogonal(size, seed), torch.linspace(0.0, 4.0, size - 2, dtype=F64)
    for t in np.linspace(0.0, 1.0, frames):
        top = torch.tensor([6.0 - t, 5.0 + t], dtype=F64)
        yield basis * torch.cat([top, rest]) @ basis.T, float(top.max())
        basis = torch.linalg.matrix_exp(turn) @ basis


def true_residuals(matrix, result):
    """``||A v - theta v||`` for each pair, and that the vectors are orthonormal."""
    vectors = torch.stack([flat(v) for v in result.eigenvectors])
    torch.testing.assert_close(
        vectors @ vectors.T, torch.eye(len(vectors), dtype=vectors.dtype), rtol=0, atol=1e-8
    )
    defects = vectors @ matrix - result.eigenvalues[:, None] * vectors
    return torch.linalg.vector_norm(defects, dim=1)
