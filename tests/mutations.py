"""Switch off one guard at a time and see a test fail: ``python -m tests.mutations``.

Each guard is a place in the source and what stands there without it.  The package and its tests are
copied, the place is changed, the named tests run; a guard that nothing misses ends the script with
an error.  Prints a table.  It means something only where all tests pass with all guards on.

Each guard has a process of its own, forked from one that has imported torch and Lightning already:
on their imports most of the time would go.  In the end the tests that failed run once more in such
processes with all guards on, and have to pass: it is the guard that they missed, nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_landscape"
# What tests import and nobody changes here; neither the package nor the tests, which are copies.
IMPORTED = [
    *("pytest", "hypothesis", "torch", "torchmetrics", "pytorch_lightning", "lightning.pytorch"),
    *("matplotlib.pyplot", "scipy.sparse.linalg", "torch.utils.tensorboard"),
]
SECONDS = 900  # for one process


@dataclass(frozen=True)
class Guard:
    """``old`` in ``file`` protects ``what``; the ``tests`` must fail when ``new`` stands there."""

    what: str
    file: str
    old: str
    new: str
    tests: str


def main() -> None:
    from tests.guards import GUARDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only guards whose description has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chosen = [guard for guard in GUARDS if options.only in guard.what]
    width = max(len(guard.what) for guard in chosen)
    missed: list[str] = []
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(IMPORTED)
    print(f"{'guard switched off':<{width}}  first test that fails")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for guard, failed in zip(chosen, pool.map(first_failure, chosen), strict=True):
            print(f"{guard.what:<{width}}  {failed or 'NONE'}", flush=True)
            missed += [failed] if failed else []
        tests = list(dict.fromkeys(missed))
        parts = [tests[job :: options.jobs] for job in range(min(options.jobs, len(tests)))]
        spurious = [failed for failed in pool.map(failure_with_all_guards, parts) if failed]
    print(f"{len(missed)} of {len(chosen)} guards are missed by a test")
    for failed in spurious:
        print(f"{failed} fails with all guards on as well: it says nothing about any")
    sys.exit(len(missed) < len(chosen) or bool(spurious))


def first_failure(guard: Guard) -> str | None:
    """The first test that fails without ``guard``; None if all pass."""
    with copied() as copy:
        path = copy / PACKAGE / guard.file
        source = path.read_text(encoding="utf-8")
        if source.count(guard.old) != 1:
            raise SystemExit(
                f"{guard.what}: {guard.file} holds {source.count(guard.old)} times {guard.old!r}: "
                f"expected exactly one; bring tests/guards.py up to date"
            )
        path.write_text(source.replace(guard.old, guard.new), encoding="utf-8")
        return _run(copy, shlex.split(guard.tests))


def failure_with_all_guards(tests: list[str]) -> str | None:
    """The first of ``tests`` that fails where nothing is switched off; None if all pass."""
    with copied() as copy:
        return _run(copy, tests)


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """The package and its tests, for as long as it lasts."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in (PACKAGE, "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def _run(folder: Path, tests: list[str]) -> str | None:
    process = multiprocessing.Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    output = (folder / "output").read_text(encoding="utf-8")
    if process.exitcode not in (0, 1):  # no end, nothing collected, a syntax error, ...
        raise SystemExit(f"pytest {tests} ended with {process.exitcode}:\n{output[-4000:]}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return found.group(1) if process.exitcode else None


def _pytest(folder: Path, tests: list[str]) -> None:
    """In a process of its own: ``tests`` of the copy in ``folder``."""
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this file's package, which is not the copy's
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
    with open("output", "wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.exit(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    main()
