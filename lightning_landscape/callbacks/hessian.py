"""The largest eigenvalues of the Hessian, and the optimizer's stability edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_landscape.callbacks.hessian_measurement import DENSITY_PRODUCTS, HessianMeasurement
from lightning_landscape.callbacks.solver import Solver
from lightning_landscape.geometry.checks import (
    check_block_names,
    check_blocks,
    check_choice,
    check_count,
    check_count_or_zero,
    check_flags,
    check_number,
)
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.data.probe import Source
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.schedule import EveryNSteps


class HessianMonitor(HessianMeasurement):
    r"""Log the largest eigenvalues of the Hessian, and the distance to the stability edge.

    The largest *algebraic* eigenvalue of the Hessian of the probe's loss over the trained
    parameters, by Lanczos (or power iteration) on Hessian-vector products, warm-started from the
    previous measurement.  With it the stability edge of the optimizer with its current settings:
    2/lr for plain SGD, (2 + 2b)/lr with momentum b, 38/lr on the preconditioned Hessian for Adam.
    ``edge_ratio`` 1 is normal: full-batch training reaches it by itself and stays there.

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
        name: for a second monitor; keys become ``hessian/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        k: how many eigenvalues.
        method: ``"lanczos"`` or ``"power"``.
        tol: relative residual at which the solver stops.
        rtol: estimated relative error of the eigenvalue at which it stops earlier; ``None``: half
            of ``tol``; 0: only the residual decides.
        max_hvps: maximum number of products per eigenvalue problem.
        min_eigenvalue: log the smallest eigenvalue too.  ``tol`` and ``rtol`` are relative to the
            largest one in magnitude: if it is a hundredth of that, pass smaller ones.
        trace_samples: log the trace, its standard error and the Frobenius norm from this many
            products (30 give a few per cent); 0: none.
        density_samples: draw the spectral density from this many start vectors (usually 10, with
            about 30 products each); 0: none.
        blocks: log the top eigenvalue of each block (one per module) too, and with
            ``trace_samples`` its trace; a mapping parameter name -> block names other blocks.
        batch_edge_ratio: log the ratio to the edge on the last training batch too: above 1 at
            several measurements in a row it is the best warning of divergence we know.
        update_curvature: log the curvature along the optimizer's last step too.

    Logged Metrics:
        - ``hessian/top_eigenvalue``: units of the loss per squared unit of the weights.
        - ``hessian/eigenvalue_2`` ... ``hessian/eigenvalue_k``.
        - ``hessian/residual``: ``||Hv - lambda v||`` of the top one, which bounds the distance to
          the nearest eigenvalue.
        - ``hessian/hvps``: Hessian-vector products used, about 2 gradients of the probe each.
        - ``hessian/edge``: the threshold, if all parameter groups share one.
        - ``hessian/edge_ratio``: ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``, S the effective step.
        - ``hessian/preconditioned_eigenvalue``: for Adam and similar optimizers, the eigenvalue to
          compare with ``hessian/edge``.
        - ``hessian/inactive_share``: for these optimizers, the share of the coordinates without a
          gradient in any step so far, from 0 to 1; the edge excludes them.
        - ``hessian/min_eigenvalue``; ``hessian/trace``, ``hessian/trace_stderr``,
          ``hessian/frobenius``; ``hessian/block/<block>``, ``hessian/block_trace/<block>``;
          ``hessian/batch_edge_ratio``; ``hessian/update_curvature``: ``u'Hu / u'u``.
        - ``hessian/eigenvalue``: an image of the eigenvalue and its edge, at the end of the fit
          and a few times before.
        - ``hessian/density``: an image, and an ``.npz`` beside the logs; at the end of the fit
          ``hessian/density_film``, one image of all densities.
        - ``hessian/engine``: as text, once: how the products were computed, and why.

        Each row of ``history`` also has ``"residuals"``: key -> residual, for all eigenvalues and
        ratios; ``"converged"``: of the top eigenvalue; and ``"checked"``: the last step at which a
        search outside the warm-started vectors found no larger one, see :class:`EigenResult`.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: two monitors of one name; manual optimisation without a
            ``loss_fn``.

    Cost: about 3 Hessian-vector products (8 gradients of the probe) per measurement, twice that for
    Adam and similar optimizers; 5 products while the eigenvalue changes much, 8 or more at first.
    If the budget does not allow as many as the solver needs, no value is logged, with a warning.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of
    stability, ICLR 2021; Adaptive gradient methods at the edge of stability, 2022.

    Example::

        trainer = Trainer(callbacks=[HessianMonitor(every_n_train_steps=50)])
    """

    kind = "hessian"
    moves_weights = False

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
        owner = "HessianMonitor"
        k = check_count(owner, "k", k)
        check_choice(owner, "method", method, ("lanczos", "power"))
        check_number(owner, "tol", tol, "a number between 0 and 1", lambda x: 0.0 < x < 1.0)
        if rtol is not None:
            expected = "a number from 0 to 1, or None"
            check_number(owner, "rtol", rtol, expected, lambda x: 0.0 <= x < 1.0)
        max_hvps = check_count(owner, "max_hvps", max_hvps)
        if max_hvps < k:
            raise ValueError(f"{owner}(max_hvps={max_hvps!r}): expected an integer >= k={k}")
        trace_samples = check_count_or_zero(owner, "trace_samples", trace_samples)
        density_samples = check_count_or_zero(owner, "density_samples", density_samples)
        check_blocks(owner, blocks)
        check_flags(owner, min_eigenvalue=min_eigenvalue, batch_edge_ratio=batch_edge_ratio)
        check_flags(owner, update_curvature=update_curvature)
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
        self.needs_clipping = True
        self.tags = (
            "top_eigenvalue",
            *(f"eigenvalue_{i}" for i in range(2, k + 1)),
            "residual",
            "hvps",
            "edge",
            "edge_ratio",
            "preconditioned_eigenvalue",
            "inactive_share",
            "clipped_share",
            *(("min_eigenvalue",) if min_eigenvalue else ()),
            *(("trace", "trace_stderr", "frobenius") if trace_samples else ()),
            *(("batch_edge_ratio",) if batch_edge_ratio else ()),
            *(("update_curvature",) if update_curvature else ()),
        )
        self._solver = Solver(method, tol, rtol, max_hvps)
        self._product_seconds: float | None = None  # at the last measurement
        self._checked_at: int | None = None  # the last step with a checked eigenvalue

    @property
    def main_tags(self) -> tuple[str, ...]:
        """The scalars that the summary at the end of the fit shows."""
        return ("top_eigenvalue", "edge_ratio")

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; the names of blocks are known only later."""
        of_block = key.startswith((self.key("block/"), self.key("block_trace/")))
        return key in self.keys or (bool(self.blocks) and of_block)

    def check_parameters(self, names: Sequence[str]) -> None:
        """Raise if an argument matches none of the module's parameters."""
        super().check_parameters(names)
        check_block_names("HessianMonitor", self.blocks, names)

    @property
    def charts(self) -> dict[str, list[Any]]:
        """The ratio to the edge first; then the eigenvalue and the edge on one chart.

        For adaptive optimizers that is the preconditioned eigenvalue, and the other one is apart:
        they may differ by orders of magnitude.
        """

        def chart(*tags: str) -> list[Any]:
            # Tags are regular expressions that match at the start: without "$", hessian/edge would
            # match hessian/edge_ratio too.
            return ["Multiline", [self.key(tag) + "$" for tag in tags]]

        found = {
            f"{self.prefix}: ratio to the edge (1 = edge of stability)": chart("edge_ratio"),
        }
        preconditioned = self.key("preconditioned_eigenvalue")
        title = f"{self.prefix}: eigenvalue and the optimizer's edge"
        if any(preconditioned in row for row in self.history[-1:]):
            title = f"{self.prefix}: preconditioned eigenvalue and the optimizer's edge"
            found[title] = chart("preconditioned_eigenvalue", "edge")
            found[f"{self.prefix}: eigenvalue of the Hessian"] = chart("top_eigenvalue")
        else:
            found[title] = chart("top_eigenvalue", "edge")
        return found

    @property
    def forwards(self) -> int:
        """Approximate forwards of the probe per measurement, with 10 products per eigenvalue."""
        problems = self.k + self.min_eigenvalue + self.batch_edge_ratio
        samples = DENSITY_PRODUCTS * self.density_samples + self.trace_samples
        return 3 + 6 * (min(10 * problems, problems * self.max_hvps) + samples)
