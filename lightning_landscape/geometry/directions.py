"""Directions in weight space for slices of the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from lightning_landscape.geometry.checks import check_mapping, quoted
from lightning_landscape.geometry.vectors import (
    Vector,
    check_vector,
    inner,
    norm,
    random_vector,
    seed_from,
)

# A dimension; (dimension, groups) if each group of dimension 0 has its own filters; None: none.
FilterDim = int | tuple[int, int] | None

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def random_direction(
    params: Vector, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A standard normal direction, the same for the same generator state.

    It does not depend on the order of ``params`` or their device, and leaves the global random
    state unchanged.  Apply :func:`filter_normalize` before taking a slice along it.
    """
    check_vector("params", params)
    return random_vector(params, seed_from(generator))


def filter_normalize(
    direction: Vector, params: Vector, *, filter_dims: Mapping[str, FilterDim] | None = None
) -> dict[str, Tensor]:
    r"""Give each filter of ``direction`` the norm of the same filter of the weights.

    .. math:: d_{ij} \leftarrow \frac{d_{ij}}{\|d_{ij}\|} \|w_{ij}\|

    A filter is an index of dimension 0: an output channel of a convolution, a neuron (row) of a
    linear layer, an output of ``Bilinear``, a token of an embedding, one gate of one unit of an
    LSTM or GRU, a row of attention's ``in_proj_weight`` or of a LoRA matrix.  Parameters with fewer
    than two dimensions (biases, normalisation layers) get 0.  Slices along such a direction do not
    change when a layer of a ReLU network is scaled up and the next one down; 1.0 on their axis is
    one weight norm.

    Norms are those of the stored parameters: with parametrizations those of the originals, with
    pruning including the masked entries.

    Args:
        direction: name -> tensor.  Missing names stay missing.
        params: the weights, name -> tensor.
        filter_dims: name -> dimension of the filters if not 0, see :func:`filter_dims_of`.  A
            dimension; ``(dimension, groups)``, where dimension 0 consists of that many equal
            groups, each with its own filters; or ``None`` for a parameter without filters, which
            gets 0.

    Raises:
        ValueError: the direction does not match the parameters, or a dimension or a number of
            groups does not match the tensor.

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
        expected = "a mapping from parameter name to dimension, as filter_dims_of returns, or None"
        check_mapping("", "filter_dims", filter_dims, expected)
    normalized = {}
    for name, tensor in direction.items():
        filter_dim = (filter_dims or {}).get(name, 0)
        if tensor.ndim < 2 or filter_dim is None:
            normalized[name] = torch.zeros_like(tensor)
            continue
        dim, groups = _dim_and_groups(name, filter_dim, tensor)
        split = _grouped(tensor, groups)
        length = _filter_norms(split, dim)
        wanted = _filter_norms(_grouped(params[name].detach().to(tensor), groups), dim)
        # A zero filter of the direction stays zero: 0/0 would make the slice NaN.
        scaled = split * torch.where(length > 0, wanted / length, 0.0)
        normalized[name] = scaled.flatten(0, 1)
    return normalized


def filter_dims_of(module: nn.Module) -> dict[str, FilterDim]:
    """The dimension of the filters where it is not 0, by names of ``module.named_parameters()``.

    The weights of ``Conv2d`` and ``ConvTranspose2d`` can only be distinguished by the module.

    - ``ConvTranspose``, whose weight is ``(in, out / groups, ...)``: 1, or ``(1, groups)``.  Output
      channel ``j`` of group ``g`` is ``weight[g * in / groups : (g + 1) * in / groups, j]``.
    - Weight norm's magnitude ``g``: ``None``.  It has as many dimensions as the weight, but one
      number per slice, like the scale of a normalisation layer.

    Parametrizations (``weight_norm``, ``spectral_norm``, ``orthogonal``, your own), the older hooks
    and pruning store a weight under other names: such a parameter counts as the weight if it has
    the weight's shape.  One of another shape has its filters along dimension 0, as do the
    parameters of a parametrization itself.  A tied parameter is treated as in the layer under whose
    name ``named_parameters`` lists it.  Parametrizations are not evaluated.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{quoted('', 'module', module)}: expected a torch.nn.Module")
    found: dict[str, FilterDim] = {}
    magnitudes: dict[str, FilterDim] = {}
    for prefix, child in module.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(child, _TRANSPOSED):
            shape = (child.in_channels, child.out_channels // child.groups, *child.kernel_size)
            for name, parameter in _stored(child, "weight", start):
                # The weight itself may be lazy or resized: its outputs are in dimension 1 anyway.
                if name == f"{start}weight" or (
                    not is_lazy(parameter) and parameter.shape == shape
                ):
                    found[name] = 1 if child.groups == 1 else (1, child.groups)
        for tensor in _magnitudes(child):
            magnitudes.update((name, None) for name, _ in _stored(child, tensor, start))
    # A magnitude may have the weight's shape.
    found.update(magnitudes)
    listed = dict(module.named_parameters())
    return {name: dim for name, dim in found.items() if name in listed}


def _stored(owner: nn.Module, tensor: str, start: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters that ``owner.tensor`` is made of, with names that begin with ``start``."""
    # Suffixes of weight norm's and spectral norm's hooks and of pruning, possibly combined.
    known = re.compile(rf"{re.escape(tensor)}(_orig|_v)*")
    for name, parameter in owner.named_parameters(recurse=False):
        if known.fullmatch(name):
            yield f"{start}{name}", parameter
    for name, held in _parametrizations(owner):
        if known.fullmatch(name):
            for original in _originals(held):
                yield from _stored(held, original, f"{start}parametrizations.{name}.")


def _magnitudes(owner: nn.Module) -> list[str]:
    """The names of the tensors in ``owner`` that are a weight norm's magnitude ``g``."""
    # By class, not by shape: a rank-one LoRA matrix is (out, 1) too.
    hooks = owner._forward_pre_hooks.values()
    of_hooks = [f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)]
    normed = isinstance(owner, ParametrizationList) and isinstance(owner[0], _WeightNorm)
    return [*of_hooks, "original0"] if normed else of_hooks


def _parametrizations(owner: nn.Module) -> list[tuple[str, ParametrizationList]]:
    held = owner._modules.get("parametrizations")
    children = held.items() if isinstance(held, nn.ModuleDict) else ()
    return [(name, child) for name, child in children if isinstance(child, ParametrizationList)]


def _originals(held: ParametrizationList) -> list[str]:
    if held.is_tensor:
        return ["original"]
    return [f"original{index}" for index in range(held.ntensors)]


def _dim_and_groups(name: str, filter_dim: object, tensor: Tensor) -> tuple[int, int]:
    """``filter_dim`` as a pair.

    Raises:
        ValueError: it does not match the tensor.
    """
    pair = filter_dim if isinstance(filter_dim, tuple) else (filter_dim, 1)
    size = tensor.shape[0]
    whole = [isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in pair]
    if whole == [True, True]:
        dim, groups = (int(n) for n in pair)
        if 0 <= dim < tensor.ndim and groups >= 1 and size % groups == 0:
            return dim, groups
    raise ValueError(
        f"filter_dims[{name!r}]={filter_dim!r}: expected a dimension from 0 to {tensor.ndim - 1}, "
        f"(dimension, groups) where the groups divide dimension 0, of size {size}, or None"
    )


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _filter_norms(split: Tensor, dim: int) -> Tensor:
    """Norm of each index of dimension ``dim`` per group; dimension 0 of ``split`` is the group."""
    rest = [d for d in range(1, split.ndim) if d != dim + 1]
    norms: Tensor = torch.linalg.vector_norm(split, dim=rest, keepdim=True)
    return norms


def unit(direction: Vector) -> dict[str, Tensor]:
    """``direction`` scaled to Euclidean length 1.

    Raises:
        ValueError: the direction is zero or not finite.
    """
    length = norm(direction)
    if not 0.0 < length < float("inf"):
        raise ValueError(f"direction has length {length}: expected a finite one above 0")
    return {name: tensor / length for name, tensor in direction.items()}


def orthogonal_to(direction: Vector, other: Vector) -> dict[str, Tensor]:
    """``direction`` minus its component along ``other``, rescaled to its own length.

    Raises:
        ValueError: the two are parallel, or one is zero.
    """
    length, squared = norm(direction), inner(other, other)
    rest = {**{name: torch.zeros_like(tensor) for name, tensor in other.items()}, **direction}
    for _ in range(2):  # twice, because of rounding if they are nearly parallel
        share = inner(rest, other) / squared if squared else 0.0
        rest = {n: t - share * other[n] if n in other else t for n, t in rest.items()}
    remaining = norm(rest)
    if squared == 0.0 or remaining <= 1e-6 * length:
        raise ValueError("the two directions are parallel: expected two that span a plane")
    return {name: tensor * (length / remaining) for name, tensor in rest.items()}


def aligned(direction: Vector, previous: Vector) -> dict[str, Tensor]:
    """``direction`` or its negative, whichever has a positive inner product with ``previous``.

    The sign of an eigenvector is arbitrary; without this a film of slices would flip at random.
    """
    sign = -1.0 if inner(direction, previous) < 0 else 1.0
    return {name: sign * tensor for name, tensor in direction.items()}
