"""Losses whose curvature is known in closed form, in float64.

Nothing here imports the package, so that the oracles are independent of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

F64 = torch.float64

# -- quadratics -----------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=generator(seed), dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


def orthogonal(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, its columns the basis."""
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def symmetric(spectrum: Iterable[float], seed: int = 0) -> Tensor:
    """``Q diag(spectrum) Q'`` with a random orthogonal Q."""
    values = torch.tensor(list(spectrum), dtype=F64)
    basis = orthogonal(len(values), seed)
    return basis * values @ basis.T


class Quadratic:
    """``L(w) = w'Aw/2 + b'w + c``, so that the gradient is ``Aw + b`` and the Hessian ``A``.

    w lies in the parameters one after the other, by default in a single one called "w".
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        constant: float = 0.0,
        dtype: torch.dtype = F64,
        seed: int = 0,
    ) -> None:
        size = len(matrix)
        shapes = shapes or {"w": (size,)}
        self.A = matrix.to(dtype)
        self.b = normal(size, seed=seed + 1).to(dtype)
        self.c = constant
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        pieces = normal(size, seed=seed + 2).to(dtype).split(sizes)
        self.params = {
            name: Parameter(piece.reshape(tuple(shape)).clone())
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def loss(self) -> Tensor:
        w = flat(self.params)
        return w @ self.A @ w / 2 + self.b @ w + self.c

    def value(self, w: Tensor) -> float:
        return float(w @ self.A @ w / 2 + self.b @ w + self.c)

    def w(self) -> Tensor:
        return flat(self.params).detach()

    def g(self) -> Tensor:
        return self.A @ self.w() + self.b

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        return named(vector, self.params)


def seven_weights(**options: Any) -> Quadratic:
    """A quadratic in two parameters, with curvature of both signs and none."""
    spectrum = [7.0, 3.0, 1.0, 0.5, 0.0, -1.0, -4.0]
    return Quadratic(symmetric(spectrum), shapes={"a": (2, 2), "b": (3,)}, **options)


# -- vectors --------------------------------------------------------------------------------------


def flat(vector: Mapping[str, Tensor]) -> Tensor:
    """The entries of all tensors, one tensor after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in vector.values()])


def named(vector: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flat`: a tensor in each parameter's shape."""
    pieces = vector.split([p.numel() for p in params.values()])
    return {n: v.view(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}


def bits(vector: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The exact bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return {
        n: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in vector.items()
    }


def close(actual: Mapping[str, Tensor] | Tensor, expected: object, rtol: float = 1e-12) -> None:
    """Within ``rtol`` of the largest entry; vectors may be mappings."""
    if isinstance(actual, Mapping):
        actual = flat(actual)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


# -- perturbations --------------------------------------------------------------------------------


def one_step_sam(A: Tensor, g: Tensor, rho: float) -> float:
    """On a quadratic: ``rho ||g|| + rho^2/2 g'Ag/||g||^2`` (Foret et al. 2021, eq. 2)."""
    return float(rho * g.norm() + rho**2 / 2 * (g @ A @ g) / (g @ g))


def one_step_asam(A: Tensor, g: Tensor, scale: Tensor, rho: float) -> float:
    """On a quadratic: ``g'e + e'Ae/2``, ``e = rho T^2 g/||Tg||`` (Kwon et al. 2021, eq. 9)."""
    e = rho * scale**2 * g / (scale * g).norm()
    return float(g @ e + e @ A @ e / 2)


# -- models with a known spectrum -----------------------------------------------------------------


def second_moment(x: Tensor) -> np.ndarray:
    """The eigenvalues of ``X'X/N``, largest first."""
    return np.linalg.eigvalsh((x.T @ x / len(x)).numpy())[::-1].copy()


def linear_regression_spectrum(x: Tensor, outputs: int) -> np.ndarray:
    """``nn.MSELoss`` on a linear layer: ``H = (2/k) X'X/N (x) I``, each eigenvalue k-fold."""
    return np.repeat(2 / outputs * second_moment(x), outputs)


def softmax_at_zero_spectrum(x: Tensor, classes: int) -> np.ndarray:
    """Cross entropy of ``Wx`` at W = 0: ``H = (I/K - 11'/K^2) (x) X'X/N``.

    The first factor has the eigenvalue 1/K, (K-1)-fold, and 0.
    """
    large = np.repeat(second_moment(x) / classes, classes - 1)
    return np.concatenate([large, np.zeros(x.shape[1])])


def logistic_at_zero_spectrum(x: Tensor) -> np.ndarray:
    """Binary cross entropy of ``w'x`` at w = 0: ``H = X'X/(4N)``."""
    return second_moment(x) / 4


def scalar_chain_top(weights: Sequence[float], x: Tensor) -> float:
    """Half squared loss of ``x prod w_i`` where it fits: ``lambda = tr H = E[x^2] c^2 sum 1/w^2``.

    c is the product; H is the outer product of the one slope ``c/w_i``.
    """
    w = np.array(weights)
    return float(x.square().mean()) * np.prod(w) ** 2 * np.sum(w**-2.0)


def flattest_deep_linear_top(target: Tensor, depth: int) -> float:
    """The smallest top eigenvalue of a minimum of ``||W_L ... W_1 - T||^2/2``.

    It is ``L s_max(T)^(2-2/L)`` (Mulayoff & Michaeli 2020), reached by balanced factors.
    """
    return float(depth * torch.linalg.matrix_norm(target, 2) ** (2 - 2 / depth))


def balanced_factors(target: Tensor, depth: int) -> list[Tensor]:
    """``T = U S V'`` in ``depth`` factors that share the singular values, the first acts first."""
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    root = torch.diag(s ** (1 / depth))
    return [root @ vh, *[root] * (depth - 2), u @ root]


# -- any small network ----------------------------------------------------------------------------


def dense_hessian(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The whole Hessian of ``loss(module)`` over ``module.named_parameters()``.

    Forward over reverse mode (``torch.func.hessian``), where the package uses reverse over reverse.
    """
    held = {name: p.detach().clone() for name, p in module.named_parameters()}
    sizes = [p.numel() for p in held.values()]

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return loss(self.module)

    wrapper = Loss()

    def of(w: Tensor) -> Tensor:
        named = {
            f"module.{name}": piece.view(p.shape)
            for (name, p), piece in zip(held.items(), w.split(sizes), strict=True)
        }
        return torch.func.functional_call(wrapper, named, ())

    hessian = torch.func.hessian(of)(flat(held))
    return (hessian + hessian.T) / 2


def arguments(mock: Mock) -> list[Any]:
    """The first argument of each call.  Isolation leaves mocks alone, and restores all else."""
    return [call.args[0] for call in mock.call_args_list]
