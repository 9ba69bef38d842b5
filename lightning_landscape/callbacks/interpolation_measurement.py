"""How ``InterpolationMonitor`` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.between import WeightsSource
from lightning_landscape.callbacks.reference import Reference
from lightning_landscape.geometry.batch_norm import tracking_batch_norms
from lightning_landscape.geometry.blocks import names_by_block
from lightning_landscape.geometry.mode_connectivity import (
    NoPlane,
    displacement_to,
    line_between,
    loss_barrier,
    plane_through,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.vectors import norm
from lightning_landscape.training.bookkeeping import usable_state
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.data.stored import is_entry
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARRIER = "max over t of L(w_t) - ((1-t) L(reference) + t L(now))"


class InterpolationMeasurement(Monitor):
    """Measures lines to a reference, with the arguments of ``InterpolationMonitor``."""

    reference: WeightsSource
    resolution: int
    reestimate_batch_norm: bool
    blocks: bool | Mapping[str, str]
    other_probes: dict[str, Probe]
    third: WeightsSource | None
    plane_resolution: int
    _reference: Reference
    _third_weights: Mapping[str, Any]
    _plane_size: int

    def measure(self, this_round: Round) -> Measured:
        if not self._reference.weights:
            raise RuntimeError("there is no copy of the weights of the reference")
        reestimated = (
            self.reestimate_batch_norm
            and self.probe_mode == "eval"
            and bool(tracking_batch_norms(this_round.pl_module))
        )
        objective_on = partial(this_round.objective_on, self, reestimated=reestimated)
        objective = objective_on(self.loss.probe)
        line = self._line(this_round, objective, self.loss.probe, reestimated)
        measured = Measured(
            {
                self.key("barrier"): line.metadata["barrier"],
                self.key("distance"): line.metadata["norms"][0],
                self.key("reference_loss"): float(line.losses[0]),
            },
            {
                "reference": self._reference_name,
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
            lines[other] = found = self._line(this_round, objective_on(probe), probe, reestimated)
            for what, value in (
                ("loss", found.center_loss),
                ("rise", found.center_loss - float(found.losses[0])),
                ("barrier", found.metadata["barrier"]),
            ):
                measured.values[self.key(f"{other}_{what}")] = value
        for other, found in lines.items():
            self._add_file(measured, f"line-{other}" if other else "line", found)
        if this_round.trainer.is_global_zero:
            measured.pictures[self.key("line")] = partial(_line_figure, lines)
        return measured

    def _line(
        self, this_round: Round, objective: Objective, probe: Probe, reestimated: bool
    ) -> Slice:
        metadata = self._metadata(this_round, this_round.size_of(probe))
        metadata |= {
            "directions": [f"from {self._reference_name}"],
            "reference": self._reference_name,
        }
        metadata |= {"batch_norm": "re-estimated"} if reestimated else {}
        line = line_between(
            objective,
            self._reference.weights,
            None,
            self.resolution,
            metadata=metadata,
            progress=False,
        )
        line.metadata["barrier"] = loss_barrier(line)
        return line

    def _add_plane(self, measured: Measured, this_round: Round, objective: Objective) -> None:
        size, full = self._plane_size, self.plane_resolution
        metadata = self._metadata(this_round, this_round.probe_size(self))
        metadata |= {"directions": [f"to {self._reference_name}", "across to third"]}
        metadata |= {} if size == full else {"coarse": {"wanted": [full] * 2, "taken": [size] * 2}}
        try:
            plane = plane_through(
                objective,
                self._reference.weights,
                self._third_weights,
                resolution=size,
                metadata=metadata,
                progress=False,
            )
        except NoPlane as error:
            self.warn_once(f"a plane was left out: {error}")
            return
        names = ("now", self._reference_name, "third")
        for point, name in zip(plane.metadata["points"], names, strict=True):
            point["name"] = name
        self._add_file(measured, "plane", plane)
        if this_round.trainer.is_global_zero:
            measured.pictures[self.key("plane")] = partial(_plane_figure, plane)

    def _add_distances(self, measured: Measured, objective: Objective) -> None:
        moves = displacement_to(objective, self._reference.weights, "reference")
        named = self.blocks if isinstance(self.blocks, Mapping) else None
        for block, names in names_by_block(objective.params, named).items():
            length = norm({name: moves[name] for name in names})
            measured.values[self.key(f"distance/{block}")] = length

    def _metadata(self, this_round: Round, samples: int) -> dict[str, Any]:
        return {
            "step": this_round.step,
            "epoch": this_round.trainer.current_epoch,
            "probe_samples": samples,
            "probe_mode": self.probe_mode,
        }

    @property
    def _reference_name(self) -> str:
        if self.reference == "initial":
            return "the start"
        if self.reference == "last_epoch":
            return "the last epoch"
        return "the reference" if isinstance(self.reference, Mapping) else Path(self.reference).stem

    def _add_file(self, measured: Measured, part: str, slice: Slice) -> None:
        name = f"{self.key(part).replace('/', '-')}-step{slice.metadata['step']:08d}.npz"
        measured.files[name] = cast(Callable[[Path], None], slice.save)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The common state, and the file of the reference."""
        return {**super().state_dict(), "reference": self._stored.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series, from the same reference."""
        super().load_state_dict(state_dict)
        if self._bookkeeping.resumed and usable_state(
            self.prefix, state_dict, {"reference": is_entry}
        ):
            self._stored.entry = state_dict.get("reference")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the copies of the weights too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._reference.clear()
            self._third_weights = {}


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
