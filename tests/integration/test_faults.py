"""After any error while measuring the run continues in the same state, with a warning.

Runs with errors only at the probe are compared bitwise with a run without callbacks.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import signal
import warnings
import weakref
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

import lightning_landscape.figures
from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
)
from lightning_landscape.geometry import Objective
from lightning_landscape.training.data.batch import ProbeBatch
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.failures import count_failure
from lightning_landscape.training.isolation import module_state
from lightning_landscape.training.last_step import LastStep
from lightning_landscape.training.output import recorder
from tests.oracles import arguments
from tests.runs import MemoryLogger, differences, rows_of, train
from tests.small import Linear, regression


class Net(Linear):
    """A nonlinear model with every kind of state that an error could leave changed."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)
        )
        self.calls = 0
        self.losses = []

    @property
    def probing(self):
        """Whether a callback evaluates the loss, not training."""
        return self.log.__name__ == "_log_nothing"

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss)
        return self.at_the_probe(loss) if self.probing else loss

    def at_the_probe(self, loss):
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


class Plain(Net):
    """Without noise, so that runs can be compared by their weights alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))


class _OutOfMemoryBackwards(torch.autograd.Function):
    """The identity; the derivative of order ``order`` runs out of memory."""

    @staticmethod
    def forward(ctx, loss, order):
        ctx.order = order
        ctx.save_for_backward(loss)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.order == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        # Something whose own derivative is this function's again.
        (loss,) = ctx.saved_tensors
        return _OutOfMemoryBackwards.apply(grad + 0 * loss, ctx.order - 1), None


class Raises(Net):
    def at_the_probe(self, loss):
        with torch.no_grad():
            self.layer[1].running_mean += 1.0
        raise RuntimeError("no such thing for the probe")


class NoMemory(Net):
    def at_the_probe(self, loss):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


class NoMemoryForGradients(Net):
    def at_the_probe(self, loss):
        return _OutOfMemoryBackwards.apply(loss, 1)


class NoMemoryForProducts(Net):
    def at_the_probe(self, loss):
        return _OutOfMemoryBackwards.apply(loss, 2)


class HookRaises(Net):
    def __init__(self):
        super().__init__()
        self.layer[2].register_forward_hook(self.hook)

    def hook(self, *_):
        if self.probing:
            raise ValueError("the hook does not like it")


class NoLoss(Net):
    def at_the_probe(self, loss):
        return None


class Displaced(Net):
    """Fails as soon as the weights are perturbed."""

    def at_the_probe(self, loss):
        if not torch.equal(self.layer[0].weight, self.trainer.own_weight):
            raise RuntimeError("half way")
        return loss


class NoteWeights(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.own_weight = pl_module.layer[0].weight.detach().clone()


def monitors(**extra):
    common = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 40, **extra}
    return [
        HessianMonitor(**common),
        SharpnessMonitor(**common),
        LandscapeMonitor(resolution=2, line_resolution=3, **common),
    ]


@contextlib.contextmanager
def recorded_warnings():
    """The messages of all warnings in the context."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(w.message) for w in caught)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return train(Net, regression, (), tmp_path_factory.mktemp("without"), max_epochs=3).state


# -- errors at the probe only ---------------------------------------------------------------------

GENERAL = "pass a fixed probe=... that fits it, or loss_fn="
MEMORY = "To use less memory, pass probe=... in smaller batches, or engine='finite_difference'"


