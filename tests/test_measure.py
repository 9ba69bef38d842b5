"""Measuring a checkpoint gives the values that a callback would have given at that step."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    LandscapeMonitor,
    SharpnessMonitor,
    Slice,
    read_history,
)
from lightning_landscape.geometry import progress
from lightning_landscape.measure import measure
from lightning_landscape.measure.__main__ import main
from lightning_landscape.measure.checkpoint import step_of
from tests.callbacks.test_generalization import held_out
from tests.runs import differences, train
from tests.small import Linear, regression
from tests.terminal import read_until, terminal

ROOT = Path(__file__).parents[1]
CPU = {"accelerator": "cpu"}


class Net(Linear):
    """Dropout and BatchNorm; a scheduler that changes the edge at every step."""

    def __init__(self, width: int = 7, optimizer: str = "sgd"):
        super().__init__(lr=0.02)
        self.save_hyperparameters()
        self.layer = nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.layer(batch[0]), batch[1]))

    def val_dataloader(self):
        return held_out()

    def train_dataloader(self):
        return regression()

    def configure_optimizers(self):
        if self.hparams.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.lr, total_steps=self.trainer.estimated_stepping_batches
            )
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Cold(HessianMonitor):
    """Cold-starts its solver at each measurement, as a single measurement does."""

    def measure(self, this_round):
        self.reset_warm_start()
        return super().measure(this_round)


def callbacks(every=1, probe=None, validation=None):
    common = {"every_n_train_steps": every, "max_overhead": None, "probe": probe}
    return [
        Cold(min_eigenvalue=True, trace_samples=3, **common),
        SharpnessMonitor(average=True, samples=2, worst_case=True, worst_case_steps=2, **common),
        LandscapeMonitor(
            directions=("gradient", "random"), resolution=3, line_resolution=3,
            validation_probe=validation, **common,
        ),
        GeneralizationMonitor(validation_probe=validation, **common),
    ]  # fmt: skip


def given():
    return callbacks(probe=regression(), validation=held_out())


class Saves(pl.Callback):
    """Saves checkpoints in every hook that may write one, with the step that each belongs to."""

    def __init__(self, folder):
        self.folder, self.steps = Path(folder), {}
        self.done = 0  # batches that stepped
        self.before = 0

    def save(self, trainer, hook):
        path = self.folder / f"{hook}-{trainer.fit_loop.total_batch_idx}.ckpt"
        trainer.save_checkpoint(path)
        self.steps[path] = self.done

    def on_train_epoch_start(self, trainer, pl_module):
        self.save(trainer, "epoch-start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = trainer.global_step
        self.save(trainer, "batch-start")

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.done += trainer.global_step > self.before
        self.save(trainer, "batch-end")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, "validation-end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch-end")

    def on_fit_end(self, trainer, pl_module):
        self.save(trainer, "fit-end")


class ByHand(Net):
    """Two optimizers, both stepped at each batch: global_step counts double."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        halves = (self.layer[0].parameters(), self.layer[4].parameters())
        return [torch.optim.SGD(half, lr=0.01) for half in halves]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 2}),
        (Net, {"val_check_interval": 1}),
        (Net, {"max_steps": 4, "max_epochs": -1}),
        (ByHand, {}),
    ],
)
def test_step_of_a_checkpoint(tmp_path, make, settings):
    saves = Saves(tmp_path)
    train(make, regression, [saves], tmp_path, **{"enable_checkpointing": False, **settings})
    assert len({path.name.rpartition("-")[0] for path in saves.steps}) >= 5
    for path, step in saves.steps.items():
        checkpoint = torch.load(path, weights_only=True)
        assert step_of(checkpoint, make()) == step, path.name


def of_weights(monitor):
    """The history without values that need a training step."""
    return [
        {k: v for k, v in row.items() if k != "hessian/clipped_share"} for row in monitor.history
    ]


