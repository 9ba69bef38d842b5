"""The report: sections in HTML; all external text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lightning_landscape.report.keys import RATIO, chart_keys, second_curve
from lightning_landscape.report.run import FRAMES, PictureSeries, Run, is_number
from lightning_landscape.report.summary import summary
from lightning_landscape.report.surface import surface_view
from lightning_landscape.report.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metadata of a slice that differ between frames; they are in each picture.
_FRAME_METADATA = ("step", "epoch", "norms", "cosine")


def render(run: Run) -> str:
    """The complete page."""
    # Pictures first, because drawing them may add problems to the summary.
    pictures = "".join(_pictures(run, series) for series in run.pictures)
    # "watch/version_0": the last part alone is often the same for all runs.
    name = "/".join(run.folder.resolve().parts[-2:])
    sections = [
        section("summary", "In short", summary(run)),
        section("charts", "Over the steps", _charts(run)),
        section("pictures", "The surface", pictures),
        section("settings", "What was measured, and how", _settings(run)),
    ]
    script = asset("script.js")
    if '<div class="surface"' in pictures:
        script = asset("surface.js") + script  # first, because script.js shows the last step
    return document(f"Loss landscape of {name}", str(run.folder), sections, script)


# -- charts -----------------------------------------------------------------------------------


def _charts(run: Run) -> str:
    series = {key: list(values.items()) for key, values in run.series.items()}
    return "".join(_one_chart(key, series) for key in chart_keys(list(series)))


def _one_chart(key: str, series: Mapping[str, Sequence[Point]]) -> str:
    second = second_curve(key, series)
    curves = [Curve(one, series[one]) for one in (key, second) if one is not None]
    title, reading = scalar_text(key)
    ratio = key.endswith(RATIO)
    if ratio:
        reading += " Dotted: 1, the edge."
    steps = [step for points in series.values() for step, _ in points]
    drawn = chart(title, curves, 1.0 if ratio else None, (min(steps), max(steps)))
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
    count = counted(shown, "picture")
    if series.found > shown:
        count += f" of {series.found}, evenly chosen: at most {FRAMES} are shown"
    return (
        f'<figure class="film" data-kind="{name}"><figcaption><h3>{name}</h3>'
        f"<p>{escape(reading)}</p></figcaption>"
        f'<div class="views"><img class="large" src="{last[1]}" alt="{name} at step {last[0]}">'
        f"{_surface(series, [step for step, _ in pictures])}</div>"
        f'<label>Step <output>{last[0]}</output><input type="range" min="0" max="{shown - 1}" '
        f'value="{shown - 1}" step="1" aria-valuetext="step {last[0]}" disabled></label>'
        f'<div class="strip">{strip}</div><p class="count">{count}.</p></figure>'
    )


def _drawing(series: PictureSeries) -> tuple[Callable[[Any, int], Figure], str]:
    first = next(iter(series.frames.values()))
    if isinstance(first, SpectralDensity):
        return lambda frame, step: density_figure(frame, metadata={"step": step}), DENSITY
    limits = _limits(series)
    planes = len(first[0].coordinates) == 2
    reading = slices_text(series.kind, planes)
    if planes:
        return lambda frame, step: plane_figure(frame[0], limits=limits), reading
    return lambda frame, step: line_figure(frame, limits=limits), reading


def _surface(series: PictureSeries, drawn: Sequence[int]) -> str:
    """The surfaces of planes at the steps that could be drawn; empty for others."""
    planes = {step: plane for step in drawn for plane in _slices(series.frames[step])[:1]}
    if not planes or len(next(iter(planes.values())).coordinates) != 2:
        return ""
    return surface_view(planes, _limits(series))


def _limits(series: PictureSeries) -> LossLimits:
    """One range for all frames."""
    return LossLimits.for_film([s for frame in series.frames.values() for s in _slices(frame)])


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
