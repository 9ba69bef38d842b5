"""SAM sharpness and its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_landscape.callbacks.monitor import Monitor
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.geometry.sharpness import curvature_along, sam_sharpness
from lightning_landscape.geometry.vectors import norm
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.session import Measured, Round


class SharpnessMonitor(Monitor):
    r"""Log how much the loss rises after one ascent step, as SAM sees it, and what it is made of.

    ``S = L(w + rho g/||g||) - L(w)``, to second order ``rho ||g|| + rho^2/2 g'Hg/||g||^2``.  While
    training goes on it is mostly the gradient's norm; that and the curvature along the gradient
    are logged beside it, so that one can tell which of them moves.

    Args:
        every_n_train_steps: steps between measurements; ``None``: epochs only.
        every_n_epochs: measure also at the last batch of every n-th epoch.
        max_overhead: the share of the training time that all these callbacks together may take,
            the smallest one given; ``None``: the exact schedule, whatever it costs.
        probe: the data: a ``DataLoader``, a list of batches, one batch (a tuple, a dict), or a
            shared ``Probe``.  ``None``: the first training batches are kept.
        probe_samples: how many examples to keep, over all processes.
        probe_mode: ``"train"``: the loss that the optimizer descends, dropout masks fixed,
            BatchNorm on batch statistics.  ``"eval"``: the module in eval mode.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar tensor`` instead of ``training_step``;
            needed with manual optimisation.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples, not a mean.
        parameters: glob patterns over parameter names; ``None``: all that an optimizer trains.
        engine: how Hessian-vector products are made, see ``Objective``.
        name: for a second monitor; keys become ``sharpness/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: say more.
        rho: length of the ascent step, in units of the weights; ``None``: .05, adaptive .5.
        adaptive: ASAM, the step relative to each weight: rescaling a ReLU network's layers does
            not change the value then.

    Logged Metrics:
        - ``sharpness/sam``: the rise, in units of the loss.
        - ``sharpness/gradient_norm``: ``||g||_2``, of the probe's loss.
        - ``sharpness/gradient_curvature``: ``g'Hg / ||g||^2``.

    Raises:
        ValueError: an argument out of its range.

    Cost: one gradient, one Hessian-vector product and one forward of the probe, less what another
    callback has computed at the same step.

    Source: Foret et al., ICLR 2021; Kwon et al., ICML 2021.

    Example::

        trainer = Trainer(callbacks=[SharpnessMonitor(rho=0.05)])
    """

    kind = "sharpness"
    tags = ("sam", "gradient_norm", "gradient_curvature")

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = 100,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        probe: Any = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "train",
        loss_fn: UserLoss | None = None,
        loss_reduction: Reduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        name: str | None = None,
        prog_bar: bool = False,
        verbose: bool = False,
        rho: float | None = None,
        adaptive: bool = False,
    ) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            max_overhead=max_overhead,
            probe=probe,
            probe_samples=probe_samples,
            probe_mode=probe_mode,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            parameters=parameters,
            engine=engine,
            name=name,
            prog_bar=prog_bar,
            verbose=verbose,
        )
        if rho is not None and not 0.0 < rho < math.inf:
            raise ValueError(f"SharpnessMonitor(rho={rho!r}): expected a finite number > 0 or None")
        self.rho = rho
        self.adaptive = adaptive

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        # The product first: moving the weights drops the graph that it is made on.
        gradient = objective.gradient()
        curvature = curvature_along(objective, gradient)
        sharpness = sam_sharpness(objective, self.rho, self.adaptive)
        values = {
            self.key("sam"): sharpness.value,
            self.key("gradient_norm"): norm(gradient),
            self.key("gradient_curvature"): curvature,
        }
        return Measured(values, {"definition": sharpness.definition})