@pytest.fixture(scope="module", params=["sgd", "adam"])
def runs(request, tmp_path_factory):
    """A run with the callbacks measuring at each step; one without them, with checkpoints."""
    make = lambda: Net(optimizer=request.param)  # noqa: E731
    live = given()
    root = tmp_path_factory.mktemp("live")
    train(make, regression, live, root, max_epochs=3)
    assert [m.failed for m in live] == [0] * 4
    folder = tmp_path_factory.mktemp("plain")
    within = ModelCheckpoint(folder, "within-{step}", every_n_train_steps=4, save_top_k=-1)
    ends = ModelCheckpoint(folder, "end-{step}", save_top_k=-1)
    plain = train(make, regression, [within, ends], folder, max_epochs=3, enable_checkpointing=True)
    plain.trainer.save_checkpoint(folder / "over.ckpt")
    return live, root, folder


CHECKPOINTS = {"within-step=4": 4, "end-step=6": 6, "within-step=8": 8, "end-step=9": 9, "over": 9}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_values_as_in_the_run(runs, tmp_path, name):
    """Bit for bit: every value, the edge, the pictures' losses."""
    live, root, folder = runs
    path = folder / f"{name}.ckpt"
    saved = torch.load(path, weights_only=True)
    module = Net(optimizer=saved["hyper_parameters"]["optimizer"])
    found = measure(module, regression, checkpoint=path, callbacks=given(), logdir=tmp_path, **CPU)
    step = CHECKPOINTS[name]
    assert found.step == step
    expected = {m.prefix: row for m in live for row in of_weights(m) if row["step"] == step}
    assert len(found.rows) == 4
    for row in found.rows:
        if name == "over":  # the epoch has ended too
            row["epoch"] -= 1
        assert row == expected[row["monitor"]]
    assert found.values["hessian/edge"] == expected["hessian"]["hessian/edge"]
    files = sorted(p.name for p in (found.log_dir / "landscape").glob("landscape*.npz"))
    assert len(files) == 3
    for file in files:
        a, b = (Slice.load(f / "landscape" / file) for f in (root, found.log_dir))
        assert np.array_equal(a.losses, b.losses)
        assert a.metadata["validation"] == b.metadata["validation"]
    # The module is that of the checkpoint, to the bit.
    assert differences(dict(saved["state_dict"]), dict(module.state_dict())) == []
    assert module.training


def test_probe_is_the_first_examples(tmp_path):
    """As captured by a run whose loader does not shuffle, validation examples too."""
    live = callbacks()
    saver = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8, save_top_k=-1)
    train(Net, regression, live, tmp_path / "live", max_epochs=3)
    train(Net, regression, [saver], tmp_path, max_epochs=3, enable_checkpointing=True)
    found = measure(
        Net, regression, checkpoint=tmp_path / "saved.ckpt", callbacks=callbacks(),
        logdir=tmp_path, **CPU,
    )  # fmt: skip
    for row in found.rows:
        same = next(m for m in live if m.prefix == row["monitor"])
        assert row in of_weights(same)
    taken = [(m.probe_samples, m.loss.probe.size) for m in live]
    assert taken == [(512, 60)] * 4


def test_checkpoint_with_a_saved_probe(tmp_path):
    """From a run with callbacks: the series continues, whatever data is passed."""
    live = callbacks()
    saver = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8, save_top_k=-1)
    train(Net, regression, [*live, saver], tmp_path, max_epochs=3, enable_checkpointing=True)
    again = callbacks()
    found = measure(
        Net, held_out, checkpoint=tmp_path / "saved.ckpt", callbacks=again, logdir=tmp_path / "x",
        **CPU,
    )  # fmt: skip
    for row in found.rows:
        assert row in of_weights(next(m for m in live if m.prefix == row["monitor"]))
    assert [m.measured for m in again] == [1] * 4
    assert again[2]._limits.keys() == live[2]._limits.keys()


