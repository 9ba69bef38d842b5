"""The variable LIGHTNING_LANDSCAPE: callbacks in scripts that do not name them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.metadata import entry_points

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn

from lightning_landscape import HessianMonitor, Monitor, environment, landscape_callbacks, measure
from lightning_landscape.training.lightning_packages import misconfiguration
from tests.small import Linear, Manual, regression

GROUPS = ("pytorch_lightning.callbacks_factory", "lightning.pytorch.callbacks_factory")
PACKAGES = (pytorch_lightning, lightning.pytorch)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "max_steps": 4}


def trainer(folder, package=pytorch_lightning, **options):
    return package.Trainer(default_root_dir=folder, **{**QUIET, **options})


def names(trainer):
    ours = (Monitor, environment.FromEnvironment)
    return [type(c).__name__ for c in trainer.callbacks if isinstance(c, ours)]


def test_the_entry_points_are_installed():
    for group in GROUPS:
        found = [point for point in entry_points(group=group) if "landscape" in point.name]
        assert [point.value for point in found] == ["lightning_landscape_entry_point:callbacks"]


@pytest.mark.parametrize("value", ["", "0", "off", "False", None])
def test_off(value, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv("LIGHTNING_LANDSCAPE", value)
    assert names(trainer(tmp_path)) == []


PROGRAM = """
import sys
from pytorch_lightning import Trainer
Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
print(sorted(name for name in sys.modules if name.startswith("lightning_landscape")))
"""


def test_nothing_is_imported_while_it_is_unset(tmp_path):
    quiet = {k: v for k, v in os.environ.items() if k != "LIGHTNING_LANDSCAPE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=quiet,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "['lightning_landscape_entry_point']"


@pytest.mark.parametrize(
    "package", [pytorch_lightning, lightning.pytorch], ids=lambda p: p.__name__
)
def test_a_run_is_measured_and_ends_in_the_same_weights(package, tmp_path, monkeypatch):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(5, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ends = []
    for value in ("0", "1"):
        monkeypatch.setenv("LIGHTNING_LANDSCAPE", value)
        module, run = Module(), trainer(tmp_path / value, package)
        run.fit(module, regression())
        ends.append(module.layer.weight.detach().clone())
    assert names(run) == [
        "FromEnvironment",
        "HessianMonitor",
        "SharpnessMonitor",
        "LandscapeMonitor",
    ]
    assert torch.equal(*ends)
    assert list((tmp_path / "1").rglob("history.jsonl"))
    assert not list((tmp_path / "0").rglob("history.jsonl"))


YAML = """
- HessianMonitor
- class_path: lightning_landscape.SharpnessMonitor
  init_args: {rho: 0.1, every_n_train_steps: 2}
- class_path: landscape_callbacks
  init_args: {monitors: [generalization]}
- class_path: pytorch_lightning.callbacks.LearningRateMonitor
- class_path: SharpnessEarlyStopping
  init_args: {monitor: hessian/edge_ratio, threshold: 1000}
"""


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_file(as_mapping, tmp_path, monkeypatch):
    path = tmp_path / "landscape.yaml"
    indented = "".join(f"  {line}\n" for line in YAML.strip().splitlines())
    path.write_text(f"callbacks:\n{indented}" if as_mapping else YAML)
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", str(path))
    run = trainer(tmp_path)
    added = [type(c).__name__ for c in run.callbacks]
    for name in ("HessianMonitor", "SharpnessMonitor", "GeneralizationMonitor",
                 "LearningRateMonitor", "SharpnessEarlyStopping"):  # fmt: skip
        assert added.count(name) == 1
    assert next(c for c in run.callbacks if type(c).__name__ == "SharpnessMonitor").rho == 0.1
    run.fit(Linear(), regression())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; expected 1 for landscape_callbacks"),
        ("- [", "not a YAML file"),
        ("HessianMonitor: 3", "expected a list of callbacks"),
        ("- HessainMonitor", "entry 1: .*did you mean 'HessianMonitor'"),
        (
            "- HessianMonitor\n- {class_path: SharpnessMonitor, args: {}}",
            "entry 2: expected a name",
        ),
        ("- {class_path: HessianMonitor, init_args: {k: 0}}", "entry 1: HessianMonitor.k=0."),
        ("- {class_path: HessianMonitor, init_args: {kk: 1}}", "entry 1: .*unexpected keyword"),
        ("- {class_path: HessianMonitor, init_args: [1]}", "expected a mapping as init_args"),
        ("- {class_path: no_such_module.Callback}", "entry 1: No module named"),
        ("- {class_path: builtins.dict}", "makes a dict, not a callback"),
    ],
)
def test_a_wrong_value(content, message, tmp_path, monkeypatch):
    path = tmp_path / "landscape.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", str(path))
    with pytest.raises(ValueError, match=f"^LIGHTNING_LANDSCAPE='.*yaml'.*{message}"):
        trainer(tmp_path)


def test_a_trainer_with_callbacks_of_its_own_keeps_those_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", "1")
    own = HessianMonitor(max_overhead=None)
    run = trainer(tmp_path, callbacks=[own])
    with pytest.warns(match="LIGHTNING_LANDSCAPE: the Trainer has measuring callbacks of its own"):
        run.fit(Linear(), regression())
    assert names(run) == ["HessianMonitor", "FromEnvironment"]
    assert len(own.history) >= 1


def test_a_module_that_cannot_be_measured_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", "1")
    run = trainer(tmp_path)
    with pytest.warns(match="LIGHTNING_LANDSCAPE: nothing is measured. .*manual optimisation"):
        run.fit(Manual(), regression())
    assert (names(run), run.global_step) == (["FromEnvironment"], 4)


def test_parameters_that_cannot_be_measured(tmp_path, monkeypatch):
    """That is known after ``configure_model``."""

    def refuse(trainer, pl_module):
        raise misconfiguration(trainer, "tensor parallelism")

    monkeypatch.setenv("LIGHTNING_LANDSCAPE", "1")
    monkeypatch.setattr("lightning_landscape.training.monitor.refuse_tensor_parallel", refuse)
    run = trainer(tmp_path)
    with pytest.warns(match="LIGHTNING_LANDSCAPE: nothing is measured. tensor parallelism"):
        run.fit(Linear(), regression())
    assert (names(run), run.global_step) == (["FromEnvironment"], 4)
    assert not list(tmp_path.rglob("history.jsonl"))


def test_measure_has_its_own_callbacks_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure(Linear(), regression(), callbacks=landscape_callbacks(monitors=["hessian"],
            max_overhead=None), logdir=tmp_path)  # fmt: skip
    assert not [w for w in caught if "LIGHTNING_LANDSCAPE" in str(w.message)]
    assert "hessian/top_eigenvalue" in found.values
    assert "sharpness/sam" not in found.values


def test_a_resumed_run_reads_the_states(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LANDSCAPE", "1")
    first = trainer(tmp_path)
    first.fit(Linear(), regression())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(tmp_path, max_steps=8)
    read = []
    monkeypatch.setattr(Monitor, "load_state_dict", lambda self, state: read.append(self.prefix))
    second.fit(Linear(), regression(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert read == ["hessian", "sharpness", "landscape"]
