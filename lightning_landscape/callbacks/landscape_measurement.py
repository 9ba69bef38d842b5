"""How ``LandscapeMonitor`` measures and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.axes import (
    Axes,
    Axis,
)
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.slices import Slice, line_slice, lowest_point, plane_slice
from lightning_landscape.geometry.trajectory import Trajectory, project
from lightning_landscape.training.bookkeeping import VALIDATION, usable_state
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.output.run_files import load_evenly
from lightning_landscape.training.round import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MAX_PANELS, _MAX_FRAMES = 6, 30  # of the film and the animation


class Points(NamedTuple):
    """The number of points of the slices of one measurement."""

    plane: tuple[int, int]  # along x and along y
    line: int

    def at_most(self, size: int) -> Points:
        """At most ``size`` points along an axis of the plane, 3/2 of that along a line."""
        x, y = self.plane
        return Points((min(x, size), min(y, size)), min(self.line, (3 * size // 2) | 1))

    def __str__(self) -> str:
        plane = f"{self.plane[0]} x {self.plane[1]}" if all(self.plane) else ""
        return " and ".join(filter(None, (plane, f"{self.line}" if self.line else "")))


class LandscapeMeasurement(Monitor):
    """Measures lines and a plane, with the arguments of ``LandscapeMonitor``."""

    seed: int
    seeds: int
    surface: bool
    _axes: Axes
    _full: Points
    _points: Points
    _limits: dict[str, dict[str, Any]]
    _path: Trajectory | None

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        axes = self._axes.make(this_round, objective, self._path)
        validation = self._on_validation(this_round)
        measured = Measured(facts={"center_loss": float(objective.loss())})
        if self._points.line:
            more_axes = [
                self._axes.random(this_round, objective, repeat) for repeat in range(2, self.seeds)
            ]
            lines = []
            for number, axis in enumerate((*axes, *more_axes), 1):
                lines.append(self._line(this_round, objective, axis, validation))
                self._add_file(measured, f"line-{number}", lines[-1])
                if "update" in lines[-1].metadata:
                    measured.facts |= lines[-1].metadata["update"]
            self._add_picture(measured, this_round, "line", lines)
        if all(self._points.plane):
            plane = self._plane(this_round, objective, axes, validation)
            self._add_file(measured, "plane", plane)
            self._add_picture(measured, this_round, "plane", [plane])
        return measured

    def _line(
        self, this_round: Round, objective: Objective, axis: Axis, validation: Objective | None
    ) -> Slice:
        line = line_slice(
            objective,
            axis.vector,
            axis.span,
            self._points.line,
            metadata=self._metadata(this_round, axis) | self._coarse_metadata("line"),
            progress=False,
        )
        if axis.kind == "update":
            lowest, within = lowest_point(line)
            line.metadata["update"] = {
                "update_norm": line.metadata["norms"][0],
                "lowest_along_update": lowest,
                # Relative to the weights before the step, at -1.
                "overshoot": 1.0 / (lowest + 1.0) if within and lowest > -1.0 else math.nan,
            }
        if validation is not None:
            other = line_slice(
                validation, axis.vector, axis.span, self._points.line, progress=False
            )
            line.metadata["validation"] = self._validation_metadata(this_round, other)
        return line

    def _plane(
        self,
        this_round: Round,
        objective: Objective,
        axes: tuple[Axis, Axis],
        validation: Objective | None,
    ) -> Slice:
        x, y = (axis.vector for axis in axes)
        spans = (axes[0].span, axes[1].span)
        metadata = self._metadata(this_round, *axes) | self._coarse_metadata("plane")
        plane = plane_slice(
            objective, x, y, spans, self._points.plane, metadata=metadata, progress=False
        )
        if validation is not None:
            other = plane_slice(validation, x, y, spans, self._points.plane, progress=False)
            plane.metadata["validation"] = self._validation_metadata(this_round, other)
        if self._path is not None:
            projection = project(self._path.weights, objective.params, [x, y])
            plane.metadata["path"] = {
                "steps": list(self._path.steps),
                "coordinates": projection.coordinates.tolist(),
                "residuals": projection.residuals.tolist(),
                "distances": projection.distances.tolist(),
                "explained": projection.explained.tolist(),
            }
        return plane

    @property
    def _validation_probe(self) -> Probe | None:
        return self._bookkeeping.probes.get(VALIDATION)

    def _on_validation(self, this_round: Round) -> Objective | None:
        if self._validation_probe is None:
            return None
        return this_round.objective_on(self, self._validation_probe, mode="eval")

    def _validation_metadata(self, this_round: Round, other: Slice) -> dict[str, Any]:
        assert self._validation_probe is not None
        return {
            "losses": other.losses.tolist(),
            "center_loss": other.center_loss,
            "probe_samples": this_round.size_of(self._validation_probe),
            "probe_mode": "eval",
        }

    def _metadata(self, this_round: Round, *axes: Axis) -> dict[str, Any]:
        kinds = {*self._axes.pair}
        normalization = "filter" if self._axes.filtered else "unit"
        return {
            "step": this_round.step,
            "epoch": this_round.trainer.current_epoch,
            "probe_samples": this_round.probe_size(self),
            "probe_mode": self.probe_mode,
            "normalization": "none" if kinds & {"update", "between"} else normalization,
            "seed": self.seed,
            "directions": [axis.name for axis in axes],
            "fixed": [axis.fixed for axis in axes],
        }

    def _coarse_metadata(self, part: str) -> dict[str, Any]:
        """The entry of a slice with fewer points; its picture shows that in the title."""
        wanted, taken = getattr(self._full, part), getattr(self._points, part)
        return {} if taken == wanted else {"coarse": {"wanted": wanted, "taken": taken}}

    def start_anew(self) -> None:
        """Drop everything of the last run, and the limits of its pictures."""
        super().start_anew()
        self._limits.clear()

    def reset_warm_start(self) -> None:
        """Drop warm starts: after a failure they may differ between processes."""
        self._axes.reset_warm_start()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._path = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the copies of the weights too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._path = None

    # -- the whole run -------------------------------------------------------------------------

    def run_summary(self, folder: Path, final: bool) -> Measured:
        """At the end of the fit, the film: small pictures in one image, and an animation."""
        part = "plane" if all(self._full.plane) else "line-1"
        files = list(self.run_files(folder, part).values())
        if not final or len(files) < 2:
            return Measured()
        film, animation = self.key("film"), f"{self.key(part).replace('/', '-')}.gif"
        return Measured(
            pictures={film: partial(_filmstrip, files)},
            files={animation: partial(_animate, files)},
            # As timed, relative to one picture of a plane.
            drawings={
                film: 1 + 0.2 * min(len(files), _MAX_PANELS),
                animation: 1.2 * min(len(files), _MAX_FRAMES),
            },
        )

    # -- files and pictures --------------------------------------------------------------------

    def _add_file(self, measured: Measured, part: str, slice: Slice) -> None:
        name = f"{self.key(part).replace('/', '-')}-step{slice.metadata['step']:08d}.npz"
        measured.files[name] = cast(Callable[[Path], None], slice.save)

    def _add_picture(
        self, measured: Measured, this_round: Round, part: str, slices: Sequence[Slice]
    ) -> None:
        if not this_round.trainer.is_global_zero:
            return
        from lightning_landscape.figures import (
            LossLimits,
            line_figure,
            plane_figure,
            surface_mesh,
        )
        from lightning_landscape.figures.data import validation_of

        tag, known = self.key(part), None
        if tag in self._limits:
            known = LossLimits.from_dict(self._limits[tag])
        limits = LossLimits.from_slice(slices[0]) if known is None else known
        for slice in slices:
            limits = limits.widened(slice)
            if part == "line" and (validation := validation_of(slice)) is not None:
                limits = limits.widened(validation)
        # A picture without a finite loss does not set the limits of the next ones.
        if known is not None or all(math.isfinite(s.center_loss) for s in slices):
            self._limits[tag] = limits.to_dict()
        if part == "line":
            measured.pictures[tag] = partial(
                line_figure, list(slices), limits=limits, band=self.seeds > 2
            )
        else:
            measured.pictures[tag] = partial(plane_figure, slices[0], limits=limits)
            if self.surface:
                measured.surfaces[self.key("surface")] = partial(surface_mesh, slices[0], limits)

    def state_dict(self) -> dict[str, Any]:
        """The common state, and the limits of the pictures."""
        limits = {tag: dict(ends) for tag, ends in self._limits.items()}
        return {**super().state_dict(), "limits": limits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series, with the same limits."""
        super().load_state_dict(state_dict)
        if self._bookkeeping.resumed and usable_state(
            self.prefix, state_dict, {"limits": _are_limits}
        ):
            self._limits = {tag: dict(ends) for tag, ends in state_dict["limits"].items()}