@pytest.mark.pictures
def test_module_without_a_checkpoint(tmp_path):
    torch.manual_seed(3)
    module = Net(width=4)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    found = measure(module, regression(), callbacks=given(), logdir=tmp_path, report=True, **CPU)
    assert found.step == 0
    assert {row["step"] for row in found.rows} == {0}
    assert differences(before, dict(module.state_dict())) == []
    x, y = (t[:50] for t in regression().dataset.tensors)  # as many as from the others
    with torch.no_grad():
        loss = module.eval().loss(module.layer(x), y)
    assert found.values["generalization/train_loss"] == pytest.approx(float(loss), rel=1e-6)
    # State that a live run leaves in the module.
    assert found.report == found.log_dir / "report.html"
    assert len(read_history(found.log_dir / "history.jsonl")) == 4
    assert "hessian/top_eigenvalue" in (found.log_dir / "metrics.csv").read_text()
    events = b"".join(p.read_bytes() for p in found.log_dir.glob("events.out.tfevents.*"))
    for key in (b"sharpness/sam", b"landscape/plane", b"generalization/gap"):
        assert key in events
    second = measure(module, regression(), callbacks=given(), logdir=tmp_path, **CPU)
    assert second.log_dir != found.log_dir


def test_default_callbacks(tmp_path, caplog):
    with caplog.at_level("INFO"):
        found = measure(Net, regression, logdir=tmp_path, init={"width": 3}, **CPU)
    assert {"hessian/top_eigenvalue", "sharpness/sam"} <= found.values.keys()
    lines = [m for m in caplog.messages if m.startswith("lightning_landscape: measured")]
    assert len(lines) == 1
    assert "measured hessian 1, sharpness 1, landscape 1 times in" in lines[0]
    assert "training" not in lines[0]
    assert "left out" not in lines[0]


class Data(pl.LightningDataModule):
    def __init__(self, examples: int = 60):
        super().__init__()
        self.save_hyperparameters()
        self.ready = False

    def setup(self, stage):
        self.ready = True

    def train_dataloader(self):
        assert self.ready
        return regression(self.hparams.examples)


@pytest.mark.parametrize(
    "data",
    [regression, regression(), Data(), Data, None, list(regression()), lambda: Data()],
    ids=["function", "loader", "datamodule", "class", "module's", "list", "made"],
)
def test_kinds_of_data(tmp_path, data):
    monitor = SharpnessMonitor(probe_samples=40)
    measure(Net, data, callbacks=[monitor], logdir=tmp_path, **CPU)
    held = torch.cat([b.batch[0] for b in monitor.loss.probe.batches])
    assert torch.equal(held, regression().dataset.tensors[0][:40])


def test_classes_are_built_from_the_checkpoint(tmp_path):
    """The module and the datamodule, from the arguments in the checkpoint."""
    saver = ModelCheckpoint(tmp_path, "saved", save_top_k=-1)
    settings = {"max_epochs": 1, "enable_checkpointing": True}
    make = lambda: Net(width=3, optimizer="adam")  # noqa: E731
    train(make, lambda: Data(20), [saver], tmp_path, **settings)
    monitor = SharpnessMonitor()
    found = measure(
        Net, Data, checkpoint=tmp_path / "saved.ckpt", callbacks=[monitor], logdir=tmp_path, **CPU
    )
    assert monitor.loss.probe.size == 20
    assert "width: 3" in (found.log_dir / "hparams.yaml").read_text()
    with pytest.raises(RuntimeError, match="size mismatch"):
        measure(
            Net, Data, checkpoint=tmp_path / "saved.ckpt", init={"width": 4}, logdir=tmp_path, **CPU
        )


