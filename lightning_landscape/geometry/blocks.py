"""Diagonal blocks of the Hessian: grouping of parameters, and the top eigenvalues of each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import check_count, check_mapping, check_objective, shown
from lightning_landscape.geometry.eigen import EigenResult, check_hint, top_eigenvalues
from lightning_landscape.geometry.matvec import HessianLike
from lightning_landscape.geometry.vectors import Layout, Vector


def module_blocks(names: Iterable[str]) -> dict[str, str]:
    """Name -> block, one block per module that holds parameters itself.

    ``"encoder.0.weight"`` and ``"encoder.0.bias"`` belong to ``"encoder.0"``.  A parameter without
    a module in its name is a block of its own; a parametrized one belongs to its module.

    Example:
        >>> module_blocks(["fc.weight", "fc.bias", "scale"])
        {'fc.weight': 'fc', 'fc.bias': 'fc', 'scale': 'scale'}
    """
    given = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            f"names={shown(names)}: expected the names of parameters, e.g. "
            f"dict(model.named_parameters())"
        )
    return {name: _module_of(name) for name in given}


def _module_of(name: str) -> str:
    module, parametrized, _ = name.partition(".parametrizations.")
    return module if parametrized else name.rpartition(".")[0] or name


def names_by_block(params: Vector, blocks: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Block -> parameter names, in the order of ``params``; default: one block per module.

    Raises:
        ValueError: there is no block, or a name is not a trainable parameter.
    """
    chosen = module_blocks(params) if blocks is None else blocks
    check_mapping("", "blocks", chosen, "a mapping from parameter name to block, or None")
    unknown = sorted(map(str, chosen.keys() - params.keys()))
    if unknown or not chosen:
        raise ValueError(
            f"blocks={{...}} names {unknown[:4]}: expected a mapping from trainable parameters to "
            f"their block, such as module_blocks(objective.params)"
        )
    found: dict[str, list[str]] = {}
    for name in params:
        if name in chosen:
            found.setdefault(chosen[name], []).append(name)
    return found


def block_eigenvalues(
    objective: HessianLike,
    blocks: Mapping[str, str] | None = None,
    k: int = 1,
    *,
    which: Literal["LA", "SA"] = "LA",
    method: Literal["lanczos", "power"] = "lanczos",
    tol: float = 1e-2,
    max_hvps: int = 50,
    init: Mapping[str, EigenResult] | None = None,
    generator: torch.Generator | None = None,
    rtol: float = 0.0,
    hint: Vector | None = None,
) -> dict[str, EigenResult]:
    r"""The top eigenvalues of each diagonal block ``H_bb`` of the Hessian.

    ``H_bb`` is the Hessian over the parameters of block ``b``, with the others fixed.  Its top
    eigenvalue is at most that of ``H``, which may exceed those of all blocks.

    Args:
        objective: the loss, or anything with ``params`` and ``hvp``.
        blocks: parameter name -> block; names that are missing belong to none.  Default: one block
            per module, :func:`module_blocks`.
        k: how many per block, counted with multiplicity; a smaller block has fewer.
        which: as in :func:`top_eigenvalues`, like ``method``, ``tol``, ``rtol`` and
            ``hint``, a vector over all parameters.
        max_hvps: hard cap on products per block.
        init: the previous result, for a warm start; missing blocks start cold.
        generator: seeds the random starts.

    Returns:
        Block -> :class:`EigenResult`, whose vectors hold the block's names only.

    Raises:
        ValueError: an argument is out of range, or a name is not a trainable parameter.

    Cost: one eigenvalue problem per block; each product is one HVP of the whole network: about 8
    products per block from a cold start, 5 from a warm one.

    Example:
        >>> from lightning_landscape.geometry.objective import Objective
        >>> a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> loss = Objective(lambda: (a**2).sum() + 2 * b[0] ** 2, {"a": a, "b": b})
        >>> found = block_eigenvalues(loss)
        >>> {block: round(result.eigenvalues.item(), 4) for block, result in found.items()}
        {'a': 2.0, 'b': 4.0}
    """
    check_objective(objective, "params", "hvp")
    check_count("", "k", k)
    if init is not None:
        check_mapping("", "init", init, "a mapping from block to EigenResult, or None")
    check_hint(hint)
    results = {}
    for block, names in names_by_block(objective.params, blocks).items():
        part = _Block(objective, names)
        results[block] = top_eigenvalues(
            part,
            min(k, Layout(part.params).size),
            which=which,
            method=method,
            tol=tol,
            max_hvps=max_hvps,
            init=(init or {}).get(block),
            generator=generator,
            rtol=rtol,
            hint=None if hint is None else {n: hint[n] for n in names if n in hint},
        )
    return results


class _Block:
    """``H_bb``: the Hessian restricted to the parameters of one block."""

    def __init__(self, objective: HessianLike, names: Iterable[str]) -> None:
        self.params = {name: objective.params[name] for name in names}
        self._objective = objective

    def hvp(self, vector: Vector) -> Mapping[str, Tensor]:
        product = self._objective.hvp(vector)
        return {name: product[name] for name in self.params if name in product}
