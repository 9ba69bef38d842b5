"""``python -m lightning_landscape.compare RUN RUN ... [--out comparison.html]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_landscape.compare import compare
from lightning_landscape.report.words import counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the page; 0, or 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_landscape.compare",
        description="Compare runs: print a table, write one self-contained HTML page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="log directories")
    parser.add_argument("--names", nargs="+", help="a name for each run")
    parser.add_argument(
        "--group-by",
        metavar="SEPARATOR",
        help="runs named alike up to the last SEPARATOR are seeds of one setting, e.g. /",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="default: comparison.html"
    )
    parser.add_argument("--keys", nargs="+", help="scalars or patterns; default: all")
    parser.add_argument(
        "--points",
        nargs=2,
        action="append",
        default=[],
        metavar=("X", "Y"),
        help="draw the last values of one scalar against those of another",
    )
    options = parser.parse_args(arguments)
    try:
        runs = options.runs if options.names is None else _named(options.names, options.runs)
        found = compare(
            runs,
            options.out,
            options.keys,
            group_by=options.group_by,
            points=[(x, y) for x, y in options.points],
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    print(f"\nWrote {found.path}")
    return 0


def _named(names: Sequence[str], runs: Sequence[Path]) -> dict[str, Path]:
    if len(names) != len(runs):
        raise ValueError(
            f"--names: got {counted(len(names), 'name')} for "
            f"{counted(len(runs), 'run')}; pass one a run"
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--names: got {name!r} {names.count(name)} times; pass another name")
    return dict(zip(names, runs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
