"""What one run has saved beside its logs, found again at its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_Saved = TypeVar("_Saved")


def saved_files(folder: Path, stem: str, mine: Callable[[int], bool]) -> dict[int, Path]:
    """Step -> ``<stem>-step00000120.npz``, in order, of the steps that are ``mine``."""
    name = re.compile(re.escape(stem) + r"-step(\d+)\.npz")
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := name.fullmatch(path.name)) and mine(int(match[1])):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def load_evenly(
    files: Sequence[Path], load: Callable[[Path], _Saved], most: int
) -> dict[Path, _Saved]:
    """At most ``most`` of them, evenly chosen; one that cannot be loaded is passed over.

    No more than ``most`` are in memory at a time.
    """
    from lightning_landscape.figures.data import evenly

    left = list(files)
    loaded: dict[Path, _Saved] = {}
    while True:
        chosen = [left[index] for index in evenly(len(left), most)]
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
        left = [path for path in left if path not in damaged]
