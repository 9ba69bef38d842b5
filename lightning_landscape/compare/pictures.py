"""The figures of a comparison: all runs on common axes, or side by side on one colour scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_landscape.figures import (
    curves_figure,
    filmstrip_figure,
    line_figure,
    points_figure,
)
from lightning_landscape.figures.curves import MOST
from lightning_landscape.figures.data import check_slice, evenly
from lightning_landscape.geometry.slices import Slice
from lightning_landscape.report.chart_texts import scalar_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_landscape.report.run import PictureSeries

_KEYS = 40  # maximum number of scalars with curves
_LINES = 2  # maximum number of lines through the weights of each run

Series = Mapping[str, Mapping[int, float]]


class Pictures:
    """Figures by name, with captions, and notes on what could not be drawn."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.captions: dict[str, str] = {}
        self.notes: list[str] = []

    def curves(
        self, keys: Sequence[str], series: Mapping[str, Series], groups: Mapping[str, str]
    ) -> None:
        """One chart per key, of all runs or of all groups."""
        if len(keys) > _KEYS:
            self.notes.append(f"curves of {_KEYS} of {len(keys)} keys are drawn: choose with keys")
        for key in keys[:_KEYS]:
            prefix = key.rpartition("/")[0]
            # The figure also needs the edge.
            needed = (key, f"{prefix}/edge", f"{prefix}/preconditioned_eigenvalue")
            histories = {
                name: [
                    {"step": step, one: value}
                    for one in dict.fromkeys(needed)
                    for step, value in known.get(one, {}).items()
                ]
                for name, known in series.items()
            }
            title, reading = scalar_text(key)
            self._draw(
                key,
                lambda h=histories, k=key: curves_figure(h, k, groups=groups or None),  # type: ignore[misc]
                f"{title}. {reading}",
            )

    def points(
        self, values: Mapping[str, tuple[float, float]], x: str, y: str, groups: Mapping[str, str]
    ) -> None:
        """The last value of one key against that of another."""
        self._draw(
            f"{y} against {x}",
            lambda: points_figure(values, x=x, y=y, groups=groups or None),
            "The last values of each run.",
        )

    def slices(self, pictures: Mapping[str, Sequence[PictureSeries]]) -> None:
        """The last slices of all runs, by kind."""
        kinds: dict[str, dict[str, tuple[int, list[Slice]]]] = {}
        for name, known in pictures.items():
            for series in known:
                ((step, frame),) = series.frames.items()
                if isinstance(frame, list):  # and not a spectral density
                    kinds.setdefault(series.kind, {})[name] = (step, frame)
        for kind, frames in kinds.items():
            most = max(len(frame) for _, frame in frames.values())
            if most > _LINES:
                self.notes.append(f"{kind}: {_LINES} of up to {most} lines a run are drawn")
            for index in range(min(most, _LINES)):
                name = kind if most == 1 else f"{kind}-{index + 1}"
                self._one_kind(
                    name,
                    {
                        run: (s, frame[index])
                        for run, (s, frame) in frames.items()
                        if index < len(frame)
                    },
                )

    def _one_kind(self, kind: str, last: Mapping[str, tuple[int, Slice]]) -> None:
        axes = len(next(iter(last.values()))[1].coordinates)
        good = {}
        for name, (step, slice) in last.items():
            try:
                check_slice(f"{kind} of {name}", slice, axes)
            except ValueError as error:
                self.notes.append(f"left out, {error}")
            else:
                good[name] = (step, slice)
        if not good:
            return
        names = list(good)
        if axes == 1:
            names = [names[index] for index in evenly(len(names), MOST)]
        shown = [good[name][1] for name in names]
        steps = [step for step, _ in good.values()]
        when = f"step {steps[0]}" if len(set(steps)) == 1 else f"steps {min(steps)} to {max(steps)}"
        few = f" {len(names)} of {len(good)} runs are shown." if len(names) < len(good) else ""
        directions = {str(slice.metadata.get("directions")) for slice in shown}
        if len(directions) > 1:
            few += " The runs were cut along different directions: compare with care."
        if axes == 1:
            self._draw(
                kind,
                lambda: line_figure(shown, names=names),
                f"The last line of each run, {when}, all on one axis.{few}",
            )
        else:
            self._draw(
                kind,
                lambda: filmstrip_figure(shown, names=names),
                f"The last plane of each run, {when}, all on one colour scale.{few}",
            )

    def _draw(self, name: str, draw: Callable[[], Figure], caption: str) -> None:
        try:
            self.figures[name] = draw()
        except Exception as error:  # values that cannot be drawn
            self.notes.append(f"{name} could not be drawn ({error})")
        else:
            self.captions[name] = caption
