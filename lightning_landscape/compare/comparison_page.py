"""The HTML page of a comparison; all external text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_landscape.compare.table_text import (
    Cell,
    group_cell_text,
    run_cell_text,
    second_column,
)
from lightning_landscape.report.frame import document, embedded, section
from lightning_landscape.report.words import counted

if TYPE_CHECKING:
    from lightning_landscape.compare.result import Comparison


def render(comparison: Comparison) -> str:
    """The complete page."""
    curves = [name for name in comparison.figures if name in comparison.keys]
    others = [name for name in comparison.figures if name not in comparison.keys]
    count = len(comparison.runs)
    return document(
        f"Comparison of {counted(count, 'run')}",
        ", ".join(list(comparison.runs)[:10]) + (", …" if count > 10 else ""),
        [
            section("table", "The numbers", _table(comparison)),
            section("curves", "Over the steps", _figures(comparison, curves)),
            section("pictures", "Side by side", _figures(comparison, others)),
            section("runs", "What is compared", _runs(comparison)),
        ],
    )


def _table(comparison: Comparison) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    problems = f'<div class="problems"><h3>Warnings</h3><ul>{notes}</ul></div>' if notes else ""
    if not comparison.keys:
        return f"<p>No numbers were found.</p>{problems}"
    columns = [(key, what) for key in comparison.keys for what in ("last", second_column(key))]
    keys = "".join(
        f'<th scope="colgroup" colspan="2">{escape(key)}</th>' for key in comparison.keys
    )
    kinds = "".join(f'<th scope="col">{what}</th>' for _, what in columns)
    bodies = ""
    if comparison.group_table:
        bodies += _body(
            "median (low to high)",
            {
                name: [group_cell_text(known.get(key), what) for key, what in columns]
                for name, known in comparison.group_table.items()
            },
            len(columns),
        )
    bodies += _body(
        "runs",
        {
            name: [run_cell_text(known.get(key), what) for key, what in columns]
            for name, known in comparison.table.items()
        },
        len(columns),
    )
    head = f'<tr><td rowspan="2"></td>{keys}</tr><tr>{kinds}</tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="The numbers">'
        f'<table class="numbers"><thead>{head}</thead>{bodies}</table></div>{problems}'
    )


def _body(title: str, rows: dict[str, list[Cell]], columns: int) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows.items()
    )
    head = f'<th scope="rowgroup">{escape(title)}</th><td colspan="{columns}"></td>'
    return f'<tbody><tr class="of">{head}</tr>{lines}</tbody>'


def _cell(cell: Cell) -> str:
    source = f"<small>{escape(cell.source)}</small>" if cell.source else ""
    return f"<td>{escape(cell.value)}{source}</td>"


def _figures(comparison: Comparison, names: Sequence[str]) -> str:
    return "".join(
        f'<figure class="picture"><figcaption><h3>{escape(name)}</h3></figcaption>'
        f'<img src="{embedded(comparison.figures[name])}" alt="{escape(name)} of the runs">'
        f"<p>{escape(comparison.captions.get(name, ''))}</p></figure>"
        for name in names
    )


def _runs(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(comparison.groups.get(name, ''))}</td>"
        f"<td>{escape(str(folder))}</td></tr>"
        for name, folder in comparison.runs.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("run", "group", "directory"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
