"""The loss as a function of the weights: its value, gradient and Hessian-vector products.

Everything else in this package sees the network only through an :class:`Objective`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_landscape.geometry.kernels import plain_kernels, saved_dtypes
from lightning_landscape.geometry.vectors import Vector, norm, working_dtype

LossFn = Callable[[], Tensor]
Engine = Literal["auto", "double_backward", "finite_difference"]

# Central differences of the gradient err as step^2 (truncation) plus precision/step (rounding).
# Steps in units of ||w|| for a unit vector, by the coarsest precision that the loss is computed in:
# the flat optimum found on smooth networks is 1e-4 .. 1e-3 in float32; in half precision, 1e-2 errs
# by 2 % along the top eigenvector and by 25 % along random ones.
_DIFFERENCE_STEP = {
    torch.float64: 1e-5,
    torch.float32: 5e-4,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
}

# What torch's decorator makes of any backward, and the node that it puts into a gradient's graph.
_MARKED = once_differentiable(lambda ctx, *grads: grads).__code__
_ERROR = "torch::autograd::Error"


class OtherRankError(RuntimeError):
    """Another process failed while computing its share; this one gives up with it."""


class _NoDoubleBackward(RuntimeError):
    """The loss cannot be differentiated twice."""


class Objective:
    r"""A loss ``L(w) = sum_i weight_i L_i(w) / sum_i weight_i`` over named parameters ``w``.

    Args:
        loss_fn: ``loss_fn() -> scalar tensor``, or a sequence of ``(weight, loss_fn)`` for several
            batches, ``weight`` being the number of examples when each loss is a mean over them.
            Every call must give the same loss at the same weights.
        params: name -> parameter, e.g. ``dict(model.named_parameters())``.  Frozen ones are
            dropped, a parameter under two names counts once.
        engine: how Hessian-vector products are made.  ``"double_backward"``: exactly, on a graph
            that is built once per batch and kept.  ``"finite_difference"``: central differences of
            the gradient.  ``"auto"``: the first, and the second where the loss has no double
            backward; :attr:`engine_used` and :attr:`engine_note` then say so.
        reduce: sums a tensor over processes and returns it, the same on all.  Each process then
            holds its own share of the batches.  If one fails, all raise.
        check_deterministic: evaluate the loss twice the first time and refuse one that varies.

    The weights are where they were after every call, also after one that raised: they are copied
    back, bit for bit.  What is kept for the next call (graph, loss, gradient) is dropped when the
    weights have been moved, by this object or by anyone else.

    Raises:
        TypeError: a loss that is not a tensor; a complex parameter.
        ValueError: no trainable parameter; a loss that is not scalar, does not depend on the
            parameters or varies from call to call.

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
    ) -> None:
        if engine not in ("auto", "double_backward", "finite_difference"):
            raise ValueError(
                f"engine={engine!r}: expected 'auto', 'double_backward' or 'finite_difference'"
            )
        self.params = _trainable(params)
        self.engine = engine
        self.engine_used: Literal["double_backward", "finite_difference"] = (
            "finite_difference" if engine == "finite_difference" else "double_backward"
        )
        self.engine_note = ""
        self.forwards = 0  # evaluations of the whole loss
        self.gradients = 0
        self.hvps = 0
        self._terms = _weighted_terms(loss_fn)
        self._weight = sum(weight for weight, _ in self._terms)
        self._reduce = reduce
        self._unchecked = check_deterministic
        self._list = list(self.params.values())
        self._sizes = [p.numel() for p in self._list]
        self._size = sum(self._sizes)
        self._dtype = (
            torch.float64 if any(p.dtype == torch.float64 for p in self._list) else torch.float32
        )
        self._device = self._list[0].device
        # float64 sums, where the device has them
        self._sum_dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._cudnn = True
        self._forward_needs_grad = False
        self._relative_step: float | None = None  # of finite differences, once needed
        self._graphs: list[tuple[float, list[Tensor]]] | None = None
        self._loss: Tensor | None = None
        self._gradient: Tensor | None = None
        self._versions: tuple[int, ...] = ()
        self._norms: Tensor | None = None

    # -- the four things one can ask -----------------------------------------------------------

    def loss(self) -> Tensor:
        """``L(w)``, a 0-dimensional float64 tensor.  Cost: one forward, nothing if known."""
        self._begin()
        if self._loss is None:
            self._loss = self._mean_over_ranks(self._local_loss, 1, self._sum_dtype)[0]
        return self._loss.clone()

    def gradient(self) -> dict[str, Tensor]:
        """``dL/dw``, one tensor per parameter.  Cost: one gradient, nothing if known."""
        self._begin()
        if self._gradient is None:
            self._gradient = self._mean_over_ranks(self._local_gradient, self._size, self._dtype)
        return self._named(self._gradient.clone())

    def hvp(self, vector: Vector) -> dict[str, Tensor]:
        """``H v`` with the Hessian ``H`` at ``w``.

        Cost: about 2 gradients on the kept graph, which the first call builds (2 gradients more);
        2 gradients by finite differences.
        """
        self._begin()
        self.hvps += 1
        pieces = self._pieces(vector)
        if self.engine_used == "double_backward":
            try:
                return self._double_backward_hvp(pieces)
            except _NoDoubleBackward as error:
                self.release()
                if self.engine == "double_backward":
                    raise RuntimeError(
                        f"engine='double_backward': the loss cannot be differentiated twice "
                        f"({error}); pass engine='auto' or 'finite_difference'"
                    ) from error
                self.engine_used = "finite_difference"
                self.engine_note = f"no double backward: {error}"
        return self._difference_hvp(vector)

    def loss_at(self, displacement: Vector) -> Tensor:
        """``L(w + displacement)``.  Cost: one forward."""
        return self.losses_at([displacement], [(1.0,)])[0]

    # -- variations on them --------------------------------------------------------------------

    def losses_at(
        self, directions: Sequence[Vector], coefficients: Iterable[Sequence[float]]
    ) -> Tensor:
        """``L(w + sum_j c_j direction_j)`` for each tuple ``c``: a float64 tensor, one per tuple.

        Cost: one forward each; the losses stay on the device until the last is there.
        """
        self._begin()
        points = list(coefficients)
        moves = [self._pieces(direction) for direction in directions]

        def local() -> Tensor:
            losses = torch.zeros(len(points), dtype=self._sum_dtype, device=self._device)
            with self._displaceable() as move_to:
                for i, point in enumerate(points):
                    move_to(moves, point)
                    losses[i] = self._local_loss()[0]
            return losses

        return self._mean_over_ranks(local, len(points), self._sum_dtype)

    def gradient_at(self, displacement: Vector) -> dict[str, Tensor]:
        """``dL/dw`` at ``w + displacement``.  Cost: one gradient."""
        self._begin()
        pieces = self._pieces(displacement)

        def local() -> Tensor:
            with self._displaceable() as move_to:
                move_to([pieces], (1.0,))
                return self._local_gradient()

        return self._named(self._mean_over_ranks(local, self._size, self._dtype))

    def batch_mean(self, quantity: Callable[[Objective], float]) -> float:
        """The mean over batches, by weight, of ``quantity(objective)`` of each batch alone.

        Over processes too.  Each ``objective`` belongs to one process: ``quantity`` may take
        decisions that differ from batch to batch.
        """
        self._begin()
        self.release()  # quantity may move the weights

        def local() -> Tensor:
            total = torch.zeros(1, dtype=self._sum_dtype, device=self._device)
            batches = []
            for weight, fn in self._terms:
                batch = Objective(fn, self.params, engine=self.engine, check_deterministic=False)
                batch._cudnn, batch._forward_needs_grad = self._cudnn, self._forward_needs_grad
                batches.append(batch)
                total += weight * quantity(batch)
            # One evaluation on every batch is one of the whole loss.
            self.forwards += max(batch.forwards for batch in batches)
            self.gradients += max(batch.gradients for batch in batches)
            self.hvps += max(batch.hvps for batch in batches)
            return total

        return float(self._mean_over_ranks(local, 1, self._sum_dtype)[0])

    def release(self) -> None:
        """Drop the kept graph, and with it the memory of one forward and backward per batch."""
        self._graphs = None

    # -- one process's share -------------------------------------------------------------------

    def _local_loss(self) -> Tensor:
        self.forwards += 1
        losses = [weight * _checked(self._forward(fn)).detach() for weight, fn in self._terms]
        return torch.stack([loss.to(self._device, self._sum_dtype) for loss in losses]).sum(0, True)

    def _forward(self, fn: LossFn) -> object:
        """The loss without a graph, unless the module differentiates inside its own loss."""
        with plain_kernels(self._cudnn):
            if not self._forward_needs_grad:
                try:
                    with torch.no_grad():
                        return fn()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # e.g. a gradient penalty: autograd.grad under no_grad
                    with torch.enable_grad():
                        loss = fn()
                    self._forward_needs_grad = True
                    return loss
            with torch.enable_grad():
                return fn()

    def _differentiate(self, fn: LossFn, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad(), plain_kernels(self._cudnn):
            loss = _differentiable(fn())
            with _refusing_double_backward() if create_graph else contextlib.nullcontext():
                gradient = torch.autograd.grad(
                    loss,
                    self._list,
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
        if create_graph and _once_differentiable([loss, *gradient]):
            raise _NoDoubleBackward("the backward of one of its functions is once_differentiable")
        return loss.detach(), list(gradient)

    def _local_gradient(self) -> Tensor:
        self.gradients += 1
        total = torch.zeros(self._size, dtype=self._dtype, device=self._device)
        for weight, fn in self._terms:
            total += weight * self._flat(self._differentiate(fn, create_graph=False)[1])
        return total

    def _double_backward_hvp(self, pieces: Sequence[Tensor | None]) -> dict[str, Tensor]:

        def local() -> Tensor:
            return self._local_hvp(pieces)

        try:
            return self._named(self._mean_over_ranks(local, self._size, self._dtype))
        except _NoDoubleBackward:
            # cuDNN's recurrent layers have none.  Without cuDNN convolutions are slower, hence
            # only now; tried whatever the message says, so that all processes do the same.
            if not (self._cudnn and torch.cuda.is_available()):
                raise
        self.release()
        self._cudnn = False
        return self._named(self._mean_over_ranks(local, self._size, self._dtype))

    def _local_hvp(self, pieces: Sequence[Tensor | None]) -> Tensor:
        if self._graphs is None:
            self._graphs = self._build_graphs()
        total = torch.zeros(self._size, dtype=self._dtype, device=self._device)
        for weight, gradient in self._graphs:
            # Parameters in which the loss is linear have a gradient without a graph: no curvature.
            curved = [
                (g, v)
                for g, v in zip(gradient, pieces, strict=True)
                if v is not None and g.requires_grad
            ]
            if not curved:
                continue
            outputs = [g for g, _ in curved]
            vectors = [v.to(dtype=g.dtype, device=g.device) for g, v in curved]
            with _refusing_double_backward():
                product = torch.autograd.grad(
                    outputs,
                    self._list,
                    grad_outputs=vectors,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            total += weight * self._flat(product)
        return total

    def _build_graphs(self) -> list[tuple[float, list[Tensor]]]:
        self.gradients += 1
        graphs = []
        loss = torch.zeros((), dtype=self._sum_dtype, device=self._device)
        for weight, fn in self._terms:
            value, gradient = self._differentiate(fn, create_graph=True)
            graphs.append((weight, gradient))
            loss += weight * value.to(loss)
        if self._reduce is None:  # with several processes these are one share only
            flats = [weight * self._flat([g.detach() for g in graph]) for weight, graph in graphs]
            self._gradient = torch.stack(flats).sum(0) / self._weight
            self._loss = loss / self._weight
        return graphs

    def _difference_hvp(self, vector: Vector) -> dict[str, Tensor]:
        length = norm(vector)
        if length == 0.0:
            return {name: torch.zeros_like(p).detach() for name, p in self.params.items()}
        if self._relative_step is None:
            self._relative_step = float(self._mean_over_ranks(self._local_step, 1, self._sum_dtype))
        weights = norm({name: p.detach() for name, p in self.params.items()}) or 1.0
        step = self._relative_step * weights / length
        ahead = self.gradient_at({name: step * v for name, v in vector.items()})
        behind = self.gradient_at({name: -step * v for name, v in vector.items()})
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}

    def _local_step(self) -> Tensor:
        used = {p.dtype for p in self._list} | saved_dtypes(self._terms[0][1])
        step = max(step for dtype, step in _DIFFERENCE_STEP.items() if dtype in used)
        return torch.full((1,), self._weight * step, dtype=self._sum_dtype, device=self._device)

    # -- moving the weights --------------------------------------------------------------------

    @contextlib.contextmanager
    def _displaceable(self) -> Iterator[Callable[..., None]]:
        """Gives ``move_to(directions, coefficients)``; copies the weights back in the end.

        Copying back, not subtracting: ``(w + d) - d`` is not ``w`` in floating point.  And from a
        copy taken now: an older one might undo training that went unnoticed.
        """
        self.release()  # its saved tensors are the weights about to be overwritten
        live = [p.detach() for p in self._list]
        base = [p.clone() for p in live]

        def move_to(moves: Sequence[Sequence[Tensor | None]], point: Sequence[float]) -> None:
            torch._foreach_copy_(live, base)
            for pieces, coefficient in zip(moves, point, strict=True):
                moved = [(w, d) for w, d in zip(live, pieces, strict=True) if d is not None]
                if moved and coefficient != 0.0:
                    torch._foreach_add_(
                        [w for w, _ in moved], [d for _, d in moved], alpha=coefficient
                    )

        try:
            yield move_to
        finally:
            torch._foreach_copy_(live, base)
            self._versions = self._current_versions()

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self._list)

    def _current_norms(self) -> Tensor:
        live = [p.detach() for p in self._list]
        norms = torch._foreach_norm(live, 2, dtype=self._sum_dtype)
        return torch.stack([norm.to(self._device) for norm in norms])

    def _begin(self) -> None:
        """Forget what belongs to other weights; check once that the loss is a function of them."""
        # Fused optimizers and writes through ``.data`` leave the version counters as they were.
        versions, norms = self._current_versions(), self._current_norms()
        same_norms = self._norms is not None and torch.equal(norms, self._norms)
        if versions != self._versions or not same_norms:
            self._graphs = self._loss = self._gradient = None
        self._versions, self._norms = versions, norms
        if not self._unchecked:
            return
        first = self._mean_over_ranks(self._local_loss, 1, self._sum_dtype)[0]
        again = self._mean_over_ranks(self._local_loss, 1, self._sum_dtype)[0]
        if not torch.allclose(first, again, rtol=1e-5, atol=0.0, equal_nan=True):
            raise ValueError(
                f"loss_fn is not deterministic: two evaluations at the same weights gave "
                f"{float(first):.7g} and {float(again):.7g}; seed its random numbers inside "
                f"loss_fn, use model.eval(), or pass check_deterministic=False"
            )
        self._unchecked, self._loss = False, first

    # -- flat tensors, processes ---------------------------------------------------------------

    def _mean_over_ranks(
        self, compute: Callable[[], Tensor], size: int, dtype: torch.dtype
    ) -> Tensor:
        """``sum over processes of compute() / sum of weights``; ``compute`` gives ``(size,)``.

        The one reduction carries the sum, the weight and what went wrong, so that no process
        waits for one that failed and all take the same way out.
        """
        if self._reduce is None:
            return compute() / self._weight
        fault: Exception | None = None
        try:
            total = compute()
        except Exception as error:  # every process must reach the reduction below
            fault, total = error, torch.zeros(size, dtype=dtype, device=self._device)
        unsupported = isinstance(fault, _NoDoubleBackward)
        status = [self._weight if fault is None else 0.0, float(unsupported)]
        status.append(float(fault is not None and not unsupported))
        carried = torch.cat([total.to(self._device), total.new_tensor(status).to(self._device)])
        carried = self._reduce(carried)
        weight, unsupported_ranks, failed_ranks = carried[-3:].tolist()
        try:
            if failed_ranks:
                if fault is not None and not unsupported:
                    raise fault
                raise OtherRankError("another process failed while computing its share")
            if unsupported_ranks:
                raise fault if fault is not None else _NoDoubleBackward("on another process")
        finally:
            fault = None  # its traceback holds this frame, and that the graph
        mean: Tensor = carried[:-3] / weight
        return mean

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One flat tensor; gradients of sparse embeddings are made dense."""
        return torch.cat(
            [
                (t.to_dense() if t.is_sparse else t)
                .reshape(-1)
                .to(dtype=self._dtype, device=self._device)
                for t in tensors
            ]
        )

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, self._sizes)
        return {
            name: piece.view(p.shape).to(dtype=working_dtype(p.dtype), device=p.device)
            for (name, p), piece in zip(self.params.items(), pieces, strict=True)
        }

    def _pieces(self, vector: Vector) -> list[Tensor | None]:
        """``vector`` in the order of the parameters, ``None`` where it is zero."""
        for name, value in vector.items():
            if name not in self.params:
                raise ValueError(f"vector[{name!r}]: no trainable parameter of that name")
            if value.shape != self.params[name].shape:
                raise ValueError(
                    f"vector[{name!r}] has shape {tuple(value.shape)}: expected the parameter's "
                    f"shape {tuple(self.params[name].shape)}"
                )
        return [
            vector[name].detach().to(dtype=p.dtype, device=p.device) if name in vector else None
            for name, p in self.params.items()
        ]


def _trainable(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params={type(params).__name__}: expected a mapping from name to parameter, "
            f"e.g. dict(model.named_parameters())"
        )
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in params.items():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        if parameter.is_complex():
            raise TypeError(
                f"params[{name!r}] is complex: curvature is defined for real parameters; "
                f"leave it out, or train its real view (torch.view_as_real)"
            )
        seen.add(id(parameter))
        kept[name] = parameter
    if not kept:
        raise ValueError(
            f"params holds {len(params)} tensors and none requires a gradient: expected at least "
            f"one trainable parameter"
        )
    return kept


def _weighted_terms(
    loss_fn: LossFn | Sequence[tuple[float, LossFn]],
) -> list[tuple[float, LossFn]]:
    terms = [(1.0, loss_fn)] if callable(loss_fn) else list(loss_fn)
    if not terms:
        raise ValueError("loss_fn=[]: expected at least one (weight, loss_fn)")
    for weight, fn in terms:
        if not (callable(fn) and math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"loss_fn holds ({weight!r}, {fn!r}): expected (weight > 0, callable) pairs"
            )
    return terms


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}: expected a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: expected a scalar, "
            f"e.g. loss.mean()"
        )
    return loss.reshape(())


def _differentiable(loss: object) -> Tensor:
    checked = _checked(loss)
    if not checked.requires_grad:
        raise ValueError(
            "loss_fn returned a loss without a graph: it was detached, computed under no_grad, or "
            "does not depend on a trainable parameter"
        )
    return checked


def _once_differentiable(tensors: Sequence[Tensor]) -> bool:
    """Whether a function marked ``once_differentiable`` had a part in a loss or its gradient.

    In the loss it is seen by its backward.  In the gradient it leaves a node that raises, but no
    way from there to the parameters; or, where what flowed into it was constant, nothing at all.
    Autograd, asked for the derivatives by the parameters alone, passes both by and leaves part of
    the Hessian out without a word.
    """
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _MARKED or node.name() == _ERROR:
            return True
        following = {following for following, _ in node.next_functions if following is not None}
        pending += following - seen
        seen |= following
    return False


@contextlib.contextmanager
def _refusing_double_backward() -> Iterator[None]:
    """Name the error of a loss that cannot be differentiated twice; out of memory is another."""
    try:
        yield
    except (torch.OutOfMemoryError, OtherRankError):
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise _NoDoubleBackward(str(error).strip().split("\n")[0]) from error
