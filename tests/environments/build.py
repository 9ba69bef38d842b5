"""Build the wheel, install it into new virtual environments, and run :mod:`checks` in each.

``python -m tests.environments.build``: nothing of the checkout can be seen from there.  The last
environment has the oldest release of everything that ``pyproject.toml`` allows, but for torch,
of which there is one CPU build on PyPI's index at most: what ``constraints.txt`` pins.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
CHECKS = Path(__file__).with_name("checks.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(*command: object, cwd: Path | str = ROOT) -> str:
    """The output of ``command``, run outside of the checkout so that it imports nothing from it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ONE_THREAD
    done = subprocess.run(
        [str(argument) for argument in command], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def oldest(folder: Path) -> Path:
    """Constraints: the oldest version of each dependency in ``pyproject.toml``, and our torch."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, flags=re.DOTALL | re.MULTILINE)
    assert listed is not None
    least = re.findall(r'"([\w-]+)>=([\d.]+)', listed[1])
    lines = [f"{name}=={version}.*" for name, version in least if name != "torch"]
    lines += [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")]
    path = folder / "oldest.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def check(folder: Path, wheel: Path, constraints: Path, package: str, *extra: str) -> None:
    """Run the checks in a new environment with ``wheel``, its dependencies and ``extra``."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints)
    run(*pip, wheel, "jsonargparse[signatures]", *extra, cwd=folder)
    shutil.copy(CHECKS, folder)
    absent = () if "lightning" in extra else ("lightning",)
    output = run(python, "-W", "ignore", "checks.py", package, *absent, cwd=folder)
    print("\n".join(line for line in output.splitlines() if line.startswith(f"{package} ")))


def main() -> None:
    """Three environments, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)
        (wheel,) = (work / "dist").glob("*.whl")
        print(f"built {wheel.name} and {', '.join(p.name for p in wheel.parent.glob('*.gz'))}")
        for package, constraints, *extra in (
            ("pytorch_lightning", CONSTRAINTS),
            ("lightning.pytorch", CONSTRAINTS, "lightning"),
            ("pytorch_lightning", oldest(work), "setuptools<81"),
        ):
            check(work / "environment", wheel, constraints, package, *extra)
            shutil.rmtree(work / "environment")


if __name__ == "__main__":
    main()
