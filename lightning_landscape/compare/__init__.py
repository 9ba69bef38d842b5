"""Compare several runs: in one table, on common axes, on one colour scale.

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
    """Compare runs by the files of their log directories.

    Values that are not finite are counted, and left out of extremes, means and medians.  If the
    seeds of a group were measured at different steps, their curves are interpolated linearly (see
    ``figures.curves_figure``).  Slices are the last of each run.

    Args:
        runs: name -> log directory, or log directories, which are then named by the parts of their
            paths that differ.  A log directory contains ``history.jsonl`` and ``landscape/``; a
            parent directory is accepted if it contains a single run.
        out: an HTML page to write, one file that loads nothing from the network.
        keys: the scalars to compare, e.g. ``"hessian/top_eigenvalue"``, or patterns such as
            ``"sharpness/*"``.  ``None``: all scalars.
        groups: run -> group, for all runs; the runs of a group count as its seeds.
        group_by: instead of ``groups``: the group is the part of the name before the last
            ``group_by``, e.g. ``"adam"`` of ``"adam/seed1"`` with ``"/"``.
        points: pairs of keys ``(x, y)`` whose last values are drawn against each other.

    Returns:
        Table, figures, notes.

    Raises:
        FileNotFoundError: a directory does not exist, or contains no measurement.
        ValueError: there is no run, two have the same name, a directory contains several runs, the
            groups do not match, or no run has a key; the message says what to pass.
        TypeError: ``runs`` is a single path.

    Cost: reading the files, and about 60 ms per picture.

    Example::

        comparison = compare({"SGD": "logs/sgd", "Adam": "logs/adam"}, out="comparison.html")
        print(comparison)
        comparison.table["SGD"]["hessian/top_eigenvalue"].highest
    """
    # Here, because it needs matplotlib.
    from lightning_landscape.compare import build

    return build.comparison(runs, out, keys, groups, group_by, points)
