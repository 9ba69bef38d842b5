"""Slices of the loss surface as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.callbacks.axes import (
    DIRECTIONS,
    PAIRS,
    Axes,
    Direction,
)
from lightning_landscape.callbacks.between import WeightsSource, check_between, difference
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
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.sharding import UnshardedParameters, is_sharded
from lightning_landscape.training.losses import LossReduction, ProbeMode, UserLoss
from lightning_landscape.training.parameters import measured_parameters
from lightning_landscape.training.schedule import EveryNSteps

# Along an axis of a plane, if the budget is too small for the resolution.
_LEAST_POINTS = 11


class LandscapeMonitor(LandscapeMeasurement):
    """Draw the loss on a line and on a plane through the weights during training.

    Every picture has the weights at its centre.  Lines show the loss on a linear axis, planes as
    colour on a logarithmic scale in which a loss has the same colour in the whole run.  The
    curvature along a random direction is about 1/100 of the largest: random slices look flat.
    ``"eigenvectors"`` and ``"gradient"`` show the steep directions.

    Args:
        every_n_train_steps: draw when the probe is complete, and then at multiples of this number
            of steps.  ``"auto"``: about 5 times in the run, every 100 steps if its length is
            unknown.  ``None``: epochs only.
        every_n_epochs: draw at the last batch of every n-th epoch, with ``"auto"`` only there.
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
        name: for a second monitor; keys become ``landscape/<name>/...``.
        prog_bar: not used, because there are no scalars.
        verbose: not used.
        directions: one of these words, or two of them for x and y.

            - ``"random"``: drawn from ``seed``, the same in the whole run, filter-normalised to the
              current weights.
            - ``"eigenvectors"``: of the two largest eigenvalues, of length 1.
            - ``"gradient"``: of length 1.
            - ``"update"``: the optimizer's last step, 1 = the step; the line shows how far the step
              went beyond the lowest point of the loss on the probe.
            - ``"pca"``: the principal directions of the path so far, of length 1.
            - ``"between"``: from one given checkpoint to another, 1 = their distance.

            If a word stands for one direction, the other is random.  Unless both are random, y is
            made orthogonal to x (x to y, if only y is an update or between checkpoints).  A
            direction beside an update or two checkpoints gets their length, otherwise length 1.
        between: ``(a, b)`` for ``directions="between"``: state dicts, or files that hold one or a
            Lightning checkpoint; the direction is b - a.  Files are read with
            ``weights_only=True`` when training starts.
        span: first and last coordinate, for both axes, in units of the directions; ``None``:
            (-1, 1), but (-2, 3) steps for an update, and the whole path for ``"pca"``.
        resolution: points along each axis of the plane, or ``(along x, along y)``; 0: no plane.
        line_resolution: points along the lines; 0: no lines.
        seed: seed of the random directions.
        surface: log the plane as a 3D surface too, for TensorBoard's mesh plugin; other loggers do
            not support it.  The height is the colour of the plane.
        seeds: with ``directions="random"``, number of directions in the line picture: above 2 as
            their median with a band from the lowest to the highest.
        trajectory: draw the path of the weights on the plane, always with ``"pca"``.  Up to 16
            copies of the measured weights are kept in main memory on rank zero, evenly spaced in
            steps; a run of N steps makes about 16 + 8 log2(N / 16).  Not available with FSDP2, and
            not saved in checkpoints: after a resume the path starts again.
        validation_probe: other examples (the same kinds of value as ``probe``), for their loss in
            eval mode on the same lines and plane.

    Logged images:
        - ``landscape/line``: the loss along each of the two directions.
        - ``landscape/plane``: the loss on the plane that they span.
        - ``landscape/film``: up to six planes of the run (without planes: lines) in one image, at
          the end of the fit; the animation ``landscape-plane.gif`` is written beside the logs.
        - ``landscape/surface``: with ``surface=True``, in TensorBoard's tab "Mesh".

    The losses are written beside the logs, ``landscape/*.npz`` (see ``Slice.load``).  If no logger
    accepts images, the pictures are written there as PNG.  One is made at the end of the fit,
    if the budget allows it.

    If the budget is too small for the picture at the end of the fit, it has fewer points, at least
    11 x 11 and 17, as shown by its title, the metadata of the slice (``coarse``) and the closing
    line; if it is too small for these too, there is no picture, with a warning.
    The film shows the pictures of full size; it and its animation are left out if there is no time.

    Cost: one forward of the probe per point, 267 by default, and 60 ms to draw; a validation probe
    doubles the forwards.  At the end of the fit about 3 s for the film of 30 pictures or more.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.

    Example::

        trainer = Trainer(callbacks=[LandscapeMonitor(directions="eigenvectors")])
    """

    kind = "landscape"
    draws = True

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
        directions: Direction | tuple[Direction, Direction] = "random",
        between: tuple[WeightsSource, WeightsSource] | None = None,
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
        counts = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution,)
        if len(counts) not in (1, 2):
            raise ValueError(
                f"{quoted(owner, 'resolution', resolution)}: expected one integer, or one each for "
                f"x and y"
            )
        sizes = [check_count_or_zero(owner, "resolution", size) for size in counts]
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
            validation = probe_of(validation_probe, probe_samples)
            self._bookkeeping.probes[VALIDATION] = validation
            if validation.captured:
                raise ValueError(
                    f"{owner}(validation_probe=Probe()): expected one with a source, or None"
                )
        self._axes = Axes(self, axes, seed, None if span is None else (span[0], span[1]))
        self._full = Points((sizes[0], sizes[-1]), line_resolution)
        self._points = self._full  # of the next picture
        self._limits: dict[str, dict[str, Any]] = {}  # tag -> limits of the pictures so far
        self._path: Trajectory | None = None  # on rank zero, while training

    @property
    def forwards(self) -> int:
        """Approximate forwards of the probe per measurement."""
        products = 10 * self._axes.pair.count("eigenvectors")
        return self._evaluations(self._full) + 6 * products

    @property
    def pictures(self) -> int:  # type: ignore[override]
        """Pictures per measurement."""
        return bool(self._full.line) + bool(all(self._full.plane)) * (1 + self.surface)

    def _evaluations(self, points: Points) -> int:
        count = points.plane[0] * points.plane[1] + self.seeds * points.line
        return count * (1 if self._validation_probe is None else 2)

    @property
    def reduced_resolution(self) -> str:
        """The number of points of the last picture, if it was reduced."""
        return "" if self._points == self._full else f"{self._points} of {self._full} points"

    def fit_to_budget(self, forwards: float | None) -> bool:
        """Reduce the points, to at least 11 along an axis of the plane and 17 along a line."""
        self._points = self._full
        if forwards is None:
            return True
        fixed = self.forwards - self._evaluations(self._full)
        for size in range(max(*self._full.plane, self._full.line, _LEAST_POINTS) | 1, 9, -2):
            self._points = self._full.at_most(size)
            if fixed + self._evaluations(self._points) <= forwards:
                return True
        self._points = self._full
        return False

    # -- the path of the weights ---------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Read the given checkpoints and start the path of the weights."""
        if self.between is not None:
            measured = measured_parameters(
                trainer, pl_module, self.parameters, UnshardedParameters()
            )
            params = dict(pl_module.named_parameters())
            self._axes.between = difference(
                type(self).__name__, self.between, params, set(measured)
            )
        self._path = None
        if not self.trajectory:
            return
        if is_sharded(pl_module):
            self.warn_once("the path of the weights is not available under FSDP2")
            return
        if self._bookkeeping.resumed and trainer.ckpt_path:
            self.warn_once("the path of the weights starts again: it is not saved in checkpoints")
        if trainer.is_global_zero:
            self._path = Trajectory()

    def wants_weights(self, step: int) -> bool:
        """Whether a copy of the weights is due."""
        return self._path is not None and self._path.due(step)

    def on_weights(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Copy the weights; if that fails, there is no path."""
        if self._path is None:
            return
        try:
            params = measured_parameters(trainer, pl_module, self.parameters, UnshardedParameters())
            self._path.add(step, params)
        except Exception as error:  # out of memory, most likely
            reraise_interrupt(error)
            self._path = None
            self.warn_once(f"the path of the weights could not be copied: {error}")
