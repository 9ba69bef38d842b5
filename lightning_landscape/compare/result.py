"""The result of a comparison: tables, figures and notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.compare.table import GroupCell, RunCell


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.  Its string is the table.

    Attributes:
        runs: name -> the run's log directory.
        keys: the scalars that are compared, in the order of the table.
        table: run -> key -> last, lowest, highest and mean value with their steps; without entries
            for keys that a run does not have.
        groups: run -> group; empty without groups.
        group_table: group -> key -> median, lowest and highest of those over the runs (seeds).
        figures: key -> curves of all runs, kind of slice such as ``"landscape-plane"`` -> the last
            slices of all runs, ``"y against x"`` -> points.
        captions: name of a figure -> a sentence that describes it.
        notes: one sentence on each thing that is missing, damaged or not shown.
        path: the page, if one was written.
    """

    runs: dict[str, Path]
    keys: list[str]
    table: dict[str, dict[str, RunCell]]
    groups: dict[str, str] = field(default_factory=dict)
    group_table: dict[str, dict[str, GroupCell]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One dict per run and key, e.g. for pandas.

        Each has the keys ``run``, ``group``, ``key``, ``last``, ``last_step``, ``lowest``,
        ``lowest_step``, ``highest``, ``highest_step``, ``mean``, ``measured`` and ``not_finite``;
        NaN and ``None`` if there is no finite value.
        """
        return [
            {"run": run, "group": self.groups.get(run), "key": key, **cell.to_dict()}
            for run, cells in self.table.items()
            for key, cell in cells.items()
        ]

    def __str__(self) -> str:
        # Here, because it needs matplotlib.
        from lightning_landscape.compare.table_text import as_text

        return as_text(self.keys, self.table, self.group_table, self.notes)
