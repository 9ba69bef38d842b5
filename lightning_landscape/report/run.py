"""Read a log directory: rows of numbers, slices, densities, and a list of problems."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_landscape.figures.data import evenly
from lightning_landscape.geometry.archive import load_arrays
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity
from lightning_landscape.report.probes import probe_problems
from lightning_landscape.report.words import counted
from lightning_landscape.training.output.history import converged_rows, read_rows
from lightning_landscape.training.output.recorder import FOLDER, HISTORY_FILE

FRAMES = 24  # maximum number of pictures of one kind
_LABELS = ("step", "epoch", "monitor", "run")  # keys of a row that are not values
_NAME = re.compile(r"(?P<kind>.+?)(?:(?<=-line)-(?P<number>\d+))?-step(?P<step>\d+)\.npz")


@dataclass
class PictureSeries:
    """Pictures of one kind, e.g. ``landscape-plane``: the data to draw at each step."""

    kind: str
    frames: dict[int, list[Slice] | SpectralDensity]
    found: int  # number of steps on disk, of which at most ``FRAMES`` are in ``frames``


@dataclass
class Run:
    """The contents of a log directory."""

    folder: Path
    rows: list[dict[str, Any]]
    pictures: list[PictureSeries] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def series(self) -> dict[str, dict[int, float]]:
        """Every scalar of the rows: key -> step -> value, NaN if not finite.

        These are the logged values, whose keys contain a ``/``, and of the other entries of the
        rows, under ``monitor/key``, the losses and all floats that change.
        """
        found: dict[str, dict[int, float]] = {}
        noted: dict[str, dict[int, float]] = {}
        for row in self.rows:
            monitor = str(row.get("monitor", ""))
            for key, value in row.items():
                if not is_number(value) or key in _LABELS:
                    continue
                if "/" in key or not monitor:
                    found.setdefault(key, {})[int(row["step"])] = as_float(value)
                elif isinstance(value, float):
                    noted.setdefault(f"{monitor}/{key}", {})[int(row["step"])] = value
        for key, values in noted.items():
            if key.endswith("/center_loss") or len(set(map(repr, values.values()))) > 1:
                found.setdefault(key, values)
        return found

    def converged(self, key: str) -> list[tuple[int, float]]:
        """Step and value of a scalar where it has converged, NaN if it is not finite."""
        if not any(key in row for row in self.rows):  # an entry of a row, under monitor/key
            return list(self.series.get(key, {}).items())
        rows = converged_rows(self.rows, key)
        return [(int(row["step"]), as_float(row[key])) for row in rows if is_number(row[key])]


def is_number(value: object) -> bool:
    """Whether ``value`` is a number, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_float(value: float) -> float:
    """``value`` as a float; infinite if an integer is out of range."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def read_run(folder: Path, most: int = FRAMES) -> Run:
    """Read the run in ``folder``, or the only one below it, and ``most`` pictures of each kind.

    Raises:
        FileNotFoundError: the directory does not exist, or contains no measurement.
        ValueError: it contains several runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such directory; pass the log directory of a run"
        )
    folder = _the_run(folder)
    run = Run(folder, [])
    if (history := folder / HISTORY_FILE).is_file():
        try:
            run.rows, damaged = read_rows(history)
        except OSError as error:
            run.problems.append(f"{HISTORY_FILE} cannot be read ({error})")
        else:
            if damaged:
                lines = counted(damaged, "damaged line")
                run.problems.append(f"{HISTORY_FILE}: {lines} left out")
            run.problems += probe_problems(run.rows)
    else:
        run.problems.append(f"there is no {HISTORY_FILE}: no numbers, pictures only")
    files: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob(f"{FOLDER}/*.npz")):
        if match := _NAME.fullmatch(path.name):
            steps = files.setdefault(match["kind"], {})
            steps.setdefault(int(match["step"]), []).append(path)
        else:
            run.problems.append(f"{path.name} is not the name of a measurement and is left out")
    for kind, steps in files.items():
        _add_series(run, kind, steps, most)
    return run


def _the_run(folder: Path) -> Path:
    if _is_run(folder):
        return folder
    files = [*folder.rglob(HISTORY_FILE), *folder.rglob(f"{FOLDER}/*.npz")]
    runs = sorted({p.parent if p.name == HISTORY_FILE else p.parent.parent for p in files})
    if not runs:
        raise FileNotFoundError(
            f"{folder}: no {HISTORY_FILE} and no {FOLDER}/*.npz here or below; expected the log "
            f"directory of a run with a callback of lightning_landscape"
        )
    if len(runs) > 1:
        named = "".join(f"\n  {run}" for run in runs)
        raise ValueError(f"{folder} holds {len(runs)} runs; choose one of them:{named}")
    return runs[0]


def _is_run(folder: Path) -> bool:
    return (folder / HISTORY_FILE).is_file() or any(folder.glob(f"{FOLDER}/*.npz"))


def _add_series(run: Run, kind: str, steps: dict[int, list[Path]], most: int) -> None:
    frames: dict[int, list[Slice] | SpectralDensity] = {}
    left = sorted(steps)
    if most == 1:  # the last step that can be read
        for step in reversed(left):
            if _add_frame(run, frames, step, steps[step]):
                break
    else:
        for index in evenly(len(left), most):
            _add_frame(run, frames, left[index], steps[left[index]])
    if frames:
        run.pictures.append(PictureSeries(kind, frames, len(steps)))


def _add_frame(
    run: Run, frames: dict[int, list[Slice] | SpectralDensity], step: int, paths: Sequence[Path]
) -> bool:
    """Read the files of one step; returns whether there is something to draw."""
    read = []
    for path in paths:
        try:
            read.append(_load(path))
        except Exception as error:  # damaged archives raise many types of errors
            run.problems.append(f"{path.name} cannot be read and is left out ({error})")
    if read and isinstance(read[0], SpectralDensity):
        frames[step] = read[0]
    elif slices := [piece for piece in read if isinstance(piece, Slice)]:
        frames[step] = slices
    return step in frames


def _load(path: Path) -> Slice | SpectralDensity:
    holds_density = "density" in load_arrays(path)
    return SpectralDensity.load(path) if holds_density else Slice.load(path)
