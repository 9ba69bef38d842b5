"""Slices of the loss surface as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.axes import (
    DIRECTIONS,
    PAIRS,
    Axes,
    Direction,
)
from lightning_landscape.callbacks.between import Weights, check_between, difference
from lightning_landscape.callbacks.landscape_measurement import LandscapeMeasurement, Points
from lightning_landscape.geometry.checks import (
    check_choice,
    check_count,
    check_count_or_zero,
    check_flags,
    check_span,
    quoted,
)
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.geometry.trajectory import Trajectory
from lightning_landscape.training.bookkeeping import VALIDATION
from lightning_landscape.training.data.probe import Source, check_source, probe_of
from lightning_landscape.training.isolation.sharding import Whole, is_sharded
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.parameters import measured_parameters

if TYPE_CHECKING:
    pass


class LandscapeMonitor(LandscapeMeasurement):
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
            where ``max_overhead`` of the whole run does not allow more, with a warning.
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
        owner = "LandscapeMonitor"
        pair = tuple(directions) if isinstance(directions, (tuple, list)) else (directions,)
        if len(pair) not in (1, 2):
            raise ValueError(
                f"{quoted(owner, 'directions', directions)}: expected one or two of {DIRECTIONS}"
            )
        for direction in pair:
            check_choice(owner, "directions", direction, DIRECTIONS)
        if span is not None:
            check_span(owner, "span", span, ", or None")
        given = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution,)
        if len(given) not in (1, 2):
            raise ValueError(
                f"{quoted(owner, 'resolution', resolution)}: expected one integer, or one each for "
                f"x and y"
            )
        sizes = [check_count_or_zero(owner, "resolution", size) for size in given]
        line_resolution = check_count_or_zero(owner, "line_resolution", line_resolution)
        if not any(sizes) and not line_resolution:
            raise ValueError(
                f"{owner}(resolution={resolution!r}, line_resolution=0): nothing is left to draw; "
                f"pass 2 or more for one of them"
            )
        axes = PAIRS[pair[0]] if len(pair) == 1 else (pair[0], pair[1])
        if ("between" in axes) != (between is not None):
            raise ValueError(
                f"{owner}(directions={directions!r}, between={between!r:.80}): expected both "
                f"'between' among the directions and the two checkpoints, or neither"
            )
        seed = check_count(owner, "seed", seed, 0)
        seeds = check_count(owner, "seeds", seeds, 2)
        check_flags(owner, surface=surface, trajectory=trajectory)
        check_source(owner, "validation_probe", validation_probe)
        if seeds > 2 and set(axes) != {"random"}:
            raise ValueError(f"{owner}(seeds={seeds!r}): expected directions='random' with it")
        self.directions = directions
        self.between = None if between is None else check_between(owner, between)
        self.span = span
        self.resolution = resolution
        self.line_resolution = line_resolution
        self.seed = seed
        self.surface = surface
        self.seeds = seeds
        self.trajectory = bool(trajectory) or "pca" in axes
        self.tracks_weights = self.trajectory
        self.validation_probe = validation_probe
        self.needs_update = "update" in axes
        if validation_probe is not None:
            further = probe_of(validation_probe, probe_samples)
            self._bookkeeping.probes[VALIDATION] = further
            if further.captured:
                raise ValueError(
                    f"{owner}(validation_probe=Probe()): expected one with a source, or None"
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
        return count * (1 if self._validation_probe is None else 2)

    @property
    def reduced_resolution(self) -> str:
        """How many points the last picture had, where they were fewer than asked for."""
        return "" if self._points == self._full else f"{self._points} of {self._full} points"

    def fit_to_budget(self, forwards: float | None) -> None:
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

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
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
            self.warn_once("the path of the weights is not available under FSDP2")
            return
        if self._bookkeeping.resumed and trainer.ckpt_path:
            self.warn_once("the path of the weights starts anew, it is not kept in checkpoints")
        if trainer.is_global_zero:
            self._path = Trajectory()

    def wants_weights(self, step: int) -> bool:
        """Whether a copy of the weights is due."""
        return self._path is not None and self._path.due(step)

    def on_weights(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Keep a copy of the weights; without room for it there is no path."""
        if self._path is None:
            return
        try:
            params = measured_parameters(trainer, pl_module, self.parameters, Whole())
            self._path.add(step, params)
        except Exception as error:  # out of memory, most likely
            self._path = None
            self.warn_once(f"the path of the weights could not be kept: {error}")