def test_checkpoint_without_optimizer_state(tmp_path):
    saver = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4, save_weights_only=True)
    train(Net, regression, [saver], tmp_path, max_epochs=3, enable_checkpointing=True)
    with pytest.warns(match="the checkpoint has no optimizer state: edges are those of the"):
        found = measure(
            Net, regression, checkpoint=tmp_path / "saved.ckpt", callbacks=given(),
            logdir=tmp_path, **CPU,
        )  # fmt: skip
    live = given()
    train(Net, regression, live, tmp_path / "live", max_epochs=3)
    assert found.step == 8
    for row in found.rows[1:]:
        same = next(m for m in live if m.prefix == row["monitor"])
        assert row in of_weights(same)
    assert found.values["hessian/edge"] == pytest.approx(3.8 / 0.02)


def test_summed_loss_has_the_edge_of_a_training_batch(tmp_path):
    make = lambda: Linear(lr=0.001, reduction="sum")  # noqa: E731
    common = {"loss_reduction": "sum", "every_n_train_steps": 1, "max_overhead": None}
    live = Cold(**common)
    saver = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4, save_top_k=-1)
    train(make, regression, [live], tmp_path / "live")
    train(make, regression, [saver], tmp_path, enable_checkpointing=True)
    found = measure(
        make(), regression, checkpoint=tmp_path / "saved.ckpt", callbacks=[Cold(**common)],
        logdir=tmp_path, **CPU,
    )  # fmt: skip
    assert found.rows[0] in of_weights(live)


class Scheduled(Net):
    """A loss that depends on the epoch and the step, and needs what on_train_start sets."""

    def on_train_start(self):
        self.factor = 2.0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor * (1 + self.current_epoch + 0.1 * self.global_step)


@pytest.mark.parametrize("name", ["within-step=4", "end-step=6"])
def test_trainer_has_the_step_and_epoch_of_the_checkpoint(tmp_path, name):
    live = SharpnessMonitor(probe=regression(), every_n_train_steps=1, max_overhead=None)
    train(Scheduled, regression, [live], tmp_path / "live", max_epochs=3)
    within = ModelCheckpoint(tmp_path, "within-{step}", every_n_train_steps=4, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1)
    train(Scheduled, regression, [within, ends], tmp_path, max_epochs=3, enable_checkpointing=True)
    found = measure(
        Scheduled, regression, checkpoint=tmp_path / f"{name}.ckpt", logdir=tmp_path,
        callbacks=[SharpnessMonitor(probe=regression())], **CPU,
    )  # fmt: skip
    assert found.rows[0] in of_weights(live)


def test_nothing_is_trained(tmp_path):
    class Watch(pl.Callback):
        batches = 0

        def on_train_batch_start(self, *_):
            self.batches += 1

        def on_validation_batch_start(self, *_):
            self.batches += 1

    watch = Watch()
    measure(Net, regression, callbacks=[*given(), watch], logdir=tmp_path, **CPU)
    assert watch.batches == 0


