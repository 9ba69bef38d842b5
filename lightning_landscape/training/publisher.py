"""What becomes of a measurement: rows, scalars, text, files and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_landscape.training.history import launched_by_another_process
from lightning_landscape.training.random_state import undrawn
from lightning_landscape.training.records import Recorder
from lightning_landscape.training.round import Measured

if TYPE_CHECKING:
    from lightning_landscape.training.account import Account
    from lightning_landscape.training.monitor import Monitor

_ENGINES = {
    "double_backward": "exact, by double backward",
    "finite_difference": "central differences of gradients",
}


class Piece(NamedTuple):
    """A picture, or a file of the whole run, to be made if it can be afforded."""

    monitor: Monitor
    name: str
    drawings: float  # what it costs, in ordinary pictures
    make: Callable[[], object]


class Publisher:
    """Brings what callbacks found to the history, the loggers, the listeners and the disk."""

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor], account: Account) -> None:
        self._account = account
        self.recorder = Recorder(trainer)
        self._trainer = trainer
        self._monitors = monitors
        self._layout_written = False
        self._engines: dict[str, tuple[str, str | None]] = {}  # told, by the callback's prefix
        self._notes: set[str] = set()  # why an engine was taken, as warned of
        self._put_off: dict[str, Piece] = {}  # tag -> its last picture, not drawn yet

    @undrawn()  # a logger, or a picture of a callback of the user's own, may draw random numbers
    def publish(
        self,
        pl_module: LightningModule,
        monitor: Monitor,
        measured: Measured,
        step: int,
        samples: int,
        final: bool,
    ) -> None:
        """Rows and scalars, listeners, text, files and pictures of one measurement.

        The pictures of a callback that is there for scalars are put off, see :meth:`draw`.

        Args:
            pl_module: the module that trains.
            monitor: whose measurement.
            measured: what it found.
            step: the label.
            samples: examples in the callback's probe.
            final: training has ended.
        """
        trainer = self._trainer
        keep = partial(monitor.keep_probes, self.recorder, trainer)
        self.recorder.guarded("the probe", keep)
        # Values of the weights before the step have their own label, and so their own row.
        rows = []
        for values, label in ((measured.before, step - 1), (measured.values, step)):
            if values or label == step:
                rows.append(self._row(monitor, measured, values, label, samples))
                self._log(pl_module, monitor, values, rows[-1], final)
        for listener in () if final else monitor.listeners:
            told = next((row for row in rows if listener.monitor in row), rows[-1])
            self.recorder.guarded(
                f"{type(listener).__name__}(monitor={listener.monitor!r})",
                partial(listener.on_record, trainer, told),
                "told of a measurement",
            )
        monitor.measured += 1
        monitor.last_measured_step = step
        self._write_layout()
        self._tell_engine(monitor, measured.facts, step)
        if monitor.max_overhead is not None and not monitor.draws:
            for tag, draw in measured.pictures.items():
                write = partial(self._write, Measured(pictures={tag: draw}), step)
                self._put_off[tag] = Piece(monitor, tag, 1.0, write)
            measured = replace(measured, pictures={})
        self._write(measured, step)

    @undrawn()
    def draw(self, final: bool = False) -> None:
        """Draw what was put off, as far as it is affordable; at the end of the fit all of it."""
        for tag, piece in list(self._put_off.items()):
            if final or self._account.spares(piece.drawings):
                begun = time.perf_counter()
                self._put_off.pop(tag).make()
                seconds = time.perf_counter() - begun
                piece.monitor.seconds_spent += seconds
                self._account.note("last pictures" if final else "later measurements", seconds)

    def _row(
        self,
        monitor: Monitor,
        measured: Measured,
        values: Mapping[str, float],
        step: int,
        samples: int,
    ) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": self._trainer.current_epoch,
            "monitor": monitor.prefix,
            **values,
            "probe_samples": samples,
            "probe_mode": monitor.probe_mode,
            **measured.facts,
        }

    def _log(
        self,
        pl_module: LightningModule,
        monitor: Monitor,
        values: Mapping[str, float],
        row: dict[str, Any],
        final: bool,
    ) -> None:
        # One file for all: also with a callback that the run before did not have.
        continued = any(m.measurements or m.resumed for m in self._monitors)
        self.recorder.row(row, continued=continued)
        monitor.measurements.add(row)
        if self._trainer.is_global_zero and launched_by_another_process(self._trainer):
            monitor.measurements.leave_word(self.recorder.history_file, row)
        if values:
            self.recorder.scalars(values, row["step"])
            if monitor.verbose:
                told = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
                rank_zero_info(f"step {row['step']}: {told}")
        if not final:  # Lightning forbids `self.log` when training has ended
            self.recorder.guarded(
                "trainer.callback_metrics",
                partial(self.recorder.metrics, pl_module, values, monitor.prog_bar),
            )

    def _tell_engine(self, monitor: Monitor, facts: Mapping[str, Any], step: int) -> None:
        """How the Hessian-vector products were made: as text, when it is new."""
        engine, note = facts.get("engine"), facts.get("engine_note")
        if engine is None or self._engines.get(monitor.prefix) == (engine, note):
            return
        self._engines[monitor.prefix] = (engine, note)
        told = _ENGINES[engine] + (f" ({note})" if note else "")
        self.recorder.text(monitor.key("engine"), told, step)
        if note and note not in self._notes:
            self._notes.add(note)  # once, not for every callback
            monitor.say_once(f"Hessian-vector products are {told}")

    def _write_layout(self) -> None:
        if not self._layout_written:
            self._layout_written = True
            charts = {title: chart for m in self._monitors for title, chart in m.charts.items()}
            if charts:
                self.recorder.layout({"landscape": charts})

    def in_retrospect(self, monitor: Monitor, step: int, final: bool) -> list[Piece]:
        """What can be made of all that the callback has measured so far, on rank zero alone."""
        asked: list[Measured] = []
        self.recorder.guarded(
            f"{monitor.prefix}: a picture of the whole run",
            lambda: asked.append(monitor.in_retrospect(self.recorder.folder, final)),
        )
        acts = {
            name: partial(self._make, Measured(**{kind: {name: made}}), step)
            for measured in asked
            for kind in ("pictures", "files")
            for name, made in getattr(measured, kind).items()
        }
        prices = asked[0].drawings if asked else {}
        return [Piece(monitor, name, prices.get(name, 1.0), act) for name, act in acts.items()]

    def _make(self, measured: Measured, step: int) -> None:
        """Files and pictures, on rank zero."""
        for name, write in measured.files.items():
            self.recorder.file(name, write)
        for tag, draw in measured.pictures.items():
            self.recorder.picture(tag, draw, step)
        for tag, make in measured.surfaces.items():
            self.recorder.mesh(tag, make, step)

    def _write(self, measured: Measured, step: int) -> None:
        """The files and pictures of one measurement; what they took is the price of the next."""
        begun = time.perf_counter()
        self._make(measured, step)
        if measured.pictures:
            self._account.drawing = (time.perf_counter() - begun) / len(measured.pictures)
