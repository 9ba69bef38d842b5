"""How ``HessianMonitor`` measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.edge import edge_of, has_own_problem
from lightning_landscape.callbacks.hessian_figures import (
    draw_density,
    draw_density_film,
    draw_history,
)
from lightning_landscape.callbacks.solver import Solver
from lightning_landscape.geometry.blocks import block_eigenvalues, names_by_block
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import curvature_along
from lightning_landscape.geometry.spectrum import spectral_density
from lightning_landscape.geometry.trace import hessian_trace
from lightning_landscape.training.failures import OverBudgetError
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round

# More than rounding in bfloat16 causes.
_MAX_ASYMMETRY = 0.02

# Products per start vector of a density.
DENSITY_PRODUCTS = 30


class HessianMeasurement(Monitor):
    """Measures the spectrum and the ratio to the edge, with the arguments of ``HessianMonitor``."""

    k: int
    max_hvps: int
    tol: float
    min_eigenvalue: bool
    trace_samples: int
    density_samples: int
    blocks: bool | Mapping[str, str]
    batch_edge_ratio: bool
    update_curvature: bool
    _solver: Solver
    _product_seconds: float | None
    _checked_at: int | None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Have the weights before a step copied if the optimizers may step in turn."""
        in_turn = self.batch_edge_ratio and len(trainer.optimizers) > 1
        self.needs_update = self.update_curvature or in_turn

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        self._stay_within_budget(this_round, objective)
        before, started = objective.hvps, this_round.clock()
        solver = self._solver
        start = solver.start("top", objective) or solver.gradient(objective)
        result = this_round.top_eigenvalues(self, self.k, init=start, **solver.settings())
        solver.store("top", result)
        if this_round.is_limited(self) and result.hvps:
            # They may take longer than the one that was timed, as on a machine under load.
            seconds = (this_round.clock() - started) / result.hvps
            solver.lower_limit(self._products_within_budget(this_round, seconds))
        measured = Measured()
        values = measured.values
        if self._is_cut_off(result.converged, float(result.eigenvalues[0])):
            raise OverBudgetError(self._solver.cut_off_warning(self.key("top_eigenvalue")))
        self._add(measured, "top_eigenvalue", result)
        values[self.key("residual")] = float(result.residuals[0])
        for index in range(1, self.k):
            self._add(measured, f"eigenvalue_{index + 1}", result, index)
        if (clipped := this_round.clipped_share) is not None:
            values[self.key("clipped_share")] = clipped
        if altered := this_round.altered_gradient(self):
            measured.facts["altered_gradient"] = altered
        self._add_edge(measured, this_round, objective, result)
        self._add_spectrum(objective, measured, this_round)
        if self.update_curvature and this_round.has_step(self, self.key("update_curvature")):
            self._add_update(measured, this_round, objective)
        products = objective.hvps - before
        values[self.key("hvps")] = float(products)
        if products:
            self._product_seconds = (this_round.clock() - started) / products
        if self.batch_edge_ratio and this_round.has_batch(self, self.key("batch_edge_ratio")):
            self._add_batch(measured, this_round, objective)
        if result.asymmetry > _MAX_ASYMMETRY:
            self.warn_once(
                f"u'Hv and v'Hu differ by {result.asymmetry:.1%} of the top eigenvalue: a kernel "
                f"in this module has a wrong second derivative; pass engine='finite_difference'"
            )
        measured.facts["converged"] = result.converged
        if result.checked:
            self._checked_at = this_round.step
        if self._checked_at is not None:
            measured.facts["checked"] = self._checked_at
        return measured

    def _stay_within_budget(self, this_round: Round, objective: Objective) -> None:
        """Limit the products of all eigenvalue problems together if the budget requires it."""
        self._solver.limit_products(math.inf)
        if not this_round.is_limited(self):
            return
        preconditioned = self._solver.has_result("preconditioned")
        seconds = self._product_seconds
        if seconds is None:
            # Of some modules a product takes ten times as long as the gradient.
            started = this_round.clock()
            gradient = objective.gradient(products_follow=True)
            between = this_round.clock()
            objective.hvp(gradient)
            seconds = max(this_round.clock() - between, between - started)
            preconditioned = has_own_problem(this_round, objective)
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        blocks = len(names_by_block(objective.params, named)) if self.blocks else 0
        problems = (1 + preconditioned) * (1 + self.batch_edge_ratio) + self.min_eigenvalue + blocks
        most = self._products_within_budget(this_round, seconds)
        fewest = self.k + 1
        if most < problems * fewest:
            raise OverBudgetError(
                f"not measured: one Hessian-vector product takes about {seconds:.2g} s, and "
                f"{problems} eigenvalue problems need {problems * fewest} at least, which is "
                f"more than the budget of this run allows; pass a larger max_overhead or "
                f"grace_seconds, max_overhead=None for no limit, or a smaller probe_samples"
            )
        self._solver.limit_products(most, problems, fewest)

    def _products_within_budget(self, this_round: Round, seconds: float) -> float:
        """Products of ``seconds`` each for all eigenvalue problems together."""
        others = self.trace_samples + DENSITY_PRODUCTS * self.density_samples
        return this_round.operations_within_budget(seconds) - others

    def run_summary(self, folder: Path, final: bool) -> Measured:
        """The eigenvalue and the edge; at the end of the fit also the densities."""
        drawn = {self.key("eigenvalue"): partial(draw_history, self.run_rows, folder, self.name)}
        densities = self.run_files(folder, "density")
        if final and len(densities) > 1:
            label = {"probe_mode": self.probe_mode}
            drawn[self.key("density_film")] = partial(draw_density_film, densities, label)
        return Measured(pictures=dict(drawn))

    def _add(self, measured: Measured, name: str, solved: EigenResult, index: int = 0) -> None:
        value, residual = float(solved.eigenvalues[index]), float(solved.residuals[index])
        self._add_value(measured, name, value, residual, solved.converged)

    def _add_value(
        self, measured: Measured, name: str, value: float, residual: float, converged: bool
    ) -> None:
        """Add an eigenvalue or a ratio, and its residual, unless the budget ended the solver."""
        key = self.key(name)
        if self._is_cut_off(converged, value):
            self.warn_once(self._solver.cut_off_warning(key))
            return
        measured.values[key] = value
        measured.facts.setdefault("residuals", {})[key] = residual
        if not converged and math.isfinite(value):
            measured.unconverged.add(key)
        if warning := self._solver.warning_for(key, value, residual, converged):
            self.warn_once(warning)

    def _is_cut_off(self, converged: bool, value: float) -> bool:
        """Whether the budget ended the solver before it had converged."""
        return not converged and self._solver.is_limited and math.isfinite(value)

    # -- the edge ------------------------------------------------------------------------------

    def _add_edge(
        self, measured: Measured, this_round: Round, objective: Objective, result: EigenResult
    ) -> None:
        values = measured.values
        # With a summed loss the curvature of the optimizer's loss is that of one batch.
        share = 1.0
        if self.loss_reduction == "sum":
            share = this_round.train_batch_size / this_round.probe_size(self)
        edge = edge_of(this_round, objective, self, share)
        if edge is None:
            values |= _nan_if_diverged(result, self.key("edge_ratio"))
            return
        if edge.preconditioner or edge.inactive_share:
            values[self.key("inactive_share")] = edge.inactive_share
        found = self._solver.ratio("preconditioned", objective, edge, result)
        converged = (found.solved or result).converged
        ratio, residual = found.ratio * share, found.residual * share
        self._add_value(measured, "edge_ratio", ratio, residual, converged)
        if edge.edge is not None:
            values[self.key("edge")] = edge.edge / share
            if edge.preconditioner:
                value, within = found.ratio * edge.edge, found.residual * edge.edge
                self._add_value(measured, "preconditioned_eigenvalue", value, within, converged)
        else:
            self.warn_once(f"{self.key('edge')} is not logged: {edge.note}")

    def _add_update(self, measured: Measured, this_round: Round, objective: Objective) -> None:
        key = self.key("update_curvature")
        if this_round.has_moved(self, objective, key):
            update = this_round.last_update(objective)
            measured.values[key] = curvature_along(objective, update)

    def _add_batch(self, measured: Measured, this_round: Round, probe: Objective) -> None:
        # The batch may be that of another optimizer's step.
        several = len(this_round.optimizers) > 1
        if several and not this_round.has_moved(self, probe, self.key("batch_edge_ratio")):
            return
        objective = this_round.batch_objective(self)
        solver, gradient = self._solver, objective.gradient(products_follow=True)
        start = solver.start("batch", objective)
        result = top_eigenvalues(objective, init=start, hint=gradient, **solver.settings())
        solver.store("batch", result)
        share = this_round.batch_share
        edge = edge_of(this_round, objective, self, share)
        if edge is None:
            measured.values |= _nan_if_diverged(result, self.key("batch_edge_ratio"))
            return
        found = solver.ratio("preconditioned batch", objective, edge, result)
        converged = (found.solved or result).converged
        ratio, residual = found.ratio * share, found.residual * share
        self._add_value(measured, "batch_edge_ratio", ratio, residual, converged)

    # -- more of the spectrum ------------------------------------------------------------------

    def _add_spectrum(self, objective: Objective, measured: Measured, this_round: Round) -> None:
        values, solver = measured.values, self._solver
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        if self.min_eigenvalue:
            start, hint = solver.start("min", objective), objective.gradient()
            smallest = top_eigenvalues(
                objective, which="SA", init=start, hint=hint, **solver.settings()
            )
            solver.store("min", smallest)
            self._add(measured, "min_eigenvalue", smallest)
        if self.blocks:
            tops = block_eigenvalues(
                objective,
                named,
                init=solver.block_starts(objective),
                hint=objective.gradient(),
                **solver.settings(),
            )
            for block, found in tops.items():
                solver.store(f"block {block}", found)
                self._add(measured, f"block/{block}", found)
        if self.trace_samples:
            trace = hessian_trace(objective, self.trace_samples, blocks=named)
            values[self.key("trace")] = trace.value
            values[self.key("trace_stderr")] = trace.stderr
            values[self.key("frobenius")] = trace.frobenius.value
            for block, share in trace.blocks.items() if self.blocks else ():
                values[self.key(f"block_trace/{block}")] = share.value
        if self.density_samples:
            density = spectral_density(objective, self.density_samples)
            label = {
                "step": this_round.step,
                "probe_samples": this_round.probe_size(self),
                "probe_mode": self.probe_mode,
            }
            name = f"{self.key('density').replace('/', '-')}-step{this_round.step:08d}.npz"
            measured.files[name] = density.save
            measured.pictures[self.key("density")] = partial(draw_density, density, label)

    def start_anew(self) -> None:
        """Drop everything of the last run."""
        super().start_anew()
        self._product_seconds = self._checked_at = None

    def reset_warm_start(self) -> None:
        """Drop warm starts: after a failure they may differ between processes."""
        self._solver.reset()


def _nan_if_diverged(result: EigenResult, key: str) -> dict[str, float]:
    """NaN for ``key`` if the eigenvalue is not finite, so that an early stop sees it; else {}."""
    return {} if math.isfinite(result.eigenvalues[0]) else {key: math.nan}
