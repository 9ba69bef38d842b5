"""Wrong uses that are seen only when a run starts, or while it goes on: nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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
from tests.bad_input.of_slices import LINE
from tests.bad_input.rows import ADVICE, table_row
from tests.conftest import TABLES
from tests.runs import differences, train
from tests.small import Linear, regression

ALWAYS = {"every_n_train_steps": 1, "max_overhead": None}
BATCH = next(iter(regression()))
OLD_ROW = {"step": 7, "monitor": "hessian", "hessian/top_eigenvalue": 3.0}
EDGE = "hessian/edge_ratio"


class Manual(Linear):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Validated(Linear):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        pass


class Apart(Linear):
    """The optimizer holds a parameter that is not the module's."""

    def configure_optimizers(self):
        self.__dict__["loose"] = nn.Parameter(torch.ones(1))
        return torch.optim.SGD([self.__dict__["loose"]], lr=0.1)


class Adagrad(Linear):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


class Twin(HessianMonitor):
    """Another class with the same keys."""


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(zip(*BATCH, strict=True))


def _torn(folder):
    path = folder / "torn.ckpt"
    torch.save({"state_dict": Linear().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:300])
    return path


def _spent():
    iterator = iter([tuple(BATCH)])
    next(iterator)
    return iterator


class Elsewhere(pl.Callback):
    """Gives ``monitor`` to another Trainer while this one runs."""

    def __init__(self, monitor, folder):
        self.monitor, self.folder = monitor, folder

    def on_train_start(self, trainer, pl_module):
        train(Linear, regression, [self.monitor], self.folder / "inner")


def _in_two(folder):
    monitor = HessianMonitor(**ALWAYS)
    return [monitor, Elsewhere(monitor, folder)]


class ByHand(pl.Callback):
    """Hands its own hook on to a callback that no Trainer has."""

    def setup(self, trainer, pl_module, stage):
        HessianMonitor().setup(trainer, pl_module, stage)


@dataclass(frozen=True)
class Run:
    """A run that is set up wrongly.

    Attributes:
        done: what was done, for the table.
        callbacks: makes them, given a folder.
        says: regular expressions; messages match all of them.
        error: what ends the run before it trains; None: a warning, and training goes on.
    """

    done: str
    callbacks: Callable[[Any], list[pl.Callback]]
    says: tuple[str, ...]
    error: type[Exception] | None = None
    module: Callable[[], pl.LightningModule] = Linear
    settings: dict[str, Any] = field(default_factory=dict)
    resumes: Callable[[Any], Any] | None = None


