"""Remove one guard at a time and check that a test fails: ``python -m tests.mutations``.

Each guard is a place in the source and what stands there without it.  The package and its tests are
copied, the place is changed, the named tests run; a guard that nothing misses ends the script with
an error.  Prints a table.  It means something only where all tests pass with all guards on.

A run of all guards stores a digest of each one's source file and test files in tests/guards.json.
``--changed`` runs the guards whose digest is another now, and of the rest a tenth, chosen by the
hash of the current commit: the same at each run of a commit, another for the next commit.

Each guard has a process of its own, forked from one that has imported torch and Lightning already:
on their imports most of the time would go.  In the end the tests that failed run once more in such
processes with all guards on, and have to pass: it is the guard that they missed, nothing else.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_landscape"
# Modules that tests import and that stay unchanged; without the package and the tests.
IMPORTED = [
    *("pytest", "hypothesis", "torch", "torchmetrics", "pytorch_lightning", "lightning.pytorch"),
    *("matplotlib.pyplot", "scipy.sparse.linalg", "torch.utils.tensorboard"),
]
SECONDS = 900  # for one process
DIGESTS = ROOT / "tests" / "guards.json"


@dataclass(frozen=True)
class Guard:
    """``old`` in ``file`` protects ``what``; the ``tests`` must fail when ``new`` stands there.

    Attributes:
        within: the function, or ``Class.method``, in which ``old`` occurs once; in the whole file
            if empty.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    within: str = ""

    def removed_from(self, source: str) -> str:
        """``source`` without the guard.

        Raises:
            ValueError: ``old`` does not occur exactly once.
        """
        start, end = _lines_of(self.within, source) if self.within else (0, len(source))
        found = source.count(self.old, start, end)
        if found != 1:
            place = f"{self.file} {self.within}".strip()
            raise ValueError(
                f"{self.what}: {place} holds {found} times {self.old!r}: expected exactly one; "
                f"bring tests/guards.py up to date"
            )
        at = source.index(self.old, start, end)
        return source[:at] + self.new + source[at + len(self.old) :]

    @property
    def test_files(self) -> list[str]:
        """The files of its tests, without options and names of tests."""
        return [word.partition("::")[0] for word in shlex.split(self.tests) if ".py" in word]

    def digest(self) -> str:
        """Of the guard itself, its source file and its test files."""
        digest = hashlib.sha256(repr(self).encode())
        for path in (f"{PACKAGE}/{self.file}", *self.test_files):
            digest.update((ROOT / path).read_bytes())
        return digest.hexdigest()[:16]


def _lines_of(name: str, source: str) -> tuple[int, int]:
    """Where the function starts and ends in ``source``."""
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        inside = [n for n in ast.walk(node) if getattr(n, "name", None) == part]
        if len(inside) != 1:
            raise ValueError(f"{name}: expected one definition of {part}, found {len(inside)}")
        node = inside[0]
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]  # type: ignore[attr-defined]


def changed(guards: list[Guard]) -> list[Guard]:
    """Those whose source or tests changed since the last full run, and a tenth of the others."""
    stored = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    asked = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def in_sample(guard: Guard) -> bool:
        return hashlib.sha256((commit + guard.what).encode()).digest()[0] % 10 == 0

    return [g for g in guards if stored.get(g.what) != g.digest() or in_sample(g)]


def main() -> None:
    from tests.guards import GUARDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only guards whose description has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--changed", action="store_true", help="see above; for CI")
    options = parser.parse_args()
    chosen = [guard for guard in GUARDS if options.only in guard.what]
    if options.changed:
        chosen = changed(chosen)
        print(f"{len(chosen)} of {len(GUARDS)} guards: those that changed, and a tenth of the rest")
    width = max((len(guard.what) for guard in chosen), default=0)
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
        print(f"{failed} fails with all guards on as well: it shows nothing about any")
    failed = len(missed) < len(chosen) or bool(spurious)
    if len(chosen) == len(GUARDS) and not failed:
        digests = {guard.what: guard.digest() for guard in GUARDS}
        DIGESTS.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.exit(failed)


def first_failure(guard: Guard) -> str | None:
    """The first test that fails without ``guard``; None if all pass."""
    with copied() as copy:
        path = copy / PACKAGE / guard.file
        source = path.read_text(encoding="utf-8")
        path.write_text(guard.removed_from(source), encoding="utf-8")
        return _run(copy, shlex.split(guard.tests))


def failure_with_all_guards(tests: list[str]) -> str | None:
    """The first of ``tests`` that fails with all guards; None if all pass."""
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