@pytest.mark.parametrize(
    ("module", "reason", "remedy", "measuring"),
    [
        (Raises, "RuntimeError: no such thing for the probe, test_faults.py line", GENERAL, []),
        (NoMemory, "OutOfMemoryError: CUDA out of memory (simulated)", MEMORY, []),
        (NoMemoryForGradients, "OutOfMemoryError: CUDA out of", MEMORY, ["landscape"]),
        (NoMemoryForProducts, "OutOfMemoryError: CUDA out of", MEMORY, ["landscape"]),
        (HookRaises, "ValueError: the hook does not like it", GENERAL, []),
        (NoLoss, "TypeError: training_step returned NoneType for a probe batch", GENERAL, []),
        (Displaced, "RuntimeError: half way, test_faults.py line", GENERAL, ["hessian"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_run_is_bitwise_equal(without, tmp_path, module, reason, remedy, measuring):
    callbacks = monitors()
    with recorded_warnings() as messages:
        run = train(module, regression, [NoteWeights(), *callbacks], tmp_path, max_epochs=3)
    # Which module and callbacks they were is not part of the state.
    found = differences(without, {**run.state, "callbacks": []})
    assert [d for d in found if "_forward_hooks" not in d] == []
    for monitor in callbacks:
        if monitor.prefix in measuring:
            assert (monitor.failed, monitor.disabled) == (0, False)
            assert monitor.measured == 8  # from the second batch of nine
            continue
        assert (monitor.measured, monitor.failed, monitor.disabled) == (0, 3, True)
        ours = [m for m in messages if m.startswith(f"{monitor.prefix}: a measurement failed")]
        assert len(ours) == 3
        assert all(reason in m and remedy in m for m in ours)
        assert "training and measuring continue" in ours[1]
        assert "it failed 3 times in a row and stops measuring; training continues" in ours[2]


def _raise(message):
    raise ValueError(message)


@pytest.mark.parametrize(
    ("raises", "advised"),
    [
        # Messages of this package contain advice already.
        (lambda: Objective(lambda: 0, {"w": torch.ones(1)}), False),
        (lambda: SharpnessEarlyStopping("hessian/edge", 1.0, stop_when="below"), False),
        (lambda: _raise("expected another batch"), True),
    ],
)
def test_advice_is_added_to_errors_without_advice(raises, advised):
    with pytest.raises((TypeError, ValueError), match="") as caught:
        raises()
    with pytest.warns() as caught_warnings:
        count_failure(HessianMonitor(), caught.value, rank=0)
    assert (GENERAL in str(caught_warnings[0].message)) == advised


def test_out_of_memory_for_the_copy_of_the_module(without, tmp_path, monkeypatch):
    """Nothing has been changed yet; every callback that is due warns."""
    copy = module_state.ModuleState.__init__
    left = [2]

    def fails_twice(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room for the copy")
        copy(self, *args, **kwargs)

    monkeypatch.setattr(module_state.ModuleState, "__init__", fails_twice)
    callbacks = monitors()
    with recorded_warnings() as messages:
        run = train(Net, regression, callbacks, tmp_path, max_epochs=3)
    assert differences(without, run.state) == []
    assert [(m.failed, m.measured, m.disabled) for m in callbacks] == [(2, 6, False)] * 3
    assert sum("no room for the copy" in m for m in messages) == 6


@pytest.mark.parametrize(
    ("owner", "name", "faults", "reason"),
    [
        (ProbeBatch, "copy_of", 1, "no room for a batch"),
        # The first failing copy is of a step that is not measured.
        (
            LastStep,
            "copy_batch",
            2,
            "the batch and the weights before the step could not be copied .*no room for a batch",
        ),
    ],
    ids=["for the probe", "of the last batch"],
)
def test_out_of_memory_for_the_copy_of_a_batch(
    without, tmp_path, monkeypatch, owner, name, faults, reason
):
    copy = getattr(owner, name)
    left = [faults]

    def fails_once(*args):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room for a batch")
        return copy(*args)

    monkeypatch.setattr(owner, name, fails_once)
    monitor = HessianMonitor(
        every_n_train_steps=1, max_overhead=None, probe_samples=40, batch_edge_ratio=True
    )
    with pytest.warns(match=f"hessian: a measurement failed .*{reason}"):
        run = train(Net, regression, [monitor], tmp_path, max_epochs=3)
    assert differences(without, run.state) == []
    assert monitor.history[-1]["probe_samples"] == 40
    assert math.isfinite(monitor.history[-1]["hessian/batch_edge_ratio"])


def test_disabled_only_after_three_failures_in_a_row(tmp_path):
    class Sometimes(Net):
        def at_the_probe(self, loss):
            if self.global_step in (3, 4, 6, 7, 8):
                raise RuntimeError("not now")
            return loss

    callbacks = monitors()
    with recorded_warnings():
        train(Sometimes, regression, callbacks, tmp_path, max_epochs=4)
    for monitor in callbacks:
        assert [row["step"] for row in monitor.history] == [2, 5]
        assert (monitor.failed, monitor.disabled) == (5, True)


def test_failing_monitor_does_not_affect_others(tmp_path):
    def fails(module, batch):
        raise RuntimeError("only here")

    broken = SharpnessMonitor(
        every_n_train_steps=1, max_overhead=None, loss_fn=fails, name="broken", probe_samples=40
    )
    alone, beside = monitors(), monitors()
    train(Plain, regression, alone, tmp_path / "alone", max_epochs=3)
    with recorded_warnings():
        callbacks = [beside[0], broken, *beside[1:]]
        train(Plain, regression, callbacks, tmp_path / "beside", max_epochs=3)
    assert broken.disabled
    for first, second in zip(alone, beside, strict=True):
        assert first.history == second.history


def test_nothing_stays_alive_after_an_error(tmp_path):
    """The exception keeps neither the graph nor the module alive, with the collector off."""
    graphs, alive = Mock(), Mock()  # isolation restores all other state

    class Fails(NoMemoryForProducts):
        def __init__(self):
            super().__init__()
            self.layer[4].register_forward_pre_hook(self.note)

        def note(self, module, inputs):
            if self.probing and torch.is_grad_enabled():
                graphs(weakref.ref(inputs[0]))  # saved for the backward of the last layer

    def count(module, batch):
        alive(sum(graph() is not None for graph in arguments(graphs)))
        return module.layer[0].weight.square().sum()

    class Check(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            alive(sum(graph() is not None for graph in arguments(graphs)))

    common = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 40}
    monitor = HessianMonitor(**common)
    beside = SharpnessMonitor(loss_fn=count, **common)  # measures after it in the same round
    gc.collect()
    gc.disable()
    try:
        with recorded_warnings():
            train(Fails, regression, [monitor, beside, Check()], tmp_path)
    finally:
        gc.enable()
    assert monitor.failed == 3
    assert len(arguments(alive)) > 10
    assert not any(arguments(alive))


# -- exceptions that end the run ------------------------------------------------------------------


@pytest.fixture
def own_sigint():
    """Restore the handler of SIGINT, which Lightning replaces after the first Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["displaced", "putting back"])
def test_interrupted_measurement(tmp_path, monkeypatch, own_sigint, kind, where):
    """The checkpoint written afterwards and the module have the weights of the run."""

    class Interrupted(Plain):
        def at_the_probe(self, loss):
            moved = not torch.equal(self.layer[0].weight, self.trainer.own_weight)
            if where == "displaced" and moved and self.global_step == 4:
                raise kind
            return loss

    if where == "putting back":
        restore, calls = module_state.ModuleState._restore, [0]

        def stops_half_way(state):
            calls[0] += 1
            if calls[0] == 1:
                for content in state._trained:
                    content.value.detach().fill_(7.0)
                raise kind
            return restore(state)

        monkeypatch.setattr(module_state.ModuleState, "_restore", stops_half_way)
    saver = ModelCheckpoint(tmp_path, filename="saved", save_on_exception=True)
    callbacks = monitors()
    modules = []

    def make():
        modules.append(Interrupted())
        return modules[-1]

    order = [NoteWeights(), *callbacks, saver]
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        train(make, regression, order, tmp_path, enable_checkpointing=True)
    steps = 4 if where == "displaced" else 2
    expected = train(Plain, regression, (), tmp_path, max_steps=steps).state["parameters"]
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    assert differences(expected, dict(saved["state_dict"])) == []
    live = {name: p.detach() for name, p in modules[0].named_parameters()}
    assert differences(expected, live) == []
    assert all(p.requires_grad for p in modules[0].parameters())
    assert [m._session for m in callbacks] == [None] * 3


# -- a probe or a network that no longer fits -----------------------------------------------------


def test_probe_that_no_longer_fits(tmp_path):
    """A network whose input grows: the captured probe has the previous size."""

    class Resized(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 0:
                self.layer[0] = nn.Linear(10, 6)
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]

        def training_step(self, batch, batch_idx):
            x, y = batch
            wide = torch.cat([x, x], 1) if self.current_epoch and not self.probing else x
            return super().training_step((wide, y), batch_idx)

    callbacks = monitors()
    without = train(Resized, regression, (), tmp_path / "without", max_epochs=3).state
    with recorded_warnings() as messages:
        run = train(Resized, regression, callbacks, tmp_path / "with", max_epochs=3)
    assert differences(without, run.state) == []
    assert [m.disabled for m in callbacks] == [True] * 3
    assert [[row["step"] for row in m.history] for m in callbacks] == [[2, 3]] * 3
    assert sum("mat1 and mat2 shapes cannot be multiplied" in m for m in messages) == 9


def test_layers_that_grow(tmp_path):
    """The same names with other shapes: previous warm starts are ignored."""

    class Grows(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch:
                width = 6 + 2 * self.current_epoch
                self.layer[0], self.layer[2] = nn.Linear(5, width), nn.Linear(width, 1)
                self.trainer.optimizers = [torch.optim.Adam(self.parameters(), lr=0.01)]

    common = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 40}
    callbacks = [
        HessianMonitor(
            blocks=True, min_eigenvalue=True, batch_edge_ratio=True, update_curvature=True, **common
        ),
        SharpnessMonitor(critical=True, **common),
        LandscapeMonitor(directions="eigenvectors", resolution=2, line_resolution=2, **common),
    ]
    run = train(Grows, regression, callbacks, tmp_path, max_epochs=3)
    without = train(Grows, regression, (), tmp_path, max_epochs=3).state
    assert differences(without, run.state) == []
    assert [(m.measured, m.failed) for m in callbacks] == [(8, 0)] * 3
    assert all(math.isfinite(row["hessian/edge_ratio"]) for row in callbacks[0].history)


# -- where the values go --------------------------------------------------------------------------


@pytest.mark.pictures
def test_errors_in_all_outputs(tmp_path, monkeypatch):
    class BadLogger(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if any("hessian" in key or "sharpness" in key for key in metrics):
                raise ConnectionError("the server is away")
            super().log_metrics(metrics, step)

    class BadLog(Net):
        def log(self, name, *args, **kwargs):
            if "/" in name:
                raise KeyError("no slashes here")
            super().log(name, *args, **kwargs)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def undrawable(*_, **__):
        raise ValueError("cannot be drawn")

    monkeypatch.setattr(recorder, "_ends_in_incomplete_line", full)
    monkeypatch.setattr(Slice, "save", full)
    monkeypatch.setattr(Probe, "fingerprint", undrawable)
    monkeypatch.setattr(lightning_landscape.figures, "plane_figure", undrawable)
    monkeypatch.setattr(SharpnessEarlyStopping, "_count", undrawable)
    callbacks = monitors()
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 1e9)
    plain = train(BadLog, regression, (), tmp_path / "plain").state
    loggers = [BadLogger(), MemoryLogger()]
    with recorded_warnings() as messages:
        run = train(BadLog, regression, [*callbacks, stopper], tmp_path, logger=loggers)
    warned = [m for m in messages if "could not be" in m]
    for reason in (
        "BadLogger could not be written (ConnectionError: the server is away)",
        "trainer.callback_metrics could not be written (KeyError: 'no slashes here')",
        "history.jsonl could not be written (OSError: [Errno 28] No space left on device)",
        "landscape-plane-step00000002.npz could not be written (OSError",
        "landscape/plane could not be drawn (ValueError: cannot be drawn)",
        "the probe could not be written (ValueError: cannot be drawn)",
        "SharpnessEarlyStopping(monitor='hessian/edge_ratio') could not be informed of a",
    ):
        assert sum(reason in m for m in warned) == 1, reason
    assert all(m.endswith("training and measuring continue") for m in warned)
    assert differences(plain["parameters"], run.state["parameters"]) == []
    # All other outputs are written.
    assert [(m.measured, m.failed) for m in callbacks] == [(5, 0)] * 3
    assert len(loggers[1].values("hessian/top_eigenvalue")) == 5
    folder = tmp_path / "landscape"
    assert len(list(folder.glob("landscape-line-step*.png"))) == 5
    assert not list(folder.glob("*.npz"))
    assert not list(folder.glob(".*"))


# -- losses that are not finite -------------------------------------------------------------------

SCALARS = ("top_eigenvalue", "edge_ratio", "sam", "gradient_norm", "gradient_curvature")


def strict_rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.pictures
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_at_the_probe_only(without, tmp_path, value):
    class Broken(Net):
        def at_the_probe(self, loss):
            return loss * value

    callbacks = monitors()
    run = train(Broken, regression, callbacks, tmp_path, max_epochs=3)
    assert differences(without, run.state) == []
    rows = [row for m in callbacks for row in m.history]
    found = [row[key] for row in rows for key in row if key.rpartition("/")[2] in SCALARS]
    assert len(found) == 8 * len(SCALARS)
    assert all(math.isnan(number) for number in found)
    # Loggers get NaN; the file has null, which is read as NaN.
    assert all(math.isnan(x) for _, x in run.logger.values("hessian/top_eigenvalue"))
    kept = strict_rows(tmp_path / "history.jsonl")
    assert [r["hessian/edge_ratio"] for r in kept if "hessian/edge_ratio" in r] == [None] * 8
    again = rows_of(tmp_path / "history.jsonl")
    ours = [row for row in again if "sharpness/sam" in row]
    assert all(math.isnan(row["sharpness/sam"]) for row in ours)
    residuals = [row["residuals"] for row in again if row["monitor"] == "hessian"]
    assert len(residuals) == 8
    assert all(math.isnan(r["hessian/top_eigenvalue"]) for r in residuals)
    assert repr(ours) == repr(callbacks[1].history)
    # Pictures of nothing are drawn, and set no limits for those to come.
    pictures = [*(tmp_path / "landscape").glob("landscape-[lp]*.png")]
    assert len(pictures) == 16
    assert callbacks[2]._limits == {}


class Explodes(Plain):
    """The training loss itself is NaN from the fourth batch on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step >= 3 and not self.probing else loss


class ExplodesWithAdam(Explodes):
    optimizer = torch.optim.Adam


@pytest.mark.parametrize("module", [Explodes, ExplodesWithAdam])
def test_training_that_becomes_nan(tmp_path, module):
    """Every quantity is NaN, and all solvers terminate."""
    common = {"every_n_train_steps": 3, "max_overhead": None, "probe_samples": 40}
    callbacks = [
        HessianMonitor(
            k=2, min_eigenvalue=True, blocks=True, trace_samples=2, density_samples=2,
            batch_edge_ratio=True, update_curvature=True, **common,
        ),
        HessianMonitor(name="power", method="power", **common),
        HessianMonitor(name="differences", engine="finite_difference", **common),
        SharpnessMonitor(
            worst_case=True, average=True, samples=2, keskar=True, critical=True, **common
        ),
        SharpnessMonitor(
            name="other", adaptive=True, worst_case=True, worst_case_norm="linf", per_batch=True,
            **common,
        ),
        LandscapeMonitor(resolution=2, line_resolution=3, **common),
        LandscapeMonitor(
            name="top", directions="eigenvectors", resolution=2, line_resolution=3, **common
        ),
        LandscapeMonitor(
            name="steep", directions="gradient", resolution=2, line_resolution=3, **common
        ),
    ]  # fmt: skip
    with recorded_warnings():
        run = train(module, regression, callbacks, tmp_path, max_epochs=3)
    plain = train(module, regression, (), tmp_path / "plain", max_epochs=3)
    assert differences(plain.state["parameters"], run.state["parameters"]) == []
    finite_still = {
        f"{prefix}/{name}"
        for prefix in ("hessian", "hessian/power", "hessian/differences")
        for name in ("edge", "clipped_share")
    }
    for monitor in callbacks:
        assert (monitor.measured >= 2, monitor.failed) == (True, 0)
        broken = [row for row in monitor.history if row["step"] > 3]
        assert broken
        for row in broken:
            values = {k: v for k, v in row.items() if "/" in k and not k.endswith("hvps")}
            assert {key for key in values if not math.isnan(values[key])} <= finite_still
            assert math.isnan(row.get("center_loss", math.nan))
    assert math.isnan(callbacks[0].history[-1]["hessian/edge_ratio"])
    strict_rows(tmp_path / "history.jsonl")


@pytest.mark.parametrize("module", [Explodes, ExplodesWithAdam])
def test_early_stopping_stops_at_once(tmp_path, module):
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 1e9, patience=100)
    with recorded_warnings():
        run = train(module, regression, [*monitors(), stopper], tmp_path, max_epochs=3)
    assert run.trainer.global_step == 4
    assert stopper.stopping_reason == "hessian/edge_ratio is nan at step 4"


def test_measuring_recovers_from_nan(tmp_path):
    """NaN weights at one measurement do not affect later measurements with finite weights."""

    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.kept = [p.detach().clone() for p in pl_module.parameters()]
            if trainer.global_step in (2, 5):
                for p in pl_module.parameters():
                    p.data.fill_(math.nan)

    class Restores(pl.Callback):
        def __init__(self, breaks):
            self.breaks = breaks

        def on_train_batch_end(self, trainer, pl_module, *_):
            for p, kept in zip(pl_module.parameters(), self.breaks.kept, strict=True):
                p.data.copy_(kept)

    def callbacks():
        common = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 40}
        return [
            HessianMonitor(k=2, blocks=True, min_eigenvalue=True, **common),
            SharpnessMonitor(**common),
            LandscapeMonitor(resolution=2, line_resolution=3, **common),
            LandscapeMonitor(
                name="top", directions="eigenvectors", resolution=2, line_resolution=3, **common
            ),
        ]

    good, broken = callbacks(), callbacks()
    train(Plain, regression, good, tmp_path / "good", max_epochs=3)
    breaks = Breaks()
    with recorded_warnings():
        order = [breaks, *broken, Restores(breaks)]
        train(Plain, regression, order, tmp_path / "broken", max_epochs=3)
    for a, b in zip(good[0].history, broken[0].history, strict=True):
        if b["step"] in (2, 5):
            assert math.isnan(b["hessian/top_eigenvalue"])
            continue
        bound = a["hessian/residual"] + b["hessian/residual"] + 1e-6
        assert abs(a["hessian/top_eigenvalue"] - b["hessian/top_eigenvalue"]) <= bound
    for a, b in zip(good[1].history, broken[1].history, strict=True):
        assert b["step"] in (2, 5) or a == b
    for part in ("line-1", "line-2", "top-line-1", "top-line-2"):
        for step in (3, 4, 6, 7, 8):
            name = f"landscape/landscape-{part}-step{step:08d}.npz"
            a, b = (Slice.load(tmp_path / run / name) for run in ("good", "broken"))
            assert b.losses == pytest.approx(a.losses, rel=0.05)  # the same sign of a vector too
            assert b.metadata["directions"] == a.metadata["directions"]
    assert broken[2]._limits.keys() == good[2]._limits.keys()