REFUSED = [
    Run(
        "SharpnessEarlyStopping(monitor='hessian/edge_ration') beside a HessianMonitor",
        lambda _: [HessianMonitor(), SharpnessEarlyStopping("hessian/edge_ration", 1.0)],
        (r"monitor='hessian/edge_ration'\): no callback of this Trainer logs", "pass one of these"),
        MisconfigurationException,
    ),
    Run(
        "SharpnessEarlyStopping(monitor='train_loss'), which Lightning logs",
        lambda _: [HessianMonitor(), SharpnessEarlyStopping("train_loss", 1.0)],
        (r"monitor='train_loss'\): no callback of this Trainer logs", "available: .*edge_ratio"),
        MisconfigurationException,
    ),
    Run(
        "SharpnessEarlyStopping without a monitor",
        lambda _: [SharpnessEarlyStopping(EDGE, 1.0)],
        ("monitor='hessian/edge_ratio'", "add a HessianMonitor"),
        MisconfigurationException,
    ),
    Run(
        "two callbacks of different classes with the same keys",
        lambda _: [HessianMonitor(), Twin()],
        ("2 callbacks would log under 'hessian'", r"give each .* another name=\.\.\."),
        MisconfigurationException,
    ),
    Run(
        "the same callback twice in the list",
        lambda _: [HessianMonitor()] * 2,
        ("more than one stateful callback of type `HessianMonitor`",),
        RuntimeError,
    ),
    *(
        Run(
            f"{kind.__name__}(loss_fn=None) with manual optimisation",
            lambda _, kind=kind: [kind()],
            ("Manual optimises manually", rf"Pass {kind.__name__}\(loss_fn=lambda pl_module"),
            MisconfigurationException,
            Manual,
        )
        for kind in (HessianMonitor, LandscapeMonitor)
    ),
    Run(
        "HessianMonitor(parameters='lyer.*')",
        lambda _: [HessianMonitor(parameters="lyer.*")],
        (r"parameters=\['lyer\.\*'\]\): no parameter matches", r"expected glob .*'layer\.weight'"),
        ValueError,
    ),
    *(
        Run(
            f"{kind.__name__}(blocks={{'lyer.weight': 'first'}})",
            lambda _, kind=kind: [kind(blocks={"lyer.weight": "first"})],
            (r"blocks=\{'lyer\.weight'.*there is no parameter 'lyer", r"expected names among"),
            ValueError,
        )
        for kind in (HessianMonitor, InterpolationMonitor)
    ),
    Run(
        "HessianMonitor(probe=DataLoader([]))",
        lambda _: [HessianMonitor(probe=DataLoader([]))],
        ("probe=DataLoader: it holds no batch", "pass a DataLoader or a list with one batch"),
        ValueError,
    ),
    Run(
        "HessianMonitor(probe=an iterator that was used up)",
        lambda _: [HessianMonitor(probe=_spent())],
        ("probe=list_iterator: it holds no batch, or all were taken from it before", "pass a D"),
        ValueError,
    ),
    Run(
        "LandscapeMonitor(between=(a, b)) of another network",
        lambda _: [LandscapeMonitor(directions="between", between=({}, {}))],
        (r"between\[0\]=\.\.\.\): it holds no parameter 'layer\.weight'", "expected the state"),
        ValueError,
    ),
    Run(
        "InterpolationMonitor(reference=state dict of another network)",
        lambda _: [InterpolationMonitor(reference={"a": torch.ones(2)})],
        ("reference=.* holds no parameter 'layer.weight'", "expected all that are measured"),
        ValueError,
    ),
    Run(
        "InterpolationMonitor(reference=a damaged file)",
        lambda folder: [InterpolationMonitor(reference=_torn(folder))],
        (r"reference=.*torn\.ckpt.*cannot be read safely", "expected a checkpoint or "),
        ValueError,
    ),
    Run(
        "a callback given to another Trainer while it measures in one",
        _in_two,
        ("it is measuring in another Trainer", "give each Trainer a callback of its own"),
        MisconfigurationException,
    ),
    Run(
        "a hook of a callback called by hand",
        lambda _: [ByHand()],
        ("not among the callbacks of this Trainer", r"pass it to Trainer\(callbacks=\[\.\.\.\]\)"),
        MisconfigurationException,
    ),
    Run(
        "Trainer.fit(ckpt_path=a damaged checkpoint)",
        lambda _: [HessianMonitor()],
        ("corrupted|failed finding central directory",),
        RuntimeError,
        resumes=_torn,
    ),
]  # fmt: skip


def _loss(what, function, *says):
    return Run(
        f"SharpnessMonitor(loss_fn=...) that returns {what}",
        lambda _: [SharpnessMonitor(loss_fn=function, **ALWAYS)],
        (r"sharpness: a measurement failed \(", *says),
    )


def _outputs(module, batch):
    return module.layer(batch[0])


