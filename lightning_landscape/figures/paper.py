"""Figures for papers: column widths, and vector graphics whose text is text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_landscape.geometry.checks import check_count, check_number, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches: the columns of most conference templates.
_WIDTHS = {1: 3.25, 2: 6.75}


def paper_axes(count: int = 1, *, columns: int = 1, aspect: float = 0.8) -> list[Axes]:
    """Returns axes side by side in a new figure that is one or two columns of a paper wide.

    Args:
        count: the number of axes.
        columns: 1: 3.25 inches wide; 2: 6.75 inches.
        aspect: height of the figure over the width of one chart.

    Returns:
        ``count`` axes; pass each as ``ax=`` to a function of this package.

    Example:
        >>> left, right = paper_axes(2, columns=2)
        >>> left.figure.get_size_inches().tolist()
        [6.75, 2.7]
    """
    check_count("paper_axes", "count", count)
    if isinstance(columns, bool) or columns not in _WIDTHS:
        raise ValueError(f"{quoted('paper_axes', 'columns', columns)}: expected 1 or 2")
    expected = "a finite number > 0"
    check_number("paper_axes", "aspect", aspect, expected, lambda x: 0.0 < x < float("inf"))
    width = _WIDTHS[columns]
    figure = Figure(figsize=(width, aspect * width / count), layout="constrained", dpi=300)
    FigureCanvasAgg(figure)
    return list(figure.subplots(1, count, squeeze=False)[0])


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure; in PDF, SVG and PostScript its text stays text, which can be searched.

    Args:
        figure: any matplotlib figure.
        path: its suffix is the format, e.g. ``plane.pdf``.

    Raises:
        TypeError: if ``figure`` is not a matplotlib figure, or ``path`` not a path.
        ValueError: if matplotlib does not know the format.
    """
    if not isinstance(figure, Figure):
        raise TypeError(
            f"save_figure(figure={figure!r:.80}): expected a matplotlib Figure, such as "
            "plane_figure returns"
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{quoted('save_figure', 'path', path)}: expected a path, e.g. 'plane.pdf'")
    # Type 42 and "none" embed fonts or name them; the defaults draw each letter as a shape.
    with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(path)
