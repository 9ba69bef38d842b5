"""Imports inside the package go in one direction; read from the source, without importing."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import lightning_landscape

PACKAGE = "lightning_landscape"
ROOT = Path(lightning_landscape.__file__).parent


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(source, name, is_package=False, runtime_only=False):
    """Every module that ``source`` imports anywhere, also inside functions."""
    found = set()

    def visit(node):
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, base]).rstrip(".")
            # `from package import module` imports a module, and `base` only leads to it.
            named = {f"{base}.{alias.name}" for alias in node.names}
            found.update(named if named <= MODULES.keys() else {base, *named})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def of_file(path, **options):
    return imports(
        path.read_text(encoding="utf-8"),
        module_name(path),
        is_package=path.name == "__init__.py",
        **options,
    )


def under(names, *packages):
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in packages)}


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("geometry"), ids=lambda path: path.name)
def test_geometry_imports_only_torch_and_numpy(path):
    named = of_file(path)
    forbidden = ("lightning", "pytorch_lightning", "torchmetrics", "matplotlib")
    assert under(named, *forbidden) == set()
    ours = under(named, PACKAGE)
    assert ours - under(ours, f"{PACKAGE}.geometry") == set()
    others = {n.split(".")[0] for n in named - ours}
    assert others <= {"torch", "numpy", *sys.stdlib_module_names}


# What each layer may import from the package beside itself; training only where history is read.
FILES = ("training.output.recorder", "training.output.history")
LAYERS = {
    "figures": ("geometry",),
    "training": ("figures", "geometry"),
    "callbacks": ("training", "figures", "geometry"),
    "measure": ("report", "callbacks", "training", "geometry"),
    "report": ("figures", "geometry", *FILES),
    "compare": ("report", "figures", "geometry", *FILES),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_lower_layers(layer):
    allowed = [f"{PACKAGE}.{name}" for name in (layer, *LAYERS[layer])]
    for path in files(layer):
        ours = under(of_file(path), PACKAGE)
        assert ours - under(ours, *allowed) == set(), path


def test_imports_are_acyclic():
    """Those under TYPE_CHECKING and inside functions count."""
    graph = {name: of_file(path) & MODULES.keys() for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


SAMPLE = """
import os, torch.nn as nn
from typing import TYPE_CHECKING
from . import vectors
from ..training.data.probe import Probe
if TYPE_CHECKING:
    from lightning_landscape.callbacks.hessian import HessianMonitor
else:
    import json
def later():
    from matplotlib import pyplot
"""


def test_reader_of_imports():
    named = imports(SAMPLE, "lightning_landscape.geometry.eigen")
    assert {"os", "torch.nn", "json", "matplotlib", "matplotlib.pyplot"} <= named
    assert {f"{PACKAGE}.geometry.vectors", f"{PACKAGE}.training.data.probe"} <= named
    assert under(named, f"{PACKAGE}.callbacks")
    assert "json" in imports(SAMPLE, f"{PACKAGE}.geometry.eigen", runtime_only=True)
    runtime = imports(SAMPLE, f"{PACKAGE}.geometry.eigen", runtime_only=True)
    assert not under(runtime, f"{PACKAGE}.callbacks")
    inside = imports("from .data.probe import Probe", f"{PACKAGE}.training", is_package=True)
    assert f"{PACKAGE}.training.data.probe" in inside
