"""A resumed run continues the series of the run that was interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.training.output.history import read_history
from lightning_landscape.training.output.recorder import Recorder
from tests.runs import MemoryLogger, train
from tests.small import Linear, regression


class Network(Linear):
    """A nonlinear network with dropout, so that the probe's random numbers matter too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def callbacks():
    common = {"every_n_train_steps": 4, "max_overhead": None, "probe_samples": 40}
    return [
        HessianMonitor(**common),
        SharpnessMonitor(**common),
        LandscapeMonitor(resolution=3, line_resolution=3, **common),
        SharpnessEarlyStopping("hessian/edge_ratio", 1e9),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of six epochs, and one stopped after three and resumed in another folder."""
    whole = tmp_path_factory.mktemp("whole")
    uninterrupted = callbacks()
    train(Network, regression, uninterrupted, whole, max_epochs=6)
    begun = tmp_path_factory.mktemp("begun")
    saver = ModelCheckpoint(begun / "checkpoints", save_last=True)
    first = callbacks()
    train(Network, regression, [*first, saver], begun, max_epochs=3, enable_checkpointing=True)
    resumed = callbacks()
    later = tmp_path_factory.mktemp("later")
    resume(begun / "checkpoints" / "last.ckpt", resumed, later)
    return uninterrupted, first, resumed, (whole, begun, later)


def resume(checkpoint, resumed, root, make_module=Network, data=regression, **settings):
    """Continue to epoch 6; the random state of the new process must not matter."""
    pl.seed_everything(99, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=MemoryLogger(),
        callbacks=resumed,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(root),
        **{"max_epochs": 6, "enable_checkpointing": False, **settings},
    )
    trainer.fit(make_module(), data(), ckpt_path=checkpoint)
    return trainer


def test_schedule_continues(runs):
    uninterrupted, first, resumed, _ = runs
    whole = [row["step"] for row in uninterrupted[0].history]
    parts = [row["step"] for row in first[0].history] + [row["step"] for row in resumed[0].history]
    assert parts == whole == [2, 4, 8, 12, 16]


def test_same_probe_and_directions_and_limits(runs):
    uninterrupted, first, resumed, _ = runs
    assert resumed[0].loss.probe.fingerprint() == first[0].loss.probe.fingerprint()
    assert resumed[2]._limits == first[2]._limits == uninterrupted[2]._limits
    assert set(first[2]._limits) == {"landscape/line", "landscape/plane"}
    assert resumed[0].measured == uninterrupted[0].measured


def test_values_at_the_same_weights_are_equal(tmp_path):
    """Without dropout in training both runs pass through the same weights: bitwise equal rows."""
    whole, resumed = callbacks(), callbacks()
    train(Linear, regression, whole, tmp_path / "whole", max_epochs=6)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(
        Linear, regression, [*callbacks(), saver], tmp_path / "a", max_epochs=3,
        enable_checkpointing=True,
    )  # fmt: skip
    resume(tmp_path / "checkpoints" / "last.ckpt", resumed, tmp_path / "b", Linear)
    after = {row["step"]: row for row in whole[1].history}
    assert len(resumed[1].history) >= 2
    for row in resumed[1].history:
        for key in ("sharpness/sam", "sharpness/gradient_norm"):
            assert row[key] == after[row["step"]][key]
    eigen = {row["step"]: row for row in whole[0].history}
    for row in resumed[0].history:
        other = eigen[row["step"]]
        bound = row["hessian/residual"] + other["hessian/residual"] + 1e-6
        assert abs(row["hessian/top_eigenvalue"] - other["hessian/top_eigenvalue"]) <= bound
    name = "landscape-plane-step00000016.npz"
    a = Slice.load(tmp_path / "whole" / "landscape" / name)
    b = Slice.load(tmp_path / "b" / "landscape" / name)
    assert (a.losses == b.losses).all()


def test_checkpoint_is_small_and_plain(runs):
    _, _, _, (_, begun, _) = runs
    checkpoint = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    ours = {k: v for k, v in checkpoint["callbacks"].items() if "Checkpoint" not in k}
    assert len(ours) == 4
    assert len(repr(ours)) < 2000
    saved = begun / "without.ckpt"
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if k not in ours}
    torch.save(checkpoint, saved)
    begun_size = (begun / "checkpoints" / "last.ckpt").stat().st_size
    assert 0 < begun_size - saved.stat().st_size < 2000
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves(ours))


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def test_missing_probe_starts_a_new_series_with_a_warning(runs, tmp_path):
    _, _, _, (_, begun, _) = runs
    kept = begun / "landscape"
    hidden = begun / "elsewhere"
    kept.rename(hidden)
    try:
        fresh = callbacks()
        with pytest.warns(match="its file is missing .*a new series starts on a new probe"):
            resume(begun / "checkpoints" / "last.ckpt", fresh, tmp_path)
    finally:
        hidden.rename(kept)
    assert fresh[0].history[0]["step"] == 11  # 40 examples after two more batches


def test_altered_probe_is_detected(runs, tmp_path):
    _, _, _, (_, begun, _) = runs
    path = next((begun / "landscape").glob("training-examples-*.pt"))
    content = path.read_bytes()
    rows = torch.load(path, weights_only=True)
    rows[0]["batch"][0][0, 0] += 1.0
    torch.save(rows, path)
    try:
        with pytest.warns(match="its file holds other data"):
            resume(begun / "checkpoints" / "last.ckpt", callbacks(), tmp_path)
        path.write_bytes(b"garbage")
        with pytest.warns(match="its file cannot be read"):
            resume(begun / "checkpoints" / "last.ckpt", callbacks(), tmp_path / "apart")
    finally:
        path.write_bytes(content)


def probe_files(checkpoint):
    """The files of all callbacks' probes in the checkpoint, and their common hash."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    entries = [state["probe"] for state in states.values() if state.get("probe")]
    assert len(entries) == 3
    (digest,) = {entry["hash"] for entry in entries}
    return [Path(entry["file"]) for entry in entries], digest


@pytest.mark.parametrize("damage", ["deleted", "other data"])
def test_new_probe_is_saved_in_the_next_checkpoint(runs, tmp_path, damage):
    """A checkpoint of the new series contains its probe, and resumes it."""
    _, _, _, (_, begun, _) = runs
    shutil.copytree(begun, tmp_path / "a")
    first = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    for state in first["callbacks"].values():
        if "probe" in state:
            state["probe"]["file"] = str(tmp_path / "a/landscape/training-examples-40-rank0.pt")
    torch.save(first, tmp_path / "first.ckpt")
    path = tmp_path / "a" / "landscape" / "training-examples-40-rank0.pt"
    if damage == "deleted":
        path.unlink()
    else:  # the new probe replaces this file
        rows = torch.load(path, weights_only=True)
        rows[0]["batch"][0][0, 0] += 1.0
        torch.save(rows, path)
    second = callbacks()
    saver = ModelCheckpoint(tmp_path, filename="second", monitor=None)
    with pytest.warns(match="a new series starts on a new probe"):
        resume(
            tmp_path / "first.ckpt", [*second, saver], tmp_path / "a", max_epochs=5,
            enable_checkpointing=True,
        )  # fmt: skip
    files, digest = probe_files(tmp_path / "second.ckpt")
    assert files == [path] * 3
    assert digest == second[0].loss.probe.fingerprint()
    third = callbacks()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(new series|could not be)")
        resume(tmp_path / "second.ckpt", third, tmp_path / "c", max_epochs=7)
    assert third[0].loss.probe.fingerprint() == digest
    assert all(len(m.history) >= 1 for m in third[:3])


def test_moved_probe_is_saved_with_its_new_path(runs, tmp_path):
    """Found beside the checkpoint; the next checkpoint may be anywhere."""
    _, _, _, (_, begun, _) = runs
    moved = tmp_path / "moved"
    shutil.copytree(begun, moved)
    saver = ModelCheckpoint(tmp_path, filename="second", monitor=None)
    hidden = begun.rename(begun.with_name("hidden"))
    try:
        resume(
            moved / "checkpoints/last.ckpt", [*callbacks(), saver], tmp_path / "b", max_epochs=5,
            enable_checkpointing=True,
        )  # fmt: skip
    finally:
        hidden.rename(begun)
    files, _ = probe_files(tmp_path / "second.ckpt")
    assert files == [moved / "landscape" / "training-examples-40-rank0.pt"] * 3


# -- in the middle of an epoch, and after a kill --------------------------------------------------


class Batches:
    """Six batches in order; stateful, as Lightning requires to resume within an epoch."""

    def __init__(self):
        self.dataset = regression().dataset
        self.position = 0

    def __len__(self):
        return 6

    def __iter__(self):
        for index in range(self.position % 6, 6):
            self.position = index + 1
            yield tuple(t[10 * index : 10 * index + 10] for t in self.dataset.tensors)
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Steady(Linear):
    """Dropout and BatchNorm; the dropout mask depends only on the batch's number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)


class Killed(Steady):
    """Kills its process at the measurement of step 15, with the weights displaced."""

    def training_step(self, batch, batch_idx):
        probing = self.log.__name__ == "_log_nothing"
        if probing and self.global_step == 15 and not torch.equal(self.layer[0].weight, self.own):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class NoteWeights(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.own = pl_module.layer[0].weight.detach().clone()


def frequent():
    common = {"every_n_train_steps": 5, "max_overhead": None, "probe_samples": 40}
    return [
        HessianMonitor(tol=1e-3, **common),
        SharpnessMonitor(average=True, samples=2, critical=True, **common),
        LandscapeMonitor(resolution=3, line_resolution=3, **common),
        SharpnessEarlyStopping("hessian/edge_ratio", -1.0, patience=1000),
    ]


def assert_same_series(whole, resumed, root_whole, root_resumed, after):
    """Rows after step ``after`` agree: bitwise, eigenvalues within what their residuals allow."""
    for a, b in zip(whole[:3], resumed[:3], strict=True):
        expected = [row for row in a.history if row["step"] >= after]
        expected = [row for row in expected if row["step"] > after or "sharpness/critical" in row]
        assert [row["step"] for row in b.history] == [row["step"] for row in expected]
        assert len(expected) >= 2
        for one, other in zip(expected, b.history, strict=True):
            assert one.keys() == other.keys()
            if "hessian/top_eigenvalue" in one:
                bound = one["hessian/residual"] + other["hessian/residual"] + 1e-6
                difference = one["hessian/top_eigenvalue"] - other["hessian/top_eigenvalue"]
                assert abs(difference) <= bound
                assert one["hessian/edge"] == other["hessian/edge"]
            else:
                assert one == other
    for path in sorted((root_resumed / "landscape").glob("*.npz")):
        if int(path.stem[-8:]) > after:
            a, b = Slice.load(root_whole / "landscape" / path.name), Slice.load(path)
            assert (a.losses == b.losses).all()
            assert a.metadata == b.metadata
    assert resumed[3].wait_count == whole[3].wait_count > 3


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    root = tmp_path_factory.mktemp("steady")
    callbacks = frequent()
    train(Steady, Batches, callbacks, root, max_epochs=4)
    assert [row["step"] for row in callbacks[0].history] == [4, 5, 10, 15, 20]
    return callbacks, root


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checkpoint_within_an_epoch(steady, tmp_path, accumulate):
    """Written at step 10 (5 with accumulation), right after the measurement there."""
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 4 * accumulate}
    whole, root = steady
    if accumulate > 1:
        whole, root = frequent(), tmp_path / "whole"
        train(Steady, Batches, whole, root, **settings)
    at = 10 if accumulate == 1 else 5
    assert at in [row["step"] for row in whole[0].history]
    saver = ModelCheckpoint(
        tmp_path, filename="saved", every_n_train_steps=at, save_top_k=1, monitor=None
    )
    stopped = {**settings, "max_steps": at, "enable_checkpointing": True}
    train(Steady, Batches, [*frequent(), saver], tmp_path / "begun", **stopped)
    resumed = frequent()
    resume(tmp_path / "saved.ckpt", resumed, tmp_path / "later", Steady, Batches, **settings)
    assert_same_series(whole, resumed, root, tmp_path / "later", at)


@pytest.mark.slow
def test_killed_while_measuring_and_resumed_in_the_same_folder(steady, tmp_path):
    whole, root = steady
    code = (
        "import sys; from tests.integration.test_resume import *; root = sys.argv[1]; "
        "saver = ModelCheckpoint(root, every_n_train_steps=5, save_last=True); "
        "train(Killed, Batches, [NoteWeights(), *frequent(), saver], root, max_epochs=4, "
        "enable_checkpointing=True)"
    )
    repository = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repository, check=False)
    assert ended.returncode == -signal.SIGKILL
    file = tmp_path / "history.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()][-1] == 10
    # Rows written after the checkpoint, and half a row.
    lines = file.read_text()
    later = {**json.loads(lines.splitlines()[0]), "step": 15, "hessian/top_eigenvalue": -1.0}
    file.write_text(lines + json.dumps(later) + '\n{"step": 15, "sharpness/s')
    resumed = frequent()
    resume(tmp_path / "last.ckpt", resumed, tmp_path, Steady, Batches, max_epochs=4)
    assert_same_series(whole, resumed, root, tmp_path, 10)
    assert list(tmp_path.glob("history-*.jsonl")) == []
    rows = read_history(file)
    assert len(rows) == len(read_history(root / "history.jsonl"))
    for key in ("sharpness/sam", "hessian/top_eigenvalue"):
        steps = [row["step"] for row in rows if key in row]
        assert steps == [4, 5, 10, 15, 20]
    assert all(row.get("hessian/top_eigenvalue", 0.0) >= 0.0 for row in rows)


def test_new_callback_after_a_resume_keeps_the_history(runs, tmp_path):
    _, _, _, (_, begun, _) = runs
    file = tmp_path / "history.jsonl"
    file.write_bytes((begun / "history.jsonl").read_bytes())
    new = SharpnessMonitor(name="new", every_n_train_steps=4, max_overhead=None, probe_samples=1)
    resume(begun / "checkpoints" / "last.ckpt", [new, *callbacks()], tmp_path)
    steps = [row["step"] for row in read_history(file) if "sharpness/sam" in row]
    assert steps == [2, 4, 8, 12, 16]


def test_checkpoint_before_the_probe_is_complete(steady, tmp_path):
    """It contains no probe: a new one is captured from the next batches, with a warning."""
    saver = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=2)
    stopped = {"max_steps": 2, "enable_checkpointing": True}
    train(Steady, Batches, [*frequent(), saver], tmp_path / "begun", **stopped)
    resumed = frequent()
    with pytest.warns(match="written before the first measurement .* from the next training"):
        resume(tmp_path / "saved.ckpt", resumed, tmp_path, Steady, Batches)
    assert resumed[0].history[0]["step"] == 6  # 40 examples from the third batch on
    assert resumed[0].history[0]["probe_samples"] == 40


def test_probe_that_was_not_saved(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = {"every_n_train_steps": 2, "max_overhead": None, "probe_samples": 40}
    saver = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=6)
    stopped = {"max_steps": 7, "enable_checkpointing": True}

    def ours(**more):  # a probe that two callbacks share is written only if both allow it
        return [HessianMonitor(**settings, **more), SharpnessMonitor(**settings)]

    train(Steady, Batches, [*ours(save_probe=False), saver], tmp_path / "begun", **stopped)
    assert not list(tmp_path.rglob("*.pt"))
    resumed = ours()
    with pytest.warns(match="the run before could not be used: it was not saved .*a new series"):
        resume(tmp_path / "saved.ckpt", resumed, tmp_path / "resumed", Steady, Batches)
    assert resumed[0].history[0]["probe_samples"] == 40
    (path,) = tmp_path.rglob("*.pt")
    assert path.name == "training-examples-40-rank0.pt"
    messages = [m for m in caplog.messages if "training-examples-40-rank0.pt holds training" in m]
    assert len(messages) == 1


# -- states and histories -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        {"other": 1},
        {"last_step": 6},
        {"last_step": "six", "measured": 2, "skipped": 0, "probe": None},
    ],
)
def test_state_of_another_version(runs, tmp_path, state):
    """Ignored completely, with a warning, instead of a KeyError while loading."""
    _, _, _, (_, begun, _) = runs
    checkpoint = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    ours = [key for key in checkpoint["callbacks"] if "Checkpoint" not in key]
    checkpoint["callbacks"].update(dict.fromkeys(ours, state))
    torch.save(checkpoint, tmp_path / "other.ckpt")
    fresh = callbacks()
    with pytest.warns() as caught:
        resume(tmp_path / "other.ckpt", fresh, tmp_path)
    for name in ("hessian", "sharpness", "landscape", "SharpnessEarlyStopping"):
        message = f"{name}: the state in the checkpoint does not have the format of this version"
        assert sum(str(w.message).startswith(message) for w in caught) == 1
    assert fresh[0].history[0]["step"] == 11


def test_state_without_colour_limits(runs):
    _, first, _, _ = runs
    state = first[2].state_dict()
    del state["limits"]
    fresh = callbacks()[2]
    with pytest.warns(match=r"landscape: the state in the checkpoint .*\['limits'\]"):
        fresh.load_state_dict(state)
    assert fresh._limits == {}


def test_read_history(tmp_path):
    """The last of equal rows, NaN for null, and no line that is not whole."""
    file = tmp_path / "history.jsonl"
    rows = [
        {"step": 1, "a/x": 1.0},
        {"step": 1, "b/y": 2.0},
        {"step": 3, "a/x": None, "note": "kept"},
        {"step": 3, "a/x": 7.0},
        {"step": 3, "a/x": 8.0},
        {"step": 2, "a/x": 9.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(text.encode() + b'[1, 2]\n{"a": 1}\n\n{"step": 4, "note": "\xc3')
    read = read_history(file)
    assert [row["step"] for row in read] == [1, 1, 2, 3, 3]
    assert [row.get("a/x") for row in read[:3]] == [1.0, None, 9.0]
    assert math.isnan(read[3]["a/x"])
    assert read[3]["note"] == "kept"
    assert read[4] == {"step": 3, "a/x": 8.0}


def test_incomplete_line_is_ended_before_the_next_row(tmp_path):
    trainer = pl.Trainer(logger=MemoryLogger(), default_root_dir=tmp_path, accelerator="cpu")
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1}\n{"st')
    Recorder(trainer).row({"step": 2}, continued=True)
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    assert read_history(file) == [{"step": 1}, {"step": 2}]
