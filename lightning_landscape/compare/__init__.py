"""Several runs side by side: one table, one axis, one colour scale.

As a function, :func:`compare`; as a command, ``python -m lightning_landscape.compare RUN RUN ...``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_landscape.compare.result import Comparison

__all__ = ["Comparison", "compare"]


def compare(
    runs: Mapping[str, str | Path] | Sequence[str | Path],
    out: str | Path | None = None,
    keys: str | Sequence[str] | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    group_by: str | None = None,
    points: Sequence[tuple[str, str]] = (),
) -> Comparison:
    """Compare runs by what our callbacks left in their log directories.

    Values that are not finite count as such and enter no extreme, mean or median.  Where the seeds
    of a group were measured at different steps, its curve takes the straight line between a seed's
    measurements (see ``figures.curves_figure``).  Slices are the last of each run.

    Args:
        runs: name -> log directory, or log directories, which are then named by the parts of their
            paths that differ.  A log directory holds ``history.jsonl`` and ``landscape/``; one
            above it will do where it is the only one there.
        out: an HTML page to write, one file that asks for nothing from the network.
        keys: the scalars to compare, e.g. ``"hessian/top_eigenvalue"``, or patterns such as
            ``"sharpness/*"``.  ``None``: all that are found.
        groups: run -> group, for all runs; the runs of a group count as its seeds.
        group_by: instead of ``groups``: the group is what stands in the name before the last
            ``group_by``, e.g. ``"adam"`` of ``"adam/seed1"`` with ``"/"``.
        points: pairs of keys ``(x, y)`` whose last values are drawn against each other.

    Returns:
        Table, figures, notes.

    Raises:
        FileNotFoundError: there is no such directory, or no measurement in it.
        ValueError: no run, two of one name, several runs in one directory, groups that do not fit,
            or a key that no run has; the message says which and what to pass.
        TypeError: ``runs`` is a single path.

    Cost: reading the files, and some 60 ms a picture.

    Example::

        comparison = compare({"SGD": "logs/sgd", "Adam": "logs/adam"}, out="comparison.html")
        print(comparison)
        comparison.table["SGD"]["hessian/top_eigenvalue"].highest
    """
    # Here, because it needs matplotlib.
    from lightning_landscape.compare import build

    return build.comparison(runs, out, keys, groups, group_by, points)
