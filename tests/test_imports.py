"""What importing the package loads and changes, in one subprocess for all checks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import lightning_landscape
from lightning_landscape import geometry

# First the figures, without torch: the packages around them are empty modules.  Then the whole
# package, after Lightning.
PROGRAM = """
import json, sys, types

def names():
    return set(sys.modules)

for name, path in (("lightning_landscape", ""), ("lightning_landscape.geometry", "/geometry")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + path]
from lightning_landscape.figures import eigenvalue_figure, figure_to_image
figure_to_image(eigenvalue_figure([{"step": 1, "hessian/top_eigenvalue": 1.0}]))
found = {"figures": names()}
for name in names():
    if name.partition(".")[0] == "lightning_landscape":
        del sys.modules[name]

import lightning.pytorch
from lightning_utilities.core import rank_zero
messages = rank_zero.log, rank_zero.rank_zero_deprecation_category
before = names()
import lightning_landscape
found["package"] = names() - before
found["callable"] = ["compare"] if callable(lightning_landscape.compare) else []
import lightning_landscape.compare.table
found["compare"] = names() - before
kept = messages == (rank_zero.log, rank_zero.rank_zero_deprecation_category)
found["messages"] = [rank_zero.log.name] if kept else []
print(json.dumps({what: sorted(modules) for what, modules in found.items()}))
"""
CLIENTS = {"tensorboard", "wandb", "mlflow", "comet_ml", "neptune", "trackio", "litlogger"}
HEAVY = {"scipy", "sklearn", "pandas"}  # torchmetrics loads matplotlib itself


def top_level(modules):
    return {name.partition(".")[0] for name in modules}


def test_imported_modules():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *lightning_landscape.__path__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    # Figures need neither torch nor pyplot, which opens windows.
    assert "lightning_landscape.figures.eigenvalue" in found["figures"]
    assert not top_level(found["figures"]) & {"torch", "lightning", "pytorch_lightning"}
    assert "matplotlib.pyplot" not in found["figures"]

    # Beyond Lightning the package loads nothing heavy, and neither figures nor the report.
    assert "lightning_landscape.callbacks.landscape" in found["package"]
    assert not top_level(found["package"]) & (HEAVY | CLIENTS)
    late = ("lightning_landscape.figures", "lightning_landscape.report.")
    assert not [name for name in found["package"] if name.startswith(late)]

    # The function compare is the package compare, whose table needs no figures.
    assert found["callable"] == ["compare"]
    assert not [name for name in found["compare"] if name.startswith(late)]

    # Both packages of Lightning are loaded; messages are logged by the one imported first.
    assert "pytorch_lightning" in found["package"]
    assert found["messages"] == ["lightning.pytorch.utilities.rank_zero"]


def test_moved_names_warn():
    """The old names work, with a warning that contains the new place."""
    moved = {*geometry.__all__, "Comparison"} - {*lightning_landscape.__all__}
    assert len(moved) > 30
    for name in moved:
        place = "compare" if name == "Comparison" else "geometry"
        with pytest.warns(DeprecationWarning, match=f"import {name} from .*\\.{place}$"):
            found = getattr(lightning_landscape, name)
        module = importlib.import_module(f"lightning_landscape.{place}")
        assert found is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'top_eigenvalue'"):
        lightning_landscape.top_eigenvalue  # noqa: B018
