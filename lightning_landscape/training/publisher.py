"""The output of a measurement: rows, scalars, text, files and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_landscape.training.budget import Budget
from lightning_landscape.training.costs import Costs
from lightning_landscape.training.isolation.random_state import preserve_rng_state
from lightning_landscape.training.output.history import launched_by_another_process
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.quantity import Quantity

_ENGINES = {
    "double_backward": "exact, by double backward",
    "finite_difference": "central differences of gradients",
}


class Output(NamedTuple):
    """A picture, or a file of the whole run, to be made if it can be afforded."""

    quantity: Quantity
    name: str
    drawings: float  # its cost, in ordinary pictures
    make: Callable[[], object]


class Publisher:
    """Writes what callbacks found to the history, the loggers, the listeners and the disk."""

    def __init__(
        self, trainer: Trainer, quantities: Sequence[Quantity], budget: Budget, costs: Costs
    ) -> None:
        self._budget = budget
        self._costs = costs
        self.recorder = Recorder(trainer)
        self._trainer = trainer
        self._quantities = quantities
        self._layout_written = False
        self._engines: dict[str, tuple[str, str | None]] = {}  # logged so far, by prefix
        self._notes: set[str] = set()  # reasons for an engine that were warned of
        self._postponed: dict[str, Output] = {}  # tag -> its last picture, not drawn yet

    @preserve_rng_state()  # a logger, or a picture of a user's callback, may draw random numbers
    def publish(
        self,
        pl_module: LightningModule,
        quantity: Quantity,
        measured: Measured,
        step: int,
        samples: int,
        final: bool,
    ) -> None:
        """Rows and scalars, listeners, text, files and pictures of one measurement.

        The pictures of a callback whose purpose are scalars are postponed, see :meth:`draw`.

        Args:
            pl_module: the module that trains.
            quantity: whose measurement.
            measured: what it found.
            step: the label.
            samples: examples in the callback's probe.
            final: training has ended.
        """
        trainer = self._trainer
        # Values of the weights before the step have their own label, and so their own row.
        rows = []
        for values, label in ((measured.before, step - 1), (measured.values, step)):
            if values or label == step:
                rows.append(self._row(quantity, measured, values, label, samples))
                self._log(pl_module, quantity, values, rows[-1], final)
        noted = quantity._bookkeeping
        for listener in () if final else noted.listeners:
            row = next((row for row in rows if listener.monitor in row), rows[-1])
            self.recorder.guarded(
                f"{type(listener).__name__}(monitor={listener.monitor!r})",
                partial(listener.on_record, trainer, row),
                "informed of a measurement",
            )
        noted.measured += 1
        noted.last_measured_step = step
        self._write_layout()
        self._log_engine(quantity, measured.facts, step)
        if quantity.max_overhead is not None and not quantity.draws:
            for tag, draw in measured.pictures.items():
                write = partial(self._write, Measured(pictures={tag: draw}), step)
                self._postponed[tag] = Output(quantity, tag, 1.0, write)
            measured = replace(measured, pictures={})
        self._write(measured, step)

    @preserve_rng_state()
    def draw(self, final: bool = False) -> None:
        """Draw what was postponed, as far as it is affordable; at the end of the fit all of it."""
        for tag, output in list(self._postponed.items()):
            if final or self._budget.affords_drawing(output.drawings, beside_last=True):
                started = time.perf_counter()
                self._postponed.pop(tag).make()
                seconds = time.perf_counter() - started
                output.quantity._bookkeeping.seconds_spent += seconds
                self._budget.note("last pictures" if final else "later measurements", seconds)

    def _row(
        self,
        quantity: Quantity,
        measured: Measured,
        values: Mapping[str, float],
        step: int,
        samples: int,
    ) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": self._trainer.current_epoch,
            "monitor": quantity.prefix,
            **values,
            "probe_samples": samples,
            "probe_mode": quantity.probe_mode,
            **measured.facts,
        }

    def _log(
        self,
        pl_module: LightningModule,
        quantity: Quantity,
        values: Mapping[str, float],
        row: dict[str, Any],
        final: bool,
    ) -> None:
        # One file for all: also with a callback that the run before did not have.
        noted = [q._bookkeeping for q in self._quantities]
        continued = any(n.history or n.resumed for n in noted)
        self.recorder.row(row, continued=continued)
        history = quantity._bookkeeping.history
        history.add(row)
        if self._trainer.is_global_zero and launched_by_another_process(self._trainer):
            history.leave_address(self.recorder.history_file, row)
        if values:
            self.recorder.scalars(values, row["step"])
            if quantity.verbose:
                shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
                rank_zero_info(f"step {row['step']}: {shown}")
        if not final:  # Lightning forbids `self.log` when training has ended
            self.recorder.guarded(
                "trainer.callback_metrics",
                partial(self.recorder.metrics, pl_module, values, quantity.prog_bar),
            )

    def _log_engine(self, quantity: Quantity, facts: Mapping[str, Any], step: int) -> None:
        """How the Hessian-vector products were made: as text, when it is new."""
        engine, note = facts.get("engine"), facts.get("engine_note")
        if engine is None or self._engines.get(quantity.prefix) == (engine, note):
            return
        self._engines[quantity.prefix] = (engine, note)
        text = _ENGINES[engine] + (f" ({note})" if note else "")
        self.recorder.text(quantity.key("engine"), text, step)
        if note and note not in self._notes:
            self._notes.add(note)  # once, not for every callback
            quantity.warn_once(f"Hessian-vector products are {text}")

    def _write_layout(self) -> None:
        if not self._layout_written:
            self._layout_written = True
            charts = {title: chart for q in self._quantities for title, chart in q.charts.items()}
            if charts:
                self.recorder.layout({"landscape": charts})

    def run_summary(self, quantity: Quantity, step: int, final: bool) -> list[Output]:
        """What can be made of all that the callback has measured so far, on rank zero alone."""
        summaries: list[Measured] = []
        self.recorder.guarded(
            f"{quantity.prefix}: a picture of the whole run",
            lambda: summaries.append(quantity.run_summary(self.recorder.folder, final)),
        )
        makes = {
            name: partial(self._make, Measured(**{kind: {name: made}}), step)
            for measured in summaries
            for kind in ("pictures", "files")
            for name, made in getattr(measured, kind).items()
        }
        costs = summaries[0].drawings if summaries else {}
        return [Output(quantity, name, costs.get(name, 1.0), make) for name, make in makes.items()]

    def _make(self, measured: Measured, step: int) -> None:
        """Files and pictures, on rank zero."""
        for name, write in measured.files.items():
            self.recorder.file(name, write)
        for tag, draw in measured.pictures.items():
            self.recorder.picture(tag, draw, step)
        for tag, make in measured.surfaces.items():
            self.recorder.mesh(tag, make, step)

    def _write(self, measured: Measured, step: int) -> None:
        """The files and pictures of one measurement; timed, as an estimate for the next."""
        begun = time.perf_counter()
        self._make(measured, step)
        if measured.pictures:
            self._costs.drawing = (time.perf_counter() - begun) / len(measured.pictures)
