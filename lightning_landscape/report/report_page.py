"""The report: sections in HTML; all external text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_landscape.figures import (
    LossLimits,
    density_figure,
    line_figure,
    plane_figure,
)
from lightning_landscape.figures.labels import number
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.geometry.spectrum import SpectralDensity
from lightning_landscape.report.chart_texts import DENSITY, scalar_text, slices_text
from lightning_landscape.report.charts import Curve, Point, chart
from lightning_landscape.report.frame import asset, document, embedded, section
from lightning_landscape.report.run import FRAMES, PictureSeries, Run, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Keys that are drawn in the chart of another key.
_DRAWN_WITH = {
    "edge": ("top_eigenvalue", "preconditioned_eigenvalue"),
    "val_loss": ("train_loss",),
}
# Metadata of a slice that differ between frames; they are in each picture.
_FRAME_METADATA = ("step", "epoch", "norms", "cosine")
_FIRST = ("edge_ratio", "top_eigenvalue", "preconditioned_eigenvalue")


def render(run: Run) -> str:
    """The complete page."""
    # Pictures first, because drawing them may add problems to the summary.
    pictures = "".join(_pictures(run, series) for series in run.pictures)
    # "watch/version_0": the last part alone is often the same for all runs.
    name = "/".join(run.folder.resolve().parts[-2:])
    sections = [
        section("summary", "In short", _summary(run)),
        section("charts", "Over the steps", _charts(run)),
        section("pictures", "The surface", pictures),
        section("settings", "What was measured, and how", _settings(run)),
    ]
    return document(f"Loss landscape of {name}", str(run.folder), sections, asset("script.js"))


# -- in short ---------------------------------------------------------------------------------


def _summary(run: Run) -> str:
    lines = []
    counts: dict[str, int] = {}
    for row in run.rows:
        name = str(row.get("monitor", "unnamed"))
        counts[name] = counts.get(name, 0) + 1
    if run.rows:
        first, last = run.rows[0]["step"], run.rows[-1]["step"]
        named = ", ".join(f"{name} {count} times" for name, count in counts.items())
        lines.append(f"Measured between step {first} and step {last}: {named}.")
    else:
        lines.append("No numbers were found.")
    for key, points in _series(run).items():
        if key.endswith("/edge_ratio"):
            lines.append(_verdict(key, points))
    lines += _reliability(run)
    steps = {step for series in run.pictures for step in series.frames}
    if steps:
        lines.append(f"Pictures are from step {min(steps)} to step {max(steps)}.")
    if run.rows:
        lines.append("Whether training was stopped early is not recorded in these files.")
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    if run.problems:
        shown = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
        text += f'<div class="problems"><h3>Not complete</h3><ul>{shown}</ul></div>'
    return f"{text}{_tiles(run)}"


def _verdict(key: str, points: list[Point]) -> str:
    step, value = points[-1]
    if not math.isfinite(value):
        return f"{key} was not finite at step {step}, the last one: the run had blown up."
    where = "below the edge of stability"
    if value > 0.9:
        where = "at the edge of stability, where a healthy run may stay"
    if value > 1.2:
        where = "above the edge of stability: steps overshoot unless it comes back"
    highest = max((p for p in points if math.isfinite(p[1])), key=lambda point: point[1])
    return (
        f"{key} is {value:.3f} at step {step}: {where}. Its highest was {highest[1]:.3f} at step "
        f"{highest[0]}."
    )


def _reliability(run: Run) -> list[str]:
    """How many of the values are reliable, according to the flags in the rows."""
    lines = []
    solved = [row for row in run.rows if isinstance(row.get("converged"), bool)]
    if solved:
        converged = sum(row["converged"] for row in solved)
        looked = sum(row["converged"] and row.get("checked") == row["step"] for row in solved)
        lines.append(
            f"The largest eigenvalue converged at {converged} of {len(solved)} measurements; at "
            f"{looked} a search outside the vectors kept from the last one found no larger one."
        )
    for tag, name in (("worst_case", "worst case"), ("keskar", "sharpness of Keskar et al.")):
        notes = [row.get(f"{tag}_settled") for row in run.rows]
        found = [note for note in notes if isinstance(note, bool)]
        if found:
            lines.append(f"The {name} was settled at {sum(found)} of {len(found)} measurements.")
    return lines


def _tiles(run: Run) -> str:
    series = _series(run)
    tiles = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(number(points[-1][1], 4))}</dd></div>"
        for key, points in series.items()
    )
    return f'<h3>Last values</h3><dl class="tiles">{tiles}</dl>' if tiles else ""


# -- charts -----------------------------------------------------------------------------------


def _series(run: Run) -> dict[str, list[Point]]:
    return {key: list(values.items()) for key, values in run.series.items()}


def _charts(run: Run) -> str:
    series = _series(run)
    return "".join(
        _one_chart(key, series)
        for key in sorted(series, key=rank)
        if not _drawn_with_another(key, series)
    )


def rank(key: str) -> tuple[int, str]:
    """Sort key of the scalars: the most informative first, then by name."""
    last = key.rpartition("/")[2]
    return (_FIRST.index(last) if last in _FIRST else len(_FIRST)), key


def _drawn_with_another(key: str, series: Mapping[str, Any]) -> bool:
    prefix, _, last = key.rpartition("/")
    return any(f"{prefix}/{other}" in series for other in _DRAWN_WITH.get(last, ()))


def _one_chart(key: str, series: Mapping[str, list[Point]]) -> str:
    prefix, _, last = key.rpartition("/")
    # With adaptive optimizers the edge is a bound of the preconditioned eigenvalue.
    bounded = "preconditioned_eigenvalue" if f"{prefix}/{_FIRST[2]}" in series else "top_eigenvalue"
    curves = [Curve(key, series[key])]
    if last == bounded and f"{prefix}/edge" in series:
        curves.append(Curve(f"{prefix}/edge", series[f"{prefix}/edge"]))
    if last == "train_loss" and f"{prefix}/val_loss" in series:
        curves.append(Curve(f"{prefix}/val_loss", series[f"{prefix}/val_loss"]))
    title, reading = scalar_text(key)
    drawn = chart(title, curves, reference=1.0 if last.endswith("edge_ratio") else None)
    legend = "".join(
        f'<span class="key k{index}">{escape(curve.name)}</span>'
        for index, curve in enumerate(curves)
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p class="legend">{legend}</p>'
        f"</figcaption>{drawn}<p>{escape(reading)}</p></figure>"
    )


# -- pictures ---------------------------------------------------------------------------------


def _pictures(run: Run, series: PictureSeries) -> str:
    pictures: list[tuple[int, str]] = []
    draw, reading = _drawing(series)
    for step, frame in series.frames.items():
        try:
            pictures.append((step, embedded(draw(frame, step))))
        except Exception as error:  # values that cannot be drawn
            run.problems.append(f"{series.kind} at step {step} could not be drawn ({error})")
    if not pictures:
        return ""
    name = escape(series.kind)
    last, shown = pictures[-1], len(pictures)
    strip = "".join(
        f'<button type="button" aria-label="Show step {step}"><img src="{data}" alt="">'
        f"<span>{step}</span></button>"
        for step, data in pictures
    )
    count = f"{shown} picture{'s' if shown > 1 else ''}"
    if series.found > shown:
        count += f" of {series.found}, evenly chosen: at most {FRAMES} are shown"
    return (
        f'<figure class="film" data-kind="{name}"><figcaption><h3>{name}</h3>'
        f"<p>{escape(reading)}</p></figcaption>"
        f'<img class="large" src="{last[1]}" alt="{name} at step {last[0]}">'
        f'<label>Step <output>{last[0]}</output><input type="range" min="0" max="{shown - 1}" '
        f'value="{shown - 1}" step="1" aria-valuetext="step {last[0]}" disabled></label>'
        f'<div class="strip">{strip}</div><p class="count">{count}.</p></figure>'
    )


def _drawing(series: PictureSeries) -> tuple[Callable[[Any, int], Figure], str]:
    first = next(iter(series.frames.values()))
    if isinstance(first, SpectralDensity):
        return lambda frame, step: density_figure(frame, metadata={"step": step}), DENSITY
    # One range for all frames.
    slices = [slice for frame in series.frames.values() for slice in _slices(frame)]
    limits = LossLimits.for_film(slices)
    planes = len(first[0].coordinates) == 2
    reading = slices_text(series.kind, planes)
    if planes:
        return lambda frame, step: plane_figure(frame[0], limits=limits), reading
    return lambda frame, step: line_figure(frame, limits=limits), reading


def _slices(frame: Any) -> list[Slice]:
    return frame if isinstance(frame, list) else []


# -- settings ---------------------------------------------------------------------------------


def _settings(run: Run) -> str:
    facts: dict[str, dict[str, list[Any]]] = {}
    drawn = run.series
    for row in run.rows:
        monitor = str(row.get("monitor", ""))
        for key, value in row.items():
            name = key if "/" in key or not monitor else f"{monitor}/{key}"
            if key in ("step", "monitor") or (is_number(value) and name in drawn):
                continue
            if isinstance(value, dict):  # values, not a setting
                continue
            facts.setdefault(monitor, {}).setdefault(key, []).append(value)
    for series in run.pictures:
        frame = next(iter(series.frames.values()))
        if isinstance(frame, list) and isinstance(frame[0], Slice):
            known = frame[0].metadata
            facts[series.kind] = {k: [v] for k, v in known.items() if k not in _FRAME_METADATA}
    rows = "".join(
        f"<tr><td>{escape(owner)}</td><td>{escape(str(key))}</td><td>{escape(_joined(values))}</td></tr>"
        for owner, known in facts.items()
        for key, values in known.items()
    )
    if not rows:
        return ""
    head = '<tr><th scope="col">of</th><th scope="col">what</th><th scope="col">value</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _joined(values: list[Any]) -> str:
    distinct = list(dict.fromkeys(_one(value) for value in values))
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(distinct) > 1 and len(numbers) == len(values):
        return f"{_one(min(numbers))} to {_one(max(numbers))}"
    text = "; ".join(distinct[:5])
    return text if len(distinct) <= 5 else f"{text}; and {len(distinct) - 5} more"


def _one(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    text = ", ".join(_one(part) for part in value) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}…"
