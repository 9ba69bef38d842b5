"""The top of the Hessian's spectrum, and the optimizer's stability edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pytorch_lightning import Trainer

from lightning_landscape.callbacks.monitor import Monitor, check_choice
from lightning_landscape.geometry.edge_ratio import edge_ratio
from lightning_landscape.geometry.eigen import EigenResult
from lightning_landscape.geometry.objective import Engine, Objective
from lightning_landscape.geometry.stability import stability_edge
from lightning_landscape.geometry.vectors import norm
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.session import Measured, Round


class HessianMonitor(Monitor):
    r"""Log the largest eigenvalues of the Hessian, and how near the optimizer is to its edge.

    The largest *algebraic* eigenvalue of the Hessian of the probe's loss over the trained
    parameters, by Lanczos (or power iteration) on Hessian-vector products, warm-started from the
    measurement before.  Beside it the stability edge of the optimizer as it is set up now: 2/lr for
    plain SGD, (2 + 2b)/lr with momentum b, 38/lr on the preconditioned Hessian for Adam.  A run at
    ``edge_ratio`` 1 is healthy: full-batch training goes there by itself and stays.

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
        name: for a second monitor; keys become ``hessian/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: say more.
        k: how many eigenvalues.
        method: ``"lanczos"`` or ``"power"``.
        tol: relative residual at which the solver stops.
        max_hvps: most products a measurement may take.

    Logged Metrics:
        - ``hessian/top_eigenvalue``: units of the loss per squared unit of the weights.
        - ``hessian/eigenvalue_2`` ... ``hessian/eigenvalue_k``.
        - ``hessian/residual``: ``||Hv - lambda v||`` of the top one (an eigenvalue lies within it).
        - ``hessian/hvps``: Hessian-vector products used, about 2 gradients of the probe each.
        - ``hessian/edge``: the threshold, when all parameter groups share one.
        - ``hessian/edge_ratio``: ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``, S the effective step.
        - ``hessian/preconditioned_eigenvalue``: for Adam and kin, what ``hessian/edge`` bounds.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: two monitors of one name; manual optimisation without a
            ``loss_fn``.

    Cost: some 5 Hessian-vector products, 12 gradients of the probe, a measurement; for Adam and
    kin twice that.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, ICLR 2021; Adaptive gradient methods at the edge of stability, 2022.

    Example::

        trainer = Trainer(callbacks=[HessianMonitor(every_n_train_steps=50)])
    """

    kind = "hessian"

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
        k: int = 1,
        method: Literal["lanczos", "power"] = "lanczos",
        tol: float = 1e-2,
        max_hvps: int = 50,
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
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"HessianMonitor(k={k!r}): expected an integer >= 1")
        check_choice("HessianMonitor", "method", method, ("lanczos", "power"))
        if not 0.0 < tol < 1.0:
            raise ValueError(f"HessianMonitor(tol={tol!r}): expected a number between 0 and 1")
        if isinstance(max_hvps, bool) or not isinstance(max_hvps, int) or max_hvps < k:
            raise ValueError(f"HessianMonitor(max_hvps={max_hvps!r}): expected an integer >= k={k}")
        self.k = k
        self.method: Literal["lanczos", "power"] = method
        self.tol = tol
        self.max_hvps = max_hvps
        self.tags = (
            "top_eigenvalue",
            *(f"eigenvalue_{i}" for i in range(2, k + 1)),
            "residual",
            "hvps",
            "edge",
            "edge_ratio",
            "preconditioned_eigenvalue",
        )
        self._last: EigenResult | None = None
        self._last_preconditioned: EigenResult | None = None

    @property
    def charts(self) -> dict[str, list[Any]]:
        """The eigenvalue and the edge on one chart."""
        # Tags are matched as regular expressions from the start: without "$", hessian/edge would
        # draw hessian/edge_ratio too.
        return {
            f"{self.prefix}: eigenvalue and the optimizer's edge": [
                "Multiline",
                [
                    self.key("top_eigenvalue") + "$",
                    self.key("preconditioned_eigenvalue") + "$",
                    self.key("edge") + "$",
                ],
            ],
            f"{self.prefix}: ratio to the edge (1 = edge of stability)": [
                "Multiline",
                [self.key("edge_ratio") + "$"],
            ],
        }

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        before = objective.hvps
        result = this_round.top_eigenvalues(
            self,
            self.k,
            method=self.method,
            tol=self.tol,
            max_hvps=self.max_hvps,
            init=_usable(self._last, objective),
        )
        self._last = result if math.isfinite(result.eigenvalues[0]) else None
        if not result.converged and math.isfinite(result.eigenvalues[0]):
            self.say_once(
                f"the eigenvalue solver stopped at max_hvps={self.max_hvps} with residual "
                f"{float(result.residuals[0]):.3g}, so the value may be too low by about that; "
                f"raise max_hvps or tol"
            )
        values = {
            self.key("top_eigenvalue"): float(result.eigenvalues[0]),
            self.key("residual"): float(result.residuals[0]),
        }
        for index in range(1, self.k):
            values[self.key(f"eigenvalue_{index + 1}")] = float(result.eigenvalues[index])
        values |= self._edge_values(this_round, objective, result)
        values[self.key("hvps")] = float(objective.hvps - before)
        if objective.engine_note:
            self.say_once(f"finite differences of gradients are used: {objective.engine_note}")
        facts = {"engine": objective.engine_used, "converged": result.converged}
        return Measured(values, facts)

    def _edge_values(
        self, this_round: Round, objective: Objective, result: EigenResult
    ) -> dict[str, float]:
        gradient_norm = norm(objective.gradient())
        edge = stability_edge(this_round.trainer.optimizers, objective.params, gradient_norm)
        reason = _clipping(this_round.trainer, objective, gradient_norm) or (
            "" if edge.scale else edge.note
        )
        if reason:
            self.say_once(f"no stability edge is logged: {reason}")
            return {}
        found = edge_ratio(
            objective,
            edge,
            result,
            init=_usable(self._last_preconditioned, objective),
            method=self.method,
            tol=self.tol,
            max_hvps=self.max_hvps,
        )
        self._last_preconditioned = found.solved
        # With a summed loss the optimizer sees the curvature of one batch, not of the probe.
        share = 1.0
        if self.loss_reduction == "sum":
            share = this_round.train_batch_size / this_round.probe_size(self)
        values = {self.key("edge_ratio"): found.ratio * share}
        if edge.edge is not None:
            values[self.key("edge")] = edge.edge / share
            if edge.preconditioner:
                values[self.key("preconditioned_eigenvalue")] = found.ratio * edge.edge
        return values


def _usable(result: EigenResult | None, objective: Objective) -> EigenResult | None:
    """A warm start, unless the trained parameters have changed (one was frozen or thawed)."""
    if result is None or not math.isfinite(float(result.eigenvalues[0])):
        return None
    return result if result.eigenvectors[0].keys() == objective.params.keys() else None


def _clipping(trainer: Trainer, objective: Objective, gradient_norm: float) -> str:
    """Why clipping takes the edge away now, or an empty string."""
    limit = trainer.gradient_clip_val
    if not limit:
        return ""
    if str(trainer.gradient_clip_algorithm or "norm").endswith("value"):
        largest = max(float(g.abs().max()) for g in objective.gradient().values())
        active = largest > limit
    else:
        active = gradient_norm > limit
    return f"gradient clipping at {limit} is active" if active else ""
