"""The weights of a loss: detect changes, and move them temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import shown
from lightning_landscape.geometry.vectors import real

# One tensor per parameter, None for zero.
ParameterTensors = Sequence[Tensor | None]
Move = Callable[[Sequence[ParameterTensors], Sequence[float]], None]

# Integers as wide as an entry of a parameter.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovableWeights:
    """Parameters that training may change, and that are restored bit for bit after every move."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._list = list(tensors)
        self._versions: list[int] = []
        self._bits: Tensor | None = None

    def changed(self) -> bool:
        """Whether they have changed since the last call; moves do not count."""
        # Fused optimizers and writes through ``.data`` do not change the version counters.
        versions, bits = self._current_versions(), self._current_bits()
        same_bits = self._bits is not None and torch.equal(bits, self._bits)
        changed = versions != self._versions or not same_bits
        self._versions, self._bits = versions, bits
        return changed

    @contextlib.contextmanager
    def displaceable(self) -> Iterator[Move]:
        """Yields ``move_to(directions, coefficients)``; restores the weights at the end.

        They are restored from a copy, because ``(w + d) - d`` is not ``w`` in floating point.  The
        copy is taken here: an older one could undo training that happened since.
        """
        live = [p.detach() for p in self._list]
        base = [p.clone() for p in live]
        # Points of a grid share all coordinates but the last: their common start is kept.
        column: list[Tensor] = []
        column_at: Sequence[float] = ()

        def move_to(moves: Sequence[ParameterTensors], point: Sequence[float]) -> None:
            nonlocal column, column_at
            start = base
            if any(point[:-1]):
                if tuple(point[:-1]) != column_at:
                    column = column or [p.clone() for p in base]
                    torch._foreach_copy_(column, base)
                    for pieces, coefficient in zip(moves[:-1], point[:-1], strict=True):
                        _add(column, pieces, coefficient)
                    column_at = tuple(point[:-1])
                start = column
            if not point:
                torch._foreach_copy_(live, start)
            else:
                _set(live, start, moves[-1], point[-1])

        try:
            yield move_to
        finally:
            torch._foreach_copy_(live, base)
            self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [p._version for p in self._list]

    def _current_bits(self) -> Tensor:
        """Per parameter, the sum of its entries' bit patterns: changes if any one entry does.

        Faster than a norm, and exact, because integers wrap around on overflow.
        """
        sums = []
        for p in self._list:
            numbers = real(p.detach())
            bits = _BITS[numbers.element_size()]
            sums.append(torch.sum(numbers.view(bits), dtype=bits))
        return torch.stack([total.to(self._list[0].device) for total in sums])


def trainable(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that require a gradient, each under its first name only.

    Raises:
        TypeError: ``params`` is not a mapping from name to tensor.
        ValueError: no parameter requires a gradient.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params={type(params).__name__}: expected a mapping from name to parameter, "
            f"e.g. dict(model.named_parameters())"
        )
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in params.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"params[{name!r}] is {shown(parameter)}: expected a parameter, "
                f"e.g. dict(model.named_parameters())"
            )
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        kept[name] = parameter
    if not kept:
        raise ValueError(
            f"params holds {len(params)} tensors and none requires a gradient: expected at least "
            f"one trainable parameter"
        )
    return kept


def _add(weights: Sequence[Tensor], pieces: ParameterTensors, coefficient: float) -> None:
    """``weights += coefficient * pieces``, in place; None is zero."""
    moved = [(w, d) for w, d in zip(weights, pieces, strict=True) if d is not None]
    if moved and coefficient != 0.0:
        torch._foreach_add_([w for w, _ in moved], [d for _, d in moved], alpha=coefficient)


def _set(
    weights: list[Tensor], start: list[Tensor], pieces: ParameterTensors, coefficient: float
) -> None:
    """``weights = start + coefficient * pieces``: one pass over memory, or few kernels."""
    if weights[0].device.type != "cpu":
        torch._foreach_copy_(weights, start)
        _add(weights, pieces, coefficient)
        return
    for w, s, d in zip(weights, start, pieces, strict=True):
        if d is None or coefficient == 0.0:
            w.copy_(s)
        else:
            torch.add(s, d, alpha=coefficient, out=w)
