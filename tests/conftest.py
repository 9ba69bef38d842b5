"""Prints what the zoo found: one line per member and probe mode."""

from __future__ import annotations

from typing import Any

import pytest

ZOO_ROWS = pytest.StashKey[list[dict[str, str]]]()
_COLUMNS = ("member", "mode", "bitwise equal", "engine", "quantities", "missing, and why")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ZOO_ROWS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ZOO_ROWS]
    if not rows:
        return
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in _COLUMNS]
    terminalreporter.section("zoo")
    for cells in (_COLUMNS, *([row[name] for name in _COLUMNS] for row in rows)):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
