"""1-D slices as curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from lightning_landscape.figures.canvas import (
    COLORS,
    GREY,
    HEADER,
    PITCH,
    TEXT,
    draw_grid,
    draw_legend,
    in_house_style,
    name_mark,
    open_axes,
    packed,
    set_ticks,
    shortened,
    write_titles,
)
from lightning_landscape.figures.data import (
    center_of,
    check_slice,
    losses_of,
    validation_of,
)
from lightning_landscape.figures.figure_checks import check_axes, check_limits, check_names
from lightning_landscape.figures.labels import (
    TIMES,
    axis_label,
    comma_joined,
    count_title,
    direction_names,
    direction_norms,
    directions_line,
    legend_name,
    norm_ranges,
    normalization_text,
    number,
    probe_text,
    step_and_loss,
)
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.geometry.checks import check_choice, check_flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lightning_landscape.geometry.slices import Slice

DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def line_figure(
    slices: Slice | Sequence[Slice],
    *,
    limits: LossLimits | None = None,
    scale: Literal["linear", "log"] = "linear",
    band: bool = False,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws one or several 1-D slices in one chart; the dot marks the weights.

    The axis of the loss is linear, so that a parabola looks like one.  Points beyond it are marked
    by a triangle at its end and "> limit", points without a finite loss by a cross.  Where the
    metadata have them, dashes show the validation loss; along the optimizer's last step a circle
    marks its start and a star the lowest point.  On a line from a reference the circle is the
    reference, and a grey line joins the losses at both ends: the barrier is the height above it.

    Args:
        slices: one slice with one coordinate axis, or several (directions, or steps).
        limits: the ends of the axis, shared by all pictures of a run. None: from these slices.
        scale: ``"log"``: a logarithmic axis; losses that are not positive are below it.
        band: draw the median of the slices and a band from their lowest to their highest loss, e.g.
            for random directions of several seeds.
        names: a name for each slice, if they are not of one run.
        ax: axes of another figure to draw into, without the header. None: a new figure.

    Returns:
        The figure of ``ax``, or one 4 inches wide at 140 dpi, not registered in pyplot.

    Raises:
        TypeError: if ``slices`` is neither a slice nor a sequence of slices.
        ValueError: if there is no slice, one is not a line, the shapes of its coordinates and
            losses do not match, the slices of a band differ in their coordinates, or the number of
            names differs.
    """
    lines = _as_lines(slices)
    check_limits("line_figure", limits)
    check_choice("line_figure", "scale", scale, ("linear", "log"))
    check_flags("line_figure", band=band)
    check_axes("line_figure", ax)
    if names is not None:
        check_names("line_figure", names)
    if names is not None and (band or len(names) != len(lines)):
        raise ValueError(
            f"line_figure(names={names!r:.80}): got {len(names)} names for "
            f"{'one band' if band else f'{len(lines)} slices'}; pass one name per slice and no band"
        )
    others = [other for other in map(validation_of, lines) if other is not None]
    if limits is None:
        limits = LossLimits.for_film([*lines, *others])
    return draw_lines(lines, limits, lines, band, names, log=scale == "log", ax=ax)


