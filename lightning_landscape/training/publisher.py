"""The output of a measurement: rows, scalars, text, files and pictures."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_landscape.training.budget import BESIDE_VALUES, Budget
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

_FRAMES = 24  # of one kind, at most, are drawn in the report


class Output(NamedTuple):
    """A picture or file to be made later, if there is time."""

    quantity: Quantity
    name: str
    drawings: float  # cost, in units of one ordinary picture
    make: Callable[[], object]


class Publisher:
    """Sends results of callbacks to the history, the loggers, the listeners and the disk.

    Attributes:
        write_report: writes the report of a run, given its directory and whether with pictures, and
            returns its path.  The package sets it, because the report is a layer above.
    """

    write_report: Callable[..., Path] | None = None

    def __init__(
        self, trainer: Trainer, quantities: Sequence[Quantity], budget: Budget, costs: Costs
    ) -> None:
        self._budget = budget
        self._costs = costs
        self.recorder = Recorder(trainer)
        self._trainer = trainer
        self._quantities = quantities
        self._layout_written = False
        self._logged_engines: dict[str, tuple[str, str | None]] = {}  # logged so far, by prefix
        self._warned_notes: set[str] = set()  # reasons for an engine, each warned of once
        self._postponed: dict[str, Output] = {}  # tag -> its last picture, if not drawn yet

    @preserve_rng_state()  # loggers and user-defined pictures may draw random numbers
    def publish(
        self,
        pl_module: LightningModule,
        quantity: Quantity,
        measured: Measured,
        step: int,
        samples: int,
        final: bool,
    ) -> None:
        """Publish the rows, scalars, text, files and pictures of one measurement.

        Pictures of a callback that does not set ``draws`` are postponed, see :meth:`draw`.

        Args:
            pl_module: the module that is trained.
            quantity: the callback.
            measured: its result.
            step: the label.
            samples: examples in the callback's probe.
            final: whether training has ended.
        """
        trainer = self._trainer
        # Values at the weights before the step have another label, and so a row of their own.
        rows = []
        for values, label in ((measured.before, step - 1), (measured.values, step)):
            if values or label == step:
                rows.append(self._row(quantity, measured, values, label, samples))
                self._log(quantity, values, rows[-1])
                if not final:  # Lightning forbids `self.log` when training has ended
                    self._set_metrics(pl_module, quantity, measured, values, label)
        bookkeeping = quantity._bookkeeping
        for listener in () if final else bookkeeping.listeners:
            row = next((row for row in rows if listener.monitor in row), rows[-1])
            if listener.monitor in measured.unconverged:
                continue
            heard = listener.monitor in row
            bookkeeping.heard[listener.monitor] = bookkeeping.heard.get(listener.monitor, 0) + heard
            self.recorder.guarded(
                f"{type(listener).__name__}(monitor={listener.monitor!r})",
                partial(listener.on_record, trainer, row),
                "informed of a measurement",
            )
        bookkeeping.measured += 1
        bookkeeping.last_measured_step = step
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
        """Draw postponed pictures as far as there is time; at the end of the fit all of them."""
        for tag, output in list(self._postponed.items()):
            if final or self._budget.allows_drawing(output.drawings, beside_last=True):
                started = time.perf_counter()
                self._postponed.pop(tag).make()
                seconds = time.perf_counter() - started
                output.quantity._bookkeeping.seconds_spent += seconds
                self._budget.record("last pictures" if final else BESIDE_VALUES, seconds)

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
            **({"series": series} if (series := quantity._bookkeeping.series) > 1 else {}),
            **({"unconverged": sorted(keys)} if (keys := measured.unconverged) else {}),
            **measured.facts,
        }

    def _log(self, quantity: Quantity, values: Mapping[str, float], row: dict[str, Any]) -> None:
        # All callbacks share the file, including those that the run before did not have.
        states = [q._bookkeeping for q in self._quantities]
        continued = any(state.history or state.resumed for state in states)
        run = {"run": quantity._bookkeeping.run}
        self.recorder.row({**row, **run}, continued=continued)
        history = quantity._bookkeeping.history
        history.add(row)
        if self._trainer.is_global_zero and launched_by_another_process(self._trainer):
            history.write_address(self.recorder.history_file, row)
        if values:
            self.recorder.scalars(values, row["step"])
            if quantity.verbose:
                shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
                rank_zero_info(f"step {row['step']}: {shown}")

    def _set_metrics(
        self,
        pl_module: LightningModule,
        quantity: Quantity,
        measured: Measured,
        values: Mapping[str, float],
        step: int,
    ) -> None:
        """Set ``trainer.callback_metrics``; the last converged value of a key stays there.

        The first one is set in any case where something reads the key: Lightning would end the fit.
        """
        bookkeeping = quantity._bookkeeping
        first = bookkeeping.read - bookkeeping.published.keys()
        values = {k: v for k, v in values.items() if k not in measured.unconverged - first}
        for key in first & measured.unconverged:
            quantity.warn_once(
                f"the first value of {key} that is read has not converged, see its row; raise "
                f"max_hvps or tol"
            )
        self.recorder.guarded(
            "trainer.callback_metrics",
            partial(self.recorder.metrics, pl_module, values, quantity.prog_bar),
        )
        bookkeeping.published |= dict.fromkeys(values, step)

    def _log_engine(self, quantity: Quantity, facts: Mapping[str, Any], step: int) -> None:
        """Log as text how Hessian-vector products were computed, if that has changed."""
        engine, note = facts.get("engine"), facts.get("engine_note")
        if engine is None or self._logged_engines.get(quantity.prefix) == (engine, note):
            return
        self._logged_engines[quantity.prefix] = (engine, note)
        text = _ENGINES[engine] + (f" ({note})" if note else "")
        self.recorder.text(quantity.key("engine"), text, step)
        if note and note not in self._warned_notes:
            self._warned_notes.add(note)  # once for all callbacks
            quantity.warn_once(f"Hessian-vector products are {text}")

    def _write_layout(self) -> None:
        if not self._layout_written:
            self._layout_written = True
            charts = {title: chart for q in self._quantities for title, chart in q.charts.items()}
            if charts:
                self.recorder.layout({"landscape": charts})

    def run_summary(self, quantity: Quantity, step: int, final: bool) -> list[Output]:
        """Outputs of all that the callback has measured so far; on rank zero only."""
        summaries: list[Measured] = []
        self.recorder.guarded(
            f"{quantity.prefix}: a picture of the whole run",
            lambda: summaries.append(quantity.run_summary(self.recorder.folder, final)),
        )
        makes = {
            name: partial(self._make, part, step)
            for measured in summaries
            for name, part in (
                *((tag, Measured(pictures={tag: draw})) for tag, draw in measured.pictures.items()),
                *((name, Measured(files={name: write})) for name, write in measured.files.items()),
            )
        }
        costs = summaries[0].drawings if summaries else {}
        return [Output(quantity, name, costs.get(name, 1.0), make) for name, make in makes.items()]

    def report(self, step: int) -> None:
        """Write and upload the report of the run, if a logger takes it; on rank zero only.

        Without its pictures, if there is no time for them.
        """
        measured = [q for q in self._quantities if q._bookkeeping.history]
        if not measured or self.write_report is None or not self.recorder.takes_report:
            return
        files = self.recorder.folder.glob("*-step*.npz")
        frames = {re.sub(r"(?<=-line)-\d+", "", path.name) for path in files}
        kinds = Counter(name.rpartition("-step")[0] for name in frames)
        drawings = sum(min(count, _FRAMES) for count in kinds.values())
        limited = any(q.max_overhead is not None for q in measured)
        pictures = not limited or self._budget.allows_drawing(1.0 + drawings)
        if drawings and not pictures:
            self._budget.left_out.append("pictures of the report")
        self.recorder.report(partial(self.write_report, pictures=pictures), step)

    def _make(self, measured: Measured, step: int) -> None:
        """Write files and draw pictures, on rank zero."""
        for name, write in measured.files.items():
            self.recorder.file(name, write)
        for tag, draw in measured.pictures.items():
            self.recorder.picture(tag, draw, step)
        for tag, make in measured.surfaces.items():
            self.recorder.mesh(tag, make, step)

    def _write(self, measured: Measured, step: int) -> None:
        """Write and draw for one measurement; timed, as an estimate for the next."""
        started = time.perf_counter()
        self._make(measured, step)
        if measured.pictures:
            self._costs.drawing = (time.perf_counter() - started) / len(measured.pictures)
