"""One round of measurements at one step: what the callbacks that are due work with."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_landscape.geometry.batches import Cut, Term
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.kernels import plain_kernels
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.vectors import Vector
from lightning_landscape.training.isolation import Isolation
from lightning_landscape.training.joining import NotJoinable
from lightning_landscape.training.losses import (
    ProbeMode,
    Reduction,
    UserLoss,
    probe_terms,
    reestimated_term,
)
from lightning_landscape.training.probe import Probe, ProbeBatch
from lightning_landscape.training.processes import Processes
from lightning_landscape.training.sharding import Whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.figures.surface import Surface
    from lightning_landscape.training.monitor import Monitor
    from lightning_landscape.training.session import Session


@dataclass
class Measured:
    """What one callback found in one round.

    Attributes:
        values: scalars under their full keys; logged everywhere.
        facts: plain values that only the history keeps.
        before: scalars of the weights before the last step.
        pictures: tag -> a function that draws it.
        files: file name -> a function that writes it.
        surfaces: tag -> a function that makes a surface in space.
        drawings: what a picture or a file of the whole run costs, in ordinary pictures; 1 if it is
            not here.
    """

    values: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    surfaces: dict[str, Callable[[], Surface]] = field(default_factory=dict)
    drawings: dict[str, float] = field(default_factory=dict)


class Round:
    """One round of measurements at one step: what the callbacks work with.

    Attributes:
        step: steps behind the weights, the label of all values.
        trainer: Lightning's.
        pl_module: the module that trains.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        isolation: Isolation,
        session: Session,
        step: int,
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.step = step
        self._isolation = isolation
        self._session = session
        self._objectives: dict[Any, Objective] = {}
        self._eigen: dict[Any, EigenResult] = {}

    def objective(self, monitor: Monitor) -> Objective:
        """The loss on the callback's probe; shared between callbacks that mean the same one."""
        key = monitor.loss_key
        if key not in self._objectives:
            self._objectives[key] = self._on_probe(monitor)
        return self._alone(key)

    def _alone(self, key: Any) -> Objective:
        """The objective ``key``; the graphs of others make room for its own."""
        for other, objective in self._objectives.items():
            if other != key:
                objective.release()
        return self._objectives[key]

    def further_objective(self, monitor: Monitor, probe: Probe) -> Objective:
        """The loss on another probe, in eval mode."""
        key = (id(probe), "eval", *monitor.loss_key[2:])
        if key not in self._objectives:
            self._objectives[key] = self._build(monitor, key, probe, "eval")
        return self._alone(key)

    def objective_on(
        self, monitor: Monitor, probe: Probe, *, reestimated: bool = False
    ) -> Objective:
        """The loss on any probe of the callback's, in its mode.

        ``reestimated``: in eval mode, BatchNorm's statistics are estimated at each evaluation, from
        the callback's own probe.  There are no gradients of such a loss.
        """
        key = (id(probe), reestimated, *monitor.loss_key[1:])
        if key not in self._objectives:
            if reestimated:
                terms = reestimated_term(
                    self.trainer,
                    self.pl_module,
                    self._isolation,
                    monitor.probe_in_use,
                    probe,
                    loss_fn=monitor.loss_fn,
                    reduction=monitor.loss_reduction,
                    total=self._session.probes.size(probe),
                )
                self._objectives[key] = self._objective(monitor, key, terms, lambda *_: [])
            else:
                self._objectives[key] = self._build(monitor, key, probe, monitor.probe_mode)
        return self._alone(key)

    def further_size(self, probe: Probe) -> int:
        """Examples in another probe, over all processes."""
        return self._session.probes.size(probe)

    def batch_losses(self, monitor: Monitor, batches: Sequence[ProbeBatch]) -> list[float]:
        """The mean loss per example of each of this process's batches, in the callback's mode."""
        terms, cut = self._terms(monitor, batches, monitor.loss_fn, monitor.loss_reduction)
        key = ("batches", *monitor.loss_key)
        return self._objective(monitor, key, terms, cut).batch_losses() if terms else []

    def batch_values(
        self, monitor: Monitor, batches: Sequence[ProbeBatch], function: Callable[..., Any]
    ) -> list[Any]:
        """``function(pl_module, batch)`` of each of this process's batches, likewise."""
        terms, _ = self._terms(monitor, batches, function, "mean")
        with torch.no_grad(), plain_kernels():
            return [value() for _, value in terms]

    def _terms(
        self,
        monitor: Monitor,
        batches: Sequence[ProbeBatch],
        loss_fn: UserLoss | None,
        reduction: Reduction,
    ) -> tuple[list[Term], Cut]:
        probe = Probe()
        probe.batches = list(batches)
        return probe_terms(
            self.trainer,
            self.pl_module,
            self._isolation,
            probe,
            mode=monitor.probe_mode,
            loss_fn=loss_fn,
            reduction=reduction,
            total=1,
        )

    @property
    def processes(self) -> Processes:
        """Those of the run, which all measure the same at the same time."""
        return self._session.processes

    def clock(self) -> float:
        """The time, in seconds, when all work given to the device is done."""
        return self._session.clock(self.pl_module)

    def is_limited(self, monitor: Monitor) -> bool:
        """Whether the callback keeps to a budget, and somebody knows how long the run will be."""
        return monitor.max_overhead is not None and math.isfinite(self._session.values_until)

    def affordable(self, seconds: float) -> float:
        """How many times so many seconds the budget of a limited round still pays for.

        By rank zero's clock and its ``seconds``, the same on all processes.
        """
        processes = self._session.processes
        left = max(self._session.values_until - self.clock(), 0.0)
        count = left / max(seconds, 1e-9) if processes.rank == 0 else 0.0
        return float(processes.sum(torch.tensor(count, device=processes.device)))

    def steps(self, monitor: Monitor, what: str) -> bool:
        """Whether a step has led here, which ``what`` is about; where none has, it is said."""
        if not self._session.trains:
            monitor.say_once(f"{what} is not available here: it is about a step, and none is made")
        return self._session.trains

    def has_batch(self, monitor: Monitor, what: str) -> bool:
        """Whether the last training batch gave a loss, which ``what`` needs; says so if not."""
        if not self.steps(monitor, what):
            return False
        self._session.kept_before()  # raises where the batch could not be copied
        if not self._session.last_batch.batches:
            monitor.say_once(
                f"{what} is not logged at steps whose training_step returned no loss for the batch"
            )
            return False
        return True

    def from_rank_zero(self, tensor: Tensor) -> Tensor:
        """``tensor`` as rank zero has it; on the others it must be zero and of its shape."""
        return self._session.processes.sum(tensor)

    def _on_probe(self, monitor: Monitor) -> Objective:
        return self._build(monitor, monitor.loss_key, monitor.probe_in_use, monitor.probe_mode)

    def _build(self, monitor: Monitor, key: Any, probe: Probe, mode: ProbeMode) -> Objective:
        """The loss on a probe: on its batches, or on one of all of them where that is the same."""

        def build(joined: bool) -> Objective:
            terms, cut = probe_terms(
                self.trainer,
                self.pl_module,
                self._isolation,
                probe,
                mode=mode,
                loss_fn=monitor.loss_fn,
                reduction=monitor.loss_reduction,
                total=self._session.probes.size(probe),
                joined=joined,
            )
            # Of a joined probe the graphs may be cut, where those of its batches were whole.
            return self._objective(monitor, (key, joined), terms, cut)

        joined = self._session.joined
        if key in joined:
            return build(joined[key])
        objective = build(False)
        if probe is monitor.probe_in_use:
            self._warn_if_noisy(objective, monitor)
        whole = self._as_one(objective, build, probe) if monitor.joins else None
        if bool(objective.loss().isfinite()):  # else it says nothing about other weights
            joined[key] = whole is not None
        return objective if whole is None else whole

    def _as_one(
        self, objective: Objective, build: Callable[[bool], Objective], probe: Probe
    ) -> Objective | None:
        """The loss on all batches as one, if that is the same and there is room for its graph.

        Seen once a run, at the weights as they are; on all processes or on none.
        """
        processes = self._session.processes
        if processes.total(len(probe.batches)) == processes.count:
            return None
        try:
            whole: Objective | None = build(True)
        except NotJoinable:
            whole = None
        if processes.total(whole is not None) < processes.count or whole is None:
            return None
        try:
            same = whole.has_room() and torch.allclose(
                whole.loss(), objective.loss(), rtol=1e-5, atol=0.0
            )
        except Exception:  # a training_step that wants its own batch size raises anything
            return None
        return whole if same else None

    def _warn_if_noisy(self, objective: Objective, monitor: Monitor) -> None:
        """Said once a run: the loss varies from call to call in spite of the isolation.

        What the second call takes is the price of a forward: in the first, much is done once.
        """
        first = objective.loss()
        started = self._session.clock(self.pl_module)
        again = objective.losses_at([], [()])[0]
        self._session.account.saw_forward(self._session.clock(self.pl_module) - started)
        if not torch.allclose(first, again, rtol=1e-5, atol=0.0, equal_nan=True):
            rank_zero_warn(
                f"{monitor.prefix}: two evaluations of the probe at the same weights gave "
                f"{float(first):.7g} and {float(again):.7g}: the loss draws random numbers or "
                f"keeps a state outside the module, and every value here carries that noise"
            )

    def _objective(self, monitor: Monitor, key: Any, terms: list[Term], cut: Cut) -> Objective:
        return Objective(
            terms,
            measured_parameters(
                self.trainer, self.pl_module, monitor.parameters, self._isolation.whole
            ),
            engine=monitor.engine,
            reduce=self._session.reducer,
            check_deterministic=False,
            memory=self._session.graph_memory(key, monitor),
            cut=cut,
        )

    def release(self) -> None:
        """Drop kept graphs: a measurement failed, perhaps for want of memory."""
        for objective in self._objectives.values():
            objective.release()

    def batch_objective(self, monitor: Monitor) -> Objective:
        """The loss on the training batch that has just been used, at the weights as they are."""
        self._session.kept_before()
        self.release()
        terms, cut = probe_terms(
            self.trainer,
            self.pl_module,
            self._isolation,
            self._session.last_batch,
            mode=monitor.probe_mode,
            loss_fn=monitor.loss_fn,
            reduction="mean",
            total=1,
        )
        return self._objective(monitor, ("batch", *monitor.loss_key), terms, cut)

    @functools.cached_property
    def optimizers(self) -> list[Any]:
        """The optimizers as they step the parameters that are measured; only to be looked at."""
        return self._isolation.whole.optimizers(self.trainer.optimizers)

    def _trained(self, objective: Objective) -> list[Tensor]:
        """What the optimizers hold in the place of the objective's parameters."""
        return [self._isolation.whole.trained(p) for p in objective.params.values()]

    def _weights_before(self, objective: Objective) -> list[Tensor]:
        before = self._session.kept_before().weights
        trained = self._trained(objective)
        if any(id(parameter) not in before for parameter in trained):
            raise RuntimeError("there is no copy of the weights before the optimizer's last step")
        return self._isolation.whole.gathered([before[id(parameter)] for parameter in trained])

    @property
    def knows_update(self) -> bool:
        """Whether the weights before the last step were kept."""
        return bool(self._session.kept_before().weights)

    def last_update(self, objective: Objective) -> dict[str, Tensor]:
        """The optimizer's last step of the measured parameters: ``w`` less ``w`` before it."""
        before = self._weights_before(objective)
        return {
            name: parameter.detach() - earlier
            for (name, parameter), earlier in zip(objective.params.items(), before, strict=True)
        }

    def last_rates(self, objective: Objective) -> dict[str, float]:
        """The learning rate that this step was made with, by parameter."""
        rates = self._session.kept_before().rates
        trained = self._trained(objective)
        return {name: rates[id(p)] for name, p in zip(objective.params, trained, strict=True)}

    @contextlib.contextmanager
    def before_the_step(self, monitor: Monitor) -> Iterator[Objective]:
        """The loss on the probe, with the weights where they were before the last step."""
        objective = self._on_probe(monitor)
        before = self._weights_before(objective)
        live = [p.detach() for p in objective.params.values()]
        now = [p.clone() for p in live]
        try:
            torch._foreach_copy_(live, before)
            yield objective
        finally:
            torch._foreach_copy_(live, now)

    def top_eigenvalues(
        self,
        monitor: Monitor,
        k: int,
        *,
        method: Literal["lanczos", "power"] = "lanczos",
        tol: float = 1e-2,
        max_hvps: int = 50,
        rtol: float = 0.0,
        init: Vector | EigenResult | None = None,
    ) -> EigenResult:
        """At least ``k`` eigenvalues; another callback's of this round if it asked for the same.

        Where it asked for less, its vectors are the best start there is.
        """
        key = (monitor.loss_key, method, tol, max_hvps, rtol)
        known = self._eigen.get(key)
        if known is None or len(known.eigenvalues) < k:
            alike = [result for other, result in self._eigen.items() if other[0] == key[0]]
            objective = self.objective(monitor)
            known = self._eigen[key] = top_eigenvalues(
                objective,
                k,
                method=method,
                tol=tol,
                max_hvps=max_hvps,
                rtol=rtol,
                init=alike[-1] if alike else init,
                hint=objective.gradient(products_follow=True),
            )
        return known

    def engine(self, monitor: Monitor) -> dict[str, str]:
        """How this round's Hessian-vector products were made, and why; empty without any."""
        objective = self._objectives.get(monitor.loss_key)
        if objective is None or objective.hvps == 0:
            return {}
        note = {"engine_note": objective.engine_note} if objective.engine_note else {}
        return {"engine": objective.engine_used, **note}

    @property
    def train_batch_size(self) -> int:
        """Examples in this process's last training batch."""
        return self._session.account.batch_size

    def probe_size(self, monitor: Monitor) -> int:
        """Examples in the callback's probe, over all processes."""
        return self._session.probes.size(monitor.probe_in_use)

    @property
    def work(self) -> int:
        """What was computed so far, in forwards of the probe (a gradient is 3, an HVP 6)."""
        objectives = list(self._objectives.values())  # a progress bar may ask meanwhile
        return sum(o.forwards + 3 * o.gradients + 6 * o.hvps for o in objectives)


def measured_parameters(
    trainer: Trainer,
    pl_module: LightningModule,
    patterns: Sequence[str] | None,
    whole: Whole,
) -> dict[str, Tensor]:
    """The trainable parameters that an optimizer holds, of those the ones that ``patterns`` name.

    Raises:
        ValueError: no parameter is left.
    """
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained: dict[str, Tensor] = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and id(whole.trained(parameter)) in held
    }
    if patterns is None:
        return trained
    chosen = {
        name: parameter
        for name, parameter in trained.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise ValueError(
            f"parameters={list(patterns)!r} matches none of the trained parameters: expected glob "
            f"patterns over names such as {list(trained)[:4]}"
        )
    return chosen