def test_quantities_that_need_a_step_warn_once(tmp_path):
    asked = [
        HessianMonitor(batch_edge_ratio=True, update_curvature=True),
        SharpnessMonitor(critical=True),
        LandscapeMonitor(directions="update", resolution=3),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure(Net, regression, callbacks=asked, logdir=tmp_path, **CPU)
    messages = [str(w.message) for w in caught if "it needs a training step" in str(w.message)]
    for what in (
        "hessian/batch_edge_ratio", "hessian/update_curvature", "sharpness/critical", "'update'",
    ):  # fmt: skip
        assert sum(what in message for message in messages) == 1
    assert len(messages) == 4
    assert not {"hessian/batch_edge_ratio", "sharpness/critical"} & found.values.keys()
    assert [m.failed for m in asked] == [0] * 3
    assert len(found.rows) == 3


# -- errors ---------------------------------------------------------------------------------------


class Needs(Net):
    def __init__(self, size: int, depth: int = 2):
        super().__init__(width=size)


def test_class_that_cannot_be_built(tmp_path):
    with pytest.raises(TypeError, match=r"module=Needs\): it cannot .*'size'; pass init=\{\.\.\."):
        measure(Needs, regression, logdir=tmp_path)
    with pytest.raises(TypeError, match=r"init=\{'shape': 3\}: .*'shape'"):
        measure(Net, regression, init={"shape": 3}, logdir=tmp_path)
    with pytest.raises(TypeError, match=r"init=\{'width': 3\}\): only used if module is a class"):
        measure(Net(), regression, init={"width": 3}, logdir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": nn.Linear(1, 1)}, TypeError, r"measure\(module=Linear.*expected a Lightning"),
        ({"data": torch.ones(3)}, TypeError, r"measure\(data=tensor.*: expected a DataLoader"),
        ({"data": 3}, TypeError, r"measure\(data=3\): expected a DataLoader, a list of"),
        ({"data": DataLoader([], 2)}, ValueError, r"measure\(data=<torch.*: it holds no batch"),
        ({"checkpoint": "none.ckpt"}, FileNotFoundError, r"checkpoint='none.ckpt'\): no such file"),
        ({"callbacks": []}, TypeError, r"callbacks=\[\]\): expected measuring callbacks, e.g."),
        ({"callbacks": [pl.Callback()]}, TypeError, r"callbacks=\[<pytorch_.*expected measuring"),
        (
            {"callbacks": [HessianMonitor()], "loss_fn": print},
            TypeError,
            r"callbacks=..., loss_fn=...\): pass loss_fn to the callbacks",
        ),
        ({"max_epochs": 3}, TypeError, r"measure\(max_epochs=...\): it cannot be set"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(**{"module": Net(), "data": regression, "logdir": tmp_path, **CPU, **arguments})


class Boom:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": Boom()}, "it cannot be read safely .*add_safe_globals"),
        (Net().state_dict(), r"it is not a checkpoint of a Trainer, .*measure\(module, data\)"),
        ([1], "it is not a checkpoint of a Trainer"),
    ],
)
def test_files_are_read_safely(tmp_path, content, message):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        measure(Net, regression, checkpoint=tmp_path / "a.ckpt", logdir=tmp_path)


def test_error_if_nothing_could_be_measured(tmp_path):
    bad = SharpnessMonitor(probe=(torch.ones(4, 3), torch.ones(4, 1)))
    with (
        pytest.warns(match="a measurement failed"),
        pytest.raises(RuntimeError, match=r"measure\(Net\): nothing could be measured"),
    ):
        measure(Net, regression, callbacks=bad, logdir=tmp_path, **CPU)


def test_eval_mode_is_reported(tmp_path):
    module = Net().eval()
    with pytest.warns(match="Net is in eval mode and is measured in that mode"):
        measure(module, regression, callbacks=[SharpnessMonitor()], logdir=tmp_path, **CPU)


# -- the command ----------------------------------------------------------------------------------


def sharpness_alone():
    return [SharpnessMonitor(probe_samples=20)]


@pytest.mark.slow
def test_command(tmp_path):
    """In a subprocess, from another folder."""
    saver = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4, save_top_k=-1)
    train(lambda: Net(width=6), regression, [saver], tmp_path, enable_checkpointing=True)
    command = [
        sys.executable, "-W", "ignore", "-m", "lightning_landscape.measure",
        "--module", "tests.test_measure:Net", "--data", "tests.small:regression",
        "--checkpoint", "saved.ckpt", "--logdir", "out", "--report", "--trainer",
        "accelerator=cpu", "--callbacks", "tests.test_measure:sharpness_alone",
        "--callbacks", "lightning_landscape:HessianMonitor",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "version_0"
    rows = read_history(folder / "history.jsonl")
    assert [(row["step"], row["monitor"]) for row in rows] == [(4, "hessian"), (4, "sharpness")]
    assert (folder / "report.html").stat().st_size > 10_000
    values = dict(
        line.split() for line in done.stdout.splitlines() if line.startswith("sharpness/")
    )
    assert float(values["sharpness/sam"]) == pytest.approx(rows[1]["sharpness/sam"], rel=1e-5)
    assert "Step 4; wrote out/version_0/report.html" in done.stdout
    assert "lightning_landscape: measured hessian 1, sharpness 1 times" in done.stderr


LOADER = regression()
NOT_CALLBACKS = 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--module": "tests.test_measure"}, "--module 'tests.test_measure': expected package."),
        ({"--module": "no.such:Thing"}, "--module 'no.such:Thing': it cannot be imported"),
        ({"--module": "tests.small:Nothing"}, "--module 'tests.small:Nothing': it cannot be"),
        ({"--data": "tests.small:Nothing"}, "--data 'tests.small:Nothing': it cannot be imported"),
        ({"--init": "width"}, "--init 'width': expected NAME=VALUE, e.g. width=64"),
        ({"--init": "size=3"}, "it cannot be built from"),
        ({"--trainer": "x"}, "--trainer 'x': expected NAME=VALUE"),
        ({"--trainer": "max_epochs=3"}, "measure(max_epochs=...): it cannot be set"),
        ({"--callbacks": "tests.test_measure:NOT_CALLBACKS"}, "expected a callback, a list or a"),
        ({"--checkpoint": "none.ckpt"}, "no such file; expected a checkpoint saved by a Trainer"),
    ],
)
def test_errors_of_the_command(tmp_path, capsys, changed, message):
    options = {
        "--module": "tests.test_measure:Net", "--data": "tests.test_measure:LOADER",
        "--logdir": str(tmp_path), **changed,
    }  # fmt: skip
    assert main([word for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err


def test_values_of_the_command(tmp_path, capsys):
    options = ["--module", "tests.test_measure:Net", "--data", "tests.test_measure:LOADER"]
    options += ["--init", "width=3", "--init", "optimizer=adam", "--trainer", "accelerator=cpu"]
    options += ["--logdir", str(tmp_path), "--callbacks", "tests.test_measure:sharpness_alone"]
    assert main(options) == 0
    assert "sharpness/gradient_norm" in capsys.readouterr().out
    written = next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "width: 3" in written
    assert "optimizer: adam" in written


# -- the progress bar -----------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(progress, "_LONG", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 1e-3)


@pytest.mark.usefixtures("quickly")
def test_progress(tmp_path):
    monitor = LandscapeMonitor(resolution=21, line_resolution=21)
    with terminal() as shown:
        measure(Net, regression, callbacks=[monitor], logdir=tmp_path, **CPU)
        seen = [(int(n), int(total)) for n, total in re.findall(r"(\d+) of (\d+) forw", shown())]
        measure(Net, regression, callbacks=[monitor], logdir=tmp_path, progress=False, **CPU)
        assert "forward" not in shown()
    assert min(total for _, total in seen) == monitor.forwards == 21 * 21 + 2 * 21
    # The total may include the two evaluations that compare the batches with one batch.
    assert max(total for _, total in seen) <= monitor.forwards + 2
    reached = [n for n, _ in seen]
    assert reached == sorted(reached)
    assert any(0 < n < monitor.forwards for n in reached)


def fails(shown):
    with progress.progress_bar(5, lambda: 1, show=True):
        read_until(shown, "1 of 5")
        math.floor(1 / 0)


@pytest.mark.usefixtures("quickly")
def test_progress_beyond_the_expected_total():
    reached = iter([3, 8])
    with terminal() as shown:
        with progress.progress_bar(5, lambda: next(reached, 8), show=True):
            text = read_until(shown, "8 of 8")
        with pytest.raises(ZeroDivisionError):
            fails(shown)
        text += shown()
    assert text.index("60 %, 3 of 5") < text.index("100 %, 8 of 8")
    assert re.search(r"\r +\r$", text)  # cleared
    assert not any(thread.name.endswith("(watch)") for thread in threading.enumerate())
