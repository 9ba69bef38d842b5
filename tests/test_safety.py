"""Untrusted files: no code in them is run, neither by the callbacks nor by readers of the logs.

Each file contains an object whose unpickling creates a folder, so that a test detects it.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_landscape
from lightning_landscape import (
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Slice,
    compare,
    read_history,
)
from lightning_landscape.geometry import SpectralDensity
from lightning_landscape.measure import measure
from lightning_landscape.measure.__main__ import _assignment
from lightning_landscape.report import write_report
from tests.runs import train
from tests.small import Linear, regression
from tests.test_report import Page, hessian, slice_at, write


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """A bomb that works when unpickled, and is not triggered by the test."""
    marker = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Bomb(marker)))
    marker.rmdir()
    yield Bomb(marker)
    assert not marker.exists()


def weights(path, bomb, kind):
    """Write a file of weights in one of the formats that torch reads."""
    content = {**Linear().state_dict(), "more": bomb}
    whole = {"state_dict": content, "loops": {}, "epoch": 0, "global_step": 0}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(whole))
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=kind == "zip")
    return path


FORMS = ["zip", "legacy", "pickle"]
ALWAYS = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 20}


@pytest.mark.parametrize("kind", FORMS)
def test_weights_passed_by_the_user(kind, bomb, tmp_path):
    path = weights(tmp_path / "given.ckpt", bomb, kind)
    other = Linear().state_dict()
    for make in (
        lambda: InterpolationMonitor(reference=path),
        lambda: InterpolationMonitor(reference=other, third=path),
        lambda: LandscapeMonitor(directions="between", between=(other, path)),
        lambda: LandscapeMonitor(directions="between", between=(path, other)),
    ):
        with pytest.raises(ValueError, match=r"given.ckpt' cannot be read safely \("):
            train(Linear, regression, [make()], tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"given.ckpt'\): it cannot be read safely \("):
        measure(Linear, regression(), checkpoint=path, logdir=tmp_path / "logs", progress=False)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose checkpoint names a probe and a reference."""
    root = tmp_path_factory.mktemp("begun")
    callbacks = [HessianMonitor(**ALWAYS), InterpolationMonitor(resolution=3, **ALWAYS)]
    saver = ModelCheckpoint(root, filename="saved", monitor=None)
    train(Linear, regression, [*callbacks, saver], root, max_epochs=1, enable_checkpointing=True)
    return root


@pytest.mark.parametrize("kind", FORMS)
def test_files_beside_the_logs_of_a_resumed_run(kind, bomb, begun, tmp_path):
    files = {"probe": "training-examples-20-rank0.pt", "reference": "interpolation-reference.pt"}
    kept = {name: (begun / "landscape" / file).read_bytes() for name, file in files.items()}
    for file in files.values():
        weights(begun / "landscape" / file, bomb, kind)
    callbacks = [HessianMonitor(**ALWAYS), InterpolationMonitor(resolution=3, **ALWAYS)]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                Linear, regression, callbacks, tmp_path, ckpt_path=begun / "saved.ckpt",
                max_epochs=2,
            )  # fmt: skip
    finally:
        for name, content in kept.items():
            (begun / "landscape" / files[name]).write_bytes(content)
    messages = [str(w.message) for w in caught]
    for name in files:
        message = f"the {name} of the run before could not be used: its file cannot be read ("
        assert sum(message in found for found in messages) >= 1, messages
    assert all(len(m.history) == 3 for m in callbacks)


def bombs_of_arrays(folder, bomb):
    """Write archives of each kind, one per field, in which that field is an array of objects."""
    objects = np.array([bomb, bomb], dtype=object)
    facts = {"x": np.zeros(2), "losses": np.zeros(2), "center_loss": 0.0, "metadata": "{}"}
    density = {"eigenvalues": np.zeros((1, 2)), "weights": np.ones((1, 2)) / 2, "metadata": "{}"}
    made = []
    for stem, fields in (("landscape-line", facts), ("hessian-density", density)):
        for number, field in enumerate(fields):
            path = folder / f"{stem}-step{number:08d}.npz"
            np.savez(path, **{**fields, field: objects})
            made.append(path)
    raw = folder / "landscape-plane-step00000001.npz"
    raw.write_bytes(pickle.dumps(bomb))
    return [*made, raw]


