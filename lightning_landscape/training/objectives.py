"""The losses of one round: each is built once, and only one keeps its graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.geometry.batches import Cut, Term
from lightning_landscape.geometry.checks import few
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.same_loss import agree, random_displacement
from lightning_landscape.training.data.batch import NotConcatenable, ProbeBatch, doubtful_sizes
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.isolated import Isolation
from lightning_landscape.training.losses import LossSpec, loss_terms, reestimated_term
from lightning_landscape.training.parameters import measured_parameters
from lightning_landscape.training.run_state import RunState


class Measurer(Protocol):
    """The part of a callback that a round uses."""

    max_overhead: float | None

    @property
    def loss(self) -> LossSpec:
        """The loss that it measures."""

    @property
    def prefix(self) -> str:
        """The first part of its keys."""

    @property
    def concat(self) -> bool | None:
        """Whether the loss is evaluated on all of the probe as one batch; None: not decided."""

    def note_concat(self, concat: bool, series: int) -> None:
        """The decision; a later ``series`` than before if an earlier one was wrong."""

    def warn_once(self, message: str) -> None:
        """Warn on rank zero, once a run."""


class Objectives:
    """The losses of one round, by what they are of."""

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, isolation: Isolation, run: RunState
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._isolation = isolation
        self._run = run
        self._known: dict[Hashable, Objective] = {}

    def of(self, monitor: Measurer, spec: LossSpec) -> Objective:
        """The loss on the probe of ``spec``; all other losses release their graphs."""
        if spec not in self._known:
            self._known[spec] = self.build(monitor, spec)
        return self._activate(spec)

    def reestimated(self, monitor: Measurer, spec: LossSpec) -> Objective:
        """The same with BatchNorm statistics of the callback's own probe; without gradients."""
        key = ("reestimated", monitor.loss.probe, spec)
        if key not in self._known:
            self.use_logged_sizes(monitor, spec)
            terms = reestimated_term(
                self._trainer,
                self._pl_module,
                self._isolation,
                spec,
                monitor.loss.probe,
                self._run.probe_size(spec.probe),
            )
            self._known[key] = self.from_terms(monitor, spec, key, terms, lambda *_: [])
        return self._activate(key)

    def known(self, spec: LossSpec) -> Objective | None:
        """The loss if it was built in this round."""
        return self._known.get(spec)

    def _activate(self, key: Hashable) -> Objective:
        for other, objective in self._known.items():
            if other != key:
                objective.release()
        return self._known[key]

    def release(self) -> None:
        """Release all graphs."""
        for objective in self._known.values():
            objective.release()

    @property
    def work(self) -> int:
        """The computations so far, in forwards of the probe (a gradient is 3, an HVP 6)."""
        objectives = list(self._known.values())  # a progress bar reads it in its thread
        return sum(o.forwards + 3 * o.gradients + 6 * o.hvps for o in objectives)

    def terms(
        self,
        spec: LossSpec,
        batches: Sequence[ProbeBatch],
        total: int = 1,
        concat: bool = False,
        sizes: dict[int, int] | None = None,
    ) -> tuple[list[Term], Cut]:
        """See :func:`~lightning_landscape.training.losses.loss_terms`."""
        return loss_terms(
            self._trainer, self._pl_module, self._isolation, spec, batches, total, concat, sizes
        )

    def from_terms(
        self, monitor: Measurer, spec: LossSpec, key: Hashable, terms: list[Term], cut: Cut
    ) -> Objective:
        """The weighted mean of ``terms``; ``key`` names its graphs' memory over the run."""
        return Objective(
            terms,
            measured_parameters(
                self._trainer, self._pl_module, spec.parameters, self._isolation.unsharded
            ),
            engine=spec.engine,
            reduce=self._run.reducer,
            check_deterministic=False,
            memory=self._run.graph_memory(key, monitor.loss.probe, monitor.warn_once),
            cut=cut,
        )

    def build(self, monitor: Measurer, spec: LossSpec) -> Objective:
        """The loss on a probe: on its batches, or on their concatenation if that is the same."""
        sizes: dict[int, int] = {}

        def build(concat: bool) -> Objective:
            total = self._run.probe_size(spec.probe)
            terms, cut = self.terms(
                spec, spec.probe.batches, total, concat, None if concat else sizes
            )
            # Graphs of the concatenation may need splitting where those of the batches do not.
            return self.from_terms(monitor, spec, (spec, concat), terms, cut)

        decided = self._run.concatenated
        if spec not in decided and spec == monitor.loss and monitor.concat is not None:
            decided[spec] = monitor.concat  # as in the run before
        if spec in decided:
            self.use_logged_sizes(monitor, spec)
            return self._as_decided(spec, build)
        parts = build(False)
        parts.loss()
        if not spec.probe.captured and self._correct_sizes(monitor, spec.probe, sizes):
            parts = build(False)
        if spec.probe is monitor.loss.probe:
            self._warn_if_noisy(parts, monitor)
        combined = self._concatenated(parts, build, spec.probe.batches) if spec.concat else None
        if bool(parts.loss().isfinite()):  # otherwise decide again at other weights
            decided[spec] = combined is not None
        return parts if combined is None else combined

    def _as_decided(self, spec: LossSpec, build: Callable[[bool], Objective]) -> Objective:
        """As at the first measurement; a concatenation is compared again now and then."""
        combined = self._run.concatenated[spec]
        objective = build(combined)
        if not combined or not self._run.looks_again:
            return objective
        parts = build(False)
        if _agree(objective, parts) is not False:
            return objective
        self._run.concatenated[spec] = False
        self._run.series[spec] = self._run.series.get(spec, 1) + 1
        return parts

    def use_logged_sizes(
        self, monitor: Measurer, spec: LossSpec, *, captured: bool = False
    ) -> None:
        """Use the numbers of examples that the module logs, by one evaluation for each probe.

        ``captured``: also of a captured probe; those of training batches are known already.
        """
        probe = spec.probe
        if probe.sized or (probe.captured and not captured):
            return
        sizes: dict[int, int] = {}
        terms, cut = self.terms(spec, probe.batches, sizes=sizes)
        if terms:
            self.from_terms(monitor, spec, ("sizes", spec), terms, cut).batch_losses()
        self._correct_sizes(monitor, probe, sizes)

    def _correct_sizes(self, monitor: Measurer, probe: Probe, sizes: Mapping[int, int]) -> bool:
        """Use the numbers of examples that were logged; whether one differs on any process."""
        probe.sized = True
        for index, batch in enumerate(probe.batches):
            if index not in sizes and (lengths := doubtful_sizes(batch.batch)):
                monitor.warn_once(
                    f"the tensors of a batch of the probe have lengths of {few(lengths)}: it "
                    f"counts as {batch.size} examples; if that is not their number pass "
                    f"batch_size=... to self.log in training_step"
                )
                break
        wrong = {i: n for i, n in sizes.items() if n != probe.batches[i].size}
        if not self._run.processes.total(len(wrong)):
            return False
        for index, size in wrong.items():
            probe.batches[index] = replace(probe.batches[index], size=size)
        self._run.forget_size(probe)
        return True

    def _concatenated(
        self,
        parts: Objective,
        build: Callable[[bool], Objective],
        batches: Sequence[ProbeBatch],
    ) -> Objective | None:
        """The loss on all batches as one, if it is the same and its graph fits into memory.

        Compared at the weights and at displaced ones, because losses may coincide, as those of all
        examples do where the last layer is zero.  On all processes or on none.
        """
        processes = self._run.processes
        if processes.total(len(batches)) == processes.count:
            return None
        try:
            combined: Objective | None = build(True)
        except NotConcatenable:
            combined = None
        if processes.total(combined is not None) < processes.count or combined is None:
            return None
        try:
            same = combined.has_room() and _agree(combined, parts)
        except Exception as error:  # a training_step that requires a certain batch size
            reraise_interrupt(error)
            return None
        return combined if same else None

    def _warn_if_noisy(self, objective: Objective, monitor: Measurer) -> None:
        """Warn if the loss differs between two calls in spite of the isolation; once per run.

        The second call is timed as a forward; the first includes one-time work.
        """
        first = objective.loss()
        started = self._run.clock(self._pl_module)
        again = objective.losses_at([], [()])[0]
        self._run.costs.record_forward(self._run.clock(self._pl_module) - started)
        if not torch.allclose(first, again, rtol=1e-5, atol=0.0, equal_nan=True):
            rank_zero_warn(
                f"{monitor.prefix}: two evaluations of the probe at the same weights gave "
                f"{float(first):.7g} and {float(again):.7g}: the loss draws random numbers or "
                f"keeps a state outside the module, so that all its values here are noisy; use the "
                f"global random generators of Python, NumPy or torch, and keep state in the module"
            )


def _agree(combined: Objective, parts: Objective) -> bool | None:
    """Whether two losses are the same function of the weights; None if they are not finite."""
    step = random_displacement(combined.params)
    one, other = (
        torch.cat([o.loss().reshape(1), o.losses_at([step], [(1.0,)])]) for o in (combined, parts)
    )
    return agree(one, other)
