"""The top of the Hessian's spectrum, and the optimizer's stability edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_landscape.geometry.blocks import block_eigenvalues, names_by_block
from lightning_landscape.geometry.checks import (
    check_block_names,
    check_blocks,
    check_choice,
    check_count,
    check_count_or_zero,
    check_flags,
    check_number,
)
from lightning_landscape.geometry.edge_ratio import EdgeRatio, edge_ratio, shared_step
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.lanczos import COLD_PRODUCTS
from lightning_landscape.geometry.objective import Engine, Objective
from lightning_landscape.geometry.sam import curvature_along
from lightning_landscape.geometry.spectrum import SpectralDensity, spectral_density
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.geometry.trace import hessian_trace
from lightning_landscape.geometry.vectors import Vector, norm, scaled
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.namespaces import package_of
from lightning_landscape.training.probe import Source
from lightning_landscape.training.round import Measured, Round
from lightning_landscape.training.saved import load_evenly

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Above what bfloat16 products show.
_ASYMMETRY = 0.02

# A product in gradients, until one was seen; and those behind one start vector of a density.
_PRODUCT, _DENSITY_PRODUCTS = 2.5, 30


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
        max_overhead: the share of the training time that all these callbacks together may
            take, the smallest one given; ``None``: the exact schedule, whatever it costs.
        probe: the data: a ``DataLoader``, a list of batches, one batch (a tuple, a dict), or a
            shared ``Probe``; in a LightningCLI the path of a function annotated
            ``-> DataLoader`` or ``-> Probe``.  ``None``: the first training batches are kept.
        probe_samples: how many examples to keep, over all processes; of training batches fewer
            where ``max_overhead`` of the whole run could not pay for them, which is said.
        probe_mode: ``"train"``: the loss that the optimizer descends, dropout masks fixed,
            BatchNorm on batch statistics.  ``"eval"``: the module in eval mode.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar tensor`` instead of ``training_step``;
            needed with manual optimisation.
        loss_reduction: ``"sum"`` if the loss is a sum over the batch's examples, not a mean.
        parameters: glob patterns over parameter names; ``None``: all that an optimizer trains.
        engine: how Hessian-vector products are made, see ``Objective``.
        name: for a second monitor; keys become ``hessian/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        k: how many eigenvalues.
        method: ``"lanczos"`` or ``"power"``.
        tol: relative residual at which the solver stops.
        rtol: estimated relative error of the eigenvalue at which it stops before that; ``None``:
            half of ``tol``; 0: the residual alone decides.
        max_hvps: most products one eigenvalue problem may take.
        min_eigenvalue: log the smallest eigenvalue too.  Here too ``tol`` and ``rtol`` are relative
            to the largest one in magnitude: a hundredth of that needs smaller ones.
        trace_samples: log the trace, its standard error and the Frobenius norm from this many
            products (30 give a few per cent); 0: none.
        density_samples: draw the spectral density from this many start vectors (10 is usual, each
            some 30 products); 0: none.
        blocks: log the top eigenvalue of each block (one per module) too, and with
            ``trace_samples`` its trace; a mapping parameter name -> block names other blocks.
        batch_edge_ratio: log the ratio to the edge on the training batch just used too: above 1 at
            several measurements in a row it is the best warning of a blow-up we know.
        update_curvature: log the curvature along the optimizer's last step too.

    Logged Metrics:
        - ``hessian/top_eigenvalue``: units of the loss per squared unit of the weights.
        - ``hessian/eigenvalue_2`` ... ``hessian/eigenvalue_k``.
        - ``hessian/residual``: ``||Hv - lambda v||`` of the top one (an eigenvalue lies within it).
        - ``hessian/hvps``: Hessian-vector products used, about 2 gradients of the probe each.
        - ``hessian/edge``: the threshold, when all parameter groups share one.
        - ``hessian/edge_ratio``: ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``, S the effective step.
        - ``hessian/preconditioned_eigenvalue``: for Adam and kin, what ``hessian/edge`` bounds.
        - ``hessian/inactive_share``: for Adam and kin, the share of the coordinates that have had
          no gradient in any step yet, from 0 to 1; the edge leaves them out.
        - ``hessian/min_eigenvalue``; ``hessian/trace``, ``hessian/trace_stderr``,
          ``hessian/frobenius``; ``hessian/block/<block>``, ``hessian/block_trace/<block>``;
          ``hessian/batch_edge_ratio``; ``hessian/update_curvature``: ``u'Hu / u'u``.
        - ``hessian/eigenvalue``: an image of the eigenvalue and its edge, at the end of the fit
          and now and then before.
        - ``hessian/density``: an image, and an ``.npz`` beside the logs; at the end of the fit
          ``hessian/density_film``, an image of all of them.
        - ``hessian/engine``: as text, once: how the products were made, and why.

        In ``history`` each row has ``"residuals"`` too: key -> residual, for all eigenvalues and
        ratios.  Some eigenvalue lies within it.  ``"converged"`` is that of the top eigenvalue, and
        ``"checked"`` the last step at which a search outside the vectors kept from one measurement
        to the next ended below it: see :class:`EigenResult`.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: two monitors of one name; manual optimisation without a
            ``loss_fn``.

    Cost: some 3 Hessian-vector products, 8 gradients of the probe, a measurement; for Adam and
    kin twice that; 5 products while the eigenvalue jumps, 8 or more the first time.  Fewer where
    half of what the whole run lends (``max_overhead`` times its length, a minute at least) does not
    pay for them: the residual is larger then, which is said.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, ICLR 2021; Adaptive gradient methods at the edge of stability, 2022.

    Example::

        trainer = Trainer(callbacks=[HessianMonitor(every_n_train_steps=50)])
    """

    kind = "hessian"
    displaces = False

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = 100,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        probe: Source = None,
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
        rtol: float | None = None,
        max_hvps: int = 50,
        min_eigenvalue: bool = False,
        trace_samples: int = 0,
        density_samples: int = 0,
        blocks: bool | Mapping[str, str] = False,
        batch_edge_ratio: bool = False,
        update_curvature: bool = False,
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
        said = "HessianMonitor"
        k = check_count(said, "k", k)
        check_choice(said, "method", method, ("lanczos", "power"))
        check_number(said, "tol", tol, "a number between 0 and 1", lambda x: 0.0 < x < 1.0)
        if rtol is not None:
            words = "a number from 0 to 1, or None"
            check_number(said, "rtol", rtol, words, lambda x: 0.0 <= x < 1.0)
        max_hvps = check_count(said, "max_hvps", max_hvps)
        if max_hvps < k:
            raise ValueError(f"{said}(max_hvps={max_hvps!r}): expected an integer >= k={k}")
        trace_samples = check_count_or_zero(said, "trace_samples", trace_samples)
        density_samples = check_count_or_zero(said, "density_samples", density_samples)
        check_blocks(said, blocks)
        check_flags(said, min_eigenvalue=min_eigenvalue, batch_edge_ratio=batch_edge_ratio)
        check_flags(said, update_curvature=update_curvature)
        self.k = k
        self.method: Literal["lanczos", "power"] = method
        self.tol = tol
        self.rtol = rtol
        self.max_hvps = max_hvps
        self.min_eigenvalue = min_eigenvalue
        self.trace_samples = trace_samples
        self.density_samples = density_samples
        self.blocks = blocks
        self.batch_edge_ratio = batch_edge_ratio
        self.update_curvature = update_curvature
        self.needs_batch = batch_edge_ratio
        self.needs_update = update_curvature
        self.tags = (
            "top_eigenvalue",
            *(f"eigenvalue_{i}" for i in range(2, k + 1)),
            "residual",
            "hvps",
            "edge",
            "edge_ratio",
            "preconditioned_eigenvalue",
            "inactive_share",
            *(("min_eigenvalue",) if min_eigenvalue else ()),
            *(("trace", "trace_stderr", "frobenius") if trace_samples else ()),
            *(("batch_edge_ratio",) if batch_edge_ratio else ()),
            *(("update_curvature",) if update_curvature else ()),
        )
        # The last result of each eigenvalue problem, to start the next one from.
        self._last: dict[str, EigenResult] = {}
        self._product_seconds: float | None = None  # at the last measurement
        self._checked_at: int | None = None  # the last step whose eigenvalue was checked
        self._settings: dict[str, Any] = {
            "method": method,
            "tol": tol,
            "rtol": tol / 2 if rtol is None else rtol,
            "max_hvps": max_hvps,
        }

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; the names of blocks are known only later."""
        of_block = key.startswith((self.key("block/"), self.key("block_trace/")))
        return key in self.keys or (bool(self.blocks) and of_block)

    def fits(self, names: Sequence[str]) -> None:
        """Raise where an argument names none of the module's parameters."""
        super().fits(names)
        check_block_names("HessianMonitor", self.blocks, names)

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

    @property
    def forwards(self) -> int:
        """Forwards of the probe that one measurement costs, about: 10 products an eigenvalue."""
        problems = self.k + self.min_eigenvalue + self.batch_edge_ratio
        probes = _DENSITY_PRODUCTS * self.density_samples + self.trace_samples
        return 3 + 6 * (min(10 * problems, problems * self.max_hvps) + probes)

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        self._stay_within_budget(this_round, objective)
        before, started = objective.hvps, this_round.clock()
        start = self._start("top", objective) or self._gradient(objective)
        result = this_round.top_eigenvalues(self, self.k, init=start, **self._settings)
        self._keep("top", result)
        measured = Measured()
        values = measured.values
        self._add(measured, "top_eigenvalue", result)
        values[self.key("residual")] = float(result.residuals[0])
        for index in range(1, self.k):
            self._add(measured, f"eigenvalue_{index + 1}", result, index)
        self._add_edge(measured, this_round, objective, result)
        self._add_spectrum(objective, measured, this_round)
        if self.update_curvature and this_round.steps(self, self.key("update_curvature")):
            update = this_round.last_update(objective)
            values[self.key("update_curvature")] = curvature_along(objective, update)
        products = objective.hvps - before
        values[self.key("hvps")] = float(products)
        if products:
            self._product_seconds = (this_round.clock() - started) / products
        if self.batch_edge_ratio and this_round.has_batch(self, self.key("batch_edge_ratio")):
            self._add_batch(measured, this_round)
        if result.asymmetry > _ASYMMETRY:
            self.say_once(
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
        """Fewer products for each eigenvalue problem, where the run does not pay for more."""
        self._settings["max_hvps"] = self.max_hvps
        if not this_round.is_limited(self):
            return
        own, price = "preconditioned" in self._last, self._product_seconds
        if price is None:
            started = this_round.clock()
            objective.gradient()
            price = _PRODUCT * (this_round.clock() - started)
            edge = self._edge(this_round, objective)
            own = edge is not None and shared_step(objective, edge) is None
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        blocks = len(names_by_block(objective.params, named)) if self.blocks else 0
        problems = (1 + own) * (1 + self.batch_edge_ratio) + self.min_eigenvalue + blocks
        others = self.trace_samples + _DENSITY_PRODUCTS * self.density_samples
        most = (this_round.affordable(price) - others) / problems
        self._settings["max_hvps"] = int(min(self.max_hvps, max(most, self.k + 1)))

    def in_retrospect(self, folder: Path, final: bool) -> Measured:
        """The eigenvalue beside the edge; at the end the densities too."""
        drawn = {self.key("eigenvalue"): partial(_eigenvalue_figure, self, folder)}
        densities = self.own_files(folder, "density")
        if final and len(densities) > 1:
            label = {"probe_mode": self.probe_mode}
            drawn[self.key("density_film")] = partial(_density_film, densities, label)
        return Measured(pictures=dict(drawn))

    def _add(self, measured: Measured, name: str, solved: EigenResult, index: int = 0) -> None:
        """An eigenvalue, and how sure it is."""
        value, residual = float(solved.eigenvalues[index]), float(solved.residuals[index])
        self._add_value(measured, name, value, residual, solved.converged)

    def _add_value(
        self, measured: Measured, name: str, value: float, residual: float, converged: bool
    ) -> None:
        key = self.key(name)
        measured.values[key] = value
        measured.facts.setdefault("residuals", {})[key] = residual
        if not converged and math.isfinite(value):
            most = self._settings["max_hvps"]
            if most < self.max_hvps:
                why, advice = (
                    f"after {most} products, all that this run can pay for at "
                    f"max_overhead={self.max_overhead},",
                    "raise max_overhead, or pass None; later measurements go on from here",
                )
            else:
                why, advice = f"at max_hvps={most}", "raise max_hvps or tol"
            self.say_once(
                f"the eigenvalue solver stopped {why} before its residual fell to tol={self.tol}, "
                f"so the value may be too low by about the residual; {advice}"
            )
        elif residual > abs(value):
            self.say_once(
                f"{key} is small beside the largest eigenvalue seen, and known to within its "
                f"residual only ({value:.3g}, residual {residual:.3g}); where it matters pass "
                f"a smaller tol, below 1e-3, rtol=0 and a larger max_hvps"
            )

    # -- the edge ------------------------------------------------------------------------------

    def _add_edge(
        self, measured: Measured, this_round: Round, objective: Objective, result: EigenResult
    ) -> None:
        values = measured.values
        # With a summed loss the optimizer sees the curvature of one batch, not of the probe.
        share = 1.0
        if self.loss_reduction == "sum":
            share = this_round.train_batch_size / this_round.probe_size(self)
        edge = self._edge(this_round, objective, share)
        if edge is None:
            values |= _unknown(result, self.key("edge_ratio"))
            return
        if edge.preconditioner or edge.inactive_share:
            values[self.key("inactive_share")] = edge.inactive_share
        found = self._ratio("preconditioned", objective, edge, result)
        converged = (found.solved or result).converged
        ratio, residual = found.ratio * share, found.residual * share
        self._add_value(measured, "edge_ratio", ratio, residual, converged)
        if edge.edge is not None:
            values[self.key("edge")] = edge.edge / share
            if edge.preconditioner:
                value, within = found.ratio * edge.edge, found.residual * edge.edge
                self._add_value(measured, "preconditioned_eigenvalue", value, within, converged)
        else:
            self.say_once(f"{self.key('edge')} is not logged: {edge.note}")

    def _add_batch(self, measured: Measured, this_round: Round) -> None:
        objective = this_round.batch_objective(self)
        start, gradient = self._start("batch", objective), objective.gradient(products_follow=True)
        result = top_eigenvalues(objective, init=start, hint=gradient, **self._settings)
        self._keep("batch", result)
        edge = self._edge(this_round, objective)
        if edge is None:
            measured.values |= _unknown(result, self.key("batch_edge_ratio"))
            return
        found = self._ratio("preconditioned batch", objective, edge, result)
        converged = (found.solved or result).converged
        self._add_value(measured, "batch_edge_ratio", found.ratio, found.residual, converged)

    def _edge(
        self, this_round: Round, objective: Objective, share: float = 1.0
    ) -> StabilityEdge | None:
        """``share``: the gradient of one batch in units of the objective's."""
        gradient = objective.gradient()
        gradient_norm = norm(gradient)
        edge = stability_edge(
            this_round.optimizers, objective.params, gradient_norm, scaled(gradient, share)
        )
        reason = _clipping(this_round.trainer, objective, gradient_norm)
        if reason or not edge.scale:
            self.say_once(f"no stability edge is logged: {reason or edge.note}")
            return None
        module = this_round.pl_module
        parent = package_of(module).LightningModule
        if is_overridden("configure_gradient_clipping", module, parent=parent):
            self.say_once(
                "configure_gradient_clipping is overridden; the stability edge is that of "
                "gradients that are not clipped, so leave it out of account while they are"
            )
        return edge

    def _ratio(
        self, problem: str, objective: Objective, edge: StabilityEdge, plain: EigenResult
    ) -> EdgeRatio:
        start: Vector | EigenResult | None = self._start(problem, objective)
        if start is None and (gradient := self._gradient(objective)) is not None:
            start = {name: g * edge.scale[name] ** 0.5 for name, g in gradient.items()}
            start = start if norm(start) > 0.0 else None  # all of it where nothing moves
        gradient = objective.gradient()
        found = edge_ratio(objective, edge, plain, init=start, hint=gradient, **self._settings)
        if found.solved is not None:
            self._keep(problem, found.solved)
        return found

    # -- more of the spectrum ------------------------------------------------------------------

    def _add_spectrum(self, objective: Objective, measured: Measured, this_round: Round) -> None:
        values = measured.values
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        if self.min_eigenvalue:
            start = self._start("min", objective)
            smallest = top_eigenvalues(
                objective, which="SA", init=start, hint=objective.gradient(), **self._settings
            )
            self._keep("min", smallest)
            self._add(measured, "min_eigenvalue", smallest)
        if self.blocks:
            tops = block_eigenvalues(
                objective,
                named,
                init=self._block_starts(objective),
                hint=objective.gradient(),
                **self._settings,
            )
            for block, found in tops.items():
                self._keep(f"block {block}", found)
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
            measured.pictures[self.key("density")] = partial(_density_figure, density, label)

    def _block_starts(self, objective: Objective) -> dict[str, EigenResult]:
        return {
            problem.removeprefix("block "): last
            for problem, last in self._last.items()
            if problem.startswith("block ")
            and last.fits(
                {name: p for name, p in objective.params.items() if name in last.eigenvectors[0]}
            )
        }

    # -- warm starts ---------------------------------------------------------------------------

    def _start(self, problem: str, objective: Objective) -> EigenResult | None:
        """The last result, unless the trained parameters have changed (one was frozen, say)."""
        last = self._last.get(problem)
        return last if last is not None and last.fits(objective.params) else None

    def _gradient(self, objective: Objective) -> dict[str, Tensor] | None:
        """Where a few products must do: it holds more of the top eigenvectors than chance does."""
        if self._settings["max_hvps"] >= min(COLD_PRODUCTS, self.max_hvps):
            return None
        gradient = objective.gradient()
        return gradient if 0.0 < norm(gradient) < math.inf else None

    def forget(self) -> None:
        """Start the solvers afresh: after a fault processes may hold different results."""
        self._last.clear()

    def _keep(self, problem: str, result: EigenResult) -> None:
        self._last.pop(problem, None)
        if bool(result.eigenvalues.isfinite().all()):
            self._last[problem] = result


def _unknown(result: EigenResult, key: str) -> dict[str, float]:
    """No ratio is logged without an edge; after a blow-up NaN is, for those who wait for it."""
    return {} if math.isfinite(result.eigenvalues[0]) else {key: math.nan}


def _eigenvalue_figure(monitor: HessianMonitor, folder: Path) -> Figure:
    from lightning_landscape.figures import eigenvalue_figure

    return eigenvalue_figure(monitor.own_rows(folder), name=monitor.name)


def _density_film(files: dict[int, Path], label: dict[str, Any]) -> Figure:
    from lightning_landscape.figures import density_film_figure

    steps = {path: step for step, path in files.items()}
    found = load_evenly(list(steps), SpectralDensity.load, most=60)
    densities = {steps[path]: density for path, density in found.items()}
    return density_film_figure(densities, metadata=label)


def _density_figure(density: SpectralDensity, label: dict[str, Any]) -> Figure:
    from lightning_landscape.figures import density_figure

    return density_figure(density, metadata=label)


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