def test_npz_archives(bomb, tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, [hessian(1)], landscape_line_1_step00000001=slice_at(1))
    folder = tmp_path / "one" / "landscape"
    paths = bombs_of_arrays(folder, bomb)
    for path in paths:
        for load in (Slice.load, SpectralDensity.load):
            with pytest.raises(ValueError, match="not a saved"):
                load(path)
    page = Page(write_report(tmp_path / "one"))
    for path in paths:
        assert f"{path.name} cannot be read" in page.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")


def test_lines_of_history_jsonl(bomb, tmp_path):
    """Only JSON is parsed: other formats are damaged lines, and code in strings is text."""
    code = f"__import__('os').mkdir({bomb.marker!r})"
    foreign = [
        pickle.dumps(bomb, protocol=0).replace(b"\n", b" "),
        pickle.dumps(bomb).replace(b"\n", b" "),
        f"!!python/object/apply:os.mkdir [{bomb.marker!r}]".encode(),
        code.encode(),
        json.dumps({"step": code}).encode(),
    ]
    row = {"step": 1, "monitor": code, f"{code}/x": 1.0, "fact": code, "py/reduce": [code]}
    (tmp_path / "history.jsonl").write_bytes(b"\n".join([*foreign, json.dumps(row).encode()]))
    assert read_history(tmp_path / "history.jsonl") == [row]
    page = Page(write_report(tmp_path))
    assert code in page.text
    assert f"{len(foreign)} damaged lines" in page.text
    compare([tmp_path], tmp_path / "page.html")


def test_values_on_the_command_line(bomb):
    """Values that are not literals stay strings."""
    code = f"__import__('os').mkdir({bomb.marker!r})"
    assert _assignment("--init", f"width={code}") == ("width", code)
    assert _assignment("--init", "width=[3, None]") == ("width", [3, None])


# -- pages ----------------------------------------------------------------------------------------

QUOTES = ('" onload="alert(1)', "' onload='alert(1)", "--><img src=x onerror=alert(1)>")


@pytest.mark.parametrize("text", QUOTES)
def test_strings_do_not_escape_their_attributes(text, tmp_path):
    """Tags and attributes are the same as on a page with a harmless string."""

    def outline(word, name):
        safe = word.replace("/", "")
        row = {"step": 1, "monitor": word, f"{word}/x": 1.0, f"{word}/edge_ratio": 0.9, word: word}
        folder = tmp_path / name / safe
        write(folder, [row, {**row, "step": 2}])
        known = {"directions": [word], "normalization": word}
        for step in (1, 2):
            path = folder / "landscape" / f"{safe}-step{step:08d}.npz"
            slice_at(step, **known).save(path)
        found = compare(
            {word: folder, "b": folder}, folder / "both.html", groups={word: word, "b": "b"}
        )
        pages = [Page(write_report(folder)), Page(found.path)]
        return [Counter((tag, *attrs) for tag, attrs in page.tags) for page in pages]

    assert outline(text, "nasty") == outline("word", "plain")


# -- the source -----------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PICKLES |= {"jsonpickle"}
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
RUNS |= {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
RUNS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}
SAFE = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}


def unsafe(source):
    """Lines that would unpickle a file or run code from one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
            forbidden = PICKLES | ({"yaml"} if isinstance(node, ast.ImportFrom) else set())
            if forbidden & {name.partition(".")[0] for name in names}:
                found.append(node.lineno)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {ast.unparse(keyword) for keyword in node.keywords}
            if name in RUNS or SAFE.get(name, "nothing") not in given | {"nothing"}:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "eval(x)", "import pickle",
     "np.load(p, allow_pickle=True)", "from yaml import load", "yaml.load(x)", "os.system(x)",
     "torch.jit.load(p)"],
)  # fmt: skip
def test_unsafe_lines_are_detected(line):
    assert unsafe(f"x = 1\n{line}") == [2]
    assert (
        unsafe("torch.load(p, weights_only=True); re.compile(x); m.eval(); ast.literal_eval(x)")
        == []
    )


def test_package_has_no_unsafe_lines():
    root = Path(lightning_landscape.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    assert sum(source.count(".load(") for source in sources.values()) >= 7
    assert {str(path): lines for path, s in sources.items() if (lines := unsafe(s))} == {}
