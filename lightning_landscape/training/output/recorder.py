"""Writes measured values to loggers, ``callback_metrics`` and files beside the logs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.isolation.random_state import preserve_rng_state
from lightning_landscape.training.output.loggers import (
    folder_of,
    prefix_of,
    show_image,
    show_report,
    show_text,
    takes_report,
    writer_of,
)
from lightning_landscape.training.output.run_folder import (
    claimed_folder,
    release_folder,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.figures.surface import Surface

HISTORY_FILE = "history.jsonl"
FOLDER = "landscape"  # in the log directory: pictures, slices and the probe

_LAYOUT_TAG = b"custom_scalars__config__"


class Recorder:
    """Writes for all callbacks of one run; errors of loggers and disks become warnings."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._reported: set[str] = set()
        self.log_dir = _log_dir(trainer)  # a collective call, so on every rank
        self._writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        self._before_first_row = True

    @property
    def history_file(self) -> Path:
        """``<log_dir>/history.jsonl``."""
        return self.log_dir / HISTORY_FILE

    @property
    def folder(self) -> Path:
        """``<log_dir>/landscape``."""
        return self.log_dir / FOLDER

    def release(self) -> None:
        """The run has ended: another one may write to its log directory."""
        release_folder(self._trainer)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars to every logger, with the label ``step``."""
        self._each_logger(lambda logger: logger.log_metrics(dict(values), step=step))

    def text(self, tag: str, text: str, step: int) -> None:
        """Log a text to the loggers that accept text."""
        if self._writes:
            self._each_logger(lambda logger: show_text(logger, tag, text, step))

    def row(self, row: Mapping[str, Any], *, continued: bool) -> None:
        """Append one row to ``history.jsonl``; the file of another run is renamed first.

        Strict JSON, with null for NaN and infinity; ``read_history`` reads it as NaN.
        """
        if not self._writes:
            return
        path = self.history_file

        def write() -> None:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if self._before_first_row and not continued and path.exists():
                _rename_old(path)
            self._before_first_row = False
            line = json.dumps(_finite(row), allow_nan=False) + "\n"
            with path.open("ab") as file:
                incomplete = _ends_in_incomplete_line(path)  # after a kill, or on a full disk
                file.write(("\n" if incomplete else "").encode() + line.encode())

        self.guarded(HISTORY_FILE, write)

    def file(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file into the folder beside the logs, on rank zero."""
        if self._writes:
            self.file_on_this_rank(name, write)

    def file_on_this_rank(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file into the folder beside the logs, on this rank."""

        def into_folder() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".{name}"
            try:
                write(unfinished)
                os.replace(unfinished, self.folder / name)
            finally:
                unfinished.unlink(missing_ok=True)

        self.guarded(name, into_folder)

    def picture(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture to the loggers that accept images; if none does, write a PNG."""
        if self._writes:
            self.guarded(tag, lambda: self._show(tag, draw, step), "drawn")

    def _show(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        from lightning_landscape.figures import figure_to_image

        image = figure_to_image(draw())
        shown: list[str] = []

        def add(logger: Any) -> None:
            if show_image(logger, tag, image.copy(), step):  # the logger may modify it
                shown.append(tag)

        self._each_logger(add)
        if not shown:
            from matplotlib.image import imsave

            name = f"{tag.replace('/', '-')}-step{step:08d}.png"
            self.file(name, lambda path: imsave(path, image))

    @property
    def takes_report(self) -> bool:
        """Whether a logger of this process stores reports."""
        return self._writes and any(map(takes_report, self._trainer.loggers))

    def report(self, write: Callable[[Path], Path], step: int) -> None:
        """Write the report of the run beside the logs, and upload it to the loggers that store it.

        ``write``: writes it, given ``log_dir``, and returns its path.
        """
        pages: list[Path] = []
        command = f"; try python -m lightning_landscape.report {shlex.quote(str(self.log_dir))}"
        self.guarded("the report", lambda: pages.append(write(self.log_dir)), remedy=command)
        for logger in filter(takes_report, self._trainer.loggers if pages else ()):
            self.guarded(
                f"the report for {type(logger).__name__}",
                partial(show_report, logger, pages[0], step),
                "uploaded",
                remedy=f"; upload {str(pages[0])!r} yourself",
            )

    def mesh(self, tag: str, make: Callable[[], Surface], step: int) -> None:
        """Log a 3D surface to TensorBoard's mesh plugin, and to no other logger."""
        from lightning_landscape.figures.surface import VIEW

        def add(logger: Any) -> None:
            writer = writer_of(logger)
            if hasattr(writer, "add_mesh"):
                parts = {name: part[None] for name, part in make()._asdict().items()}
                if parts["faces"].size:
                    name = prefix_of(logger) + tag
                    writer.add_mesh(name, **parts, config_dict=VIEW, global_step=step)

        if self._writes:
            self._each_logger(add)

    def layout(self, charts: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Add a custom-scalars page to each TensorBoard writer that has none."""

        def add(logger: Any) -> None:
            writer = writer_of(logger)
            if not hasattr(writer, "add_custom_scalars"):
                return
            writer.flush()
            if any(_LAYOUT_TAG in path.read_bytes() for path in _event_files(writer)):
                rank_zero_warn(
                    "this TensorBoard run has a custom-scalars layout already and cannot have a "
                    "second one: the charts of lightning_landscape are not added"
                )
                return
            writer.add_custom_scalars(_prefixed_charts(logger, charts))

        if self._writes:
            self._each_logger(add)

    def metrics(
        self, pl_module: LightningModule, values: Mapping[str, float], prog_bar: bool
    ) -> None:
        """Set ``trainer.callback_metrics``, on every rank.

        Without the loggers, to which Lightning would log the last value again at every step.
        """
        for key, value in values.items():
            pl_module.log(
                key,
                torch.tensor(value, dtype=torch.float32, device=pl_module.device),
                logger=False,
                on_step=True,
                on_epoch=False,
                prog_bar=prog_bar,
                batch_size=1,  # unused without averages, but required with dataloader_iter
            )

    def _each_logger(self, action: Callable[[Any], object]) -> None:
        kinds = [type(logger).__name__ for logger in self._trainer.loggers]
        for index, (kind, logger) in enumerate(zip(kinds, self._trainer.loggers, strict=True)):
            name = kind if kinds.count(kind) == 1 else f"{kind}, trainer.loggers[{index}],"
            self.guarded(name, partial(action, logger), source=f"logger {index}")

    def guarded(
        self,
        what: str,
        act: Callable[[], object],
        done: str = "written",
        source: str = "",
        remedy: str = "",
    ) -> None:
        """Call ``act``; an exception becomes a warning, once for each ``source`` or ``what``.

        ``remedy``: what the warning suggests, unless it is an error of the disk.
        """
        try:
            act()
        except Exception as error:  # whatever a logger or a disk raises
            reraise_interrupt(error)
            # One warning for the same file at all steps.
            known = source or re.sub(r"\d+", "#", what)
            if known not in self._reported:
                self._reported.add(known)
                if _is_disk_error(error):
                    remedy = "; free disk space, or pass the logger a directory that can be written"
                warnings.warn(
                    f"{what} could not be {done} ({type(error).__name__}: {error}){remedy}; "
                    f"training and measuring continue",
                    stacklevel=2,
                )


def _is_disk_error(error: Exception) -> bool:
    """Whether it is an OSError of the disk.  Network errors are OSErrors too."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and not network and (error.errno or 0) > 0


def _log_dir(trainer: Trainer) -> Path:
    """The folder of this run, the same on every process and of no other run."""
    folder = ""
    if trainer.is_global_zero:
        writes = not getattr(trainer, "fast_dev_run", False)
        with preserve_rng_state():  # a logger may draw the name of its run at this point
            logger = trainer.loggers[0] if trainer.loggers else None
            path = folder_of(logger, trainer.default_root_dir)
            if writes:
                path = claimed_folder(trainer, path, numbered=not trainer.loggers)
            folder = str(path)
    return Path(trainer.strategy.broadcast(folder))


def _prefixed_charts(
    logger: Any, charts: Mapping[str, Mapping[str, list[Any]]]
) -> dict[str, dict[str, list[Any]]]:
    """The charts with the logger's prefix before their tags, which are regular expressions."""
    prefix = re.escape(prefix_of(logger))
    return {
        page: {
            title: [kind, [prefix + tag for tag in tags]] for title, (kind, tags) in chart.items()
        }
        for page, chart in charts.items()
    }


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which JSON does not support."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_in_incomplete_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _event_files(writer: Any) -> list[Path]:
    folder = getattr(writer, "log_dir", None)
    return list(Path(folder).glob("events.out.tfevents.*")) if folder else []


def _rename_old(path: Path) -> None:
    number = 1
    while (older := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(older)
