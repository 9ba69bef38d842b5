"""SAM sharpness, the gradient norm and the curvature along the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lightning_landscape.geometry.average import average_sharpness
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
)
from lightning_landscape.geometry.critical import critical_sharpness
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.geometry.sam import Sharpness, curvature_along, sam_sharpness
from lightning_landscape.geometry.vectors import norm
from lightning_landscape.geometry.worst_case import keskar_sharpness, worst_case_sharpness
from lightning_landscape.training.data.probe import Source
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round
from lightning_landscape.training.schedule import EveryNSteps


class SharpnessMonitor(Monitor):
    r"""Log SAM sharpness: the rise of the loss after one ascent step, and its two parts.

    ``S = L(w + rho g/||g||) - L(w)``, to second order ``rho ||g|| + rho^2/2 g'Hg/||g||^2``.  During
    training the gradient norm dominates; it and the curvature along the gradient are logged too, to
    show which of the two changes.

    Args:
        every_n_train_steps: measure when the probe is complete, and then at multiples of this
            number of steps.  ``"auto"``: about 50 times in the run, every 100 steps if its length
            is unknown.  ``None``: epochs only.
        every_n_epochs: measure at the last batch of every n-th epoch, with ``"auto"`` only there.
        max_overhead: largest share of the training time that all these callbacks together may
            take; measurements are spread over the run accordingly.  ``None``: no limit, exactly on
            schedule.
        grace_seconds: a short run may become up to twice as long, or 10 s longer if that is more,
            but not by more than these seconds.
        probe: the data: a ``DataLoader``, a list of batches, one batch (a tuple, a dict), or a
            shared ``Probe``; in a LightningCLI the path of a function annotated
            ``-> DataLoader`` or ``-> Probe``.  ``None``: the first training batches are kept.
        probe_samples: number of examples to keep, over all processes.
        probe_mode: ``"train"``: the loss that is trained, with fixed dropout masks and BatchNorm on
            batch statistics.  ``"eval"``: the module in eval mode.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar tensor`` instead of ``training_step``;
            required with manual optimisation.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples, not a mean.
        parameters: glob patterns over parameter names; ``None``: all that an optimizer trains.
        engine: how Hessian-vector products are computed, see ``Objective``.
        save_probe: write the kept batches beside the logs, so that a resumed run measures the same
            ones; ``False`` if they must not be on disk.
        name: for a second monitor; keys become ``sharpness/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        rho: length of the ascent step, in units of the weights; ``None``: .05, adaptive .5.
        adaptive: ASAM, with the step relative to each weight: rescaling the layers of a ReLU
            network does not change the value.  Also for the worst and the average case.
        worst_case: log the largest rise within ``rho`` too, by projected ascent.
        worst_case_norm: ``"l2"`` or ``"linf"``.
        worst_case_steps: steps of the ascent, here and for Keskar's, up to 3.5 gradients each;
            below 5 the value is never settled.
        per_batch: the mean of the worst cases of each batch of the probe (m-sharpness).
        average: log the mean rise under Gaussian noise too, with its standard error.
        sigma: standard deviation of that noise, in units of the weights, adaptive of each weight.
        samples: pairs of draws of that noise.
        keskar: log Keskar's sharpness too.
        epsilon: half-width of its box, relative to ``|w| + 1``.
        critical: log the critical sharpness along the optimizer's last step too, at the weights
            before it (labelled with their step): 8 to 10 forwards, no second derivative.
        critical_rtol: its relative error.

    Logged Metrics:
        - ``sharpness/sam``: the rise, in units of the loss.
        - ``sharpness/gradient_norm``: ``||g||_2``, of the probe's loss.
        - ``sharpness/gradient_curvature``: ``g'Hg / ||g||^2``.
        - ``sharpness/worst_case``, ``sharpness/average`` and ``sharpness/average_stderr``,
          ``sharpness/keskar`` (per cent of ``1 + L``), ``sharpness/critical`` (``2 / eta_c``, to be
          compared with ``2 / lr``; NaN if the loss falls nowhere along the step).

    The history also has ``worst_case_settled`` and ``keskar_settled``: whether a longer search is
    expected to find less than 3 % more; if not, there is a warning the first time.

    Raises:
        ValueError: an argument out of its range.

    Cost: one gradient, one Hessian-vector product and one forward of the probe, less if another
    callback has computed them at the same step.  For the others see their functions.

    Source: Foret et al., ICLR 2021; Kwon et al., ICML 2021; Andriushchenko et al., ICML 2023;
    Keskar et al., ICLR 2017; Kalra et al., arXiv 2601.16979.

    Example::

        trainer = Trainer(callbacks=[SharpnessMonitor(rho=0.05)])
    """

    kind = "sharpness"

    def __init__(
        self,
        *,
        every_n_train_steps: EveryNSteps = "auto",
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        grace_seconds: float = 30.0,
        probe: Source = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "train",
        loss_fn: UserLoss | None = None,
        loss_reduction: LossReduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        save_probe: bool = True,
        name: str | None = None,
        prog_bar: bool = False,
        verbose: bool = False,
        rho: float | None = None,
        adaptive: bool = False,
        worst_case: bool = False,
        worst_case_norm: Literal["l2", "linf"] = "l2",
        worst_case_steps: int = 20,
        per_batch: bool = False,
        average: bool = False,
        sigma: float = 0.01,
        samples: int = 30,
        keskar: bool = False,
        epsilon: float = 1e-3,
        critical: bool = False,
        critical_rtol: float = 0.05,
    ) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            max_overhead=max_overhead,
            grace_seconds=grace_seconds,
            probe=probe,
            probe_samples=probe_samples,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            parameters=parameters,
            engine=engine,
            save_probe=save_probe,
            name=name,
            prog_bar=prog_bar,
            verbose=verbose,
        )
        owner, positive = "SharpnessMonitor", "a finite number > 0"
        if rho is not None:
            check_number(owner, "rho", rho, f"{positive} or None", lambda x: 0.0 < x < math.inf)
        check_choice(owner, "worst_case_norm", worst_case_norm, ("l2", "linf"))
        check_number(owner, "sigma", sigma, positive, lambda x: 0.0 < x < math.inf)
        check_number(owner, "epsilon", epsilon, positive, lambda x: 0.0 < x < math.inf)
        expected = "a number from 0 to 1, both excluded"
        check_number(owner, "critical_rtol", critical_rtol, expected, lambda x: 0.0 < x < 1.0)
        worst_case_steps = check_count(owner, "worst_case_steps", worst_case_steps)
        samples = check_count(owner, "samples", samples, least=2)
        check_flags(owner, adaptive=adaptive, worst_case=worst_case, per_batch=per_batch)
        check_flags(owner, average=average, keskar=keskar, critical=critical)
        self.rho = rho
        self.adaptive = adaptive
        self.worst_case = worst_case
        self.worst_case_norm: Literal["l2", "linf"] = worst_case_norm
        self.worst_case_steps = worst_case_steps
        self.per_batch = per_batch
        self.average = average
        self.sigma = sigma
        self.samples = samples
        self.keskar = keskar
        self.epsilon = epsilon
        self.critical = critical
        self.critical_rtol = critical_rtol
        self.needs_update = critical
        self.tags = (
            "sam",
            "gradient_norm",
            "gradient_curvature",
            *(("worst_case",) if worst_case else ()),
            *(("average", "average_stderr") if average else ()),
            *(("keskar",) if keskar else ()),
            *(("critical",) if critical else ()),
        )

    @property
    def forwards(self) -> int:
        """Approximate forwards of the probe per measurement."""
        ascent = 10 * self.worst_case_steps * (self.worst_case + self.keskar)
        return 3 + 6 + 2 + ascent + 2 * self.samples * self.average + 15 * self.critical

    @property
    def allows_concat(self) -> bool:
        """False if the worst case of each batch is measured."""
        return not (self.worst_case and self.per_batch)

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        # The product comes first: moving the weights drops its graph.
        gradient = objective.gradient(products_follow=True)
        curvature = curvature_along(objective, gradient)
        sharpness = sam_sharpness(objective, self.rho, self.adaptive)
        measured = Measured(
            {
                self.key("sam"): sharpness.value,
                self.key("gradient_norm"): norm(gradient),
                self.key("gradient_curvature"): curvature,
            },
            {"definition": sharpness.definition},
        )
        if self.worst_case:
            worst = worst_case_sharpness(
                objective,
                (0.5 if self.adaptive else 0.05) if self.rho is None else self.rho,
                self.worst_case_norm,
                self.worst_case_steps,
                self.per_batch,
                self.adaptive,
            )
            self._add(measured, "worst_case", worst)
        if self.average:
            average = average_sharpness(objective, self.sigma, self.samples, self.adaptive)
            self._add(measured, "average", average)
            measured.values[self.key("average_stderr")] = average.stderr
        if self.keskar:
            keskar = keskar_sharpness(objective, self.epsilon, self.worst_case_steps)
            self._add(measured, "keskar", keskar)
        if self.critical and this_round.has_step(self, self.key("critical")):
            self._add_critical(measured, this_round)
        return measured

    def _add(self, measured: Measured, tag: str, found: Sharpness) -> None:
        measured.values[self.key(tag)] = found.value
        measured.facts[f"{tag}_definition"] = found.definition
        if found.note:
            self.warn_once(f"{self.key(tag)} is NaN: {found.note}")
        if found.settled is not None:
            measured.facts[f"{tag}_settled"] = found.settled
            if not found.settled:
                self.warn_once(
                    f"{self.key(tag)} is not settled, a longer search may find more: raise "
                    f"worst_case_steps (now {self.worst_case_steps})"
                )

    def _add_critical(self, measured: Measured, this_round: Round) -> None:
        objective = this_round.objective(self)
        rates = this_round.last_rates(objective)
        direction = {
            name: step / rates[name]
            for name, step in this_round.last_update(objective).items()
            if rates[name] > 0.0
        }
        if not any(bool(d.any()) for d in direction.values()):
            self.warn_once("no critical sharpness at a step that did not move the weights")
            return
        with this_round.before_the_step(self) as earlier:
            found = critical_sharpness(
                earlier, direction, self.critical_rtol, start=max(rates.values())
            )
        if found.note:
            missing = " is NaN" if math.isnan(found.value) else ""
            self.warn_once(f"critical sharpness{missing}: {found.note}")
        measured.before[self.key("critical")] = found.value
        measured.facts["critical_definition"] = found.definition
