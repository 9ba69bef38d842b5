"""The rows of one callback: in memory, and from a process that was launched for the fit."""

from __future__ import annotations

import json
import math
import tempfile
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from lightning_landscape.geometry.checks import check_path

_MAX_ROWS = 10_000


class History:
    """The last 10,000 rows of one callback, oldest first.

    Under ``ddp_spawn`` and ``ddp_fork`` training runs in other processes, with copies of the
    callback.  So the copy in process zero writes the path of ``history.jsonl`` to a temporary file,
    whose name both know, and the original reads the rows from there.
    """

    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=_MAX_ROWS)
        self._name = f"lightning_landscape-{uuid.uuid4().hex}"  # of the temporary file

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add the newest row."""
        self._rows.append(row)

    def supersede(self) -> None:
        """Mark the rows so far: they are of another loss than the next ones."""
        for row in self._rows:
            row["superseded"] = True

    def rows(self) -> list[dict[str, Any]]:
        """All rows; read from the file first if another process has measured."""
        if not self._rows:
            self._fetch()
        return list(self._rows)

    def write_address(self, path: Path, row: dict[str, Any]) -> None:
        """Write the location of ``row`` and those after it, for the launching process."""
        if not self._address_file.exists():
            address = {"path": str(path.resolve()), "monitor": row["monitor"], "step": row["step"]}
            self._address_file.write_text(json.dumps(address))

    def _fetch(self) -> None:
        if self._address_file.is_file():
            address = json.loads(self._address_file.read_text())
            self._address_file.unlink()
            for row in read_history(address["path"]):
                if row.get("monitor") == address["monitor"] and row["step"] >= address["step"]:
                    self.add(row)

    @property
    def _address_file(self) -> Path:
        return Path(tempfile.gettempdir()) / self._name


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``history.jsonl``, by step; NaN where the file has null.

    Incomplete lines, which a killed run may leave, and rows without a number for their step are
    skipped.  Of several rows of one callback with the same step and the same keys, as a resumed run
    may write them, the last one is used.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``path`` is not a path.
    """
    check_path("read_history", "path", path, "the path of a history.jsonl")
    if not Path(path).is_file():
        what = "is a directory; pass" if Path(path).is_dir() else "no such file; expected"
        raise FileNotFoundError(
            f"read_history(path={str(path)!r}): {what} the history.jsonl in a log directory"
        )
    return read_rows(path)[0]


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows as :func:`read_history` returns them, and the number of damaged lines skipped."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    damaged = 0
    for line in filter(None, Path(path).read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # incomplete, perhaps within a character; deep nesting
            row = None
        if not isinstance(row, dict) or not _is_step(row.get("step")):
            damaged += 1
            continue
        rows[row["step"], str(row.get("monitor")), frozenset(row)] = _filled(row)
    return sorted(rows.values(), key=lambda row: int(row["step"])), damaged


def converged_rows(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """The rows in which ``key`` has converged; of several series of measurements, the last one."""
    having = [row for row in rows if row.get(key) is not None]
    series = having[-1].get("series", 1) if having else 1
    return [
        row
        for row in having
        if key not in _names(row.get("unconverged"))
        and row.get("series", 1) == series
        and not row.get("superseded")
    ]


def _names(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items()}
    return math.nan if value is None else value


def _is_step(step: object) -> bool:
    number = isinstance(step, (int, float)) and not isinstance(step, bool)
    return number and -(2**63) < step < 2**63  # type: ignore[operator]


def launched_by_another_process(trainer: Trainer) -> bool:
    """Whether this process was launched for the fit only, by ``ddp_spawn`` or ``ddp_fork``."""
    # By name: there are two Lightning packages.
    kinds = type(trainer.strategy.launcher).__mro__
    return any(kind.__name__ == "_MultiProcessingLauncher" for kind in kinds)
