"""Weights that a run is compared with: copies in main memory, and the file that they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_landscape.callbacks.between import Weights, read_weights
from lightning_landscape.geometry.checks import quoted
from lightning_landscape.geometry.mode_connectivity import select_weights


class Reference:
    """Copies of weights on the CPU, and the file that they lie in."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.file: str | None = None

    def take(self, params: Mapping[str, Tensor]) -> None:
        """Copy the weights as they are; what has no shape yet is left out."""
        self.weights = {n: _copied(p) for n, p in params.items() if not is_lazy(p)}
        self.file = None

    def save(self, path: Path) -> None:
        """Write a state dict."""
        torch.save(self.weights, path)

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read it back; it stays on the CPU."""
        self.weights = torch.load(path, weights_only=True, map_location="cpu")

    def fingerprint(self) -> str:
        """A hash of names and entries."""
        digest = hashlib.sha256()
        for name, tensor in self.weights.items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forget(self) -> None:
        """Hold nothing."""
        self.weights, self.file = {}, None


def own_weights(said: str, argument: str, weights: object, words: str = "") -> Weights:
    """A file that exists, or a copy of a state dict: the user's own may be of the live module.

    Args:
        said: the class that messages name.
        argument: the argument that they name.
        weights: what was given for it.
        words: what else might have been.

    Raises:
        TypeError: it is neither.
        FileNotFoundError: there is no such file.
        ValueError: a mapping that is no state dict.
    """
    if isinstance(weights, Mapping):
        state = read_weights(f"{said}({argument}=...)", weights)
        return {name: _copied(t) for name, t in state.items() if isinstance(t, Tensor)}
    expected = f"expected {f'{words}, ' if words else ''}a checkpoint file or a state dict"
    if not isinstance(weights, (str, Path)):
        raise TypeError(f"{quoted(said, argument, weights)}: {expected}")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{said}({argument}={str(weights)!r}): no such file; {expected}")
    return weights


def weights_for(
    said: str, weights: Weights, measured: Mapping[str, Tensor], all_params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The given weights of what is measured, and of what may be later, on the CPU.

    Raises:
        ValueError: a file that cannot be read; some of what is measured is missing or of another
            shape.
    """
    state = read_weights(said, weights)
    select_weights(said, state, measured)
    return {
        name: state[name].detach().cpu()
        for name, parameter in all_params.items()
        if isinstance(state.get(name), Tensor) and state[name].shape == parameter.shape
    }


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
