"""``python -m lightning_landscape.report LOGDIR [-o report.html]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_landscape.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 0, or 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_landscape.report",
        description="Write one self-contained HTML page about a run's measurements.",
    )
    parser.add_argument("logdir", type=Path, help="the run's log directory")
    parser.add_argument("-o", "--output", type=Path, help="default: report.html in that directory")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.logdir, options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
