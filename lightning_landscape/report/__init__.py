"""An HTML report of a run from its log directory: ``python -m lightning_landscape.report LOGDIR``.

The page is a single file that loads nothing from the network: charts are SVG, pictures are
embedded, style and script are inline, with their hashes in the Content-Security-Policy.
"""

from __future__ import annotations

from pathlib import Path

from lightning_landscape.geometry.checks import check_path

__all__ = ["write_report"]


def write_report(log_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of the run in ``log_dir``.

    Args:
        log_dir: the directory that contains ``history.jsonl`` and ``landscape/``, or a parent that
            contains no other run.
        path: the page to write; ``None``: ``report.html`` in the run's directory.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the directory does not exist, or contains no measurement.
        ValueError: it contains several runs (the message lists them), or ``path`` is a directory.
        TypeError: an argument is not a path.
    """
    # Here, because they need matplotlib.
    from lightning_landscape.report.frame import check_page, write_page
    from lightning_landscape.report.report_page import render
    from lightning_landscape.report.run import read_run

    owner = "write_report"
    check_path(owner, "log_dir", log_dir, "the log directory of a run")
    if path is not None:
        check_page(owner, "path", path)
    try:
        run = read_run(Path(log_dir))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{owner}(log_dir=...): {error}") from error
    target = run.folder / "report.html" if path is None else Path(path)
    return write_page(render(run), target)


def write_at_end(log_dir: Path, *, pictures: bool) -> Path:
    """Write ``report.html`` at the end of a fit; without ``pictures``, which take most of the time.

    Raises:
        FileNotFoundError: the directory does not exist, or contains no measurement.
    """
    from lightning_landscape.report.frame import write_page
    from lightning_landscape.report.report_page import render
    from lightning_landscape.report.run import FRAMES, read_run

    run = read_run(log_dir, FRAMES if pictures else 0)
    if not pictures:
        run.problems.append(
            "there was no time for pictures at the end of the fit: python -m "
            "lightning_landscape.report with the log directory writes a report with pictures"
        )
    return write_page(render(run), run.folder / "report.html")
