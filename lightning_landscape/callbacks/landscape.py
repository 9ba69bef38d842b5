"""Slices of the loss surface as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.axes import (
    DIRECTIONS,
    PAIRS,
    Axes,
    Axis,
    Direction,
)
from lightning_landscape.callbacks.between import Weights, check_between, difference
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_count_or_zero,
    check_flags,
    check_span,
    quoted,
)
from lightning_landscape.geometry.objective import Engine, Objective
from lightning_landscape.geometry.slices import Slice, line_slice, lowest_point, plane_slice
from lightning_landscape.geometry.trajectory import Trajectory, project
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.monitor import Monitor, usable_state
from lightning_landscape.training.probe import Source, check_source, probe_of
from lightning_landscape.training.round import Measured, Round, measured_parameters
from lightning_landscape.training.saved import load_evenly
from lightning_landscape.training.sharding import Whole, is_sharded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.figures import ColorScale


_PANELS, _FRAMES = 9, 30  # at most, of a film and an animation


class Points(NamedTuple):
    """How many points the slices of one measurement have."""

    plane: tuple[int, int]  # along x and along y
    line: int

    def at_most(self, size: int) -> Points:
        """No more than ``size`` along an axis of the plane, 3/2 of that along a line."""
        x, y = self.plane
        return Points((min(x, size), min(y, size)), min(self.line, (3 * size // 2) | 1))

    def __str__(self) -> str:
        plane = f"{self.plane[0]} x {self.plane[1]}" if all(self.plane) else ""
        return " and ".join(filter(None, (plane, f"{self.line}" if self.line else "")))


class LandscapeMonitor(Monitor):
    """Draw the loss on a line and on a plane through the weights, as training goes on.

    Every picture has the weights at its centre and shows the loss minus the loss there, on one
    scale for the whole run (from the first picture).  A random direction shows about 1/100 of the
    top curvature: random slices look flat.  ``"eigenvectors"`` and ``"gradient"`` show where it is
    steep.

    Args:
        every_n_train_steps: steps between pictures; ``None``: epochs only.
        every_n_epochs: draw also at the last batch of every n-th epoch.
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
        name: for a second monitor; keys become ``landscape/<name>/...``.
        prog_bar: not used here, there are no scalars.
        verbose: not used here either.
        directions: one of these words, or two of them for x and y.

            - ``"random"``: drawn from ``seed``, the same all through the run, filter-normalised to
              the weights of the moment.
            - ``"eigenvectors"``: of the top two eigenvalues, of length 1.
            - ``"gradient"``: of length 1.
            - ``"update"``: the optimizer's last step, 1 = the step; the line tells how far beyond
              its lowest point the step went, for the loss on the probe.
            - ``"pca"``: the principal directions of the path so far, of length 1.
            - ``"between"``: from one given checkpoint to another, 1 = their distance.

            Where only one is meant a random one is beside it.  Unless both are random, y is made
            orthogonal to x (x to y, where only y is an update or between checkpoints), and what
            stands beside an update or two checkpoints gets their length, otherwise length 1.
        between: ``(a, b)`` for ``directions="between"``: state dicts, or files that hold one or a
            Lightning checkpoint; the direction is b - a.  Files are read with
            ``weights_only=True`` when training starts.
        span: first and last coordinate, for both axes, in units of the directions; ``None``:
            (-1, 1), but (-2, 3) steps for an update, and all of the path for ``"pca"``.
        resolution: points along each axis of the plane, or ``(along x, along y)``; 0: no plane.
        line_resolution: points along the lines; 0: no lines.
        seed: of the random directions.
        surface: log the plane as a surface in space too, to be turned by hand, for TensorBoard's
            mesh plugin; other loggers take none.  Height is the colour of the plane.
        seeds: with ``directions="random"``, how many directions the line picture shows: above 2 as
            their median and a band from the lowest to the highest.
        trajectory: draw the path of the weights on the plane, always on with ``"pca"``.  Up to 16
            copies of the measured weights are kept in main memory on rank zero, evenly spaced in
            steps; a run of N steps takes about 16 + 8 log2(N / 16).  Not with FSDP2, and not in
            checkpoints: after a resume the path starts anew.
        validation_probe: other examples (the same kinds of value as ``probe``): their loss in eval
            mode on the same lines and plane.

    Logged images:
        - ``landscape/line``: the loss along each of the two directions.
        - ``landscape/plane``: the loss on the plane that they span.
        - ``landscape/film``: up to nine planes of the run (without a plane: first lines) on one
          sheet, at the end of the fit; the animation ``landscape-plane.gif`` lies beside the logs.
        - ``landscape/surface``: with ``surface=True``, in TensorBoard's tab "Mesh".

    The losses are written beside the logs, ``landscape/*.npz`` (see ``Slice.load``).  Where no
    logger takes images the pictures are written there as PNG.  One is made at the end of the fit in
    any case.

    Where the budget does not hold the picture at the end of the fit, it has fewer points, down to
    5 x 5 and 7: the title, the slice's metadata (``coarse``) and the closing line say so.  The film
    shows those of full size, and is left out, as its animation, where it cannot be afforded.

    Cost: one forward of the probe per point, 267 by default, and 60 ms to draw; a validation probe
    costs as many forwards again.  At the end of the fit some 3 s for the film, if there were 30
    pictures or more.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.

    Example::

        trainer = Trainer(callbacks=[LandscapeMonitor(directions="eigenvectors")])
    """

    kind = "landscape"
    draws = True

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
        directions: Direction | tuple[Direction, Direction] = "random",
        between: tuple[Weights, Weights] | None = None,
        span: tuple[float, float] | None = None,
        resolution: int | tuple[int, int] = 15,
        line_resolution: int = 21,
        seed: int = 0,
        surface: bool = False,
        seeds: int = 2,
        trajectory: bool = False,
        validation_probe: Source = None,
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
        said = "LandscapeMonitor"
        pair = tuple(directions) if isinstance(directions, (tuple, list)) else (directions,)
        if len(pair) not in (1, 2):
            raise ValueError(
                f"{quoted(said, 'directions', directions)}: expected one or two of {DIRECTIONS}"
            )
        for direction in pair:
            check_choice(said, "directions", direction, DIRECTIONS)
        if span is not None:
            check_span(said, "span", span, ", or None")
        given = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution,)
        if len(given) not in (1, 2):
            raise ValueError(
                f"{quoted(said, 'resolution', resolution)}: expected one integer, or one each for "
                f"x and y"
            )
        sizes = [check_count_or_zero(said, "resolution", size) for size in given]
        line_resolution = check_count_or_zero(said, "line_resolution", line_resolution)
        if not any(sizes) and not line_resolution:
            raise ValueError(
                f"{said}(resolution={resolution!r}, line_resolution=0): nothing is left to draw; "
                f"pass 2 or more for one of them"
            )
        axes = PAIRS[pair[0]] if len(pair) == 1 else (pair[0], pair[1])
        if ("between" in axes) != (between is not None):
            raise ValueError(
                f"{said}(directions={directions!r}, between={between!r:.80}): expected both "
                f"'between' among the directions and the two checkpoints, or neither"
            )
        seed = check_count(said, "seed", seed, 0)
        seeds = check_count(said, "seeds", seeds, 2)
        check_flags(said, surface=surface, trajectory=trajectory)
        check_source(said, "validation_probe", validation_probe)
        if seeds > 2 and set(axes) != {"random"}:
            raise ValueError(f"{said}(seeds={seeds!r}): expected directions='random' with it")
        self.directions = directions
        self.between = None if between is None else check_between(said, between)
        self.span = span
        self.resolution = resolution
        self.line_resolution = line_resolution
        self.seed = seed
        self.surface = surface
        self.seeds = seeds
        self.trajectory = bool(trajectory) or "pca" in axes
        self.follows_weights = self.trajectory
        self.validation_probe = validation_probe
        self.needs_update = "update" in axes
        if validation_probe is not None:
            self.further_probe = probe_of(validation_probe, probe_samples)
            if self.further_probe.captured:
                raise ValueError(
                    f"{said}(validation_probe=Probe()): expected one with a source, or None"
                )
        self._axes = Axes(self, axes, seed, None if span is None else (span[0], span[1]))
        self._full = Points((sizes[0], sizes[-1]), line_resolution)
        self._points = self._full  # of the picture that is next
        self._scales: dict[str, dict[str, float]] = {}  # tag -> limits, from the first picture
        self._path: Trajectory | None = None  # on rank zero, while training

    @property
    def forwards(self) -> int:
        """Forwards of the probe that one picture costs."""
        products = 10 * self._axes.pair.count("eigenvectors")
        return self._evaluations(self._full) + 6 * products

    @property
    def pictures(self) -> int:  # type: ignore[override]
        """Pictures that are drawn at each measurement."""
        return bool(self._full.line) + bool(all(self._full.plane)) * (1 + self.surface)

    def _evaluations(self, points: Points) -> int:
        count = points.plane[0] * points.plane[1] + self.seeds * points.line
        return count * (1 if self.further_probe is None else 2)

    @property
    def coarse(self) -> str:
        """How many points the last picture had, where they were fewer than asked for."""
        return "" if self._points == self._full else f"{self._points} of {self._full} points"

    def settle_for(self, forwards: float | None) -> None:
        """Take fewer points, down to 5 along an axis of the plane and 7 along a line."""
        self._points = self._full
        if forwards is None:
            return
        fixed = self.forwards - self._evaluations(self._full)
        for size in range(max(*self._full.plane, self._full.line) | 1, 3, -2):
            self._points = self._full.at_most(size)
            if fixed + self._evaluations(self._points) <= forwards:
                break

    # -- the path of the weights ---------------------------------------------------------------

    def begin(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Read the checkpoints; start the path, from the weights that training starts with."""
        if self.between is not None:
            measured = measured_parameters(trainer, pl_module, self.parameters, Whole())
            everything = dict(pl_module.named_parameters())
            given = difference(type(self).__name__, self.between, everything, set(measured))
            self._axes.between = given
        self._path = None
        if not self.trajectory:
            return
        if is_sharded(pl_module):
            self.say_once("the path of the weights is not available under FSDP2")
            return
        if self.resumed and trainer.ckpt_path:
            self.say_once("the path of the weights starts anew, it is not kept in checkpoints")
        if trainer.is_global_zero:
            self._path = Trajectory()

    def follows(self, step: int) -> bool:
        """Whether a copy of the weights is due."""
        return self._path is not None and self._path.due(step)

    def follow(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Keep a copy of the weights; without room for it there is no path."""
        if self._path is None:
            return
        try:
            params = measured_parameters(trainer, pl_module, self.parameters, Whole())
            self._path.add(step, params)
        except Exception as error:  # out of memory, most likely
            self._path = None
            self.say_once(f"the path of the weights could not be kept: {error}")

    # -- a measurement -------------------------------------------------------------------------

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        axes = self._axes.take(this_round, objective, self._path)
        validation = self._validation(this_round)
        measured = Measured(facts={"center_loss": float(objective.loss())})
        if self._points.line:
            further = [
                self._axes.random(this_round, objective, repeat) for repeat in range(2, self.seeds)
            ]
            lines = []
            for number, axis in enumerate((*axes, *further), 1):
                lines.append(self._line(this_round, objective, axis, validation))
                self._keep(measured, f"line-{number}", lines[-1])
                if "update" in lines[-1].metadata:
                    measured.facts |= lines[-1].metadata["update"]
            self._picture(measured, this_round, "line", lines)
        if all(self._points.plane):
            plane = self._plane(this_round, objective, axes, validation)
            self._keep(measured, "plane", plane)
            self._picture(measured, this_round, "plane", [plane])
        return measured

    def _line(
        self, this_round: Round, objective: Objective, axis: Axis, validation: Objective | None
    ) -> Slice:
        line = line_slice(
            objective,
            axis.vector,
            axis.span,
            self._points.line,
            metadata=self._known(this_round, axis) | self._less("line"),
            progress=False,
        )
        if axis.kind == "update":
            lowest, within = lowest_point(line)
            line.metadata["update"] = {
                "update_norm": line.metadata["norms"][0],
                "lowest_along_update": lowest,
                # From the weights before the step, at -1.
                "overshoot": 1.0 / (lowest + 1.0) if within and lowest > -1.0 else math.nan,
            }
        if validation is not None:
            other = line_slice(
                validation, axis.vector, axis.span, self._points.line, progress=False
            )
            line.metadata["validation"] = self._further(this_round, other)
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
        known = self._known(this_round, *axes) | self._less("plane")
        plane = plane_slice(
            objective, x, y, spans, self._points.plane, metadata=known, progress=False
        )
        if validation is not None:
            other = plane_slice(validation, x, y, spans, self._points.plane, progress=False)
            plane.metadata["validation"] = self._further(this_round, other)
        if self._path is not None:
            seen = project(self._path.weights, objective.params, [x, y])
            plane.metadata["path"] = {
                "steps": list(self._path.steps),
                "coordinates": seen.coordinates.tolist(),
                "residuals": seen.residuals.tolist(),
                "distances": seen.distances.tolist(),
                "explained": seen.explained.tolist(),
            }
        return plane

    def _validation(self, this_round: Round) -> Objective | None:
        if self.further_probe is None:
            return None
        return this_round.further_objective(self, self.further_probe)

    def _further(self, this_round: Round, other: Slice) -> dict[str, Any]:
        assert self.further_probe is not None
        return {
            "losses": other.losses.tolist(),
            "center_loss": other.center_loss,
            "probe_samples": this_round.further_size(self.further_probe),
            "probe_mode": "eval",
        }

    def _known(self, this_round: Round, *axes: Axis) -> dict[str, Any]:
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

    def _less(self, part: str) -> dict[str, Any]:
        """Said in the slice, and so in the picture: fewer points than all the others."""
        wanted, taken = getattr(self._full, part), getattr(self._points, part)
        return {} if taken == wanted else {"coarse": {"wanted": wanted, "taken": taken}}

    def forget(self) -> None:
        """Start the solver afresh: after a fault processes may hold different results."""
        self._axes.forget()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._path = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the copies of the weights too."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._path = None

    # -- the whole run -------------------------------------------------------------------------

    def in_retrospect(self, folder: Path, final: bool) -> Measured:
        """At the end the film: small pictures on one sheet, and an animation beside the logs."""
        part = "plane" if all(self._full.plane) else "line-1"
        files = list(self.own_files(folder, part).values())
        if not final or len(files) < 2:
            return Measured()
        scale = self._scales.get(self.key(part.split("-")[0]))
        film, animation = self.key("film"), f"{self.key(part).replace('/', '-')}.gif"
        return Measured(
            pictures={film: partial(_filmstrip, files, scale)},
            files={animation: partial(_animate, files, scale)},
            # As measured, beside one picture of a plane.
            drawings={
                film: 1 + 0.2 * min(len(files), _PANELS),
                animation: 1.2 * min(len(files), _FRAMES),
            },
        )

    # -- files and pictures --------------------------------------------------------------------

    def _keep(self, measured: Measured, part: str, piece: Slice) -> None:
        name = f"{self.key(part).replace('/', '-')}-step{piece.metadata['step']:08d}.npz"
        measured.files[name] = cast(Callable[[Path], None], piece.save)

    def _picture(
        self, measured: Measured, this_round: Round, part: str, slices: Sequence[Slice]
    ) -> None:
        if not this_round.trainer.is_global_zero:
            return
        from lightning_landscape.figures import (
            ColorScale,
            line_figure,
            plane_figure,
            surface_mesh,
        )

        tag = self.key(part)
        if tag in self._scales:
            scale: ColorScale = ColorScale.from_dict(self._scales[tag])
        else:
            scale = max((ColorScale.from_slice(s) for s in slices), key=lambda scale: scale.limit)
            # A picture without a loss has nothing to say about the scale of those to come.
            if all(math.isfinite(s.center_loss) for s in slices):
                self._scales[tag] = scale.to_dict()
        if part == "line":
            measured.pictures[tag] = partial(
                line_figure, list(slices), scale=scale, band=self.seeds > 2
            )
        else:
            measured.pictures[tag] = partial(plane_figure, slices[0], scale=scale)
            if self.surface:
                measured.surfaces[self.key("surface")] = partial(surface_mesh, slices[0], scale)

    def state_dict(self) -> dict[str, Any]:
        """The common state, and the colour scale of the run."""
        scales = {tag: dict(limits) for tag, limits in self._scales.items()}
        return {**super().state_dict(), "scales": scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series, on the same scale."""
        super().load_state_dict(state_dict)
        if self.resumed and usable_state(self.prefix, state_dict, {"scales": _are_scales}):
            self._scales = {tag: dict(limits) for tag, limits in state_dict["scales"].items()}


def _is_scale(limits: object) -> bool:
    """Whether a checkpoint's entry is what ``ColorScale.to_dict`` gave."""
    if not isinstance(limits, Mapping) or set(limits) != {"linthresh", "limit"}:
        return False
    low, high = limits["linthresh"], limits["limit"]
    return isinstance(low, float) and isinstance(high, float) and 0.0 < low <= high < math.inf


def _are_scales(value: object) -> bool:
    """Whether ``value`` is tag -> scale."""
    return isinstance(value, Mapping) and all(map(_is_scale, value.values()))


def _film(files: list[Path], most: int) -> list[Slice]:
    """Slices of the run, evenly chosen, on the grid of the newest that is not a coarser one."""
    newest = load_evenly(files, _full_slice, most=1) or load_evenly(files, Slice.load, most=1)
    if not newest:
        return []
    (grid,) = newest.values()

    def load(path: Path) -> Slice:
        slice = Slice.load(path)
        for axis, other in zip(slice.coordinates, grid.coordinates, strict=True):
            if not np.array_equal(axis, other):
                raise ValueError("another grid")
        return slice

    return list(load_evenly(files, load, most).values())


def _full_slice(path: Path) -> Slice:
    slice = Slice.load(path)
    if "coarse" in slice.metadata:
        raise ValueError("coarser than asked for")
    return slice


def _filmstrip(files: list[Path], scale: dict[str, float] | None) -> Figure:
    from lightning_landscape.figures import ColorScale, filmstrip_figure

    shared = None if scale is None else ColorScale.from_dict(scale)
    return filmstrip_figure(_film(files, most=_PANELS), scale=shared, of=len(files))


def _animate(files: list[Path], scale: dict[str, float] | None, path: Path) -> None:
    from lightning_landscape.figures import ColorScale
    from lightning_landscape.figures.film import write_film

    shared = None if scale is None else ColorScale.from_dict(scale)
    write_film(_film(files, most=_FRAMES), path, shared)
