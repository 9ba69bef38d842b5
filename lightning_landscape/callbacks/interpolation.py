"""The loss on the line from reference weights to the current weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.callbacks.between import WeightsSource
from lightning_landscape.callbacks.interpolation_measurement import InterpolationMeasurement
from lightning_landscape.callbacks.reference import Reference, check_weights, weights_for
from lightning_landscape.geometry.checks import (
    check_block_names,
    check_blocks,
    check_count,
    check_flags,
    check_mapping,
)
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.data.probe import Source, check_source, probe_of
from lightning_landscape.training.data.stored import StoredFile
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.sharding import UnshardedParameters, is_sharded
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.monitor import session_of
from lightning_landscape.training.parameters import measured_parameters
from lightning_landscape.training.schedule import EveryNSteps

_FROM_RUN = ("initial", "last_epoch")  # references copied during the run
_LEAST_POINTS = 11  # along an axis of the plane, if the budget is too small for more
_OTHER_PROBE_TAGS = ("loss", "rise", "barrier")


class InterpolationMonitor(InterpolationMeasurement):
    r"""Log the distance of the weights from a reference, and the loss barrier between them.

    The loss is evaluated on the line from the reference to the current weights.  Without a barrier
    both lie in one basin.  With ``other_probes`` the same line is evaluated on other data, for
    example on the old task during fine-tuning.

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
            All others keep their current values on the whole line.
        engine: not used, because there are no derivatives.
        save_probe: write the kept batches beside the logs, so that a resumed run measures the same
            ones; ``False`` if they must not be on disk.
        name: for a second monitor; keys become ``interpolation/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        reference: ``"initial"``: the weights at the start of this fit, e.g. those to be fine-tuned.
            ``"last_epoch"``: those at the start of the current epoch (after a resume within an
            epoch: those at the resume).  Or a checkpoint file, or a state dict, which is copied
            immediately.
        resolution: points on the line, including both ends.
        reestimate_batch_norm: in eval mode, estimate BatchNorm's running statistics from the probe
            at every point, on each process from its part.  The statistics of training are wrong
            between the ends; ``False`` uses them.
        blocks: log the distance of each block (one per module) too; a mapping parameter name ->
            block names other blocks.
        other_probes: name -> data as ``probe`` takes it; the line is evaluated on each of them.
        third: a checkpoint file or a state dict: draw the plane through the reference, these
            weights and the current ones.  The budget then treats this callback as one that draws:
            it measures if there is time for all of it, and at the end of the fit, if necessary with
            fewer points along the axes of the plane, at least 11.
        plane_resolution: points along each axis of that plane.

    Logged Metrics:
        - ``interpolation/barrier``: ``max_t L(w_t) - ((1-t) L(w_0) + t L(w_1))``, w_0 the reference
          and w_1 the current weights; at least 0, in units of the loss.
        - ``interpolation/distance``: ``||w_1 - w_0||``, over the measured parameters.
        - ``interpolation/reference_loss``: ``L(w_0)``, on the probe.
        - ``interpolation/<probe>_loss``: ``L(w_1)`` on another probe; ``<probe>_rise``:
          ``L(w_1) - L(w_0)`` there; ``<probe>_barrier``.
        - ``interpolation/distance/<block>``.
        - ``interpolation/line``: an image, and an ``.npz`` beside the logs for each probe.  The
          image is drawn if the budget has time left, and always at the end of the fit.
        - ``interpolation/plane``: an image, with ``third``.

    Raises:
        ValueError: an argument out of its range; weights that lack a measured parameter, or of
            another shape.
        FileNotFoundError: a checkpoint is missing.
        MisconfigurationException: manual optimisation without a ``loss_fn``.

    Cost: ``resolution`` forwards of each probe, twice as many with re-estimated statistics, and
    ``plane_resolution^2`` for a plane.  A copy of the selected parameters in main memory, including
    frozen ones, and for ``"initial"`` a file of that size beside the logs, for resumed runs.

    Source: Goodfellow et al., Qualitatively characterizing neural network optimization problems,
    ICLR 2015; Entezari et al., The role of permutation invariance in linear mode connectivity of
    neural networks, ICLR 2022 (the barrier).

    Example::

        old = DataLoader(old_task, batch_size=256)
        watch = InterpolationMonitor(other_probes={"old": old}, probe_mode="eval")
        stop = SharpnessEarlyStopping("interpolation/old_rise", threshold=0.5)
        trainer = Trainer(callbacks=[watch, stop])
    """

    kind = "interpolation"

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
        reference: WeightsSource = "initial",
        resolution: int = 11,
        reestimate_batch_norm: bool = True,
        blocks: bool | Mapping[str, str] = False,
        other_probes: Mapping[str, Source] | None = None,
        third: WeightsSource | None = None,
        plane_resolution: int = 15,
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
        owner = "InterpolationMonitor"
        resolution = check_count(owner, "resolution", resolution, least=2)
        plane_resolution = check_count(owner, "plane_resolution", plane_resolution, least=2)
        check_flags(owner, reestimate_batch_norm=reestimate_batch_norm)
        check_blocks(owner, blocks)
        if other_probes is not None:
            expected = "a mapping from name to data, or None"
            check_mapping(owner, "other_probes", other_probes, expected)
        for other, data in (other_probes or {}).items():
            check_source(owner, f"other_probes[{other!r}]", data)
            if not isinstance(other, str) or not other or "/" in other or other == "reference":
                raise ValueError(
                    f"{owner}(other_probes={{{other!r}: ...}}): expected a word, no '/', and not "
                    f"'reference'"
                )
        if not isinstance(reference, str) or reference not in _FROM_RUN:
            expected = "'initial', 'last_epoch'"
            reference = check_weights(owner, "reference", reference, expected)
        if third is not None:
            third = check_weights(owner, "third", third)
        self.reference = reference
        self.resolution = resolution
        self.reestimate_batch_norm = reestimate_batch_norm
        self.blocks = blocks
        self.third = third
        self.plane_resolution = plane_resolution
        self.other_probes = {
            other: probe_of(data, probe_samples) for other, data in (other_probes or {}).items()
        }
        for other, data in self.other_probes.items():
            if data.captured:
                raise ValueError(
                    f"{owner}(other_probes={{{other!r}: ...}}): expected data, not None"
                )
        self._bookkeeping.probes |= {f"other/{n}": p for n, p in self.other_probes.items()}
        self.tracks_epochs = reference == "last_epoch"
        self.draws = third is not None  # type: ignore[misc]  # a plane is scheduled as a picture
        self.tags = (
            "barrier",
            "distance",
            "reference_loss",
            *(f"{other}_{what}" for other in self.other_probes for what in _OTHER_PROBE_TAGS),
        )
        self._reference = Reference()
        self._third_weights: Mapping[str, Any] = {}
        self._bookkeeping.stored["reference"] = StoredFile("reference")
        self._without_reference = False
        self._plane_size = plane_resolution  # of the next plane

    @property
    def _stored(self) -> StoredFile:
        return self._bookkeeping.stored["reference"]

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; the names of blocks are known only later."""
        return key in self.keys or (bool(self.blocks) and key.startswith(self.key("distance/")))

    def check_parameters(self, names: Sequence[str]) -> None:
        """Raise if an argument matches none of the module's parameters."""
        super().check_parameters(names)
        check_block_names("InterpolationMonitor", self.blocks, names)

    @property
    def charts(self) -> dict[str, list[Any]]:
        """The barriers of all probes on one chart, the rises of the other probes on another."""
        others = list(self.other_probes)
        charts = {
            f"{self.prefix}: barrier": [
                "Multiline",
                [self.key(f"{tag}barrier") + "$" for tag in ("", *(f"{o}_" for o in others))],
            ]
        }
        if others:
            charts[f"{self.prefix}: rise of the loss since the reference"] = [
                "Multiline",
                [self.key(f"{other}_rise") + "$" for other in others],
            ]
        return charts

    @property
    def forwards(self) -> int:
        """Approximate forwards of the probe per measurement."""
        return self._line_forwards + (0 if self.third is None else self.plane_resolution**2)

    @property
    def _line_forwards(self) -> int:
        return self.resolution * (1 + len(self.other_probes))

    @property
    def pictures(self) -> int:  # type: ignore[override]
        """Pictures per measurement."""
        return 1 + (self.third is not None)

    @property
    def measures_at_end(self) -> bool:
        """True, for the line to the final weights."""
        return True

    @property
    def reduced_resolution(self) -> str:
        """The number of points of the last plane, if it was reduced."""
        if self.third is None or self._plane_size == self.plane_resolution:
            return ""
        size, full = self._plane_size, self.plane_resolution
        return f"{size} x {size} of {full} x {full} points"

    def fit_to_budget(self, forwards: float | None) -> bool:
        """Reduce the points along the axes of the plane, to 11 at least."""
        self._plane_size = self.plane_resolution
        if forwards is None or self.third is None:
            return super().fit_to_budget(forwards)
        least = min(_LEAST_POINTS, self.plane_resolution)
        while self._line_forwards + self._plane_size**2 > forwards:
            if self._plane_size == least:
                self._plane_size = self.plane_resolution
                return False
            self._plane_size = max(self._plane_size - 2, least)
        return True

    # -- the reference -------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Copy the current weights as the reference, or read the given ones."""
        if self._without_reference:  # by another fit
            self._bookkeeping.disabled = self._without_reference = False
        measured = measured_parameters(trainer, pl_module, self.parameters, UnshardedParameters())
        params = self._params(pl_module)
        if self.third is not None:
            owner = "InterpolationMonitor(third=...)"
            self._third_weights = weights_for(owner, self.third, measured, params)
        if self.reference not in _FROM_RUN:
            owner = "InterpolationMonitor(reference=...)"
            self._reference.weights = weights_for(owner, self.reference, measured, params)
        elif is_sharded(pl_module):
            self._disable_without_reference("under FSDP2 no copy of the weights is kept")
        elif self.reference == "initial" and self._restore_reference(trainer, params):
            pass
        elif not session_of(trainer).run.trains:
            self._disable_without_reference("no training has led to these weights")
        else:
            self._copy_reference(trainer, params)

    def _params(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """All parameters that may be measured in this fit, including frozen ones."""
        patterns = ["*"] if self.parameters is None else self.parameters
        return {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def _disable_without_reference(self, reason: str) -> None:
        self._bookkeeping.disabled = self._without_reference = True
        self.warn_once(
            f"nothing is measured, there is no reference={self.reference!r}: {reason}; pass a "
            f"checkpoint file or a state dict"
        )

    def _copy_reference(self, trainer: Trainer, params: Mapping[str, Tensor]) -> None:
        self._reference.copy_from(params)
        if self.reference == "last_epoch":
            if trainer.fit_loop.restarted_mid_epoch:
                self.warn_once(
                    "this fit resumes in the middle of an epoch: until the next one begins, the "
                    "reference is the weights at the resume"
                )
            return
        self._stored.entry = None
        # The weights are the same on all processes; rank zero writes them.
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            recorder = session_of(trainer).recorder
            name = f"{self.prefix.replace('/', '-')}-reference.pt"
            self._stored.write_as(name, self._reference, recorder)

    def _restore_reference(self, trainer: Trainer, params: Mapping[str, Tensor]) -> bool:
        """After a resume, read the reference of the run before; returns whether it was found."""
        if not (self._bookkeeping.resumed and trainer.ckpt_path) or trainer.global_step == 0:
            return False
        session = session_of(trainer)
        problem = "the checkpoint has none"
        if self._stored.entry is not None:
            problem = self._stored.read(self._reference, session.recorder, trainer)
        if not problem and {n: p.shape for n, p in params.items()} != {
            n: w.shape for n, w in self._reference.weights.items()
        }:
            problem = "it has other parameters"
        if session.run.processes.total(not problem) == session.run.processes.count:
            return True
        self.warn_once(
            f"the reference of the run before could not be used: "
            f"{problem or 'another process has none'}; a new series starts from the current weights"
        )
        return False

    def on_epoch_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights; if that fails, nothing is measured in this epoch."""
        try:
            self._reference.copy_from(self._params(pl_module))
        except Exception as error:  # out of memory, most likely
            reraise_interrupt(error)
            self._reference.clear()
            self.warn_once(f"the weights at the start of the epoch could not be copied: {error}")
