"""The first section of the report: a sentence, the main values, what they are based on."""

from __future__ import annotations

import math
from html import escape

from lightning_landscape.geometry.judgement import LAST_VALUES, edge_judgement
from lightning_landscape.report.chart_texts import scalar_text
from lightning_landscape.report.keys import RATIO, SAM, TOP, first_of, loss_key, name_of, rank
from lightning_landscape.report.run import Run
from lightning_landscape.report.words import counted, steps_text, value_text


def summary(run: Run) -> str:
    """The section's content."""
    first, *others = _judgements(run)
    lines = [*others, *_measured(run), *_reliability(run), *_pictures(run)]
    if run.rows:
        lines.append("Whether training was stopped early is not recorded in these files.")
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    judgement = f'<p class="judgement">{escape(first)}</p>'
    return f"{judgement}{_cards(run)}{_problems(run)}{text}{_other_values(run)}"


# -- in words ---------------------------------------------------------------------------------


def _judgements(run: Run) -> list[str]:
    """A sentence for each ratio to the edge; one on the first scalar if there is none."""
    keys = sorted((key for key in run.series if name_of(key) == RATIO), key=rank)
    if not keys:
        return [_change(run)]
    only = len(keys) == 1
    return [_judgement(run, key, "the edge ratio" if only else key) for key in keys]


def _judgement(run: Run, key: str, name: str) -> str:
    values = run.converged(key)
    sentence = edge_judgement(name, values)
    if not sentence and not values:
        sentence = f"{name} has no converged value: it says nothing about the learning rate"
    elif not sentence:
        step, value = values[-1]
        sentence = (
            f"{name} was {value_text(value)} at step {step}: fewer than {LAST_VALUES} converged "
            f"values, too few for a judgement"
        )
    return f"{_capitalized(sentence)}."


def _change(run: Run) -> str:
    for key in sorted(run.series, key=rank):
        if values := [pair for pair in run.converged(key) if math.isfinite(pair[1])]:
            (first_step, first), (last_step, last) = values[0], values[-1]
            text = f"{scalar_text(key)[0]} was {value_text(first)} at step {first_step}"
            if len(values) > 1:
                text += f" and {value_text(last)} at step {last_step}"
            return f"{text}."
    return "No numbers were found."


def _capitalized(sentence: str) -> str:
    return f"T{sentence[1:]}" if sentence.startswith("the ") else sentence


def _measured(run: Run) -> list[str]:
    counts: dict[str, int] = {}
    for row in run.rows:
        name = str(row.get("monitor", "unnamed"))
        counts[name] = counts.get(name, 0) + 1
    if not counts:
        return []
    steps = steps_text(run.rows[0]["step"], run.rows[-1]["step"])
    named = ", ".join(f"{name} {counted(count, 'time')}" for name, count in counts.items())
    return [f"Measured at {steps}: {named}."]


def _reliability(run: Run) -> list[str]:
    """How many of the values are reliable, according to the flags in the rows."""
    lines = []
    solved = [row for row in run.rows if isinstance(row.get("converged"), bool)]
    if solved:
        converged = sum(row["converged"] for row in solved)
        looked = sum(row["converged"] and row.get("checked") == row["step"] for row in solved)
        lines.append(
            f"The largest eigenvalue converged at {converged} of "
            f"{counted(len(solved), 'measurement')}; at {looked} a search outside the vectors kept "
            f"from the last one found no larger one."
        )
    for tag, name in (("worst_case", "worst case"), ("keskar", "sharpness of Keskar et al.")):
        notes = [row.get(f"{tag}_settled") for row in run.rows]
        found = [note for note in notes if isinstance(note, bool)]
        if found:
            of = counted(len(found), "measurement")
            lines.append(f"The {name} was settled at {sum(found)} of {of}.")
    return lines


def _pictures(run: Run) -> list[str]:
    steps = {step for series in run.pictures for step in series.frames}
    return [f"Pictures are from {steps_text(min(steps), max(steps))}."] if steps else []


def _problems(run: Run) -> str:
    shown = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="problems"><h3>Warnings</h3><ul>{shown}</ul></div>' if shown else ""


# -- the last values --------------------------------------------------------------------------


def _main_keys(run: Run) -> list[str]:
    keys = list(run.series)
    found = [*(first_of(keys, name) for name in (RATIO, TOP, SAM)), loss_key(keys)]
    return [key for key in found if key is not None]


def _cards(run: Run) -> str:
    cards = "".join(
        f"<div><dt>{escape(scalar_text(key)[0])}</dt><dd>{_last(run, key)[0]}</dd>"
        f'<dd class="count">{escape(key)}<br>{_last(run, key)[1]}</dd></div>'
        for key in _main_keys(run)
    )
    return f'<dl class="tiles">{cards}</dl>' if cards else ""


def _other_values(run: Run) -> str:
    shown = _main_keys(run)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{_last(run, key)[0]}</td>'
        f"<td>{_last(run, key)[1]}</td></tr>"
        for key in sorted(run.series, key=rank)
        if key not in shown
    )
    if not rows:
        return ""
    table = f'<table class="values"><tbody>{rows}</tbody></table>'
    return f'<h3>Other last values</h3><div class="scroll">{table}</div>'


def _last(run: Run, key: str) -> tuple[str, str]:
    """The last value and its step, as text."""
    step, value = list(run.series[key].items())[-1]
    text = f"step {step}"
    if math.isfinite(value) and (step, value) not in run.converged(key):
        text += ", not converged"
    return value_text(value), text
