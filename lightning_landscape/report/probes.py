"""The probes that values were measured on; values of different probes are not comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_landscape.report.words import counted, steps_text

NOT_COMPARABLE = "the values are not comparable"


def probes_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Callback -> probe, in words -> the steps at which the callback measured on it."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if probe := _probe_text(row):
            steps = found.setdefault(str(row.get("monitor", "unnamed")), {})
            steps.setdefault(probe, []).append(int(row["step"]))
    return found


def probe_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each callback that measured on several probes."""
    return [
        f"{monitor}: measured on different probes, "
        + ", ".join(f"{text} ({steps_text(min(s), max(s))})" for text, s in probes.items())
        + f"; {NOT_COMPARABLE}"
        for monitor, probes in probes_of(rows).items()
        if len(probes) > 1
    ]


def _probe_text(row: Mapping[str, Any]) -> str:
    samples, mode = row.get("probe_samples"), row.get("probe_mode")
    size = counted(samples, "example") if isinstance(samples, int) else ""
    return " ".join([*filter(None, [size]), *([f"in {mode} mode"] if mode else [])])
