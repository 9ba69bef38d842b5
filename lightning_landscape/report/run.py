"""Reads a log directory: rows of numbers, slices, densities, and what of it cannot be read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_landscape.figures.data import evenly
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity
from lightning_landscape.training.output.history import read_rows
from lightning_landscape.training.output.recorder import FOLDER, HISTORY_FILE

FRAMES = 24  # most of one kind on a page
_LABELS = ("step", "epoch", "monitor")  # of a row; they are no values
_NAME = re.compile(r"(?P<kind>.+?)(?:(?<=-line)-(?P<number>\d+))?-step(?P<step>\d+)\.npz")


@dataclass
class Film:
    """Pictures of one kind, e.g. of ``landscape-plane``: what to draw at each step."""

    kind: str
    frames: dict[int, list[Slice] | SpectralDensity]
    found: int  # steps on the disk, of which at most ``FRAMES`` are here


@dataclass
class Run:
    """What a run left behind."""

    folder: Path
    rows: list[dict[str, Any]]
    films: list[Film] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def series(self) -> dict[str, dict[int, float]]:
        """Every scalar of the rows: key -> step -> value, NaN where it was not finite.

        That is what is logged, whose key has a ``/``, and of what a callback notes beside it, which
        appears as ``monitor/key``, the losses and other decimal numbers that change.
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


def is_number(value: object) -> bool:
    """Whether it is a number and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_float(value: float) -> float:
    """A float; infinite where an integer has more digits than floats hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def read_run(folder: Path, most: int = FRAMES) -> Run:
    """Read the run in ``folder``, or the only one below it, and ``most`` pictures of each kind.

    Raises:
        FileNotFoundError: no such directory, or no measurement in it.
        ValueError: several runs.
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
                many = "s" if damaged > 1 else ""
                run.problems.append(f"{HISTORY_FILE}: {damaged} damaged line{many} left out")
    else:
        run.problems.append(f"there is no {HISTORY_FILE}: no numbers, pictures only")
    files: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob(f"{FOLDER}/*.npz")):
        if match := _NAME.fullmatch(path.name):
            steps = files.setdefault(match["kind"], {})
            steps.setdefault(int(match["step"]), []).append(path)
        else:
            run.problems.append(f"{path.name} is not a name of ours and is left out")
    for kind, steps in files.items():
        _add_film(run, kind, steps, most)
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


def _add_film(run: Run, kind: str, steps: dict[int, list[Path]], most: int) -> None:
    frames: dict[int, list[Slice] | SpectralDensity] = {}
    left = sorted(steps)
    if most == 1:  # of the last step that can be read
        for step in reversed(left):
            if _add_frame(run, frames, step, steps[step]):
                break
    else:
        for index in evenly(len(left), most):
            _add_frame(run, frames, left[index], steps[left[index]])
    if frames:
        run.films.append(Film(kind, frames, len(steps)))


def _add_frame(
    run: Run, frames: dict[int, list[Slice] | SpectralDensity], step: int, paths: Sequence[Path]
) -> bool:
    """Read what belongs to one step; whether there is something to draw."""
    read = []
    for path in paths:
        try:
            read.append(_load(path))
        except Exception as error:  # a damaged archive raises any of a dozen types
            run.problems.append(f"{path.name} cannot be read and is left out ({error})")
    if read and isinstance(read[0], SpectralDensity):
        frames[step] = read[0]
    elif slices := [piece for piece in read if isinstance(piece, Slice)]:
        frames[step] = slices
    return step in frames


def _load(path: Path) -> Slice | SpectralDensity:
    with np.load(path, allow_pickle=False) as file:
        holds_density = "density" in file
    return SpectralDensity.load(path) if holds_density else Slice.load(path)
