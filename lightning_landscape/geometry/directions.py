"""Directions in weight space along which a loss is worth looking at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_landscape.geometry.checks import check_mapping, quoted
from lightning_landscape.geometry.vectors import (
    Vector,
    check_vector,
    inner,
    norm,
    random_vector,
    seed_from,
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def random_direction(
    params: Vector, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A standard normal direction, the same for the same generator state.

    It depends neither on the order of ``params`` nor on their device, and leaves the global random
    state alone.  Combine with :func:`filter_normalize` before drawing a slice along it.
    """
    check_vector("params", params)
    return random_vector(params, seed_from(generator))


def filter_normalize(
    direction: Vector, params: Vector, *, filter_dims: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    r"""Give each filter of ``direction`` the norm of the same filter of the weights.

    .. math:: d_{ij} \leftarrow \frac{d_{ij}}{\|d_{ij}\|} \|w_{ij}\|

    A filter is an index of dimension 0: an output channel of a convolution, a neuron (row) of a
    linear layer, a token of an embedding.  Parameters with fewer than two dimensions (biases,
    normalisation layers) get 0.  Slices along such a direction do not change when a layer of a
    ReLU network is scaled up and the next one down; 1.0 on their axis is one weight norm.

    Args:
        direction: name -> tensor.  Names that are missing stay missing.
        params: the weights, name -> tensor.
        filter_dims: name -> dimension of the filters where it is not 0, see
            :func:`filter_dims_of`; in ``ConvTranspose`` weights it is 1.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, section 4.

    Example:
        >>> w = {"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "bias": torch.ones(2)}
        >>> d = {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "bias": torch.ones(2)}
        >>> filter_normalize(d, w)
        {'weight': tensor([[5., 0.],
                [0., 1.]]), 'bias': tensor([0., 0.])}
    """
    check_vector("params", params)
    check_vector("direction", direction, params)
    if filter_dims is not None:
        words = "a mapping from parameter name to dimension, as filter_dims_of returns, or None"
        check_mapping("", "filter_dims", filter_dims, words)
    normalized = {}
    for name, tensor in direction.items():
        if tensor.ndim < 2:
            normalized[name] = torch.zeros_like(tensor)
            continue
        filter_dim = (filter_dims or {}).get(name, 0)
        if isinstance(filter_dim, bool) or filter_dim not in range(tensor.ndim):
            raise ValueError(
                f"filter_dims[{name!r}]={filter_dim!r}: expected a dimension from 0 to "
                f"{tensor.ndim - 1}"
            )
        rest = [dim for dim in range(tensor.ndim) if dim != filter_dim]
        length = torch.linalg.vector_norm(tensor, dim=rest, keepdim=True)
        wanted = torch.linalg.vector_norm(params[name].detach().to(tensor), dim=rest, keepdim=True)
        # A filter in which the direction is zero stays zero: 0/0 would paint the slice with NaN.
        normalized[name] = tensor * torch.where(length > 0, wanted / length, 0.0)
    return normalized


def filter_dims_of(module: nn.Module) -> dict[str, int]:
    """The filter dimension by parameter name, for layers where it is not 0.

    The weights of ``Conv2d`` and ``ConvTranspose2d`` look alike; only the module tells them apart.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{quoted('', 'module', module)}: expected a torch.nn.Module")
    return {
        f"{prefix}.weight" if prefix else "weight": 1
        for prefix, child in module.named_modules()
        if isinstance(child, _TRANSPOSED)
    }


def unit(direction: Vector) -> dict[str, Tensor]:
    """``direction`` at Euclidean length 1.

    Raises:
        ValueError: a direction that is zero or not finite.
    """
    length = norm(direction)
    if not 0.0 < length < float("inf"):
        raise ValueError(f"direction has length {length}: expected a finite one above 0")
    return {name: tensor / length for name, tensor in direction.items()}


def orthogonal_to(direction: Vector, other: Vector) -> dict[str, Tensor]:
    """``direction`` less its component along ``other``, at its own length.

    Raises:
        ValueError: the two are parallel, so that nothing is left, or one is zero.
    """
    length, squared = norm(direction), inner(other, other)
    rest = {**{name: torch.zeros_like(tensor) for name, tensor in other.items()}, **direction}
    for _ in range(2):  # rounding leaves some of it the first time when they are nearly parallel
        share = inner(rest, other) / squared if squared else 0.0
        rest = {n: t - share * other[n] if n in other else t for n, t in rest.items()}
    remaining = norm(rest)
    if squared == 0.0 or remaining <= 1e-6 * length:
        raise ValueError("the two directions are parallel: expected two that span a plane")
    return {name: tensor * (length / remaining) for name, tensor in rest.items()}


def aligned(direction: Vector, previous: Vector) -> dict[str, Tensor]:
    """``direction`` or its opposite, whichever points along ``previous``.

    The sign of an eigenvector is arbitrary; without this a film of slices flips at random.
    """
    sign = -1.0 if inner(direction, previous) < 0 else 1.0
    return {name: sign * tensor for name, tensor in direction.items()}
