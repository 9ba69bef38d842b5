"""Finds and loads the files that a run has saved beside its logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_Saved = TypeVar("_Saved")


def saved_files(folder: Path, stem: str, is_own: Callable[[int], bool]) -> dict[int, Path]:
    """Step -> ``<stem>-step00000120.npz``, sorted, of the steps for which ``is_own`` is true."""
    name = re.compile(re.escape(stem) + r"-step(\d+)\.npz")
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := name.fullmatch(path.name)) and is_own(int(match[1])):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def load_evenly(
    files: Sequence[Path], load: Callable[[Path], _Saved], most: int
) -> dict[Path, _Saved]:
    """Load at most ``most`` files, evenly spaced; those that cannot be loaded are skipped.

    No more than ``most`` are in memory at a time.
    """
    from lightning_landscape.figures.data import evenly

    remaining = list(files)
    loaded: dict[Path, _Saved] = {}
    while True:
        chosen = [remaining[index] for index in evenly(len(remaining), most)]
        loaded = {path: loaded[path] for path in chosen if path in loaded}
        damaged = set()
        for path in chosen:
            if path not in loaded:
                try:
                    loaded[path] = load(path)
                except (OSError, ValueError):
                    damaged.add(path)
        if not damaged:
            return {path: loaded[path] for path in chosen}
        remaining = [path for path in remaining if path not in damaged]