@in_house_style
def draw_lines(
    lines: Sequence[Slice],
    limits: LossLimits,
    film: Sequence[Slice],
    band: bool = False,
    names: Sequence[str] | None = None,
    *,
    log: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Draws one frame of a film; only the title and the curves differ between frames."""
    shaded = lines if band else []
    if band:
        lines = [_median(lines)]
    dashed = [validation_of(line) for line in lines]
    every = [*film, *lines, *(other for other in map(validation_of, film) if other is not None)]
    losses = np.concatenate([losses_of(line) for line in every])
    title, small = _header(lines)
    if names is not None:
        steps = {_step(line) for line in lines}
        title = count_title(len(lines), "line")
        if len(steps) == 1 and "?" not in steps and all("reference" in s.metadata for s in lines):
            title = f"step {steps.pop()}"
    small = packed(small, _update_text(lines), _reference_text(lines), _validation_text(dashed))
    entries = len(lines) if len(lines) > 1 or names is not None else 0
    # Inches. Space for the remark is always reserved, so that all frames have the same height.
    legend = HEADER + PITCH * (len(small) + 1)
    top = legend + PITCH * entries + 0.08
    height = top + 2.5
    figure, axes = open_axes(ax, height, (0.175, 0.43 / height, 0.795, 2.07 / height))
    axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=1)
    low, high = _set_loss_axis(axes, limits, losses, log)
    for index, line in enumerate(lines):
        color, dashes = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
        other, curve = dashed[index], losses_of(line)
        if other is not None:
            dashes, validation = "-", losses_of(other)
            axes.plot(line.coordinates[0], validation, color=color, linestyle="--", linewidth=1.4)
            mark_outside(axes, line.coordinates[0], validation, low, high, color)
            end = len(validation) * 4 // 5  # near the right end
            name_mark(axes, float(line.coordinates[0][end]), validation[end], "validation", "right")
        x = np.asarray(line.coordinates[0], dtype=np.float64)
        called = _name(index, lines) if names is None else legend_name(names[index], 44)
        axes.plot(x, curve, color=color, linestyle=dashes, label=called)
        axes.plot([0.0], [center_of(line)], "o", color=color, markersize=7, zorder=5)
        mark_outside(axes, x, curve, low, high, color)
        _mark_update(axes, line, curve, color)
        _mark_reference(axes, line, curve, color)
    if shaded:
        _draw_band(axes, shaded)
    axes.set_xlim(*_span(film))
    axes.set_xlabel(_shared_axis_label(lines, film), fontsize=TEXT, labelpad=2)
    write_titles(ax, figure, title, [*small, line_remark(losses, low, high)])
    if entries:
        draw_legend(figure, legend, ax=ax, handlelength=2.8)
    return figure


def _as_lines(slices: Slice | Sequence[Slice]) -> list[Slice]:
    """Returns the slices as a checked list."""
    lines: list[Slice]
    if hasattr(slices, "losses"):
        lines = [cast("Slice", slices)]
    elif isinstance(slices, Sequence) and not isinstance(slices, str):
        lines = list(slices)
    else:
        raise TypeError(
            f"line_figure(slices={slices!r:.80}): expected a Slice, as line_slice returns, or a "
            "list of them"
        )
    if not lines:
        raise ValueError("line_figure(slices=[]): expected at least one slice")
    for index, line in enumerate(lines):
        check_slice(f"line_figure(slices=...), slice {index}", line, axes=1)
    return lines


def _median(lines: Sequence[Slice]) -> Slice:
    """Returns the median slice, with their number in its metadata; NaN where any loss is."""
    first = lines[0]
    x = first.coordinates[0]
    for index, line in enumerate(lines):
        if not np.array_equal(line.coordinates[0], x):
            raise ValueError(
                f"line_figure(slices=..., band=True), slice {index}: other coordinates than slice "
                "0; pass slices over one span at one resolution"
            )
    random = all(_direction(line).startswith("random") for line in lines)
    metadata = {**first.metadata}
    many = f"{len(lines)} {'random ' if random else ''}directions"
    metadata |= {"directions": [many], "median_of": f"median and range of {many}"}
    metadata.pop("update", None)
    if _differ(lines, _norm):
        metadata.pop("norms", None)
    others = [other for other in map(validation_of, lines) if other is not None]
    if len(others) == len(lines):
        losses = np.median([losses_of(other) for other in others], axis=0)
        metadata["validation"] = {**metadata["validation"], "losses": losses.tolist()}
    else:
        metadata.pop("validation", None)
    return dataclasses.replace(
        first,
        losses=np.median([losses_of(line) for line in lines], axis=0),
        center_loss=float(np.median([line.center_loss for line in lines])),
        metadata=metadata,
    )


def _draw_band(axes: Axes, lines: Sequence[Slice]) -> None:
    """Shades the range from the lowest to the highest of the slices."""
    curves = [losses_of(line) for line in lines]
    axes.fill_between(
        lines[0].coordinates[0], np.min(curves, axis=0), np.max(curves, axis=0),
        color=COLORS[0], alpha=0.2, linewidth=0,
    )  # fmt: skip


def _mark_update(axes: Axes, line: Slice, curve: NDArray[Any], color: Any) -> None:
    """Marks the start of the last step, the weights now, and the lowest point along it."""
    known = line.metadata.get("update")
    if not known:
        return
    x = line.coordinates[0]
    for at, marker, size in ((-1.0, "o", 7), (known.get("lowest_along_update"), "*", 11)):
        if at is not None and x[0] <= at <= x[-1]:
            height = float(np.interp(at, x, curve))
            if marker == "*" and np.isfinite(curve).any():
                height = min(height, float(np.nanmin(curve)))
            axes.plot(
                [at], [height], marker, color=color, markersize=size, zorder=6,
                markerfacecolor="white", markeredgewidth=1.4,
            )  # fmt: skip
            if marker == "*":
                name_mark(axes, at, height, "lowest", "center", above=22)
            else:
                name_mark(axes, at, height, "before", "right")
    name_mark(axes, 0.0, center_of(line), "now", "left")


def _mark_reference(axes: Axes, line: Slice, curve: NDArray[Any], color: Any) -> None:
    """Marks the reference, and the straight line between the losses at both ends."""
    if "reference" not in line.metadata:
        return
    x = line.coordinates[0]
    between = np.linspace(x[0], x[-1], 200)  # because it is curved on a logarithmic axis
    chord = np.interp(between, x[[0, -1]], curve[[0, -1]])
    axes.plot(between, chord, "-", color=GREY, linewidth=1.0, zorder=1.5)
    axes.plot(
        x[:1], curve[:1], "o", color=color, markersize=7, zorder=6,
        markerfacecolor="white", markeredgewidth=1.4,
    )  # fmt: skip
    name = shortened(str(line.metadata["reference"]), 24)
    name_mark(axes, float(x[0]), float(curve[0]), name, "left")
    name_mark(axes, 0.0, center_of(line), "now", "right")


def _set_loss_axis(
    axes: Axes, limits: LossLimits, losses: NDArray[Any], log: bool
) -> tuple[float, float]:
    """Sets the loss axis, with a margin; returns its ends."""
    low, high = limits.low, limits.high
    positive = losses[losses > 0]
    log = log and bool(positive.size) and high > 0
    if log:
        low = low if low > 0 else min(float(positive.min()), high / 10)
        margin = (high / low) ** 0.04
        low, high = low / margin, high * margin
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.05 * (high - low)
        low, high = low - margin, high + margin
    set_ticks(axes, axes.xaxis, *([] if log else [axes.yaxis]))
    axes.set_ylabel("loss (logarithmic)" if log else "loss", fontsize=TEXT, labelpad=1)
    axes.set_ylim(low, high)
    draw_grid(axes)
    if not np.isfinite(losses).any():
        axes.set_yticks([])
    return low, high


def mark_outside(
    axes: Axes, x: NDArray[Any], curve: NDArray[Any], low: float, high: float, color: Any
) -> None:
    """Marks points outside of the chart at its border."""
    above, below, absent = curve > high, curve < low, np.isnan(curve)
    for where, border, marker in ((above, 0.97, "^"), (below, 0.03, "v"), (absent, 0.97, "x")):
        if where.any():
            axes.plot(
                x[where], np.full(where.sum(), border), marker, color=color, markersize=6,
                markeredgewidth=1.6, transform=axes.get_xaxis_transform(), zorder=6,
            )  # fmt: skip


def _span(lines: Sequence[Slice]) -> tuple[float, float]:
    """Returns the limits of the coordinate axis."""
    low = min(float(line.coordinates[0][0]) for line in lines)
    high = max(float(line.coordinates[0][-1]) for line in lines)
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _name(index: int, lines: Sequence[Slice]) -> str:
    """Returns what distinguishes a line: step, direction, probe, norm of the direction."""
    line = lines[index]
    name = comma_joined(
        f"step {_step(line)}" if _differ(lines, _step) else "",
        _direction(line) if _differ(lines, _direction) else "",
        _state(line) if _differ(lines, _direction) and _differ(lines, _state) else "",
        _probe(line) if _differ(lines, _probe) else "",
    )
    return axis_label(
        name or f"slice {index + 1}", norm_ranges([line], 1)[0] if _differ(lines, _norm) else None
    )


def _shared_axis_label(lines: Sequence[Slice], film: Sequence[Slice]) -> str:
    """Returns the label of the coordinate axis, with what all lines have in common."""
    name = "along the direction" if _differ(lines, _direction) else _direction(lines[0])
    return axis_label(name, None if _differ(lines, _norm) else norm_ranges(film, 1)[0])


def _header(lines: Sequence[Slice]) -> tuple[str, list[str]]:
    """Returns the title and the small lines of the header: what all slices have in common."""
    first = lines[0].metadata
    if _differ(lines, _step):
        title = "Loss along a line, by step"
    elif _differ(lines, _center):
        title = "Loss along a line" if first.get("step") is None else f"step {first['step']}"
    else:
        title = step_and_loss(first, lines[0].center_loss)
    texts = {
        (directions_line(line.metadata, 1), _normalization(line), _probe(line)) for line in lines
    }
    # For each of the three: the common text, or nothing.
    directions, kind, probe = (
        shared.pop() if len(shared) == 1 else "" for shared in map(set, zip(*texts, strict=True))
    )
    if not directions:
        states = {_state(line) for line in lines}
        directions = f"directions {states.pop()}" if len(states) == 1 and "" not in states else ""
    if "median_of" in first:
        directions = comma_joined(first["median_of"], directions.rpartition("(")[2].rstrip(")"))
    return title, [line for line in (directions, comma_joined(kind, probe)) if line]


def _validation_text(dashed: Sequence[Slice | None]) -> str:
    """Describes the dashed curves."""
    known = [line for line in dashed if line is not None]
    if not known:
        return ""
    samples, mode = (known[0].metadata.get(key) for key in ("probe_samples", "probe_mode"))
    probe = "validation" if samples is None else str(samples)
    return f"dashed: {probe}" if mode is None else f"dashed: {probe} in {mode} mode"


def _update_text(lines: Sequence[Slice]) -> str:
    """Describes the overshoot of the optimizer's last step; its length is at the axis."""
    for line in lines:
        known = line.metadata.get("update")
        if known:
            over = float(known["overshoot"])
            if np.isfinite(over):
                return f"{number(over, 2)}{TIMES} the step to the lowest point"
            uphill = line.coordinates[0][0] < float(known["lowest_along_update"]) <= -1.0
            return "uphill from the start" if uphill else "lowest point not in the picture"
    return ""


def _reference_text(lines: Sequence[Slice]) -> str:
    """Describes the barrier."""
    for line in lines:
        if "reference" in line.metadata:
            barrier = line.metadata.get("barrier") if len(lines) == 1 else None
            height = "" if barrier is None else f" {number(float(barrier))}"
            return f"barrier{height} above grey line"
    return ""


def _center(line: Slice) -> str:
    return str(line.center_loss)


def _differ(lines: Sequence[Slice], what: Callable[[Slice], Any]) -> bool:
    """Returns whether ``what`` differs between the lines."""
    return len({what(line) for line in lines}) > 1


def _direction(line: Slice) -> str:
    return direction_names(line.metadata, 1)[0]


def _state(line: Slice) -> str:
    flags = list(line.metadata.get("fixed") or [])
    return ("fixed" if flags[0] else "taken anew") if len(flags) == 1 else ""


def _norm(line: Slice) -> str:
    """The norm of the direction as labels show it."""
    (norm,) = direction_norms(line.metadata, 1)
    return "" if norm is None else number(norm, 2)


def _normalization(line: Slice) -> str:
    """The normalization; a step and the way from a reference have a length of their own."""
    has_length = line.metadata.get("update") or "reference" in line.metadata
    return "" if has_length else normalization_text(line.metadata)


def _probe(line: Slice) -> str:
    return probe_text(line.metadata)


def _step(line: Slice) -> Any:
    return line.metadata.get("step", "?")


def line_remark(losses: NDArray[Any], low: float, high: float) -> str:
    """Explains the triangles and crosses of the chart."""
    finite = losses[np.isfinite(losses)]
    remarks = []
    if finite.size and finite.max() > high:
        remarks.append(f"▲ > {number(high)}, up to {number(float(finite.max()))}")
    if finite.size and finite.min() < low:
        remarks.append(f"▼ < {number(low)}, down to {number(float(finite.min()))}")
    if finite.size < losses.size:
        remarks.append(f"{TIMES} not finite")
    return comma_joined(*remarks)
