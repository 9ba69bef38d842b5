"""The loss as a function of the weights: its value, gradient and Hessian-vector products.

All other functions of this package access the network through an :class:`Objective` only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_landscape.geometry.batches import Batches, Cut, LossFn, Term
from lightning_landscape.geometry.checks import (
    check_callable,
    check_flags,
    quoted,
    shown,
)
from lightning_landscape.geometry.errors import (
    NoDoubleBackward,
    OtherRankOutOfMemory,
    clear_frames,
    out_of_memory,
)
from lightning_landscape.geometry.matvec import FlatHessian, Matvec
from lightning_landscape.geometry.memory import GraphMemory
from lightning_landscape.geometry.process_mean import ProcessMean
from lightning_landscape.geometry.vectors import (
    Layout,
    Vector,
    check_vector,
    norm,
    working_dtype,
)
from lightning_landscape.geometry.weights import MovableWeights, Move, ParameterTensors, trainable

Engine = Literal["auto", "double_backward", "finite_difference"]

# The error of central differences is step^2 (truncation) plus precision/step (rounding).
# Steps in units of ||w|| for a unit vector, by the lowest precision in which the loss is computed.
# On smooth networks the optimum is flat, 1e-4 to 1e-3 in float32; in half precision the error at
# 1e-2 is 2 % along the top eigenvector and 25 % along random vectors.
_DIFFERENCE_STEP = {
    torch.float64: 1e-5,
    torch.float32: 5e-4,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
}


class Objective(FlatHessian):
    r"""A loss ``L(w) = sum_i weight_i L_i(w) / sum_i weight_i`` over named parameters ``w``.

    Args:
        loss_fn: ``loss_fn() -> scalar tensor``, or a sequence of ``(weight, loss_fn)`` for several
            batches, where ``weight`` is the number of examples if each loss is a mean over them.
            Every call must give the same loss at the same weights.
        params: name -> parameter, e.g. ``dict(model.named_parameters())``.  Frozen ones are
            dropped, a parameter under two names counts once.  A complex one counts as its real and
            imaginary parts; its entries of vectors are complex too.
        engine: how Hessian-vector products are computed.  ``"double_backward"``: exactly, on a
            graph that is built once per batch and kept.  ``"finite_difference"``: by central
            differences of the gradient.  ``"auto"``: by double backward, or by finite differences
            if the loss does not support it; see :attr:`engine_used` and :attr:`engine_note`.
        reduce: sums a tensor over processes and returns the same result on all.  Each process then
            holds a share of the batches.  If one fails, all raise.
        check_deterministic: evaluate the loss twice the first time, and raise if it varies.
        memory: limits how many examples' graphs exist at once.  Default: as many as fit into half
            of the free memory, or those of the largest batch if free memory is unknown.
        cut: ``cut(i, most) -> [(weight, loss_fn), ...]``: batch ``i`` in pieces of at most ``most``
            examples, or nothing if it cannot be split.  Called when the graph of the whole batch
            does not fit into memory; the pieces are used if they give its loss to within 1e-5.

    After every call, also one that raises, the weights are restored bit for bit.  The graph, loss
    and gradient that are cached are dropped when the weights change, by this object or by others.
    When a device runs out of memory all caches are dropped, and the call is repeated with fewer
    graphs, then with smaller pieces.

    Raises:
        TypeError: the loss is not a tensor, or complex.
        ValueError: there is no trainable parameter; the loss is not scalar, does not depend on the
            parameters, or varies from call to call.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> objective = Objective(lambda: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2, {"w": w})
        >>> objective.hvp({"w": torch.tensor([1.0, 1.0])})["w"]
        tensor([3., 1.])
    """

    def __init__(
        self,
        loss_fn: LossFn | Sequence[tuple[float, LossFn]],
        params: Mapping[str, Tensor],
        *,
        engine: Engine = "auto",
        reduce: Callable[[Tensor], Tensor] | None = None,
        check_deterministic: bool = True,
        memory: GraphMemory | None = None,
        cut: Cut | None = None,
    ) -> None:
        if engine not in ("auto", "double_backward", "finite_difference"):
            raise ValueError(
                f"engine={engine!r}: expected 'auto', 'double_backward' or 'finite_difference'"
            )
        check_flags("", check_deterministic=check_deterministic)
        if reduce is not None:
            check_callable(
                "", "reduce", reduce, "a function that sums a tensor over ranks, or None"
            )
        if memory is not None and not isinstance(memory, GraphMemory):
            raise TypeError(f"{quoted('', 'memory', memory)}: expected a GraphMemory, or None")
        if cut is not None:
            check_callable("", "cut", cut, "a function (i, most) -> [(weight, loss_fn)], or None")
        self.params = trainable(params)
        self.engine = engine
        self.engine_used: Literal["double_backward", "finite_difference"] = (
            "finite_difference" if engine == "finite_difference" else "double_backward"
        )
        self.engine_note = ""
        self.hvps = 0
        self._list = list(self.params.values())
        self._weights = MovableWeights(self._list)
        self._layout = Layout(self.params)
        self._memory = memory or GraphMemory()
        self._cut = cut
        self._local = Batches(_weighted_terms(loss_fn), self._list, self._memory, cut)
        self._processes = ProcessMean(reduce, self._local.weight, self._local.device)
        self._unchecked = check_deterministic
        self._relative_step: float | None = None  # of finite differences, once needed
        self._room_for_gradients = self._room_for_products = False
        self._loss: Tensor | None = None
        self._gradient: Tensor | None = None

    @property
    def forwards(self) -> int:
        """Evaluations of the whole loss, so far."""
        return self._local.forwards

    @property
    def gradients(self) -> int:
        """Evaluations of the whole gradient, with a graph or without, so far."""
        return self._local.gradients

    # -- loss, gradient, products --------------------------------------------------------------

    def loss(self) -> Tensor:
        """``L(w)``, a 0-dimensional float64 tensor.  Cost: one forward, nothing if cached."""
        self._begin()
        if self._loss is None:
            self._loss = self._mean_loss()
        return self._loss.clone()

    def gradient(self, *, products_follow: bool = False) -> dict[str, Tensor]:
        """``dL/dw``, one tensor per parameter.  Cost: one gradient, nothing if cached.

        With ``products_follow`` the gradient is computed with the graph that the next :meth:`hvp`
        needs, which then need not be built.
        """
        self._begin()
        if self._gradient is None and products_follow and self.engine_used == "double_backward":
            self.hvp({})  # zero: the graph alone
            self.hvps -= 1
        if self._gradient is None:
            self._gradient = self._mean_gradient()
        return self._named(self._gradient.clone())

    def hvp(self, vector: Vector) -> dict[str, Tensor]:
        """``H v`` with the Hessian ``H`` at ``w``.

        Cost: about 2 gradients, plus 2 to build the graph in the first call, and in every call for
        batches whose graph is not kept; by finite differences 2 gradients.
        """
        self._begin()
        self.hvps += 1
        product = self._exact_product(self._pieces(vector))
        return self._difference_hvp(vector) if product is None else self._named(product)

    def loss_at(self, displacement: Vector) -> Tensor:
        """``L(w + displacement)``.  Cost: one forward."""
        return self.losses_at([displacement], [(1.0,)])[0]

    # -- many points or vectors ----------------------------------------------------------------

    def losses_at(
        self, directions: Sequence[Vector], coefficients: Iterable[Sequence[float]]
    ) -> Tensor:
        """``L(w + sum_j c_j direction_j)`` for each tuple ``c``: a float64 tensor, one per tuple.

        Cost: one forward each; the device is not synchronized between them.
        """
        self._begin()
        points = list(coefficients)
        if not points:
            return torch.zeros(0, dtype=self._local.sum_dtype, device=self._local.device)
        moves = [self._pieces(direction) for direction in directions]

        def local() -> Tensor:
            with self._displaceable() as move_to, self._local.evaluations():
                return self._local.losses_at(points, partial(move_to, moves))

        return self._mean(local, len(points), self._local.sum_dtype)

    def gradient_at(self, displacement: Vector) -> dict[str, Tensor]:
        """``dL/dw`` at ``w + displacement``.  Cost: one gradient."""
        self._begin()
        pieces = self._pieces(displacement)

        def local() -> Tensor:
            with self._displaceable() as move_to:
                move_to([pieces], (1.0,))
                return self._local.gradient()

        return self._named(self._mean_vector(local))

    @contextlib.contextmanager
    def products(self) -> Iterator[Matvec]:
        """Yields ``product(v) = H v`` for flat vectors, for many products at the same weights.

        ``v`` and ``H v`` are the concatenated entries of all parameters: ``(n,)``, float64 if any
        parameter is, else float32, on the device of the first.  What each :meth:`hvp` repeats is
        done once: comparing the weights, and replacing kernels.
        """
        layout = self._layout
        if getattr(self.hvp, "__func__", None) is not Objective.hvp:  # overridden by a subclass
            yield lambda flat: layout.flatten(self.hvp(layout.unflatten(flat)))
            return
        self._begin()
        with contextlib.ExitStack() as stack:
            if self.engine_used == "double_backward":
                stack.enter_context(self._local.products())

            def product(flat: Tensor) -> Tensor:
                self.hvps += 1
                found = self._exact_product(self._split(flat))
                if found is not None:
                    return found
                stack.close()
                return layout.flatten(self._difference_hvp(self._named(flat)))

            yield product

    def batch_mean(self, quantity: Callable[[Objective], float]) -> float:
        """The weighted mean over all batches, of all processes, of ``quantity(objective)``.

        Each ``objective`` is a single batch of a single process, so the control flow of
        ``quantity`` may differ between batches.
        """
        self._begin()
        self.release()  # quantity may move the weights

        def local() -> Tensor:
            total = torch.zeros(1, dtype=self._local.sum_dtype, device=self._local.device)
            batches = [self._batch(index) for index in range(len(self._local.terms))]
            for batch, (weight, _) in zip(batches, self._local.terms, strict=True):
                total += weight * quantity(batch)
                batch.release()
            # One evaluation on every batch is one of the whole loss.
            self._local.forwards += max(batch.forwards for batch in batches)
            self._local.gradients += max(batch.gradients for batch in batches)
            self.hvps += max(batch.hvps for batch in batches)
            return total

        return float(self._mean(local, 1, self._local.sum_dtype)[0])

    def batch_losses(self) -> list[float]:
        """``L_i(w)`` of each batch of this process, without communication.  Cost: one forward."""
        self._begin()
        return self._local.losses()

    def _batch(self, index: int) -> Objective:
        """The objective of batch ``index`` of this process."""
        cut = self._cut
        alone = Objective(
            self._local.terms[index : index + 1],
            self.params,
            engine=self.engine,
            check_deterministic=False,
            memory=self._memory,
            cut=None if cut is None else lambda _, most: cut(index, most),
        )
        alone._local.cudnn = self._local.cudnn
        alone._local.forward_needs_grad = self._local.forward_needs_grad
        return alone

    def has_room(self) -> bool:
        """Whether the graphs of all batches fit into free memory, on all processes."""
        return not self._processes.any(lambda: not self._local.has_room(products=True))

    def release(self) -> None:
        """Drop the kept graphs, the memory of one forward and backward per batch."""
        self._local.release()

    # -- products ------------------------------------------------------------------------------

    def _exact_product(self, pieces: ParameterTensors) -> Tensor | None:
        """The product by double backward; None, from now on, if the loss does not support it."""
        if self.engine_used == "finite_difference":
            return None
        try:
            return self._double_backward_product(pieces)
        except NoDoubleBackward as error:
            self.release()
            if self.engine == "double_backward":
                raise RuntimeError(
                    f"engine='double_backward': the loss cannot be differentiated twice "
                    f"({error}); pass engine='auto' or 'finite_difference'"
                ) from error
            self.engine_used = "finite_difference"
            self.engine_note = f"no double backward: {error}"
            return None

    def _double_backward_product(self, pieces: ParameterTensors) -> Tensor:

        def local() -> Tensor:
            return self._local.product(pieces)

        try:
            return self._mean_vector(local, products=True)
        except NoDoubleBackward:
            # cuDNN's recurrent layers have no double backward.  Convolutions are slower without
            # cuDNN, so it is switched off only now; regardless of the message, so that all
            # processes do the same.
            if not (self._local.cudnn and torch.cuda.is_available()):
                raise
        self.release()
        self._local.cudnn = False
        return self._mean_vector(local, products=True)

    def _difference_hvp(self, vector: Vector) -> dict[str, Tensor]:
        length = norm(vector)
        if length == 0.0:
            return {name: torch.zeros_like(p).detach() for name, p in self.params.items()}
        if self._relative_step is None:
            local = partial(self._local.difference_step, _DIFFERENCE_STEP)
            self._relative_step = float(self._mean(local, 1, self._local.sum_dtype))
        weights = norm({name: p.detach() for name, p in self.params.items()}) or 1.0
        step = self._relative_step * weights / length
        ahead = self.gradient_at({name: step * v for name, v in vector.items()})
        behind = self.gradient_at({name: -step * v for name, v in vector.items()})
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}

    # -- the weights ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _displaceable(self) -> Iterator[Move]:
        self.release()  # its saved tensors are the weights that will be overwritten
        with self._weights.displaceable() as move_to:
            yield move_to

    def _begin(self) -> None:
        """Drop results of other weights; check once that the loss is a function of the weights."""
        if self._weights.changed():
            self._loss = self._gradient = None
            self._local.reset()
        if not self._unchecked:
            return
        first, again = self._mean_loss(), self._mean_loss()
        if not torch.allclose(first, again, rtol=1e-5, atol=0.0, equal_nan=True):
            raise ValueError(
                f"loss_fn is not deterministic: two evaluations at the same weights gave "
                f"{float(first):.7g} and {float(again):.7g}; seed its random numbers inside "
                f"loss_fn, use model.eval(), or pass check_deterministic=False"
            )
        self._unchecked, self._loss = False, first

    # -- means over batches and processes ------------------------------------------------------

    def _mean_loss(self) -> Tensor:
        local = self._local

        def share() -> Tensor:
            known, local.known_loss = local.known_loss, None
            return local.loss() if known is None else known

        return self._mean(share, 1, local.sum_dtype)[0]

    def _mean_gradient(self) -> Tensor:
        local = self._local

        def share() -> Tensor:
            known, local.known_gradient = local.known_gradient, None
            return local.gradient() if known is None else known

        return self._mean_vector(share)

    def _mean_vector(self, compute: Callable[[], Tensor], products: bool = False) -> Tensor:
        """The mean of a computation that builds graphs: first makes room for them."""

        def with_room() -> Tensor:
            return self._processes.mean(compute, self._local.size, self._local.dtype)

        return self._until_it_fits(with_room, graphs=True, products=products)

    def _mean(self, compute: Callable[[], Tensor], size: int, dtype: torch.dtype) -> Tensor:
        return self._until_it_fits(lambda: self._processes.mean(compute, size, dtype))

    def _until_it_fits(
        self, call: Callable[[], Tensor], graphs: bool = False, products: bool = False
    ) -> Tensor:
        """``call()``, repeated with fewer graphs after an out of memory, on all processes."""
        while True:
            try:
                if graphs:
                    self._make_room(products)
                return call()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                clear_frames(error)  # frees the graphs that its frames refer to
                fault = error
            try:
                changed = self._local.shrink(products=products)
                if self._local.device.type == "cuda":
                    torch.cuda.empty_cache()
                stuck = not changed and not isinstance(fault, OtherRankOutOfMemory)
                if self._processes.any(partial(bool, stuck)):
                    raise fault
            finally:
                del fault

    def _make_room(self, products: bool) -> None:
        """Reduce the graphs to what fits into free memory; once per objective."""
        if self._room_for_products or (self._room_for_gradients and not products):
            return
        while self._processes.any(lambda: not self._local.has_room(products=products)):
            self._local.shrink(self._local.least)
        self._room_for_gradients, self._room_for_products = True, products

    # -- names ---------------------------------------------------------------------------------

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        vector = self._layout.unflatten(flat)
        return {
            name: vector[name].to(dtype=working_dtype(p.dtype), device=p.device)
            for name, p in self.params.items()
        }

    def _split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector as tensors in the order, dtype and device of the parameters."""
        vector = self._layout.unflatten(flat)
        return [vector[n].to(dtype=p.dtype, device=p.device) for n, p in self.params.items()]

    def _pieces(self, vector: Vector) -> list[Tensor | None]:
        """``vector`` in the order of the parameters, ``None`` for missing names."""
        check_vector("vector", vector, self.params)
        return [
            vector[name].detach().to(dtype=p.dtype, device=p.device) if name in vector else None
            for name, p in self.params.items()
        ]


def _weighted_terms(
    loss_fn: LossFn | Sequence[tuple[float, LossFn]],
) -> list[Term]:
    if callable(loss_fn):
        return [(1.0, loss_fn)]
    if isinstance(loss_fn, (str, Mapping)) or not isinstance(loss_fn, Iterable):
        raise TypeError(
            f"{quoted('', 'loss_fn', loss_fn)}: expected a function () -> loss, or a list of "
            f"(weight, loss_fn), one a batch"
        )
    terms = list(loss_fn)
    if not terms:
        raise ValueError("loss_fn=[]: expected at least one (weight, loss_fn)")
    for term in terms:
        try:
            weight, fn = term
            good = callable(fn) and math.isfinite(weight) and weight > 0
        except (TypeError, ValueError):  # not a pair, or not a number
            good = False
        if not good:
            raise ValueError(f"loss_fn holds {shown(term)}: expected (weight > 0, callable) pairs")
    return terms