TOLD = [
    Run(
        "HessianMonitor(probe=a batch that does not fit the module)",
        lambda _: [HessianMonitor(probe=(torch.ones(4, 3), torch.ones(4, 1)), **ALWAYS)],
        (r"hessian: a measurement failed .*shapes", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(probe=[x, y]), one batch as a list",
        lambda _: [HessianMonitor(probe=list(BATCH), **ALWAYS)],
        ("probe is a list, so each of its items was taken as a", r"pass probe=tuple\(batch\)"),
    ),
    Run(
        "HessianMonitor(probe=(text, text)), which hold no tensor",
        lambda _: [HessianMonitor(probe=("a", "b"), **ALWAYS)],
        ("a measurement failed .*must be Tensor, not str", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(probe=NumPy arrays)",
        lambda _: [HessianMonitor(probe=tuple(t.numpy() for t in BATCH), **ALWAYS)],
        ("must be Tensor, not numpy", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(k=10) of a module with 5 parameters",
        lambda _: [HessianMonitor(k=10, **ALWAYS)],
        ("k=10: expected an integer from 1 to the 5 parameters",),
    ),
    Run(
        "HessianMonitor(parameters=['layer.*', 'haed.*'])",
        lambda _: [HessianMonitor(parameters=["layer.*", "haed.*"], **ALWAYS)],
        (r"parameters=\['layer.*no parameter matches 'haed\.\*'", "expected glob patterns"),
    ),
    _loss("a dict", lambda module, batch: {"total": 1.0}, "returned dict: expected a scalar"),
    _loss("nothing", lambda module, batch: None, "returned NoneType: expected a scalar"),
    _loss("one loss an example", _outputs, r"of shape \(20, 1\): expected a scalar, e.g. loss"),
    _loss("a complex loss", lambda *a: _outputs(*a).sum() * 1j, "expected a real scalar"),
    _loss("a detached loss", lambda *a: _outputs(*a).sum().detach(), "expected one that loss"),
    _loss("an integer", lambda *a: _outputs(*a).sum().long(), "int64.*expected one that loss"),
    Run(
        "GeneralizationMonitor(metric_fn=...) that returns a number",
        lambda _: [
            GeneralizationMonitor(validation_probe=[BATCH], metric_fn=lambda *a: 3, **ALWAYS)
        ],
        ("metric_fn returned int: expected a mapping such as",),
    ),
    Run(
        "GeneralizationMonitor() in a fit without validation",
        lambda _: [GeneralizationMonitor(**ALWAYS)],
        ("this fit has no validation loop", r"pass validation_probe=\.\.\."),
    ),
    Run(
        "HessianMonitor with no trainable parameter in an optimizer",
        lambda _: [HessianMonitor(**ALWAYS)],
        ("none requires a gradient: expected at least one trainable",),
        module=Apart,
    ),
    Run(
        "SharpnessEarlyStopping(monitor='hessian/edge_ratio') of an optimizer without an edge",
        lambda _: [HessianMonitor(**ALWAYS), SharpnessEarlyStopping(EDGE, 1.0)],
        ("a measurement came without 'hessian/edge_ratio'", "no stability edge is logged: Adagrad"),
        module=Adagrad,
    ),
]  # fmt: skip


@cache
def plain(module):
    """What the run without our callbacks ends with; none of these modules draws at random."""
    return train(module, regression).trainer.lightning_module.state_dict()


def attempt(case, folder):
    """``(error, our warnings, the module's first and last weights)``."""
    kept = []

    def make():
        kept.append(case.module())
        kept.append({n: p.detach().clone() for n, p in kept[0].named_parameters()})
        return kept[0]

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
    told = [str(w.message) for w in caught if not any(w_ in str(w.message) for w_ in foreign)]
    return error, told, kept[1:2], kept[0].state_dict() if kept else None


@pytest.fixture
def earlier(tmp_path):
    """What another run has written into the same folder, which must stay whole."""
    (tmp_path / "landscape").mkdir()
    (tmp_path / "history.jsonl").write_text(json.dumps(OLD_ROW) + "\n")
    LINE.save(tmp_path / "landscape" / "landscape-line-1-step00000099.npz")
    torch.save(Linear().state_dict(), tmp_path / "old.ckpt")
    yield tmp_path
    histories = [read_history(path) for path in tmp_path.glob("history*.jsonl")]
    assert [OLD_ROW] in histories
    assert Slice.load(tmp_path / "landscape" / "landscape-line-1-step00000099.npz")
    assert set(torch.load(tmp_path / "old.ckpt", weights_only=True)) == {"layer.weight"}
    assert [path.name for path in tmp_path.rglob(".*")] == []  # nothing half written


@pytest.fixture
def table(request):
    return request.config.stash[TABLES]["wrong uses"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.done)
def test_refused_before_training(case, earlier, table):
    error, _, first, last = attempt(case, earlier)
    assert type(error) is case.error, error
    for words in case.says:
        assert re.search(words, str(error), re.DOTALL), str(error)
    if "stateful callback" not in case.says[0] and case.resumes is None:  # not our words
        assert ADVICE.search(str(error))
    for weights in first:
        assert differences(dict(weights), dict(last)) == []
    table.append(table_row(case.done, case.error.__name__, str(error)))


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.done)
def test_told_and_training_goes_on(case, earlier, table):
    error, told, _, last = attempt(case, earlier)
    assert error is None
    for words in case.says:
        assert any(re.search(words, message, re.DOTALL) for message in told), told
    assert len(told) <= 4  # not at every step
    assert any(ADVICE.search(message) for message in told)
    assert differences(dict(plain(case.module)), dict(last)) == []
    said = next(m for m in told if re.search(case.says[0], m, re.DOTALL))
    table.append(table_row(case.done, "a warning", said))


# -- the disk -------------------------------------------------------------------------------------


STEPS = (1, 4, 6)  # the last one is that of the end


def _writing(folder):
    """Two that draw, at ``STEPS``."""
    few = {"probe": [tuple(BATCH)], "every_n_train_steps": 3, "max_overhead": None}
    drawing = LandscapeMonitor(resolution=2, line_resolution=0, **few)
    return [drawing, InterpolationMonitor(resolution=3, **few)]


def test_a_folder_that_cannot_be_written_is_told_once_for_each_kind_of_file(tmp_path, table):
    (tmp_path / "landscape").write_text("a file where the folder should be")
    case = Run("Trainer(default_root_dir=...) that cannot be written", _writing, ())
    error, told, _, last = attempt(case, tmp_path)
    assert error is None
    told = [message for message in told if "could not be written" in message]
    kinds = [re.sub(r"\d+", "#", message) for message in told]
    assert len(kinds) == len(set(kinds)) <= 6  # of files, not one for each step
    for message in told:
        assert re.search("make room, or give the logger a directory .*; training and", message)
    assert differences(dict(plain(Linear)), dict(last)) == []
    assert len(read_history(tmp_path / "history.jsonl")) == len(STEPS) * 2  # these could be
    table.append(table_row(case.done, "a warning", told[0].replace(str(tmp_path), "...")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_is_full_while_a_picture_is_written(tmp_path, table):
    folder = tmp_path / "landscape"
    folder.mkdir()
    for name in ("landscape-plane-step00000001.png", "interpolation-line-step00000004.npz"):
        (folder / f".{name}").symlink_to("/dev/full")
    case = Run("a disk that is full while a picture is written", _writing, ())
    error, told, _, last = attempt(case, tmp_path)
    assert error is None
    told = [message for message in told if "could not be written" in message]
    assert len(told) == 2
    assert "landscape-plane-step00000001.png could not be written" in told[0]
    assert "interpolation-line-step00000004.npz could not be written" in told[1]
    for message in told:
        assert re.search("No space left on device.*; make room, or give the logger", message)
    assert differences(dict(plain(Linear)), dict(last)) == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    written = {path.name for path in folder.iterdir()}
    assert not {"landscape-plane-step00000001.png", "interpolation-line-step00000004.npz"} & written
    assert {"landscape-plane-step00000001.npz", "landscape-plane-step00000004.png"} <= written
    for path in folder.glob("*.npz"):
        Slice.load(path)
    assert len(read_history(tmp_path / "history.jsonl")) == len(STEPS) * 2
    table.append(table_row(case.done, "a warning", told[0].replace(str(tmp_path), "...")))


# -- states of others -----------------------------------------------------------------------------

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
def test_a_foreign_state_is_ignored_and_said(state, table):
    for make in KINDS:
        callback = make()
        before = callback.state_dict()
        with pytest.warns(
            match=r"the state in the checkpoint is not .*\(see \[.*ignored"
        ) as caught:
            callback.load_state_dict(state)
        assert callback.state_dict() == before
    said = str(caught[0].message)
    table.append(table_row(f"load_state_dict({state!r})", "a warning", said))


@pytest.mark.parametrize("make", KINDS[:-1])
def test_a_state_of_another_class_is_taken_as_far_as_it_goes(make):
    callback = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback.load_state_dict(
            {**COMMON, "scales": {"a": 3, "b": {"linthresh": "x", "limit": 1}}}
        )
    assert callback.measured == 1
    assert getattr(callback, "_scales", {}) == {}


def test_a_probe_that_a_checkpoint_tells_wrongly_of(tmp_path, table):
    """A new series starts, which is said; the run ends as without us."""
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    train(Linear, regression, [HessianMonitor(**ALWAYS), keep], tmp_path, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["callbacks"]["HessianMonitor{'name': None}"]["probe"] = {"file": 3}
    torch.save(saved, tmp_path / "damaged.ckpt")
    monitor = HessianMonitor(**ALWAYS)
    with pytest.warns(match="what the checkpoint tells of it is damaged; a new series") as caught:
        train(
            Linear,
            regression,
            [monitor],
            tmp_path,
            ckpt_path=tmp_path / "damaged.ckpt",
            max_epochs=4,
        )
    assert len(monitor.history) >= 1
    said = next(str(w.message) for w in caught if "is damaged" in str(w.message))
    table.append(table_row("a checkpoint with a damaged probe entry", "a warning", said))


# -- what is no fault -----------------------------------------------------------------------------


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
def test_probes_that_can_be_read(probe, tmp_path):
    monitor = HessianMonitor(probe=probe(), probe_samples=64, **ALWAYS)
    train(Linear, regression, [monitor], tmp_path)
    assert len(monitor.history) == 6
    assert monitor.failed == 0
    assert 20 <= monitor.history[0]["probe_samples"] <= 80


@pytest.mark.parametrize("what", ["validate", "test"])
def test_outside_of_a_fit_nothing_is_done(what, tmp_path):
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
    """Without a Trainer that has opened a session: there is nothing to measure in."""
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
