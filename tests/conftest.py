"""Runs that do not depend on time; tables that tests fill row by row, printed at the end.

``pytest --device cuda`` trains on a GPU whatever a test leaves to ``tests.runs.train``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_landscape.figures import film
from lightning_landscape.training import budget
from lightning_landscape.training.output.recorder import Recorder
from tests import runs

# Title -> rows, each a dict from column to cell.
TABLES = pytest.StashKey[dict[str, list[dict[str, str]]]]()
_TITLES = ("zoo", "one process against two", "wrong uses")


@pytest.fixture(autouse=True)
def _long_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every run an unlimited budget.

    Otherwise the number of measurements would depend on the load of the machine.
    """
    if request.node.get_closest_marker("short_runs") is None:
        monkeypatch.setattr(budget.Budget, "_grace", lambda self, seconds: math.inf)


# Functions that draw: most of the time of a small run, and few tests check the pictures.
_DRAWING = {
    (Recorder, "picture"): lambda *_: None,
    (film, "write_film"): lambda slices, path, *_: Path(path).touch(),
}
_AS_WRITTEN = {(owner, name): getattr(owner, name) for owner, name in _DRAWING}


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Callbacks draw nothing, except in tests that are marked ``pictures``."""
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), instead in _DRAWING.items():
            patch.setattr(owner, name, instead)
        yield


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("pictures") is not None:
        for (owner, name), drawing in _AS_WRITTEN.items():
            monkeypatch.setattr(owner, name, drawing)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where tests train")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or two equal runs differ
        runs.DEVICE.update({"accelerator": "gpu", "devices": 1, "deterministic": True})
    config.stash[TABLES] = {title: [] for title in _TITLES}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Collect the rows of a pytest-xdist worker that has finished."""
    for title, rows in getattr(node, "workeroutput", {}).get("tables", {}).items():
        node.config.stash[TABLES][title] += rows


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # this is a worker
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for title, rows in config.stash[TABLES].items():
        if not rows:
            continue
        columns = list(rows[0])
        table = sorted([row[name] for name in columns] for row in rows)
        widths = [max(len(cell) for cell in cells) for cells in zip(columns, *table, strict=True)]
        terminalreporter.section(title)
        for cells in (columns, *table):
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            terminalreporter.write_line(line.rstrip())
