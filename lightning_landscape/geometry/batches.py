"""One process's share of a loss: its batches, evaluated one by one, and the graphs kept of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_landscape.geometry.double_backward import (
    translate_double_backward_errors,
    uses_once_differentiable,
)
from lightning_landscape.geometry.errors import NoDoubleBackward, out_of_memory
from lightning_landscape.geometry.kernels import (
    float32_is_full,
    full_float32,
    plain_kernels,
    saved_dtypes,
)
from lightning_landscape.geometry.memory import GraphMemory, counting_saved, free_memory
from lightning_landscape.geometry.same_loss import agree, random_displacement
from lightning_landscape.geometry.second_derivatives import (
    LossState,
    explicit_second_derivatives,
)
from lightning_landscape.geometry.vectors import flat_dtype, real
from lightning_landscape.geometry.weights import MovableWeights, ParameterTensors

_Point = TypeVar("_Point")
LossFn = Callable[[], Tensor]
Term = tuple[float, LossFn]
Cut = Callable[[int, int], Sequence[Term]]


class Batches:
    """Sums ``sum_i weight_i L_i`` over the batches of this process, and their derivatives.

    Results are new flat tensors.  ``memory`` limits the graphs: those that are kept and the one
    being used cover at most the number of examples that it allows.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        params: Sequence[Tensor],
        memory: GraphMemory,
        cut: Cut | None,
    ) -> None:
        self.terms = list(terms)  # as passed by the caller
        self.memory = memory
        self.params = list(params)
        self.weight = sum(weight for weight, _ in self.terms)
        self.size = sum(real(p.detach()).numel() for p in self.params)
        self.dtype = flat_dtype(self.params)
        self.device = self.params[0].device
        # float64 sums, where the device has them
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.forwards = 0  # evaluations of all batches
        self.gradients = 0
        self.cudnn = True
        self.forward_needs_grad = False
        self._kernels_are_plain = False
        self._active_loss: LossState | None = None
        self._active_cudnn = True
        # By-products of the first product at new weights: sums, consumed by the caller.
        self.known_loss: Tensor | None = None
        self.known_gradient: Tensor | None = None
        self._new_weights = True
        self._cut = cut
        # Graphs of this many examples are always allowed.
        self.least = memory.examples or max(weight for weight, _ in self.terms)
        self._pieces = self.terms  # as they are evaluated
        self._graphs: dict[int, list[Tensor]] = {}
        self._keep: set[int] = set()
        self._arrange()

    # -- sums over the batches -----------------------------------------------------------------

    def loss(self) -> Tensor:
        """The loss, ``(1,)``.  Cost: one forward."""
        self.forwards += 1
        return self._sum_of_losses(self._pieces)

    def losses_at(self, points: Sequence[_Point], move_to: Callable[[_Point], None]) -> Tensor:
        """The loss at each point, one after the other.  Cost: one forward each."""
        losses = torch.empty(len(points), dtype=self.sum_dtype, device=self.device)
        weight, fn = self._pieces[0]
        alone = len(self._pieces) == 1
        for point, place in zip(points, losses.unbind(), strict=True):
            move_to(point)
            self.forwards += alone  # the others are counted by loss()
            # Copied at once, because a loss that stays allocated fragments the memory of its
            # forward; and not read, because that would wait for the device.
            place.copy_(self._value(fn) if alone else self.loss()[0])
        return losses.mul_(weight) if alone else losses

    def losses(self) -> list[float]:
        """The loss of each batch.  Cost: one forward."""
        self.forwards += 1
        found = [self._value(fn) for _, fn in self.terms]
        return [float(loss) for loss in found]

    @contextlib.contextmanager
    def evaluations(self) -> Iterator[None]:
        """Evaluate many losses inside: the kernels are replaced once, not for each of them."""
        with self._plain_kernels():
            self._kernels_are_plain = True
            try:
                yield
            finally:
                self._kernels_are_plain = False

    @contextlib.contextmanager
    def _plain_kernels(self) -> Iterator[None]:
        if self._kernels_are_plain:
            yield
            return
        with plain_kernels(self.cudnn), full_float32():
            yield

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Compute many products inside: the kernels are replaced once, not for each of them."""
        with self._twice_differentiable() as loss:
            self._active_loss, self._active_cudnn = loss, self.cudnn
            try:
                yield
            finally:
                self._active_loss = None

    @contextlib.contextmanager
    def _twice_differentiable(self) -> Iterator[LossState]:
        """Kernels with a second derivative, explicit ones included."""
        if self._active_loss is not None and self._active_cudnn == self.cudnn:
            yield self._active_loss
            return
        with plain_kernels(self.cudnn), explicit_second_derivatives() as loss:
            yield loss

    def gradient(self) -> Tensor:
        """The gradient.  Cost: one gradient."""
        self.gradients += 1
        total: Tensor | None = None
        for weight, fn in self._pieces:
            total = self._added(total, weight, self._differentiate(fn, create_graph=False)[1])
        return self._zeros() if total is None else total

    def product(self, vector: ParameterTensors) -> Tensor:
        """The Hessian times ``vector``, one tensor per parameter, None for zero.

        Cost: about 2 gradients on the graphs that are kept, 2 more for those that are not.
        """
        total: Tensor | None = None
        first = self._new_weights
        if first:
            self.release()  # graphs of a call that failed
        loss = torch.zeros(1, dtype=self.sum_dtype, device=self.device)
        slope: Tensor | None = None
        self.gradients += len(self._graphs) < len(self._pieces)
        for index, (weight, fn) in enumerate(self._pieces):
            graph = self._graphs.get(index)
            if graph is None:
                value, graph = self._differentiate(fn, create_graph=True)
                if first:
                    loss += weight * value.to(loss)
                    slope = self._added(slope, weight, [g.detach() for g in graph])
            product = self._product(graph, vector, keep=index in self._keep)
            if product:
                total = self._added(total, weight, product)
            if index in self._keep:
                self._graphs[index] = graph
            del graph  # before the next one is built
        if first:
            # The loss is subtracted from others, so it has to be as precise as they are.
            self.known_loss = loss if float32_is_full() else None
            self.known_gradient, self._new_weights = slope, False
        return self._zeros() if total is None else total

    def difference_step(self, steps: dict[torch.dtype, float]) -> Tensor:
        """The largest of ``steps`` over the dtypes that the first loss is computed in."""
        saved = saved_dtypes(self._pieces[0][1]) | {p.dtype for p in self.params}
        used = {dtype.to_real() if dtype.is_complex else dtype for dtype in saved}
        step = max(step for dtype, step in steps.items() if dtype in used)
        return torch.full((1,), self.weight * step, dtype=self.sum_dtype, device=self.device)

    def reset(self) -> None:
        """Drop everything that belongs to the previous weights."""
        self.release()
        self._new_weights = True
        self.known_loss = self.known_gradient = None

    def release(self) -> None:
        """Drop the graphs."""
        self._graphs.clear()

    # -- memory --------------------------------------------------------------------------------

    def has_room(self, *, products: bool) -> bool:
        """Whether the graphs that will exist at once fit into memory, or cannot be reduced."""
        alive = self._live_examples() if products else max(weight for weight, _ in self._pieces)
        if alive <= self.least or self.memory.allowed <= self.least:
            return True
        if self.memory.bytes_per_example is None:
            self._count_bytes()
        devices = {p.device for p in self.params}
        free = [free_memory(device) for device in devices]
        known = [bytes for bytes in free if bytes is not None]
        graphs = min(len(self._keep) + 1, len(self._pieces)) if products else 1
        return self.memory.holds(alive, graphs, min(known) if len(known) == len(free) else None)

    def shrink(self, least: float | None = None, *, products: bool = True) -> bool:
        """Halve the examples whose graphs exist at once, down to ``least``; False if no change.

        Without ``least``, for use after an out of memory: halve until something changes for the
        call that failed, which uses kept graphs only for ``products``.
        """
        had, allowed = bool(self._graphs), self.memory.allowed
        self.release()

        def arranged() -> tuple[int, set[int]]:
            return len(self._pieces), self._keep if products else set()

        before = arranged()
        while True:
            if self._arranged_for == self.memory.allowed:  # otherwise another objective shrank it
                current = min(self.memory.allowed, self._live_examples())
                self.memory.allowed = max(current / 2, least or 0.0)
            self._arrange()
            if had or arranged() != before:
                return True
            if least is not None:
                return False
            if self.memory.allowed < 1:
                self.memory.allowed = allowed
                self._arrange()
                return False

    def _arrange(self) -> None:
        """Split batches that are too large, if possible, and choose the graphs to keep."""
        allowed = self._arranged_for = self.memory.allowed
        self._pieces = [
            piece
            for index, term in enumerate(self.terms)
            for piece in ([term] if term[0] <= allowed else self._pieces_of(index, int(allowed)))
        ]
        weights = [weight for weight, _ in self._pieces]
        self._keep, kept = set(), 0.0
        for index, weight in enumerate(weights):
            # Unless all are kept, one more exists while it is being used.
            kept += weight
            if kept + (0.0 if sum(weights) <= allowed else max(weights)) > allowed:
                break
            self._keep.add(index)
        if len(weights) == 1 and allowed >= self.least:
            # It exists at each product anyway.  (A graph that is freed during the product takes a
            # fifth less memory: the last resort after an out of memory.)
            self._keep = {0}

    def _live_examples(self) -> float:
        """The number of examples whose graphs exist at once."""
        weights = [weight for weight, _ in self._pieces]
        kept = sum(weights[index] for index in self._keep)
        return kept if len(self._keep) == len(weights) else kept + max(weights)

    def _pieces_of(self, index: int, most: int) -> Sequence[Term]:
        """Batch ``index`` in pieces of at most ``most`` examples, or whole if they change the loss.

        Checked the first time and every 8th time, at the current weights and at displaced ones.
        """
        whole = self.terms[index]
        if self._cut is None or self.memory.cuttable is False or most < 1:
            return [whole]
        pieces = self._cut(index, most)
        if not pieces:
            self.memory.cuttable = False
            self._warn_not_split(whole, "they cannot be split into examples")
            return [whole]
        self.memory.cuts += 1
        if self.memory.cuttable is None or self.memory.cuts % 8 == 0:
            self._check_pieces(whole, pieces)
        return pieces if self.memory.cuttable else [whole]

    def _check_pieces(self, whole: Term, pieces: Sequence[Term]) -> None:
        try:
            expected, found = self._nearby([whole]), self._nearby(pieces)
        except Exception as error:  # a training_step may require its own batch size
            self.memory.cuttable = False
            self._warn_not_split(whole, f"the loss of a piece could not be computed ({error})")
            return
        same = agree(found, expected)
        if same is None:
            return  # other weights may show more
        self.memory.cuttable = same
        if same:
            self.memory.warn_once(
                f"a graph of {whole[0]:g} examples does not fit into memory; such batches are "
                f"evaluated in pieces, which give the same loss"
            )
        else:
            self._warn_not_split(
                whole,
                f"the pieces give losses of {_listed(found)} instead of {_listed(expected)} at "
                f"these and at nearby weights, as with BatchNorm in train mode, dropout, a mean "
                f"over tokens or a contrastive loss",
            )

    def _nearby(self, terms: Sequence[Term]) -> Tensor:
        """The mean loss at the weights, and at randomly displaced ones."""
        weights = {str(index): param for index, param in enumerate(self.params)}
        step = list(random_displacement(weights).values())
        losses = []
        with MovableWeights(self.params).displaceable() as move_to:
            for length in (0.0, 1.0):
                move_to([step], (length,))
                losses.append(self._sum_of_losses(terms)[0] / sum(weight for weight, _ in terms))
        return torch.stack(losses)

    def _warn_not_split(self, whole: Term, reason: str) -> None:
        self.memory.warn_once(
            f"a graph of {whole[0]:g} examples does not fit into memory, and such batches are not "
            f"split: {reason}; pass smaller batches if memory runs out"
        )

    def _count_bytes(self) -> None:
        """Measure the graph of one example, on one batch or a piece of it.

        The piece need not give the same loss.
        """
        weight, fn = self.terms[0]
        if weight > self.least and self._cut is not None:
            pieces = self._cut(0, max(int(self.least), 1))
            weight, fn = pieces[0] if pieces else (weight, fn)
        try:
            saved, self.memory.bytes_per_graph = self._bytes_of(fn)
            self.memory.bytes_per_example = saved / weight
        except Exception as error:  # saved-tensor hooks or a piece that the module rejects
            if out_of_memory(error):
                raise
            self.memory.bytes_per_example = math.inf
            self.memory.warn_once(
                f"the memory of a graph could not be measured ({error}): graphs of only "
                f"{self.least:g} examples are kept, and Hessian-vector products take longer"
            )

    def _bytes_of(self, fn: LossFn) -> tuple[int, int]:
        """The bytes that a graph saves, and those of its gradient."""
        with counting_saved(self.params) as saved:
            try:
                _, gradient = self._differentiate(fn, create_graph=True)
            except NoDoubleBackward:
                _, gradient = self._differentiate(fn, create_graph=False)
            held = [g._values() if g.is_sparse else g for g in gradient]
            return saved(), sum(tensor.nbytes for tensor in held)

    # -- one batch -----------------------------------------------------------------------------

    def _sum_of_losses(self, terms: Sequence[Term]) -> Tensor:
        total: Tensor | None = None
        for weight, fn in terms:
            loss = self._value(fn).reshape(1).to(self.device, self.sum_dtype)
            total = loss * weight if total is None else total.add_(loss, alpha=weight)
        assert total is not None
        return total

    def _value(self, fn: LossFn) -> Tensor:
        return checked(self._forward(fn)).detach()

    def _forward(self, fn: LossFn) -> object:
        """The loss without a graph, unless the module differentiates inside its own loss."""
        with self._plain_kernels():
            if not self.forward_needs_grad:
                try:
                    with torch.no_grad():
                        return fn()
                except RuntimeError as error:  # e.g. a gradient penalty: autograd.grad in no_grad
                    if out_of_memory(error):
                        raise
                    with torch.enable_grad():
                        loss = fn()
                    self.forward_needs_grad = True
                    return loss
            with torch.enable_grad():
                return fn()

    def _differentiate(self, fn: LossFn, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if create_graph:
                state = stack.enter_context(self._twice_differentiable())
                state.evaluated = False
            else:
                stack.enter_context(plain_kernels(self.cudnn))
                stack.enter_context(full_float32())  # for finite differences
            loss = _differentiable(fn())
            if create_graph:
                state.evaluated = True
            with translate_double_backward_errors() if create_graph else contextlib.nullcontext():
                gradient = torch.autograd.grad(
                    loss,
                    self.params,
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
        if create_graph and uses_once_differentiable([loss, *gradient]):
            raise NoDoubleBackward("the backward of one of its functions is once_differentiable")
        return loss.detach(), list(gradient)

    def _product(
        self, gradient: Sequence[Tensor], vector: ParameterTensors, keep: bool
    ) -> Sequence[Tensor]:
        # Parameters in which the loss is linear have a gradient without a graph: no curvature.
        curved = [
            (g, v)
            for g, v in zip(gradient, vector, strict=True)
            if v is not None and g.requires_grad
        ]
        if not curved:
            return ()
        # An activation checkpoint recomputes its part, and needs the same kernels as before.
        with translate_double_backward_errors(), self._twice_differentiable():
            return torch.autograd.grad(
                [g for g, _ in curved],
                self.params,
                grad_outputs=[v.to(dtype=g.dtype, device=g.device) for g, v in curved],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def _added(self, total: Tensor | None, weight: float, tensors: Sequence[Tensor]) -> Tensor:
        """``total`` plus ``weight`` times the concatenated tensors; sparse ones become dense."""
        flat = torch.cat(
            [
                real(t.to_dense() if t.is_sparse else t)
                .reshape(-1)
                .to(dtype=self.dtype, device=self.device)
                for t in tensors
            ]
        )
        if total is None:
            return flat.mul_(weight)
        return total.add_(flat, alpha=weight)


def checked(loss: object) -> Tensor:
    """The loss as a scalar tensor; raises if it is not one."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}: expected a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: expected a scalar, "
            f"e.g. loss.mean()"
        )
    if loss.is_complex():
        raise TypeError(
            "loss_fn returned a complex tensor: expected a real scalar, e.g. loss.abs()"
        )
    return loss.reshape(())


def _differentiable(loss: object) -> Tensor:
    scalar = checked(loss)
    if not scalar.requires_grad:
        raise ValueError(
            f"loss_fn returned a loss without a graph ({scalar.dtype}): it was detached, rounded "
            f"to an integer, computed under no_grad, or does not depend on a trainable parameter; "
            f"expected one that loss.backward() would take"
        )
    return scalar


def _listed(losses: Tensor) -> str:
    return " and ".join(f"{float(loss):.6g}" for loss in losses)
