"""Wrong uses that are detected only when a run starts or during it: no data is lost."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from functools import cache

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
    read_history,
)
from tests.bad_input.of_runs import (
    ALWAYS,
    BATCH,
    EDGE,
    OLD_ROW,
    REFUSED,
    WARNED,
    Endless,
    Run,
    Validated,
)
from tests.bad_input.of_slices import LINE
from tests.bad_input.rows import ADVICE, table_row
from tests.conftest import TABLES
from tests.runs import differences, train
from tests.small import Linear, regression


@cache
def plain(module):
    """The final state dict of a run without callbacks; these modules use no random numbers."""
    return train(module, regression).trainer.lightning_module.state_dict()


def attempt(case, folder):
    """``(error, our warnings, the module's first and last weights)``."""
    modules = []

    def make():
        modules.append(case.module())
        modules.append({n: p.detach().clone() for n, p in modules[0].named_parameters()})
        return modules[0]

    error = None
    resumes = None if case.resumes is None else case.resumes(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(
                make, regression, case.callbacks(folder), folder, ckpt_path=resumes, **case.settings
            )
        except Exception as raised:
            error = raised
    foreign = ("LeafSpec", "workers", "ckpt_path", "unclosed file", "treespec")
    messages = [str(w.message) for w in caught if not any(w_ in str(w.message) for w_ in foreign)]
    return error, messages, modules[1:2], modules[0].state_dict() if modules else None


@pytest.fixture
def earlier(tmp_path):
    """A folder with files of another run, which must stay unchanged."""
    (tmp_path / "landscape").mkdir()
    (tmp_path / "history.jsonl").write_text(json.dumps(OLD_ROW) + "\n")
    LINE.save(tmp_path / "landscape" / "landscape-line-1-step00000099.npz")
    torch.save(Linear().state_dict(), tmp_path / "old.ckpt")
    yield tmp_path
    histories = [read_history(path) for path in tmp_path.glob("history*.jsonl")]
    assert [OLD_ROW] in histories
    assert Slice.load(tmp_path / "landscape" / "landscape-line-1-step00000099.npz")
    assert set(torch.load(tmp_path / "old.ckpt", weights_only=True)) == {"layer.weight"}
    assert [path.name for path in tmp_path.rglob(".*")] == []  # no temporary files


@pytest.fixture
def table(request):
    return request.config.stash[TABLES]["wrong uses"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.use)
def test_error_before_training(case, earlier, table):
    error, _, first, last = attempt(case, earlier)
    assert type(error) is case.error, error
    for pattern in case.messages:
        assert re.search(pattern, str(error), re.DOTALL), str(error)
    if "stateful callback" not in case.messages[0] and case.resumes is None:  # not our message
        assert ADVICE.search(str(error))
    for weights in first:
        assert differences(dict(weights), dict(last)) == []
    table.append(table_row(case.use, case.error.__name__, str(error)))


@pytest.mark.parametrize("case", WARNED, ids=lambda case: case.use)
def test_warning_and_training_continues(case, earlier, table):
    error, messages, _, last = attempt(case, earlier)
    assert error is None
    for pattern in case.messages:
        assert any(re.search(pattern, message, re.DOTALL) for message in messages), messages
    assert len(messages) <= 4  # not at every step
    assert any(ADVICE.search(message) for message in messages)
    assert differences(dict(plain(case.module)), dict(last)) == []
    message = next(m for m in messages if re.search(case.messages[0], m, re.DOTALL))
    table.append(table_row(case.use, "a warning", message))


# -- the disk -------------------------------------------------------------------------------------


STEPS = (1, 3, 6)  # the last one at the end of training


def _writing(folder):
    """Two callbacks that write files at ``STEPS``."""
    few = {"probe": [tuple(BATCH)], "every_n_train_steps": 3, "max_overhead": None}
    drawing = LandscapeMonitor(resolution=2, line_resolution=0, **few)
    return [drawing, InterpolationMonitor(resolution=3, **few)]


def test_unwritable_folder_warns_once_per_kind_of_file(tmp_path, table):
    (tmp_path / "landscape").write_text("a file where the folder should be")
    case = Run("Trainer(default_root_dir=...) that cannot be written", _writing, ())
    error, messages, _, last = attempt(case, tmp_path)
    assert error is None
    messages = [message for message in messages if "could not be written" in message]
    kinds = [re.sub(r"\d+", "#", message) for message in messages]
    assert len(kinds) == len(set(kinds)) <= 6  # one per kind of file, not per step
    for message in messages:
        assert re.search("disk space, or pass the logger a directory .*; training and", message)
    assert differences(dict(plain(Linear)), dict(last)) == []
    assert len(read_history(tmp_path / "history.jsonl")) == len(STEPS) * 2  # outside the folder
    table.append(table_row(case.use, "a warning", messages[0].replace(str(tmp_path), "...")))


@pytest.mark.pictures
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk_while_a_figure_is_written(tmp_path, table):
    folder = tmp_path / "landscape"
    folder.mkdir()
    for name in ("landscape-plane-step00000001.png", "interpolation-line-step00000003.npz"):
        (folder / f".{name}").symlink_to("/dev/full")
    case = Run("a disk that is full while a figure is written", _writing, ())
    error, messages, _, last = attempt(case, tmp_path)
    assert error is None
    messages = [message for message in messages if "could not be written" in message]
    assert len(messages) == 2
    assert "landscape-plane-step00000001.png could not be written" in messages[0]
    assert "interpolation-line-step00000003.npz could not be written" in messages[1]
    for message in messages:
        assert re.search("No space left on device.*; free disk space, or pass the logger", message)
    assert differences(dict(plain(Linear)), dict(last)) == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    written = {path.name for path in folder.iterdir()}
    assert not {"landscape-plane-step00000001.png", "interpolation-line-step00000003.npz"} & written
    assert {"landscape-plane-step00000001.npz", "landscape-plane-step00000003.png"} <= written
    for path in folder.glob("*.npz"):
        Slice.load(path)
    assert len(read_history(tmp_path / "history.jsonl")) == len(STEPS) * 2
    table.append(table_row(case.use, "a warning", messages[0].replace(str(tmp_path), "...")))


# -- states in checkpoints ------------------------------------------------------------------------

KINDS = (
    HessianMonitor,
    SharpnessMonitor,
    LandscapeMonitor,
    InterpolationMonitor,
    GeneralizationMonitor,
    lambda: SharpnessEarlyStopping(EDGE, 1.0),
)
COMMON = {"last_step": 1, "measured": 1, "skipped": 0, "probe": None}
STATES = [
    None,
    3,
    "state",
    [],
    {},
    {**COMMON, "last_step": -1},
    {**COMMON, "measured": True},
    {**COMMON, "probe": "probe.pt"},
    {"wait_count": "3", "stopped_step": None, "stopping_reason": ""},
]


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
def test_invalid_state_is_ignored_with_a_warning(state, table):
    for make in KINDS:
        callback = make()
        before = callback.state_dict()
        with pytest.warns(
            match=r"the state in the checkpoint does not .*\(see \[.*ignored"
        ) as caught:
            callback.load_state_dict(state)
        assert callback.state_dict() == before
    message = str(caught[0].message)
    table.append(table_row(f"load_state_dict({state!r})", "a warning", message))


@pytest.mark.parametrize("make", KINDS[:-1])
def test_state_of_another_class_is_loaded_as_far_as_valid(make):
    callback = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback.load_state_dict(
            {**COMMON, "scales": {"a": 3, "b": {"linthresh": "x", "limit": 1}}}
        )
    assert callback.measured == 1
    assert getattr(callback, "_scales", {}) == {}


def test_invalid_probe_entry_in_a_checkpoint(tmp_path, table):
    """A new series starts, with a warning; the final weights are those without callbacks."""
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    train(Linear, regression, [HessianMonitor(**ALWAYS), keep], tmp_path, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["callbacks"]["HessianMonitor{'name': None}"]["probe"] = {"file": 3}
    torch.save(saved, tmp_path / "damaged.ckpt")
    monitor = HessianMonitor(**ALWAYS)
    with pytest.warns(match=r"see \['probe'\]\) and is ignored; a new series") as caught:
        train(
            Linear,
            regression,
            [monitor],
            tmp_path,
            ckpt_path=tmp_path / "damaged.ckpt",
            max_epochs=4,
        )
    assert len(monitor.history) >= 1
    message = next(str(w.message) for w in caught if "is ignored" in str(w.message))
    table.append(table_row("a checkpoint with a damaged probe entry", "a warning", message))


# -- valid uses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probe",
    [
        lambda: (batch for batch in regression()),
        lambda: itertools.repeat(tuple(BATCH)),
        lambda: DataLoader(Endless(), batch_size=16),
        lambda: DataLoader(TensorDataset(*BATCH), batch_size=10, num_workers=1),
    ],
    ids=["a generator", "an endless iterator", "an endless dataset", "with a worker"],
)
def test_valid_probes(probe, tmp_path):
    monitor = HessianMonitor(probe=probe(), probe_samples=64, **ALWAYS)
    train(Linear, regression, [monitor], tmp_path)
    assert len(monitor.history) == 6
    assert monitor.failed == 0
    assert 20 <= monitor.history[0]["probe_samples"] <= 80


@pytest.mark.parametrize("what", ["validate", "test"])
def test_nothing_is_measured_outside_of_fit(what, tmp_path):
    callbacks = [make() for make in KINDS]
    module, settings = Validated(), {"accelerator": "cpu", "logger": False}
    trainer = pl.Trainer(
        callbacks=list(callbacks), enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=tmp_path, **settings,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    getattr(trainer, what)(module, regression(), verbose=False)
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())
    assert all(not callback.history for callback in callbacks[:-1])
    assert list(tmp_path.iterdir()) == []


def test_hooks_called_by_hand_do_nothing(tmp_path):
    """No Trainer has opened a session for these callbacks."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    module = Linear()
    for make in KINDS[:-1]:
        callback = make()
        callback.on_train_start(trainer, module)
        callback.on_train_epoch_start(trainer, module)
        callback.on_train_batch_start(trainer, module, BATCH, 0)
        callback.on_train_batch_end(trainer, module, None, BATCH, 0)
        callback.on_validation_start(trainer, module)
        callback.on_train_end(trainer, module)
        callback.on_exception(trainer, module, ValueError())
        callback.teardown(trainer, module, "fit")
        assert callback.history == []
        assert callback.measured == 0
