"""One round of measurements at one step: the losses and results that callbacks share."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.geometry.checks import few
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.gradient_check import gradient_mismatch
from lightning_landscape.geometry.kernels import plain_kernels
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import Vector
from lightning_landscape.training.data.batch import (
    ProbeBatch,
    clone_batch,
    concat_batches,
)
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.isolated import Isolation
from lightning_landscape.training.losses import (
    LossSpec,
    ProbeMode,
    evaluation,
    mask_seed,
)
from lightning_landscape.training.objectives import Measurer, Objectives
from lightning_landscape.training.processes import Processes
from lightning_landscape.training.run_state import RunState

# Precisions at which a change of the loss by 0.1 % is not lost in rounding.
_EXACT = ("32-true", "64-true")
# The largest mismatch of a gradient that kinks and third derivatives explain.
_MISMATCH = 0.2


class Round:
    """One round of measurements at one step; passed to ``measure`` of each callback.

    Attributes:
        step: number of training steps so far, the label of all values.
        trainer: the Trainer.
        pl_module: the module that is trained.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        isolation: Isolation,
        run: RunState,
        step: int,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.step = step
        self._isolation = isolation
        self._run = run
        self._objectives = Objectives(trainer, pl_module, isolation, run)
        self._eigen: dict[tuple[LossSpec, str, float, int, float], EigenResult] = {}

    # -- losses --------------------------------------------------------------------------------

    def objective(self, monitor: Measurer) -> Objective:
        """The loss on the callback's probe; callbacks with equal losses share it."""
        spec = monitor.loss
        objective = self._objectives.of(monitor, spec)
        if spec in self._run.concatenated:
            monitor.note_concat(self._run.concatenated[spec], self._run.series.get(spec, 1))
        return objective

    def objective_on(
        self,
        monitor: Measurer,
        probe: Probe,
        *,
        mode: ProbeMode | None = None,
        reestimated: bool = False,
    ) -> Objective:
        """The callback's loss on another probe, in ``mode``; None: the callback's mode.

        ``reestimated``: in eval mode, with BatchNorm statistics that are estimated at each
        evaluation from the callback's own probe.  Such a loss has no gradients.
        """
        spec = replace(monitor.loss, probe=probe, mode=mode or monitor.loss.mode)
        if reestimated:
            return self._objectives.reestimated(monitor, spec)
        return self._objectives.of(monitor, spec)

    def batch_losses(self, monitor: Measurer, batches: Sequence[ProbeBatch]) -> list[float]:
        """The mean loss per example on each of this process's batches, in the callback's mode."""
        spec = monitor.loss
        terms, cut = self._objectives.terms(spec, batches)
        if not terms:
            return []
        key = ("batches", spec)
        return self._objectives.from_terms(monitor, spec, key, terms, cut).batch_losses()

    def batch_values(
        self, monitor: Measurer, batches: Sequence[ProbeBatch], function: Callable[..., Any]
    ) -> list[Any]:
        """``function(pl_module, batch)`` on each of this process's batches, in the same mode."""
        terms, _ = self._objectives.terms(
            replace(monitor.loss, loss_fn=function, reduction="mean"), batches
        )
        with torch.no_grad(), plain_kernels():
            return [value() for _, value in terms]

    def batch_objective(self, monitor: Measurer) -> Objective:
        """The loss on the training batches of the last step, at the current weights.

        Several with gradient accumulation; see :attr:`batch_share`.
        """
        self._run.last_step.check()
        self.release()
        spec = replace(monitor.loss, reduction="mean")
        terms, cut = self._objectives.terms(spec, self._run.last_step.batches)
        return self._objectives.from_terms(monitor, spec, ("batch", monitor.loss), terms, cut)

    @property
    def batch_share(self) -> float:
        """The optimizer's loss relative to :meth:`batch_objective`: batches per accumulated ones.

        Less than 1 where an epoch ends within an accumulation.
        """
        return self._run.last_step.share

    def batches(self, monitor: Measurer) -> list[ProbeBatch]:
        """This process's batches of the callback's probe, as :meth:`objective` evaluates them.

        Each has a ``batch``, as ``training_step`` takes it, and a ``size``, its number of examples.
        """
        self.objective(monitor)  # decides whether they are concatenated
        spec = monitor.loss
        if self._run.concatenated.get(spec):
            return [concat_batches(spec.probe.batches)]
        return list(spec.probe.batches)

    @contextlib.contextmanager
    def evaluation(self, monitor: Measurer, probe_batch: ProbeBatch) -> Iterator[Any]:
        """A context to evaluate the module on one of :meth:`batches`; yields a copy of the batch.

        Mode, precision and random numbers (dropout masks) are those of the loss on that batch.
        Buffers and attributes are restored on exit.  Attention uses kernels that can be
        differentiated twice.
        """
        spec = monitor.loss
        batches = spec.probe.batches
        position = next((i for i, batch in enumerate(batches) if batch is probe_batch), 0)
        seed = mask_seed(self.trainer, position)
        with (
            plain_kernels(),
            evaluation(self.trainer, self._isolation, seed, spec.mode),
        ):
            yield clone_batch(probe_batch.batch)

    def release(self) -> None:
        """Release all graphs, after a failure that may be an out-of-memory error."""
        self._objectives.release()

    # -- sizes, processes, time ----------------------------------------------------------------

    @property
    def train_batch_size(self) -> int:
        """Examples in this process's last training batch."""
        return self._run.costs.batch_size

    def probe_size(self, monitor: Measurer) -> int:
        """Examples in the callback's probe, over all processes."""
        return self._run.probe_size(monitor.loss.probe)

    def size_of(self, probe: Probe) -> int:
        """Examples in another probe, over all processes."""
        return self._run.probe_size(probe)

    @property
    def processes(self) -> Processes:
        """The processes of the run, which all measure the same at the same time."""
        return self._run.processes

    def clock(self) -> float:
        """The time in seconds, after all work submitted to the device has finished."""
        return self._run.clock(self.pl_module)

    def is_limited(self, monitor: Measurer) -> bool:
        """Whether the callback has a budget."""
        return monitor.max_overhead is not None and math.isfinite(self._run.deadline)

    def operations_within_budget(self, seconds: float) -> float:
        """How many operations of ``seconds`` each the remaining budget of this round allows.

        Computed on rank zero, the same on all processes.
        """
        processes = self._run.processes
        left = max(self._run.deadline - self._run.reserved - self.clock(), 0.0)
        count = left / max(seconds, 1e-9) if processes.rank == 0 else 0.0
        return float(processes.sum(torch.tensor(count, device=processes.device)))

    def time_forward(self, monitor: Measurer) -> None:
        """Time a forward of the callback's probe."""
        objective = self.objective(monitor)
        started = self.clock()
        objective.losses_at([], [()])
        self._run.costs.record_forward(self.clock() - started)

    def use_logged_sizes(self, monitor: Measurer, probe: Probe) -> None:
        """Count the examples of ``probe`` as the module does in ``self.log``.

        By one evaluation of its batches, at the first measurement.
        """
        spec = replace(monitor.loss, probe=probe, reduction="mean")
        self._objectives.use_logged_sizes(monitor, spec, captured=True)

    def from_rank_zero(self, tensor: Tensor) -> Tensor:
        """Rank zero's ``tensor``; on all others it must be zeros of the same shape."""
        return self._run.processes.sum(tensor)

    @property
    def work(self) -> int:
        """The computations so far, in forwards of the probe (a gradient is 3, an HVP 6)."""
        return self._objectives.work

    # -- the last step -------------------------------------------------------------------------

    def has_step(self, monitor: Measurer, what: str) -> bool:
        """Whether a training step was made, which ``what`` needs; warns if not."""
        if not self._run.trains:
            monitor.warn_once(f"{what} is not available here: it needs a training step")
        return self._run.trains

    def has_batch(self, monitor: Measurer, what: str) -> bool:
        """Whether the last training batch gave a loss, which ``what`` needs; warns if not."""
        if not self.has_step(monitor, what):
            return False
        self._run.last_step.check()
        if not self._run.last_step.batches:
            monitor.warn_once(
                f"{what} is not logged at steps whose batches gave no loss, or were not all copied"
            )
            return False
        return True

    @property
    def clipped_share(self) -> float | None:
        """Of the last 20 steps that were seen; the same on all processes; None without any."""
        return self._run.clipped_share if self._run.trains else None

    def altered_gradient(self, monitor: Measurer) -> str:
        """Why the gradient of training is not that of the loss, or an empty string."""
        if hooked := self._isolation.hooked:
            return (
                f"hooks of {few(hooked)} (register_hook) change the gradient that training uses; "
                f"the loss is measured without them"
            )
        known = self._run.altered
        if monitor.loss not in known and self.trainer.precision in _EXACT:
            try:
                mismatch = _mismatch(self.objective(monitor))
            except Exception as error:  # a module that cannot be evaluated at other weights
                reraise_interrupt(error)
                if self.processes.count > 1:
                    raise  # on all of them
                monitor.warn_once(f"the gradient could not be compared with the loss: {error}")
                mismatch = 0.0
            if mismatch is not None:
                known[monitor.loss] = _altered(mismatch) if mismatch > _MISMATCH else ""
        return known.get(monitor.loss, "")

    @property
    def hooked_parameters(self) -> Sequence[str]:
        """Parameters with hooks (``register_hook``), which change the gradient of training.

        They are disabled while the loss is measured.
        """
        return self._isolation.hooked

    @functools.cached_property
    def optimizers(self) -> list[Any]:
        """Read-only views of the optimizers, with the parameters that are measured."""
        return self._isolation.unsharded.view_optimizers(self.trainer.optimizers)

    def _optimized(self, objective: Objective) -> list[Tensor]:
        """The objective's parameters as the optimizers hold them (shards under FSDP)."""
        return [self._isolation.unsharded.shard_of(p) for p in objective.params.values()]

    def _weights_before(self, objective: Objective) -> list[Tensor]:
        before = self._run.last_step.before.weights
        optimized = self._optimized(objective)
        if any(id(parameter) not in before for parameter in optimized):
            raise RuntimeError("there is no copy of the weights before the optimizer's last step")
        return self._isolation.unsharded.gather([before[id(parameter)] for parameter in optimized])

    @property
    def has_update(self) -> bool:
        """Whether there is a copy of the weights before the last step."""
        return bool(self._run.last_step.before.weights)

    def last_update(self, objective: Objective) -> dict[str, Tensor]:
        """The optimizer's last step, ``w - w_before``, over the measured parameters."""
        before = self._weights_before(objective)
        return {
            name: parameter.detach() - earlier
            for (name, parameter), earlier in zip(objective.params.items(), before, strict=True)
        }

    def has_moved(self, monitor: Measurer, objective: Objective, what: str) -> bool:
        """Whether the last step moved the measured parameters; warns if not.

        That of another optimizer does not.  The same on all processes.
        """
        if any(bool(part.any()) for part in self.last_update(objective).values()):
            return True
        monitor.warn_once(
            f"{what} is not logged at steps that leave the measured parameters as they are: "
            f"another optimizer stepped, or the learning rate was 0"
        )
        return False

    def last_rates(self, objective: Objective) -> dict[str, float]:
        """The learning rate of the last step, by parameter."""
        rates = self._run.last_step.before.rates
        optimized = self._optimized(objective)
        return {name: rates[id(p)] for name, p in zip(objective.params, optimized, strict=True)}

    @contextlib.contextmanager
    def before_the_step(self, monitor: Measurer) -> Iterator[Objective]:
        """The loss on the probe, with the weights set to those before the last step."""
        objective = self._objectives.build(monitor, monitor.loss)
        before = self._weights_before(objective)
        weights = [p.detach() for p in objective.params.values()]
        now = [p.clone() for p in weights]
        try:
            torch._foreach_copy_(weights, before)
            yield objective
        finally:
            torch._foreach_copy_(weights, now)

    def top_eigenvalues(
        self,
        monitor: Measurer,
        k: int,
        *,
        method: Literal["lanczos", "power"] = "lanczos",
        tol: float = 1e-2,
        max_hvps: int = 50,
        rtol: float = 0.0,
        init: Vector | EigenResult | None = None,
    ) -> EigenResult:
        """At least ``k`` eigenvalues; a result of this round with the same settings is reused.

        A result with fewer eigenvalues or other settings is the start of the solver.
        """
        key = (monitor.loss, method, tol, max_hvps, rtol)
        known = self._eigen.get(key)
        if known is None or len(known.eigenvalues) < k:
            same_loss = [found for other, found in self._eigen.items() if other[0] == monitor.loss]
            objective = self.objective(monitor)
            known = self._eigen[key] = top_eigenvalues(
                objective,
                k,
                method=method,
                tol=tol,
                max_hvps=max_hvps,
                rtol=rtol,
                init=same_loss[-1] if same_loss else init,
                hint=objective.gradient(products_follow=True),
            )
        return known

    def engine(self, monitor: Measurer) -> dict[str, str]:
        """How this round computed Hessian-vector products, and why; empty without any."""
        objective = self._objectives.known(monitor.loss)
        if objective is None or objective.hvps == 0:
            return {}
        note = {"engine_note": objective.engine_note} if objective.engine_note else {}
        return {"engine": objective.engine_used, **note}


def _mismatch(objective: Objective) -> float | None:
    mismatch = gradient_mismatch(objective)
    if mismatch is not None and mismatch > _MISMATCH:
        return gradient_mismatch(objective, scale=8.0)  # it may have been a kink of the loss
    return mismatch


def _altered(mismatch: float) -> str:
    return (
        f"the gradient that autograd gives is not the derivative of the loss (along it they differ "
        f"by {mismatch:.0%}): a hook on an activation or a module, a gradient that is stopped "
        f"(detach), reversed or passed straight through; second derivatives are altered likewise"
    )
