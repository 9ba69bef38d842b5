"""Weights that a run is compared with: copies in main memory, and their file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_landscape.callbacks.between import WeightsSource, read_weights
from lightning_landscape.geometry.checks import quoted
from lightning_landscape.geometry.mode_connectivity import select_weights


class Reference:
    """Copies of weights on the CPU, and the file that holds them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.file: str | None = None

    def copy_from(self, params: Mapping[str, Tensor]) -> None:
        """Copy the current weights, without uninitialized parameters."""
        self.weights = {n: _copy_to_cpu(p) for n, p in params.items() if not is_lazy(p)}
        self.file = None

    def save(self, path: Path) -> None:
        """Write a state dict."""
        torch.save(self.weights, path)

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read a state dict; it stays on the CPU."""
        self.weights = torch.load(path, weights_only=True, map_location="cpu")

    def fingerprint(self) -> str:
        """A hash of names and entries."""
        digest = hashlib.sha256()
        for name, tensor in self.weights.items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def clear(self) -> None:
        """Drop the weights."""
        self.weights, self.file = {}, None


def check_weights(owner: str, argument: str, weights: object, accepted: str = "") -> WeightsSource:
    """The path of an existing file, or a copy of a state dict, whose tensors may be in use.

    Args:
        owner: the class, for messages.
        argument: the argument, for messages.
        weights: its value.
        accepted: other values that are accepted, for messages.

    Raises:
        TypeError: neither a path nor a mapping.
        FileNotFoundError: there is no such file.
        ValueError: a mapping that is not a state dict.
    """
    if isinstance(weights, Mapping):
        state = read_weights(f"{owner}({argument}=...)", weights)
        return {name: _copy_to_cpu(t) for name, t in state.items() if isinstance(t, Tensor)}
    expected = f"expected {f'{accepted}, ' if accepted else ''}a checkpoint file or a state dict"
    if not isinstance(weights, (str, Path)):
        raise TypeError(f"{quoted(owner, argument, weights)}: {expected}")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{owner}({argument}={str(weights)!r}): no such file; {expected}")
    return weights


def weights_for(
    owner: str,
    weights: WeightsSource,
    measured: Mapping[str, Tensor],
    all_params: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The given weights of all parameters that may be measured in this run, on the CPU.

    Raises:
        ValueError: a file that cannot be read; a measured parameter is missing or has another
            shape.
    """
    state = read_weights(owner, weights)
    select_weights(owner, state, measured)
    return {
        name: state[name].detach().cpu()
        for name, parameter in all_params.items()
        if isinstance(state.get(name), Tensor) and state[name].shape == parameter.shape
    }


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
