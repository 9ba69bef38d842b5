"""Common parts of all figures: style, header, ticks, and conversion to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast

import numpy as np
from matplotlib import patheffects, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

P = ParamSpec("P")

WIDTH, DPI = 4.0, 140
# Points. 9 points at 140 dots an inch are 11 pixels after the reduction from 560 to 350.
TITLE, TEXT, SMALL = 12.0, 9.5, 9.0
LENGTH = 58  # characters of a small line of the header
# Inches: from the top to the first small line of the header, and the line spacing.
HEADER, PITCH = 0.34, 0.18
INK, GREY, GRID = "#1a1a1a", "#6b6b6b", "#e2e2e2"
# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1a1a1a", "#56B4E9")

# On top of matplotlib's defaults, not the user's style (dark background, LaTeX, grids), which could
# make the figures illegible.
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "font.size": TEXT,
    "hatch.linewidth": 1.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    # A direction may be called "$w".
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def in_house_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw with the package's style; the user's settings are restored."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(height: float) -> Figure:
    """Returns an empty figure with an Agg canvas."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def open_axes(
    ax: Axes | None, height: float, box: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    """Returns the axes to draw into, those of the user or of a new figure, and their figure."""
    if ax is None:
        figure = new_figure(height)
        return figure, figure.add_axes(box)
    return figure_of(ax), ax


def figure_of(axes: Axes) -> Figure:
    """Returns the whole figure, also of axes in a subfigure."""
    figure: Any = axes.figure
    return cast("Figure", figure.figure)


def figure_to_image(figure: Figure) -> NDArray[np.uint8]:
    """Renders a figure to an array.

    Args:
        figure: any matplotlib figure.

    Returns:
        uint8, shape (height, width, 3), row 0 at the top, as TensorBoard's
        ``SummaryWriter.add_image(..., dataformats="HWC")`` expects.

    Raises:
        TypeError: if ``figure`` is not a matplotlib figure.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure_to_image(Figure(figsize=(2, 1), dpi=100)).shape
        (100, 200, 3)
    """
    if not isinstance(figure, Figure):
        raise TypeError(
            f"figure_to_image(figure={figure!r:.80}): expected a matplotlib Figure, such as "
            "plane_figure returns"
        )
    canvas: Any = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3], dtype=np.uint8)


def packed(lines: Sequence[str], *further: str) -> list[str]:
    """Returns the lines, with each further text on the first that has room, or on its own line.

    Example:
        >>> packed(["random (fixed)", "512 examples in train mode"], "not to scale", "")
        ['random (fixed), not to scale', '512 examples in train mode']
    """
    found = list(filter(None, lines))
    for text in filter(None, further):
        room = (row for row, line in enumerate(found) if len(line) + 2 + len(text) <= LENGTH)
        row = next(room, None)
        if row is None:
            found.append(text)
        else:
            found[row] += f", {text}"
    return found


def write_header(figure: Figure, title: str, lines: Sequence[str]) -> None:
    """Writes a title and smaller lines at fixed positions, the same in all frames of a film.

    Empty lines are skipped. All lines are shortened to the width of the figure.
    """
    height = figure.get_figheight()
    figure.suptitle(
        shortened(title, 36), x=0.03, y=1 - 0.08 / height, ha="left", va="top",
        fontsize=TITLE, fontweight="bold",
    )  # fmt: skip
    for row, line in enumerate(filter(None, lines)):
        figure.text(
            0.03, 1 - (HEADER + PITCH * row) / height, shortened(line, LENGTH),
            ha="left", va="top", fontsize=SMALL,
        )  # fmt: skip


def write_titles(ax: Axes | None, figure: Figure, title: str, lines: Sequence[str]) -> None:
    """Writes the header of a new figure, or the title alone above the user's axes."""
    if ax is None:
        write_header(figure, title, lines)
    else:
        ax.set_title(title, fontsize=TEXT)


def name_mark(
    axes: Axes, x: float, y: float, name: str, side: str = "center", above: float = 8
) -> None:
    """Writes a name ``above`` points over a mark, once in a chart."""
    if not np.isfinite([x, y]).all() or name in {text.get_text() for text in axes.texts}:
        return
    label = axes.annotate(
        name, (x, y), xytext=(0, above), textcoords="offset points", fontsize=SMALL, ha=side,
        va="bottom" if above > 0 else "top", zorder=7, annotation_clip=False,
    )  # fmt: skip
    label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])


def write_across(axes: Axes, text: str) -> None:
    """Writes a message across an empty chart."""
    axes.text(
        0.5, 0.7, text, transform=axes.transAxes, ha="center", va="center", fontsize=TEXT,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
    )  # fmt: skip


def set_ticks(axes: Axes, *linear: Axis, bins: int = 5) -> None:
    """Sets the size of all ticks, and the number of ticks of the linear axes.

    Labels have no offset: "2.3001", not "1e-4" with "+2.3" in a corner.
    """
    axes.tick_params(labelsize=SMALL, length=3, pad=2)
    for axis in linear:
        axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]))
        formatter = ScalarFormatter(useOffset=False, useMathText=False)
        formatter.set_powerlimits((-3, 5))
        axis.set_major_formatter(formatter)
        axis.get_offset_text().set_fontsize(SMALL)


def draw_legend(
    figure: Figure, top: float, columns: int = 1, *, ax: Axes | None = None, **options: Any
) -> None:
    """Draws the legend ``top`` inches below the top of a new figure, or in the user's axes."""
    if ax is not None:
        ax.legend(fontsize=SMALL, **options)
        return
    figure.legend(
        loc="upper left", bbox_to_anchor=(0.03, 1 - top / figure.get_figheight()), fontsize=SMALL,
        ncols=columns, borderpad=0, borderaxespad=0, labelspacing=0.3, handletextpad=0.5,
        columnspacing=1.0, **options,
    )  # fmt: skip


def draw_grid(axes: Axes) -> None:
    """Draws a faint grid below everything."""
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def shortened(text: str, length: int) -> str:
    """Returns the text, truncated with an ellipsis to at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
