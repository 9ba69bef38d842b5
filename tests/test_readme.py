"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
    Slice,
    landscape_callbacks,
)
from tests.small import Linear, regression

pytestmark = pytest.mark.pictures  # all is done as it stands there

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCED if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, text in FENCED
    if not language
    for line in text.splitlines()
]


def test_the_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": Linear(), "train_loader": regression()}
    exec(BLOCKS[0], names)
    assert names["trainer"].global_step == 60
    assert (tmp_path / "lightning_logs" / "version_0" / "history.jsonl").exists()


def test_the_one_word(tmp_path):
    pl.Trainer(
        callbacks=landscape_callbacks(), max_epochs=1, default_root_dir=tmp_path, logger=False
    ).fit(Linear(), regression())


def test_without_lightning(capsys):
    (block,) = [block for block in BLOCKS if "Objective(" in block]
    exec(block, {})
    assert "3.0000" in capsys.readouterr().out


def test_a_figure_for_a_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.linspace(-1, 1, 5)
    Slice((x, x), 1 + x[:, None] ** 2 + x**2, 1.0).save("landscape-plane-step00000800.npz")
    Slice((x,), 1 + x**2, 1.0).save("landscape-line-1-step00000800.npz")
    (block,) = [block for block in BLOCKS if "paper_axes" in block]
    exec(block, {})
    assert (tmp_path / "landscape.pdf").read_bytes().startswith(b"%PDF")


def test_tensorboard_opens_the_logs(tmp_path):
    assert "tensorboard --logdir runs/digits --samples_per_plugin images=100" in COMMANDS
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path)]
    command += ["--samples_per_plugin", "images=100", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")))
def test_every_example_is_in_the_readme_and_in_ci(path):
    if path.name != "tools.py":
        for text in (README, (ROOT / "Makefile").read_text() + (ROOT / ".ci" / "run").read_text()):
            assert path.stem in text


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
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


def test_every_key_that_is_logged_is_in_the_table():
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
            assert f"`{key}`" in README
