"""The interface of the solvers to a Hessian: matrix-vector products."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from lightning_landscape.geometry.vectors import Layout, Vector

Matvec = Callable[[Tensor], Tensor]


class HessianLike(Protocol):
    """A symmetric operator on vectors over ``params``."""

    params: dict[str, Tensor]

    def hvp(self, vector: Vector) -> Mapping[str, Tensor]:
        """The operator applied to ``vector``."""


class FlatHessian(ABC):
    """A Hessian that computes many products on flat vectors with less overhead."""

    @abstractmethod
    def products(self) -> contextlib.AbstractContextManager[Matvec]:
        """Yields ``product(flat) -> flat``, in the order and dtype of ``Layout(params)``.

        The weights must not change inside this context.
        """


@contextlib.contextmanager
def flat_products(objective: HessianLike, layout: Layout) -> Iterator[Matvec]:
    """The operator as a function of flat vectors."""
    if isinstance(objective, FlatHessian):
        with objective.products() as product:
            yield product
    else:
        yield lambda flat: layout.flatten(objective.hvp(layout.unflatten(flat)))
