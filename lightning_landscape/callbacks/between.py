"""The direction from one checkpoint to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_landscape.geometry.vectors import norm, to_double, working_dtype
from lightning_landscape.training.faults import why_unreadable

Weights = str | Path | Mapping[str, Any]


def difference(said: str, between: Sequence[Weights], params: Mapping[str, Tensor], names: set[str]
               ) -> dict[str, Tensor]:  # fmt: skip
    """``b - a`` on the CPU, over the parameters that both have.

    Args:
        said: the class that the messages name.
        between: a and b: state dicts, or files that hold one or a Lightning checkpoint.
        params: all parameters of the module.
        names: those that are measured; both must have them.

    Raises:
        ValueError: a file that cannot be read, a parameter that is missing or of another shape,
            weights that are the same.
    """
    a, b = (read_weights(f"{said}(between[{i}]=...)", weights) for i, weights in enumerate(between))
    for number, state in enumerate((a, b)):
        for name in sorted(names):
            found = state.get(name)
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"{said}(between[{number}]=...): it holds no parameter {name!r}; expected the "
                    f"state dict of the module that is trained, it has {list(state)[:4]}"
                )
            if found.shape != params[name].shape:
                raise ValueError(
                    f"{said}(between[{number}]=...): {name!r} has shape {tuple(found.shape)}, "
                    f"expected {tuple(params[name].shape)}"
                )
    moved = {}
    for name, parameter in params.items():
        pair = [state.get(name) for state in (a, b)]
        if all(isinstance(t, Tensor) and t.shape == parameter.shape for t in pair):
            low, high = (to_double(t.detach().cpu()) for t in pair if t is not None)
            moved[name] = (high - low).to(working_dtype(parameter.dtype))
    length = norm({name: moved[name] for name in names})
    if not 0.0 < length < math.inf:
        raise ValueError(
            f"{said}(between=...): the two lie {length} apart; expected different finite weights"
        )
    return moved


def check_between(said: str, between: object) -> tuple[Weights, Weights]:
    """``between`` as a pair of state dicts or files that exist.

    Raises:
        ValueError: it is no such pair.
        FileNotFoundError: a file is missing.
    """
    pair = tuple(between) if isinstance(between, Sequence) and not isinstance(between, str) else ()
    if len(pair) != 2 or not all(isinstance(w, (str, Path, Mapping)) for w in pair):
        raise ValueError(
            f"{said}(between={between!r:.80}): expected two checkpoint files or state dicts (a, b)"
        )
    for number, weights in enumerate(pair):
        if not isinstance(weights, Mapping) and not Path(weights).is_file():
            raise FileNotFoundError(
                f"{said}(between[{number}]={str(weights)!r}): no such file; pass a checkpoint file "
                f"that exists, or a state dict"
            )
    return pair


def read_weights(said: str, weights: Weights) -> Mapping[str, Any]:
    """A state dict, from a file that holds one or a Lightning checkpoint; nothing is unpickled."""
    content: Any = weights
    if not isinstance(weights, Mapping):
        try:
            content = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch raise many kinds
            raise ValueError(
                f"{said}: {str(weights)!r} cannot be read safely ({why_unreadable(error)}); "
                f"expected a checkpoint or a state dict that torch.load(..., weights_only=True) "
                f"reads"
            ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{said}: holds {type(content).__name__}, expected a state dict")
    return content
