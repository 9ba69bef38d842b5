"""The way from a reference to the weights now: what it costs to go straight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_landscape.callbacks.between import Weights
from lightning_landscape.callbacks.reference import Reference, own_weights, weights_for
from lightning_landscape.geometry.batch_norm import tracking_batch_norms
from lightning_landscape.geometry.blocks import names_by_block
from lightning_landscape.geometry.checks import (
    check_block_names,
    check_blocks,
    check_count,
    check_flags,
    check_mapping,
)
from lightning_landscape.geometry.mode_connectivity import (
    NoPlane,
    displacement_to,
    line_between,
    loss_barrier,
    plane_through,
)
from lightning_landscape.geometry.objective import Engine, Objective
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.vectors import norm
from lightning_landscape.training.kept import Kept, is_told
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.monitor import Monitor, session_of, usable_state
from lightning_landscape.training.probe import Probe, Source, check_source, probe_of
from lightning_landscape.training.round import Measured, Round, measured_parameters
from lightning_landscape.training.sharding import Whole, is_sharded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIVE = ("initial", "last_epoch")  # references that are taken from the run itself
_OF_OTHERS = ("loss", "rise", "barrier")
_BARRIER = "max over t of L(w_t) - ((1-t) L(reference) + t L(now))"


class InterpolationMonitor(Monitor):
    r"""Watch how far the weights have come from a reference, and whether a hill lies between.

    The loss on the straight line from the reference to the weights now.  Without a barrier both lie
    in one basin.  With ``other_probes`` the same line on other data: the old task while
    fine-tuning, say.

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
            What is not measured stays as it is now all along the line.
        engine: unused, no derivative is taken.
        name: for a second monitor; keys become ``interpolation/<name>/...``.
        prog_bar: show the values in the progress bar.
        verbose: print the values of each measurement.
        reference: ``"initial"``: the weights that this fit starts with, the initial ones or those
            to be fine-tuned.  ``"last_epoch"``: those that the epoch under way started with (after
            a resume in its middle: those at the resume).  Or a checkpoint file or a state dict,
            which is copied here and now.
        resolution: points on the line, both ends among them.
        reestimate_batch_norm: in eval mode, estimate BatchNorm's running statistics from the probe
            at every point, each process from its share.  Those of training are wrong on the way;
            ``False`` keeps them.
        blocks: log the distance of each block (one per module) too; a mapping parameter name ->
            block names other blocks.
        other_probes: name -> data as ``probe`` takes it; the line is evaluated on each of them.
        third: a checkpoint file or a state dict: draw the plane through the reference, this one and
            the weights now.  The budget then treats this callback as one that draws: it measures
            when there is time for all of it, and once at the end of the fit in any case, with
            fewer points along the plane's axes, down to 5, where it must.
        plane_resolution: points along each axis of that plane.

    Logged Metrics:
        - ``interpolation/barrier``: ``max_t L(w_t) - ((1-t) L(w_0) + t L(w_1))``, w_0 the reference
          and w_1 the weights now; 0 or more, in units of the loss.
        - ``interpolation/distance``: ``||w_1 - w_0||``, over what is measured.
        - ``interpolation/reference_loss``: ``L(w_0)``, on the probe.
        - ``interpolation/<probe>_loss``: ``L(w_1)`` on another probe; ``<probe>_rise``:
          ``L(w_1) - L(w_0)`` there; ``<probe>_barrier``.
        - ``interpolation/distance/<block>``.
        - ``interpolation/line``: an image, and an ``.npz`` beside the logs for each probe.  The
          image where the budget has time left for it, and at the end of the fit.
        - ``interpolation/plane``: an image, with ``third``.

    Raises:
        ValueError: an argument out of its range; weights that lack a measured parameter, or of
            another shape.
        FileNotFoundError: a checkpoint is missing.
        MisconfigurationException: manual optimisation without a ``loss_fn``.

    Cost: ``resolution`` forwards of each probe, with re-estimated statistics twice as many, and
    ``plane_resolution^2`` for a plane.  A copy in main memory of the parameters that
    ``parameters`` names, also of those that are frozen so far, and for ``"initial"`` a file of that
    size beside the logs, from which a resumed run goes on.

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
        reference: Weights = "initial",
        resolution: int = 11,
        reestimate_batch_norm: bool = True,
        blocks: bool | Mapping[str, str] = False,
        other_probes: Mapping[str, Source] | None = None,
        third: Weights | None = None,
        plane_resolution: int = 15,
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
        said = "InterpolationMonitor"
        resolution = check_count(said, "resolution", resolution, least=2)
        plane_resolution = check_count(said, "plane_resolution", plane_resolution, least=2)
        check_flags(said, reestimate_batch_norm=reestimate_batch_norm)
        check_blocks(said, blocks)
        if other_probes is not None:
            words = "a mapping from name to data, or None"
            check_mapping(said, "other_probes", other_probes, words)
        for other, data in (other_probes or {}).items():
            check_source(said, f"other_probes[{other!r}]", data)
            if not isinstance(other, str) or not other or "/" in other or other == "reference":
                raise ValueError(
                    f"{said}(other_probes={{{other!r}: ...}}): expected a word, no '/', and not "
                    f"'reference'"
                )
        if not isinstance(reference, str) or reference not in _LIVE:
            words = "'initial', 'last_epoch'"
            reference = own_weights(said, "reference", reference, words)
        if third is not None:
            third = own_weights(said, "third", third)
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
                    f"{said}(other_probes={{{other!r}: ...}}): expected data, not None"
                )
        self.given_probes = tuple(self.other_probes.values())
        self.follows_epochs = reference == "last_epoch"
        self.draws = third is not None  # type: ignore[misc]  # no price for a scalar
        self.tags = (
            "barrier",
            "distance",
            "reference_loss",
            *(f"{other}_{what}" for other in self.other_probes for what in _OF_OTHERS),
        )
        self._from = Reference()
        self._third: Mapping[str, Any] = {}
        self._kept_reference = Kept("reference")
        self._without_reference = False
        self._plane_size = plane_resolution  # of the plane that is next

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``; the names of blocks are known only later."""
        return key in self.keys or (bool(self.blocks) and key.startswith(self.key("distance/")))

    def fits(self, names: Sequence[str]) -> None:
        """Raise where an argument names none of the module's parameters."""
        super().fits(names)
        check_block_names("InterpolationMonitor", self.blocks, names)

    @property
    def charts(self) -> dict[str, list[Any]]:
        """The barriers of all probes on one chart, and what was lost on the others."""
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
        """Forwards of the probe that one measurement costs, about."""
        return self._on_lines + (0 if self.third is None else self.plane_resolution**2)

    @property
    def _on_lines(self) -> int:
        return self.resolution * (1 + len(self.other_probes))

    @property
    def pictures(self) -> int:  # type: ignore[override]
        """Pictures that are drawn at each measurement."""
        return 1 + (self.third is not None)

    @property
    def owes(self) -> bool:
        """The line to where training has ended."""
        return True

    @property
    def coarse(self) -> str:
        """How many points the last plane had, where they were fewer than asked for."""
        if self.third is None or self._plane_size == self.plane_resolution:
            return ""
        size, full = self._plane_size, self.plane_resolution
        return f"{size} x {size} of {full} x {full} points"

    def settle_for(self, forwards: float | None) -> None:
        """Take fewer points along the axes of the plane, down to 5."""
        self._plane_size = self.plane_resolution
        if forwards is None or self.third is None:
            return
        while self._plane_size > 5 and self._on_lines + self._plane_size**2 > forwards:
            self._plane_size = max(self._plane_size - 2, 5)

    # -- the reference -------------------------------------------------------------------------

    def begin(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Take the weights as they are, or read those that were given."""
        if self._without_reference:  # that was another fit
            self.disabled = self._without_reference = False
        measured = measured_parameters(trainer, pl_module, self.parameters, Whole())
        params = self._params(pl_module)
        if self.third is not None:
            said = "InterpolationMonitor(third=...)"
            self._third = weights_for(said, self.third, measured, params)
        if self.reference not in _LIVE:
            said = "InterpolationMonitor(reference=...)"
            self._from.weights = weights_for(said, self.reference, measured, params)
        elif is_sharded(pl_module):
            self._do_without("under FSDP2 no copy of the weights is kept")
        elif self.reference == "initial" and self._goes_on(trainer, params):
            pass
        elif not session_of(trainer).trains:
            self._do_without("no training has led to these weights")
        else:
            self._take(trainer, params)

    def _params(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """All that may be measured in this fit: what is frozen so far, too."""
        patterns = ["*"] if self.parameters is None else self.parameters
        return {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def _do_without(self, reason: str) -> None:
        self.disabled = self._without_reference = True
        self.say_once(
            f"nothing is measured, there is no reference={self.reference!r}: {reason}; pass a "
            f"checkpoint file or a state dict"
        )

    def _take(self, trainer: Trainer, params: Mapping[str, Tensor]) -> None:
        self._from.take(params)
        if self.reference == "last_epoch":
            if trainer.fit_loop.restarted_mid_epoch:
                self.say_once(
                    "this fit goes on in the middle of an epoch: until the next one begins the "
                    "reference is what it goes on from"
                )
            return
        self._kept_reference.told = None
        # The same on all processes; rank zero writes.
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            recorder = session_of(trainer).recorder
            name = f"{self.prefix.replace('/', '-')}-reference.pt"
            self._kept_reference.write_as(name, self._from, recorder)

    def _goes_on(self, trainer: Trainer, params: Mapping[str, Tensor]) -> bool:
        """After a resume: whether the reference of the run before was found."""
        if not (self.resumed and trainer.ckpt_path) or trainer.global_step == 0:
            return False
        session = session_of(trainer)
        problem = "the checkpoint names none"
        if self._kept_reference.told is not None:
            problem = self._kept_reference.read(self._from, session.recorder, trainer)
        if not problem and {n: p.shape for n, p in params.items()} != {
            n: w.shape for n, w in self._from.weights.items()
        }:
            problem = "it has other parameters"
        if session.processes.total(not problem) == session.processes.count:
            return True
        self.say_once(
            f"the reference of the run before could not be used: "
            f"{problem or 'another process has none'}; a new series starts from the weights now"
        )
        return False

    def epoch_begins(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of the epoch before; without room for a copy nothing is measured in this one."""
        try:
            self._from.take(self._params(pl_module))
        except Exception as error:  # out of memory, most likely
            self._from.forget()
            self.say_once(f"the weights at the start of the epoch could not be kept: {error}")

    # -- a measurement -------------------------------------------------------------------------

    def measure(self, this_round: Round) -> Measured:
        if not self._from.weights:
            raise RuntimeError("there is no copy of the weights of the reference")
        reestimated = (
            self.reestimate_batch_norm
            and self.probe_mode == "eval"
            and bool(tracking_batch_norms(this_round.pl_module))
        )
        on = partial(this_round.objective_on, self, reestimated=reestimated)
        objective = on(self.probe_in_use)
        line = self._line(this_round, objective, self.probe_in_use, reestimated)
        measured = Measured(
            {
                self.key("barrier"): line.metadata["barrier"],
                self.key("distance"): line.metadata["norms"][0],
                self.key("reference_loss"): float(line.losses[0]),
            },
            {
                "reference": self._words,
                "barrier_definition": _BARRIER,
                "center_loss": line.center_loss,
            },
        )
        lines = {"": line}
        if self.blocks:
            self._add_distances(measured, objective)
        if self.third is not None:
            self._add_plane(measured, this_round, objective)
        for other, probe in self.other_probes.items():
            lines[other] = found = self._line(this_round, on(probe), probe, reestimated)
            for what, value in (
                ("loss", found.center_loss),
                ("rise", found.center_loss - float(found.losses[0])),
                ("barrier", found.metadata["barrier"]),
            ):
                measured.values[self.key(f"{other}_{what}")] = value
        for other, found in lines.items():
            self._keep(measured, f"line-{other}" if other else "line", found)
        if this_round.trainer.is_global_zero:
            measured.pictures[self.key("line")] = partial(_line_figure, lines)
        return measured

    def _line(
        self, this_round: Round, objective: Objective, probe: Probe, reestimated: bool
    ) -> Slice:
        known = self._known(this_round, this_round.further_size(probe))
        known |= {"directions": [f"from {self._words}"], "reference": self._words}
        known |= {"batch_norm": "re-estimated"} if reestimated else {}
        line = line_between(
            objective, self._from.weights, None, self.resolution, metadata=known, progress=False
        )
        line.metadata["barrier"] = loss_barrier(line)
        return line

    def _add_plane(self, measured: Measured, this_round: Round, objective: Objective) -> None:
        size, full = self._plane_size, self.plane_resolution
        known = self._known(this_round, this_round.probe_size(self))
        known |= {"directions": [f"to {self._words}", "across to third"]}
        known |= {} if size == full else {"coarse": {"wanted": [full] * 2, "taken": [size] * 2}}
        try:
            plane = plane_through(
                objective,
                self._from.weights,
                self._third,
                resolution=size,
                metadata=known,
                progress=False,
            )
        except NoPlane as error:
            self.say_once(f"a plane was left out: {error}")
            return
        names = ("now", self._words, "third")
        for point, told in zip(plane.metadata["points"], names, strict=True):
            point["name"] = told
        self._keep(measured, "plane", plane)
        if this_round.trainer.is_global_zero:
            measured.pictures[self.key("plane")] = partial(_plane_figure, plane)

    def _add_distances(self, measured: Measured, objective: Objective) -> None:
        moves = displacement_to(objective, self._from.weights, "reference")
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        for block, names in names_by_block(objective.params, named).items():
            length = norm({name: moves[name] for name in names})
            measured.values[self.key(f"distance/{block}")] = length

    def _known(self, this_round: Round, samples: int) -> dict[str, Any]:
        return {
            "step": this_round.step,
            "epoch": this_round.trainer.current_epoch,
            "probe_samples": samples,
            "probe_mode": self.probe_mode,
        }

    @property
    def _words(self) -> str:
        if self.reference == "initial":
            return "the start"
        if self.reference == "last_epoch":
            return "the last epoch"
        return "the reference" if isinstance(self.reference, Mapping) else Path(self.reference).stem

    def _keep(self, measured: Measured, part: str, piece: Slice) -> None:
        name = f"{self.key(part).replace('/', '-')}-step{piece.metadata['step']:08d}.npz"
        measured.files[name] = cast(Callable[[Path], None], piece.save)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The common state, and where the reference lies."""
        return {**super().state_dict(), "reference": self._kept_reference.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series, from the same reference."""
        super().load_state_dict(state_dict)
        if self.resumed and usable_state(self.prefix, state_dict, {"reference": is_told}):
            self._kept_reference.told = state_dict.get("reference")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the copies too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._from.forget()
            self._third = {}


def _line_figure(lines: Mapping[str, Slice]) -> Figure:
    from lightning_landscape.figures import line_figure
    from lightning_landscape.figures.labels import number

    names = [
        f"{name or 'probe'}, barrier {number(s.metadata['barrier'])}" for name, s in lines.items()
    ]
    return line_figure(list(lines.values()), names=names if len(lines) > 1 else None)


def _plane_figure(plane: Slice) -> Figure:
    from lightning_landscape.figures import plane_figure

    return plane_figure(plane)
