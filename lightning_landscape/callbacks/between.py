"""The direction from one checkpoint to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_landscape.geometry.vectors import norm, to_double, working_dtype
from lightning_landscape.training.data.probe import why_unreadable

WeightsSource = str | Path | Mapping[str, Any]


def difference(
    owner: str, between: Sequence[WeightsSource], params: Mapping[str, Tensor], names: set[str]
) -> dict[str, Tensor]:
    """``b - a`` on the CPU, over the parameters that both have.

    Args:
        owner: the class, for messages.
        between: a and b: state dicts, or files that hold one or a Lightning checkpoint.
        params: all parameters of the module.
        names: the measured parameters, which both must have.

    Raises:
        ValueError: a file that cannot be read, a parameter that is missing or has another shape,
            equal weights.
    """
    a, b = (
        read_weights(f"{owner}(between[{i}]=...)", weights) for i, weights in enumerate(between)
    )
    for number, state in enumerate((a, b)):
        for name in sorted(names):
            weight = state.get(name)
            if not isinstance(weight, Tensor):
                raise ValueError(
                    f"{owner}(between[{number}]=...): it has no parameter {name!r}, only "
                    f"{list(state)[:4]}; expected the state dict of the module that is trained"
                )
            if weight.shape != params[name].shape:
                raise ValueError(
                    f"{owner}(between[{number}]=...): {name!r} has shape {tuple(weight.shape)}, "
                    f"expected {tuple(params[name].shape)}"
                )
    direction = {}
    for name, parameter in params.items():
        pair = [state.get(name) for state in (a, b)]
        if all(isinstance(t, Tensor) and t.shape == parameter.shape for t in pair):
            low, high = (to_double(t.detach().cpu()) for t in pair if t is not None)
            direction[name] = (high - low).to(working_dtype(parameter.dtype))
    length = norm({name: direction[name] for name in names})
    if not 0.0 < length < math.inf:
        raise ValueError(
            f"{owner}(between=...): the distance of the two is {length}; expected different finite "
            f"weights"
        )
    return direction


def check_between(owner: str, between: object) -> tuple[WeightsSource, WeightsSource]:
    """``between`` as a pair of state dicts or files that exist.

    Raises:
        ValueError: not such a pair.
        FileNotFoundError: a file is missing.
    """
    pair = tuple(between) if isinstance(between, Sequence) and not isinstance(between, str) else ()
    if len(pair) != 2 or not all(isinstance(w, (str, Path, Mapping)) for w in pair):
        raise ValueError(
            f"{owner}(between={between!r:.80}): expected two checkpoint files or state dicts (a, b)"
        )
    for number, weights in enumerate(pair):
        if not isinstance(weights, Mapping) and not Path(weights).is_file():
            raise FileNotFoundError(
                f"{owner}(between[{number}]={str(weights)!r}): no such file; pass a checkpoint "
                f"file that exists, or a state dict"
            )
    return pair


def read_weights(owner: str, weights: WeightsSource) -> Mapping[str, Any]:
    """A state dict, from a file that holds one or a Lightning checkpoint; nothing is unpickled."""
    content: Any = weights
    if not isinstance(weights, Mapping):
        try:
            content = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch raise many types
            raise ValueError(
                f"{owner}: {str(weights)!r} cannot be read safely ({why_unreadable(error)}); "
                f"expected a checkpoint or a state dict that torch.load(..., weights_only=True) "
                f"reads"
            ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{owner}: holds {type(content).__name__}, expected a state dict")
    return content
