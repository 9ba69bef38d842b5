"""Slices of the loss surface as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from torch import Tensor

from lightning_landscape.geometry.directions import (
    aligned,
    filter_dims_of,
    filter_normalize,
    orthogonal_to,
    unit,
)
from lightning_landscape.geometry.eigen import EigenResult
from lightning_landscape.geometry.objective import Engine, Objective
from lightning_landscape.geometry.slices import Slice, Span, line_slice, plane_slice
from lightning_landscape.geometry.vectors import norm, random_vector
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.monitor import Monitor, check_choice, usable_state
from lightning_landscape.training.round import Measured, Round
from lightning_landscape.training.saved import load_evenly

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.figures import ColorScale

Direction = Literal["random", "eigenvectors", "gradient"]
_DIRECTIONS = ("random", "eigenvectors", "gradient")
# The two axes that a single word stands for.
_PAIRS = {
    "random": ("random", "random"),
    "eigenvectors": ("eigenvectors", "eigenvectors"),
    "gradient": ("gradient", "random"),
}


@dataclass(frozen=True)
class _Axis:
    name: str
    vector: dict[str, Tensor]
    fixed: bool  # the same direction in every picture of the run


class LandscapeMonitor(Monitor):
    """Draw the loss on a line and on a plane through the weights, as training goes on.

    Every picture has the weights at its centre and shows the loss minus the loss there, on one
    scale for the whole run (from the first picture).  A random direction shows about 1/100 of the
    top curvature: random slices look flat.  ``"eigenvectors"`` and ``"gradient"`` show where it is
    steep.

    Args:
        every_n_train_steps: steps between pictures; ``None``: epochs only.
        every_n_epochs: draw also at the last batch of every n-th epoch.
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
        name: for a second monitor; keys become ``landscape/<name>/...``.
        prog_bar: not used here, there are no scalars.
        verbose: not used here either.
        directions: ``"random"`` (drawn from ``seed``, the same all through the run,
            filter-normalised to the weights of the moment), ``"eigenvectors"`` (the top two, of
            length 1) or ``"gradient"`` (length 1; a random one beside it), or two of these for x
            and y: both of length 1 then unless both are random, y made orthogonal to x.
        span: first and last coordinate, for both axes, in units of the directions: weight norms
            for random ones, Euclidean length for the others.
        resolution: points along each axis of the plane, or ``(along x, along y)``; 0: no plane.
        line_resolution: points along the lines; 0: no lines.
        seed: of the random directions.
        surface: log the plane as a surface in space too, to be turned by hand, for TensorBoard's
            mesh plugin; other loggers take none.  Height is the colour of the plane.

    Logged images:
        - ``landscape/line``: the loss along each of the two directions.
        - ``landscape/plane``: the loss on the plane that they span.
        - ``landscape/film``: up to nine planes of the run (without a plane: first lines) on one
          sheet, at the end of the fit; the animation ``landscape-plane.gif`` lies beside the logs.
        - ``landscape/surface``: with ``surface=True``, in TensorBoard's tab "Mesh".

    The losses are written beside the logs, ``landscape/*.npz`` (see ``Slice.load``).  Where no
    logger takes images the pictures are written there as PNG.  One is made at the end of the fit in
    any case.

    Cost: one forward of the probe per point, 266 by default, and 60 ms to draw; at the end of the
    fit some 3 s for the film, if there were 30 pictures or more.

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
        directions: Direction | tuple[Direction, Direction] = "random",
        span: tuple[float, float] = (-1.0, 1.0),
        resolution: int | tuple[int, int] = 15,
        line_resolution: int = 21,
        seed: int = 0,
        surface: bool = False,
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
        pair = (directions,) if isinstance(directions, str) else tuple(directions)
        if len(pair) not in (1, 2):
            raise ValueError(f"{said}(directions={directions!r}): expected one or two")
        for direction in pair:
            check_choice(said, "directions", direction, _DIRECTIONS)
        ends = tuple(span)
        if len(ends) != 2 or not all(math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
            raise ValueError(f"{said}(span={span!r}): expected two finite numbers, smaller first")
        sizes = (resolution,) if isinstance(resolution, int) else tuple(resolution)
        for argument, size in [("resolution", s) for s in sizes] + [
            ("line_resolution", line_resolution)
        ]:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size == 1:
                raise ValueError(f"{said}({argument}={size!r}): expected an integer >= 2, or 0")
        if not any(sizes) and not line_resolution:
            raise ValueError(
                f"{said}(resolution={resolution!r}, line_resolution=0): nothing is left to draw"
            )
        self.directions = directions
        self.span: Span = ends
        self.resolution = resolution
        self.line_resolution = line_resolution
        self.seed = seed
        self.surface = surface
        self._pair = _PAIRS[pair[0]] if len(pair) == 1 else pair
        self._grid = (sizes[0], sizes[-1])
        self._scales: dict[str, dict[str, float]] = {}  # tag -> limits, from the first picture
        self._last_eigen: EigenResult | None = None
        self._last_vectors: dict[int, dict[str, Tensor]] = {}

    @property
    def forwards(self) -> int:
        """Forwards of the probe that one picture costs."""
        products = 10 * self._pair.count("eigenvectors")
        return self._grid[0] * self._grid[1] + 2 * self.line_resolution + 6 * products

    def measure(self, this_round: Round) -> Measured:
        objective = this_round.objective(self)
        axes = self._axes(this_round, objective)
        known = {
            "step": this_round.step,
            "epoch": this_round.trainer.current_epoch,
            "probe_samples": this_round.probe_size(self),
            "probe_mode": self.probe_mode,
            "normalization": "filter" if set(self._pair) == {"random"} else "unit",
            "seed": self.seed,
        }
        measured = Measured(facts={"center_loss": float(objective.loss())})
        if self.line_resolution:
            lines = [
                line_slice(
                    objective,
                    axis.vector,
                    self.span,
                    self.line_resolution,
                    metadata={**known, "directions": [axis.name], "fixed": [axis.fixed]},
                )
                for axis in axes
            ]
            for number, line in enumerate(lines, 1):
                self._keep(measured, f"line-{number}", line)
            self._picture(measured, this_round, "line", lines)
        if all(self._grid):
            plane = plane_slice(
                objective,
                axes[0].vector,
                axes[1].vector,
                self.span,
                self._grid,
                metadata={
                    **known,
                    "directions": [axis.name for axis in axes],
                    "fixed": [axis.fixed for axis in axes],
                },
            )
            self._keep(measured, "plane", plane)
            self._picture(measured, this_round, "plane", [plane])
        return measured

    # -- directions ----------------------------------------------------------------------------

    def _axes(self, this_round: Round, objective: Objective) -> list[_Axis]:
        both_random = set(self._pair) == {"random"}
        axes: list[_Axis] = []
        for position, kind in enumerate(self._pair):
            repeat = self._pair[:position].count(kind)
            if kind == "random":
                axis = self._random_axis(this_round, objective, repeat, filtered=both_random)
            elif kind == "gradient":
                axis = _Axis("gradient", objective.gradient(), fixed=False)
            else:
                axis = self._eigen_axis(this_round, objective, repeat)
            if kind != "random":
                try:
                    axis = _Axis(axis.name, unit(axis.vector), axis.fixed)
                except ValueError:  # where the loss is NaN, or flat
                    self.say_once(
                        f"{axis.name} is zero or not finite; it is a random direction where it is"
                    )
                    axis = self._random_axis(this_round, objective, 2 + position, filtered=False)
            if axes and not both_random:
                try:
                    vector = orthogonal_to(axis.vector, axes[0].vector)
                    axis = _Axis(axis.name, vector, axis.fixed)
                except ValueError:
                    self.say_once(
                        f"{axis.name} and {axes[0].name} are parallel; y is a random direction"
                    )
                    spare = self._random_axis(this_round, objective, 1, filtered=False)
                    vector = orthogonal_to(spare.vector, axes[0].vector)
                    axis = _Axis(spare.name, vector, fixed=False)
            axes.append(axis)
        return axes

    def _random_axis(
        self, this_round: Round, objective: Objective, repeat: int, filtered: bool
    ) -> _Axis:
        vector = random_vector(objective.params, self.seed + repeat)
        name = f"random {repeat + 1}" if self._pair.count("random") > 1 else "random"
        if filtered:
            dims = filter_dims_of(this_round.pl_module)
            normalized = filter_normalize(vector, objective.params, filter_dims=dims)
            length = norm(normalized)
            if 0.0 < length < math.inf:
                return _Axis(name, normalized, fixed=True)
            if length == 0.0:
                self.say_once(
                    "the parameters are all vectors or all zero, which filter normalisation leaves "
                    "out; random directions have length 1 instead"
                )
        return _Axis(name, unit(vector), fixed=True)

    def _eigen_axis(self, this_round: Round, objective: Objective, repeat: int) -> _Axis:
        wanted = self._pair.count("eigenvectors")
        last = self._last_eigen
        start = last if last is not None and last.fits(objective.params) else None
        found = self._last_eigen = this_round.top_eigenvalues(self, wanted, init=start)
        vector = found.eigenvectors[repeat]
        # The sign of an eigenvector is arbitrary: keep to the last picture's, and for the first
        # picture, here or after a resume, to the same fixed vector.
        if start is None:
            self._last_vectors.clear()
        reference = self._last_vectors.get(repeat) or random_vector(vector, self.seed)
        vector = aligned(vector, reference)
        if bool(found.eigenvalues.isfinite().all()):
            self._last_vectors[repeat] = vector
        name = "top eigenvector" if repeat == 0 else "second eigenvector"
        return _Axis(name, vector, fixed=False)

    def forget(self) -> None:
        """Start the solver afresh: after a fault processes may hold different results."""
        self._last_eigen = None
        self._last_vectors.clear()

    # -- the whole run -------------------------------------------------------------------------

    def in_retrospect(self, folder: Path, final: bool) -> Measured:
        """At the end the film: small pictures on one sheet, and an animation beside the logs."""
        part = "plane" if all(self._grid) else "line-1"
        files = list(self.own_files(folder, part).values())
        if not final or len(files) < 2:
            return Measured()
        scale = self._scales.get(self.key(part.split("-")[0]))
        return Measured(
            pictures={self.key("film"): partial(_filmstrip, files, scale)},
            files={f"{self.key(part).replace('/', '-')}.gif": partial(_animate, files, scale)},
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
            measured.pictures[tag] = partial(line_figure, list(slices), scale=scale)
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
        if self.resumed and usable_state(self.prefix, state_dict, {"scales": (dict,)}):
            self._scales = {tag: dict(limits) for tag, limits in state_dict["scales"].items()}


def _film(files: list[Path], most: int) -> list[Slice]:
    """Slices of the run, evenly chosen, on the grid of the newest."""
    grid: list[Slice] = []

    def load(path: Path) -> Slice:
        slice = Slice.load(path)
        pairs = zip(slice.coordinates, (grid or [slice])[0].coordinates, strict=True)
        if not all(np.array_equal(axis, other) for axis, other in pairs):
            raise ValueError("another grid")
        return slice

    grid += load_evenly(files, load, most=1).values()
    return list(load_evenly(files, load, most).values())


def _filmstrip(files: list[Path], scale: dict[str, float] | None) -> Figure:
    from lightning_landscape.figures import ColorScale, filmstrip_figure

    shared = None if scale is None else ColorScale.from_dict(scale)
    return filmstrip_figure(_film(files, most=9), scale=shared, of=len(files))


def _animate(files: list[Path], scale: dict[str, float] | None, path: Path) -> None:
    from lightning_landscape.figures import ColorScale
    from lightning_landscape.figures.film import write_film

    shared = None if scale is None else ColorScale.from_dict(scale)
    write_film(_film(files, most=30), path, shared)
