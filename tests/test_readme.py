"""What the README shows works as it stands there; links and language of README and docs/."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import unicodedata
import urllib.request
from glob import glob
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
)

pytestmark = pytest.mark.pictures  # all is done as it stands there

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
}
FENCED = re.compile(r"^(`{3,}|:{3,})(\S*)[^\n]*\n(.*?)^\1[ ]*$", flags=re.DOTALL | re.MULTILINE)


def code(text: str, language: str) -> list[str]:
    """The blocks of code of a page that are in this language."""
    return [block[3] for block in FENCED.finditer(text) if block[2] == language]


def commands(text: str) -> list[str]:
    """The lines of a page's blocks of commands, without their comments."""
    lines = "".join(code(text, "")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


(EXAMPLE,) = code(README, "python")
(SUMMARY,) = code(README, "text")
COMMANDS = commands(README)

# -- the example, and what is done with its logs ---------------------------------------------------


class Run(NamedTuple):
    folder: Path  # the working directory
    environment: dict[str, str]
    output: str


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The README's example as a script in an empty directory, on one thread of the CPU."""
    folder = tmp_path_factory.mktemp("example")
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment.pop("LIGHTNING_LANDSCAPE", None)
    (folder / "train.py").write_text(EXAMPLE)
    return Run(folder, environment, run(folder, environment, [sys.executable, "train.py"]))


def run(folder: Path, environment: dict[str, str], command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def summary_of(output: str) -> list[str]:
    """The closing lines of a fit."""
    lines = [line.rstrip() for line in output.splitlines()]
    (first,) = [n for n, line in enumerate(lines) if "lightning_landscape: measured" in line]
    rest = lines[first + 1 :]
    return [lines[first], *itertools.takewhile(lambda line: line.startswith("  "), rest)]


def test_the_example_prints_what_is_shown(example):
    """But for times and counts, which depend on the machine."""
    shown, printed = SUMMARY.splitlines(), summary_of(example.output)
    assert len(shown) == len(printed) == 5
    assert shown[0].startswith("lightning_landscape: measured hessian ")
    assert "max_overhead=0.05, grace_seconds=30" in shown[0]
    value = re.compile(r"  (\S+) +(\S+) at step (\d+), (\S+) at step (\d+), highest \S+ at")
    for ours, theirs in zip(shown[1:4], printed[1:4], strict=True):
        key, first, start, last, end = value.match(ours).groups()
        their_key, their_first, their_start, their_last, their_end = value.match(theirs).groups()
        assert (key, start, end) == (their_key, their_start, their_end)
        assert float(their_first) == pytest.approx(float(first), rel=0.02)
        assert float(their_last) == pytest.approx(float(last), rel=0.2)
    assert shown[4].startswith("  hessian/edge_ratio ")
    assert printed[4].startswith("  hessian/edge_ratio ")


def test_the_log_directory_has_what_the_readme_lists(example):
    folder = example.folder / "lightning_logs" / "version_0"
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "history.jsonl").is_file()
    assert list(folder.glob("landscape/landscape-plane-step*.npz"))
    assert list(folder.glob("landscape/training-examples-512-*.pt"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m")])
def test_commands_after_the_run(example, command, monkeypatch):
    logs = example.folder / "lightning_logs" / "version_0"
    for name in ("adam", "sgd"):
        shutil.copytree(logs, example.folder / "logs" / name / "version_0", dirs_exist_ok=True)
    monkeypatch.chdir(example.folder)
    _, _, module, *words = shlex.split(command)
    arguments = [path for word in words for path in (sorted(glob(word)) or [word])]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    before = set(example.folder.rglob("*.html"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"{module}.__main__", run_name="__main__")
    assert not ended.value.code
    assert len(set(example.folder.rglob("*.html")) - before) == 1


@pytest.mark.slow
def test_the_environment_variable(example, tmp_path):
    """The same script without callbacks has them where the variable is set."""
    assert "LIGHTNING_LANDSCAPE=1 python train.py" in COMMANDS
    group = importlib.metadata.entry_points(group="pytorch_lightning.callbacks_factory")
    if not any(entry.value.startswith("lightning_landscape") for entry in group):
        pytest.skip("the installed package has no entry point: pip install it again")
    script = EXAMPLE.replace("callbacks=landscape_callbacks()", "log_every_n_steps=8")
    script = script.replace("from lightning_landscape import landscape_callbacks\n", "")
    script = script.replace("max_epochs=60", "max_epochs=2")
    assert "landscape" not in script
    (tmp_path / "train.py").write_text(script)
    switched_on = {**example.environment, "LIGHTNING_LANDSCAPE": "1"}
    output = run(tmp_path, switched_on, [sys.executable, "train.py"])
    assert "lightning_landscape: measured hessian" in output


def test_tensorboard_opens_the_logs(example):
    command = "tensorboard --logdir lightning_logs --samples_per_plugin images=100"
    assert command in COMMANDS
    words = [sys.executable, "-m", "tensorboard.main", *command.split()[1:], "--port", "0"]
    server = subprocess.Popen(words, cwd=example.folder, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (found := re.search(r"http://localhost:\d+", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(found[0].replace("localhost", "127.0.0.1")) as page:
            assert b"TensorBoard" in page.read()
    finally:
        server.terminate()
        server.wait()


# -- commands --------------------------------------------------------------------------------------


def test_every_command_of_the_readme_is_tested():
    """Those not here are run above; CI installs the package and runs the targets of make."""
    tested = ("python -m", "tensorboard ", "LIGHTNING_LANDSCAPE=1 ", "make ")
    assert [c for c in COMMANDS if not c.startswith(tested)] == ["pip install ."]


MAKE = [
    c for page in ("README.md", "docs/costs.md") for c in commands(PAGES[page]) if c[:5] == "make "
]


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist_and_are_run_in_ci(command):
    target = command.split()[1]
    in_ci = re.findall(r"[\w-]+", (ROOT / ".ci" / "run").read_text())
    if target.startswith("bench"):  # of benchmarks only that they run
        assert "bench-smoke" in in_ci
        script = re.findall(r"benchmarks[\w./]*", recipe(target))[-1]
        assert script in recipe("bench-smoke").split()
    else:
        assert recipe(target)
        assert target in in_ci or f"{target}-changed" in in_ci


def recipe(target):
    found = re.search(
        rf"^{target}:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert found, target
    return found[0]


def test_every_benchmark_is_on_the_page_of_costs():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(bench[\w-]*):", makefile, re.MULTILINE)) - {"bench-smoke"}
    assert {c.split()[1] for c in commands(PAGES["docs/costs.md"]) if c[:5] == "make "} == targets


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_tests_that_a_page_names_exist(page):
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        assert module == "pytest" or importlib.util.find_spec(module), module
    for path in re.findall(r"pytest (tests/[\w/.]+)", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_options_of_the_benchmarks_exist():
    for command in commands(PAGES["docs/costs.md"]):
        if command.startswith("python -m benchmarks"):
            file = ROOT / f"{command.split()[2].replace('.', '/')}.py"
            file = file if file.is_file() else file.with_suffix("") / "__main__.py"
            for option in re.findall(r"--\w+", command):
                assert f'"{option}"' in file.read_text(), option


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")))
def test_every_example_is_in_the_docs_and_in_ci(path):
    if path.name != "tools.py":
        docs = PAGES["docs/examples.md"] + PAGES["docs/gallery.md"]
        for text in (docs, (ROOT / "Makefile").read_text() + (ROOT / ".ci" / "run").read_text()):
            assert path.stem in text


# -- links -----------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and the documentation make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    kept = (c for c in plain.strip().lower() if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def without_code(text: str) -> str:
    """A page without blocks of code; what is in figures and other directives stays."""
    return FENCED.sub(lambda block: "" if block[1][0] == "`" else block[3], text)


def anchors(path: str) -> set[str]:
    text = without_code(PAGES[path])
    targets = re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE)
    headings = re.findall(r"^#{1,6} (.*)$", text, flags=re.MULTILINE)
    return {*targets, *map(slug, headings)}


def links(text: str) -> list[str]:
    text = without_code(text)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    return found + re.findall(r"^:::+\{figure\} (\S+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Files and headings that a page links to exist; addresses in the network are not asked."""
    folder = (ROOT / page).parent
    for link in links(PAGES[page]):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else ROOT / page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link
    for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", PAGES[page]):
        assert (folder / f"{name}.md").is_file(), name


def test_every_page_is_in_the_contents():
    listed = {
        line.split("<")[-1].rstrip("> ")
        for block in code(PAGES["docs/index.md"], "{toctree}")
        for line in block.splitlines()
        if line.strip() and not line.startswith(":")
    }
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    pages |= {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.ipynb")}
    assert listed == pages - {"index"}


# -- pictures and badges ---------------------------------------------------------------------------


def test_badges_name_the_versions_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()

    def oldest(name: str) -> str:
        return re.search(rf'"?{name}(?: = ")?>=([\d.]+)"', project)[1] + "+"

    expected = {
        "license": re.search(r'^license = "(\w+)"', project, re.MULTILINE)[1],
        "python": oldest("requires-python"),
        "torch": oldest("torch"),
        "lightning": oldest("pytorch-lightning"),
    }
    for name, version in expected.items():
        badge = ElementTree.parse(DOCS / "badges" / f"{name}.svg").getroot()
        assert badge.get("aria-label") == f"{name}: {version}"
        assert badge.findall(".//{*}text")[-1].text == version
        assert f"{version}](docs/badges/{name}.svg)" in README


def test_the_screenshot_is_small():
    assert (DOCS / "tensorboard.png").stat().st_size < 150_000


# -- language --------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a page: of paragraphs, items of lists and cells of tables."""
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", without_code(text), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|\[(?=[^]]*\])", " ", text)
    text = re.sub(r"^[ ]*:\w+:.*$|^[-|: ]+$", "", text, flags=re.MULTILINE)  # options, rules
    text = re.sub(r"^[ ]*(?:[-*:] |\d+\. |#+ )", "\n\n", text, flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n|[ ]*\|\s*", text)
    found = [
        " ".join(sentence.split())
        for part in parts
        for sentence in re.split(r"(?<=[.?!:])(?:\*\*)?\s+(?=[\W_]*[A-Z`0-9])", part)
    ]
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/keys.md", "docs/promises.md", "docs/costs.md", "docs/gallery.md"]
)
def test_sentences_are_short(page):
    lengths = {sentence: len(words(sentence)) for sentence in sentences(PAGES[page])}
    long = {sentence: length for sentence, length in lengths.items() if length > 30}
    assert not long
    full = [length for sentence, length in lengths.items() if sentence[-1] in ".?!" and length > 2]
    assert sum(full) / len(full) <= 16


def test_the_readme_has_at_most_a_thousand_words():
    """Code, tables and addresses of links included."""
    assert len(README.split()) <= 1000


# -- the table of keys -----------------------------------------------------------------------------


def test_every_key_that_is_logged_is_in_the_table():
    table = PAGES["docs/keys.md"]
    callbacks = [
        HessianMonitor(
            min_eigenvalue=True, trace_samples=2, batch_edge_ratio=True, update_curvature=True
        ),
        SharpnessMonitor(worst_case=True, average=True, keskar=True, critical=True),
        LandscapeMonitor(),
        InterpolationMonitor(),
        GeneralizationMonitor(),
    ]
    for callback in callbacks:
        for key in callback.keys:
            assert f"`{key}`" in table


def test_every_tag_in_the_readme_is_in_the_table():
    for tag in re.findall(
        r"`((?:hessian|sharpness|landscape|interpolation|generalization)/\w+)`", README
    ):
        assert f"`{tag}`" in PAGES["docs/keys.md"]


def test_the_example_is_the_shortest():
    """One call of this package, and nothing that it does not need."""
    names = [node.id for node in ast.walk(ast.parse(EXAMPLE)) if isinstance(node, ast.Name)]
    assert names.count("landscape_callbacks") == 1


def test_the_example_without_lightning(capsys):
    (block,) = [block for block in code(PAGES["docs/keys.md"], "python") if "Objective(" in block]
    exec(block, {})
    assert "3.0000" in capsys.readouterr().out
