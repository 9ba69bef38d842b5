"""Matplotlib figures of loss slices, spectral densities and logged values.

Every function whose name ends in ``_figure`` returns a ``matplotlib.figure.Figure`` that is not
registered in pyplot: no window opens, and it need not be closed. Figures are 4 inches wide at 140
dpi, with text that is legible where TensorBoard shows them 350 pixels wide. With ``ax=`` they draw
into axes of another figure, e.g. those of ``paper_axes``.
"""

from lightning_landscape.figures.canvas import figure_to_image
from lightning_landscape.figures.comparison import barrier_matrix_figure, points_figure
from lightning_landscape.figures.curves import curves_figure
from lightning_landscape.figures.density import density_figure
from lightning_landscape.figures.density_film import density_film_figure
from lightning_landscape.figures.eigenvalue import eigenvalue_figure
from lightning_landscape.figures.film import film_frames, save_film
from lightning_landscape.figures.filmstrip import filmstrip_figure
from lightning_landscape.figures.limits import LossLimits
from lightning_landscape.figures.line import line_figure
from lightning_landscape.figures.paper import paper_axes, save_figure
from lightning_landscape.figures.plane import plane_figure
from lightning_landscape.figures.surface import surface_mesh

__all__ = [
    "LossLimits",
    "barrier_matrix_figure",
    "curves_figure",
    "density_figure",
    "density_film_figure",
    "eigenvalue_figure",
    "figure_to_image",
    "film_frames",
    "filmstrip_figure",
    "line_figure",
    "paper_axes",
    "plane_figure",
    "points_figure",
    "save_figure",
    "save_film",
    "surface_mesh",
]
