"""Reads a log directory: rows of numbers, slices, densities, and what of it cannot be read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity
from lightning_landscape.training.history import read_history
from lightning_landscape.training.records import FOLDER, HISTORY_FILE

FRAMES = 24  # most of one kind on a page
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


def read_run(folder: Path) -> Run:
    """Read the run in ``folder``, or the only one below it.

    Raises:
        FileNotFoundError: no such directory, or no measurement in it.
        ValueError: several runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such directory")
    folder = _the_run(folder)
    run = Run(folder, [])
    if (history := folder / HISTORY_FILE).is_file():
        try:
            run.rows = read_history(history)
        except Exception as error:
            run.problems.append(f"{HISTORY_FILE} cannot be read ({error})")
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
        _add_film(run, kind, steps)
    return run


def evenly(values: list[int], most: int = FRAMES) -> list[int]:
    """At most ``most`` of the values, evenly chosen, the first and the last among them.

    Example:
        >>> evenly([1, 2, 3, 4, 5, 6, 7], 3)
        [1, 4, 7]
    """
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


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


def _add_film(run: Run, kind: str, steps: dict[int, list[Path]]) -> None:
    frames: dict[int, list[Slice] | SpectralDensity] = {}
    for step in evenly(sorted(steps)):
        read = []
        for path in steps[step]:
            try:
                read.append(_load(path))
            except Exception as error:  # a damaged archive raises any of a dozen types
                run.problems.append(f"{path.name} cannot be read and is left out ({error})")
        if read and isinstance(read[0], SpectralDensity):
            frames[step] = read[0]
        elif slices := [piece for piece in read if isinstance(piece, Slice)]:
            frames[step] = slices
    if frames:
        run.films.append(Film(kind, frames, len(steps)))


def _load(path: Path) -> Slice | SpectralDensity:
    with np.load(path, allow_pickle=False) as file:
        if "density" not in file:
            return Slice.load(path)
        arrays = {key: torch.as_tensor(file[key]) for key in file if key not in ("sigma", "hvps")}
        return SpectralDensity(sigma=float(file["sigma"]), hvps=int(file["hvps"]), **arrays)