def _is_limits(ends: object) -> bool:
    """Whether ``ends`` has the format of ``LossLimits.to_dict``."""
    if not isinstance(ends, Mapping) or set(ends) != {"low", "high", "excess", "room"}:
        return False
    low, high = ends["low"], ends["high"]
    return isinstance(low, float) and isinstance(high, float) and -math.inf < low < high < math.inf


def _are_limits(value: object) -> bool:
    """Whether ``value`` is a mapping from tag to limits."""
    return isinstance(value, Mapping) and all(map(_is_limits, value.values()))


def _film_slices(files: list[Path], most: int) -> list[Slice]:
    """Slices of the run, evenly spaced, on the grid of the newest one of full resolution."""
    newest = load_evenly(files, _full_slice, most=1) or load_evenly(files, Slice.load, most=1)
    if not newest:
        return []
    (grid,) = newest.values()

    def load(path: Path) -> Slice:
        slice = Slice.load(path)
        for axis, other in zip(slice.coordinates, grid.coordinates, strict=True):
            if not np.array_equal(axis, other):
                raise ValueError("a different grid")
        return slice

    return list(load_evenly(files, load, most).values())


def _full_slice(path: Path) -> Slice:
    slice = Slice.load(path)
    if "coarse" in slice.metadata:
        raise ValueError("reduced resolution")
    return slice


def _filmstrip(files: list[Path]) -> Figure:
    from lightning_landscape.figures import filmstrip_figure

    return filmstrip_figure(_film_slices(files, most=_MAX_FRAMES), of=len(files))


def _animate(files: list[Path], path: Path) -> None:
    from lightning_landscape.figures.film import write_film

    write_film(_film_slices(files, most=_MAX_FRAMES), path, None)
