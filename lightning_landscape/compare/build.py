"""Build a comparison: read the runs, summarize, draw, write the page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_landscape.compare.comparison_page import render
from lightning_landscape.compare.pictures import Pictures
from lightning_landscape.compare.result import Comparison
from lightning_landscape.compare.runs import chosen_keys, groups_of, read_runs
from lightning_landscape.compare.table import GroupCell, RunCell, group_cell, run_cell
from lightning_landscape.geometry.checks import quoted
from lightning_landscape.report.frame import check_page, write_page
from lightning_landscape.report.keys import rank
from lightning_landscape.report.probes import NOT_COMPARABLE, probes_of

_NAMED = 3  # runs or keys listed by name in a note


def comparison(
    runs: Mapping[str, str | Path] | Sequence[str | Path],
    out: str | Path | None,
    keys: str | Sequence[str] | None,
    groups: Mapping[str, str] | None,
    group_by: str | None,
    points: Sequence[tuple[str, str]],
) -> Comparison:
    """See :func:`lightning_landscape.compare`."""
    if out is not None:
        check_page("compare", "out", out)
    if not isinstance(points, (list, tuple)) or not all(_is_pair(pair) for pair in points):
        raise TypeError(
            f"{quoted('compare', 'points', points)}: expected pairs of keys (x, y), e.g. "
            f"[('hessian/top_eigenvalue', 'generalization/gap')]"
        )
    read = read_runs(runs)
    grouped = groups_of(list(read), groups, group_by)
    series = {name: run.series for name, run in read.items()}
    found = sorted({key for known in series.values() for key in known}, key=rank)
    chosen = chosen_keys(found, keys)
    table = {
        name: {key: run_cell(known[key]) for key in chosen if key in known}
        for name, known in series.items()
    }
    pictures = Pictures()
    pictures.curves(chosen, series, grouped)
    for x, y in points:
        for key in (x, y):
            if key not in found:
                chosen_keys(found, [key], "points")  # raises, and lists the keys
        last = {
            name: (_last(known.get(x, {})), _last(known.get(y, {})))
            for name, known in series.items()
        }
        pictures.points(last, x, y, grouped)
    pictures.slices({name: run.pictures for name, run in read.items()})
    result = Comparison(
        runs={name: run.folder for name, run in read.items()},
        keys=chosen,
        table=table,
        groups=grouped,
        group_table=_grouped(chosen, table, grouped),
        figures=pictures.figures,
        captions=pictures.captions,
        notes=[
            *_probe_notes({name: run.rows for name, run in read.items()}),
            *_missing_notes(chosen, table),
            *(f"{name}: {problem}" for name, run in read.items() for problem in run.problems),
            *pictures.notes,
        ],
    )
    if out is None:
        return result
    return dataclasses.replace(result, path=write_page(render(result), Path(out)))


def _grouped(
    keys: Sequence[str], table: Mapping[str, Mapping[str, RunCell]], groups: Mapping[str, str]
) -> dict[str, dict[str, GroupCell]]:
    cells: dict[str, dict[str, GroupCell]] = {}
    for group in dict.fromkeys(groups.values()):
        members = [table[name] for name, own in groups.items() if own == group]
        known = {key: [cells[key] for cells in members if key in cells] for key in keys}
        cells[group] = {key: group_cell(of, len(members)) for key, of in known.items() if of}
    return cells


def _missing_notes(keys: Sequence[str], table: Mapping[str, Mapping[str, RunCell]]) -> list[str]:
    """A note for each set of runs that lack the same keys."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        if without := tuple(name for name, cells in table.items() if key not in cells):
            lacking.setdefault(without, []).append(key)
    return [f"not measured in {_some(runs)}: {_some(absent)}" for runs, absent in lacking.items()]


def _probe_notes(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A note on the callbacks that measured on different probes in different runs."""
    probes: dict[str, dict[str, list[str]]] = {}  # callback -> probe -> runs
    for name, own in rows.items():
        for monitor, found in probes_of(own).items():
            for probe in found:
                probes.setdefault(monitor, {}).setdefault(probe, []).append(name)
    notes: dict[str, list[str]] = {}  # the same of several callbacks
    for monitor, known in probes.items():
        if len({tuple(runs) for runs in known.values()}) > 1:
            text = ", ".join(f"{probe} ({_some(runs)})" for probe, runs in known.items())
            notes.setdefault(text, []).append(monitor)
    return [
        f"{_some(monitors)}: measured on different probes, {text}; {NOT_COMPARABLE}"
        for text, monitors in notes.items()
    ]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    text = ", ".join(names[:_NAMED] if more > 1 else names)
    return f"{text} and {more} more" if more > 1 else text


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(isinstance(key, str) for key in pair)


def _last(values: Mapping[int, float]) -> float:
    return values[max(values)] if values else math.nan
