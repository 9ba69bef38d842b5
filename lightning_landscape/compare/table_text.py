"""The table of a comparison as text: its cells, and its form for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_landscape.figures.labels import number
from lightning_landscape.report.words import counted, steps_text, value_text

if TYPE_CHECKING:
    from lightning_landscape.compare.table import GroupCell, Reading, RunCell, Spread


class Cell(NamedTuple):
    """The text of a cell: the value, and in smaller print its step or seeds."""

    value: str
    source: str


def second_column(key: str) -> str:
    """The second column of a key, next to its last value: lowest, highest or mean.

    Example:
        >>> second_column("hessian/edge_ratio"), second_column("generalization/val_loss")
        ('highest', 'lowest')
    """
    name = key.rpartition("/")[2]
    if name in ("hvps", "residual") or name.endswith("_stderr"):
        return "mean"
    return "lowest" if name.endswith("loss") or name.startswith("min_") else "highest"


def run_cell_text(cell: RunCell | None, what: str) -> Cell:
    """``Cell("9.6", "step 120")``; empty if the run does not have the key."""
    if cell is None:
        return Cell("", "")
    reading: Reading = getattr(cell, what)
    value = value_text(reading.value)
    lost = f"{cell.not_finite} of {cell.measured} not finite" if cell.not_finite else ""
    if what == "last":
        return Cell(value, f"step {reading.step}")
    step = f"step {reading.step}" if reading.step is not None else ""
    return Cell(value, _comma_joined(step, lost))


def group_cell_text(cell: GroupCell | None, what: str) -> Cell:
    """``Cell("9.6 (9.1 to 12)", "3 seeds, step 120")``."""
    if cell is None:
        return Cell("", "")
    spread: Spread = getattr(cell, what)
    seeds = f"{cell.seeds} of " if cell.seeds < cell.of else ""
    seeds += counted(cell.of, "seed")
    lost = f"{spread.not_finite} not finite" if spread.not_finite else ""
    if not spread.seeds:
        return Cell("not finite", seeds)
    value = number(spread.median, 4)
    low, high = number(spread.low, 4), number(spread.high, 4)
    if low != high:
        value += f" ({low} to {high})"
    return Cell(value, _comma_joined(seeds, lost, _steps(spread)))


def _steps(spread: Spread) -> str:
    if spread.first_step is None or spread.last_step is None:
        return ""
    return steps_text(spread.first_step, spread.last_step)


def as_text(
    keys: Sequence[str],
    table: Mapping[str, Mapping[str, RunCell]],
    group_table: Mapping[str, Mapping[str, GroupCell]],
    notes: Sequence[str],
) -> str:
    """The table for a terminal: one block per key, then the notes."""
    blocks = []
    for key in keys:
        second = second_column(key)
        rows = [
            [f"{name} (median, low to high)", *(_one(cell) for cell in cells)]
            for name, cells in (
                (name, [group_cell_text(known.get(key), what) for what in ("last", second)])
                for name, known in group_table.items()
            )
        ]
        rows += [
            [name, *(_one(run_cell_text(known.get(key), what)) for what in ("last", second))]
            for name, known in table.items()
        ]
        blocks.append("\n".join([key, *_aligned([["", "last", second], *rows])]))
    listed_notes = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join(filter(None, [*blocks, listed_notes]))


def _one(cell: Cell) -> str:
    if not cell.value:
        return "-"
    return f"{cell.value}, {cell.source}" if cell.source else cell.value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _comma_joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))
