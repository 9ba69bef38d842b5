"""Logging of values, texts and pictures, and postponed pictures."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import (
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Measured,
    SharpnessMonitor,
    Slice,
    landscape_callbacks,
)
from lightning_landscape.report.run import FRAMES
from lightning_landscape.training import costs, publisher
from lightning_landscape.training.costs import Costs
from tests.runs import MemoryLogger, rows_of, train
from tests.small import Linear, Quartic, ones, regression
from tests.training.clock import Timed, closing_line_of, share_in_closing_line


def steps(callback) -> list[int]:
    return [row["step"] for row in callback.history]


class Module:
    """The attributes of a LightningModule that a publisher uses."""

    device = torch.device("cpu")

    def __init__(self):
        self.logged = {}

    def log(self, key, value, **settings):
        assert settings["logger"] is False
        self.logged[key] = float(value)


def publisher_of(monitor, tmp_path, affordable=True):
    """A publisher for one callback, and its logger."""
    logger = MemoryLogger()
    trainer = pl.Trainer(
        logger=logger, accelerator="cpu", default_root_dir=tmp_path, barebones=False
    )
    budget = SimpleNamespace(allows_drawing=lambda *_, **__: affordable, record=lambda *_: None)
    return publisher.Publisher(trainer, [monitor], budget, Costs()), logger


def test_values_of_the_previous_weights_have_their_own_row(tmp_path):
    monitor = SharpnessMonitor()
    found, logger = publisher_of(monitor, tmp_path)
    module = Module()
    one = Measured({"sharpness/sam": 2.0}, {"note": "a fact"}, before={"sharpness/critical": 3.0})
    found.publish(module, monitor, one, 7, 40, final=False)
    found.publish(module, monitor, Measured(before={"sharpness/critical": 4.0}), 8, 40, final=False)
    assert logger.rows == [
        (6, {"sharpness/critical": 3.0}),
        (7, {"sharpness/sam": 2.0}),
        (7, {"sharpness/critical": 4.0}),
    ]
    assert [(row["step"], row["probe_samples"]) for row in monitor.history] == [
        (6, 40), (7, 40), (7, 40), (8, 40),
    ]  # fmt: skip
    assert rows_of(tmp_path / "history.jsonl") == sorted(
        monitor.history, key=lambda row: row["step"]
    )
    assert module.logged == {"sharpness/sam": 2.0, "sharpness/critical": 4.0}
    assert monitor.measured == 2


def test_listeners_get_the_row_of_their_key(tmp_path):
    monitor = SharpnessMonitor()
    found, _ = publisher_of(monitor, tmp_path)
    heard = []

    def fails(trainer, row):
        raise ZeroDivisionError

    keys = ("sharpness/critical", "sharpness/sam", "sharpness/none")
    monitor._bookkeeping.listeners = [
        SimpleNamespace(monitor="sharpness/sam", on_record=fails),
        *(
            SimpleNamespace(monitor=key, on_record=lambda _, row, k=key: heard.append((k, row)))
            for key in keys
        ),
    ]
    one = Measured({"sharpness/sam": 2.0}, before={"sharpness/critical": 3.0})
    with pytest.warns(UserWarning, match=r"monitor='sharpness/sam'\) could not be informed of a"):
        found.publish(Module(), monitor, one, 7, 40, final=False)
    assert [(key, row["step"]) for key, row in heard] == [*zip(keys, (6, 7, 7), strict=True)]
    found.publish(Module(), monitor, one, 8, 40, final=True)  # training has ended
    assert len(heard) == 3


@pytest.mark.parametrize("affordable", [True, False])
def test_only_the_last_postponed_picture_of_a_tag_is_drawn(affordable, tmp_path, monkeypatch):
    monitor = HessianMonitor(density_samples=2)
    found, _ = publisher_of(monitor, tmp_path, affordable)
    drawn = []
    monkeypatch.setattr(
        found.recorder, "picture", lambda tag, draw, step: drawn.append((tag, step))
    )
    for step in (1, 2):
        pictures = {"hessian/density": print, "hessian/other": print}
        found.publish(Module(), monitor, Measured(pictures=pictures), step, 40, final=False)
    assert drawn == []
    latest = [("hessian/density", 2), ("hessian/other", 2)]
    found.draw()
    assert drawn == (latest if affordable else [])
    found.draw(final=True)
    found.draw(final=True)
    assert drawn == latest


def test_pictures_are_not_postponed_without_a_limit(tmp_path, monkeypatch):
    for monitor in (HessianMonitor(max_overhead=None), LandscapeMonitor()):
        found, _ = publisher_of(monitor, tmp_path, affordable=False)
        drawn = []
        monkeypatch.setattr(found.recorder, "picture", lambda tag, *_, seen=drawn: seen.append(tag))
        tag = monitor.key("picture")
        found.publish(Module(), monitor, Measured(pictures={tag: print}), 1, 40, final=False)
        assert drawn == [tag]


def test_history_file_and_memory_agree(tmp_path):
    callbacks = [
        HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4),
        SharpnessMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4),
    ]
    train(Quartic, ones, callbacks, tmp_path)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    rows = rows_of(tmp_path / "history.jsonl")
    assert rows[::2] == callbacks[0].history
    assert rows[1::2] == callbacks[1].history
    # A second run in the same folder does not mix with the first one's rows.
    once = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe_samples=4)
    train(Quartic, ones, [once], tmp_path)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "history-1.jsonl").read_text().splitlines() == lines


@pytest.mark.pictures
def test_without_a_logger(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=10)
    train(Linear, regression, callbacks, tmp_path, logger=False)
    assert [len(c.history) for c in callbacks] == [1, 1, 2]
    folder = tmp_path / "landscape_logs" / "version_0"
    assert (folder / "history.jsonl").exists()
    assert sorted(p.suffix for p in (folder / "landscape").iterdir()).count(".png") == 6


@pytest.mark.pictures
def test_tensorboard_and_csv(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=2)
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    train(Linear, regression, callbacks, tmp_path, logger=loggers, max_epochs=3)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for key in ("top_eigenvalue", "residual", "hvps", "edge", "edge_ratio"):
        logged = [(e.step, e.value) for e in events.Scalars(f"hessian/{key}")]
        kept = [(row["step"], row[f"hessian/{key}"]) for row in callbacks[0].history]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in kept]
    for key in ("sam", "gradient_norm", "gradient_curvature"):
        assert [e.step for e in events.Scalars(f"sharpness/{key}")] == steps(callbacks[1])
    assert {"landscape/line", "landscape/plane"} <= set(tags["images"])
    assert [e.step for e in events.Images("landscape/plane")] == steps(callbacks[2])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    patterns = re.findall(rb"hessian/[a-z_]+\$", layout)
    assert b"hessian/top_eigenvalue$" in patterns
    assert b"hessian/edge$" in patterns
    table = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "hessian/top_eigenvalue" in table.splitlines()[0]
    saved = sorted((tmp_path / "tb" / "version_0" / "landscape").glob("landscape-plane-*.npz"))
    assert [Slice.load(path).metadata["step"] for path in saved] == steps(callbacks[2])


def test_callback_metrics_are_available_to_lightnings_callbacks(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=4)
    best = ModelCheckpoint(
        tmp_path, monitor="hessian/top_eigenvalue", every_n_train_steps=3, save_top_k=1
    )
    stopping = EarlyStopping("hessian/edge_ratio", patience=50)
    run = train(
        Quartic, ones, [stopping, monitor, best], tmp_path, enable_checkpointing=True, logger=None
    )
    lowest = min(row["hessian/top_eigenvalue"] for row in monitor.history[:-1])
    assert float(best.best_model_score) <= lowest * (1 + 1e-6)
    assert run.trainer.callback_metrics["hessian/top_eigenvalue"] == pytest.approx(
        monitor.history[-1]["hessian/top_eigenvalue"]
    )


def test_values_are_logged_once_not_repeated(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path)
    assert [s for s, _ in run.logger.values("hessian/top_eigenvalue")] == steps(monitor)


def test_fast_dev_run_writes_nothing(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None)
    train(Linear, regression, callbacks, tmp_path, fast_dev_run=True)
    assert callbacks[0].measured == 1
    assert list(tmp_path.iterdir()) == []


def test_verbose_prints_each_measurement(tmp_path, caplog):
    caplog.set_level("INFO")
    monitor = SharpnessMonitor(every_n_train_steps=5, max_overhead=None, verbose=True)
    train(Quartic, ones, [monitor], tmp_path)
    lines = [m for m in caplog.messages if m.startswith("step ") and "sharpness/sam" in m]
    assert [line.split(":")[0] for line in lines] == [f"step {s}" for s in steps(monitor)]


def test_values_in_the_progress_bar(tmp_path):
    monitor = HessianMonitor(max_overhead=None, probe_samples=4, prog_bar=True)
    run = train(Quartic, ones, [monitor], tmp_path)
    shown = run.trainer.progress_bar_metrics
    assert shown["hessian/top_eigenvalue"] == pytest.approx(
        monitor.history[-1]["hessian/top_eigenvalue"], rel=1e-3
    )


class Once(torch.autograd.Function):
    """A kernel whose backward has no backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(4)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 4 * grad * x**3


class OnceQuartic(Quartic):
    def training_step(self, batch, batch_idx):
        return batch[0].mean() * Once.apply(self.w).sum() / 4


@pytest.mark.parametrize(
    ("module", "engine", "text"),
    [
        (Quartic, "double_backward", "exact, by double backward"),
        (OnceQuartic, "finite_difference", "central differences of gradients (no double backward"),
    ],
)
def test_engine_is_reported_once(tmp_path, module, engine, text):
    """As text in TensorBoard, in every row of the history, and as a warning where it is not exact.

    The gradient is w^3 and the curvature 3 w^2 = 3 g^(2/3) either way.
    """
    monitors = [
        HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4),
        SharpnessMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4),
    ]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, ones, monitors, tmp_path, logger=logger)
    for monitor in monitors:
        assert len(monitor.history) > 5
        assert {row["engine"] for row in monitor.history} == {engine}
    for curved, sloped in zip(monitors[0].history, monitors[1].history, strict=True):
        expected = pytest.approx(3 * sloped["sharpness/gradient_norm"] ** (2 / 3), rel=1e-3)
        assert sloped["sharpness/gradient_curvature"] == expected
        assert curved["hessian/top_eigenvalue"] == expected
    events = EventAccumulator(str(tmp_path)).Reload()
    for kind in ("hessian", "sharpness"):
        (event,) = events.Tensors(f"{kind}/engine/text_summary")
        assert event.tensor_proto.string_val[0].decode().startswith(text)
    messages = [w for w in caught if "Hessian-vector products are" in str(w.message)]
    assert len(messages) == (engine == "finite_difference")


# -- pictures of callbacks that measure values -----------------------------------------------------


@pytest.fixture
def slow_pictures(monkeypatch, clock):
    """Each picture takes 4 s on the clock, which is known in advance."""
    make = publisher.Publisher._make

    def slow(self, measured, step):
        clock.now += 4.0 * len(measured.pictures)
        make(self, measured, step)

    monkeypatch.setattr(publisher.Publisher, "_make", slow)
    monkeypatch.setattr(costs, "_DRAWING_SECONDS", 4.0)


def made(folder, kind, suffix):
    """Steps of the files ``<kind>-step00000120.<suffix>`` beside the logs."""
    return sorted(int(path.stem[-8:]) for path in folder.glob(f"landscape/{kind}-step*.{suffix}"))


@pytest.mark.short_runs
@pytest.mark.pictures
def test_picture_of_values_is_postponed_until_affordable(
    tmp_path, monkeypatch, clock, slow_pictures, caplog
):
    Timed(monkeypatch, clock, {InterpolationMonitor: 0.5})
    monitor = InterpolationMonitor(every_n_train_steps=10, max_overhead=0.1, grace_seconds=0.0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=100)  # 300 steps, 300 s
    # The values do not wait for their pictures: 31 take 15.5 of the 28.5 s that are planned with.
    values = [3, *range(10, 301, 10)]
    # The last picture takes 4 of the others.  9 s are left, the part of them that the run has
    # come along: the first 4 at 0.44 of it, the next 4 at 0.89.
    drawn = [140, 270]
    assert [row["step"] for row in monitor.history] == values
    assert made(tmp_path, "interpolation-line", "npz") == values
    assert made(tmp_path, "interpolation-line", "png") == [*drawn, 300]
    assert share_in_closing_line(caplog) <= 0.1


@pytest.mark.short_runs
@pytest.mark.pictures
def test_last_postponed_picture_is_drawn_at_the_end(tmp_path, monkeypatch, clock, slow_pictures):
    Timed(monkeypatch, clock, {HessianMonitor: 0.1})
    monitor = HessianMonitor(every_n_train_steps=10, density_samples=2, grace_seconds=0.0)
    train(Linear, regression, [monitor], tmp_path, max_epochs=25)  # 75 s allow one of 3.75 s
    assert made(tmp_path, "hessian-density", "npz") == [3, *range(10, 75, 10)]
    assert made(tmp_path, "hessian-density", "png") == [70]


@pytest.mark.pictures
def test_every_picture_is_drawn_without_a_limit(tmp_path, monkeypatch, clock, slow_pictures):
    monitors = [
        InterpolationMonitor(every_n_train_steps=10, max_overhead=None),
        HessianMonitor(density_samples=2, every_n_train_steps=10, max_overhead=None),
        SharpnessMonitor(),  # the budget is that of the others
    ]
    train(Linear, regression, monitors, tmp_path, max_epochs=10)
    assert made(tmp_path, "interpolation-line", "png") == [3, 10, 20, 30]
    assert made(tmp_path, "hessian-density", "png") == [3, 10, 20, 30]


@pytest.mark.short_runs
@pytest.mark.pictures
def test_postponed_picture_reduces_the_time_of_the_last_ones(
    tmp_path, monkeypatch, clock, slow_pictures, caplog
):
    # Of 22 s less 4 for the density four fifths are planned with, less 4 for drawing the plane, and
    # about 2.4 went before: 8.5 s at .06 a forward, for 121 points, not for 169.
    Timed(monkeypatch, clock, {}, evaluation=0.06)
    monkeypatch.setattr(HessianMonitor, "forwards", 25)
    common = {"every_n_train_steps": 10**6, "grace_seconds": 22.0}
    callbacks = [
        HessianMonitor(density_samples=2, **common),
        LandscapeMonitor(line_resolution=0, **common),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=80)
    assert made(tmp_path, "hessian-density", "png") == [3]
    (path,) = (tmp_path / "landscape").glob("landscape-plane-*.npz")
    assert Slice.load(path).losses.shape == (11, 11)
    assert share_in_closing_line(caplog) <= 22 / 240


# -- pictures of the whole run ---------------------------------------------------------------------


@pytest.mark.short_runs
def test_expensive_pictures_of_the_run_are_skipped(tmp_path, monkeypatch, clock, caplog):
    # A picture takes .5 s, so the animation of the two 1.2, the film .7: of 6.4 s, 6 are planned
    # with and 5 spent.
    picture = publisher.Publisher._make

    def slow(self, measured, step):
        clock.now += 0.5 * len(measured.pictures)
        picture(self, measured, step)

    monkeypatch.setattr(publisher.Publisher, "_make", slow)
    Timed(monkeypatch, clock, {LandscapeMonitor: 2.0})
    monitor = LandscapeMonitor(
        every_n_train_steps=10**6, resolution=3, line_resolution=0, grace_seconds=0.0
    )
    monitor._bookkeeping.schedule.due = lambda step, *_: step == 110
    train(Linear, regression, [monitor], tmp_path, max_epochs=42)
    assert [row["step"] for row in monitor.history] == [110, 126]
    assert "left out: landscape-plane.gif" in closing_line_of(caplog)
    assert "landscape/film" not in closing_line_of(caplog)
    assert share_in_closing_line(caplog) <= 0.05


# -- the report at the end of the fit ----------------------------------------------------------


@pytest.mark.parametrize("affordable", [True, False])
@pytest.mark.parametrize("max_overhead", [0.05, None])
def test_pictures_of_the_report(tmp_path, affordable, max_overhead):
    """At most 24 of one kind are drawn, and all lines of one step are one."""
    monitor = HessianMonitor(max_overhead=max_overhead)
    sender, _ = publisher_of(monitor, tmp_path)
    asked, left_out, written = [], [], []
    sender._budget = SimpleNamespace(
        allows_drawing=lambda pictures: asked.append(pictures) or affordable, left_out=left_out
    )
    sender.recorder = SimpleNamespace(
        takes_report=True, folder=tmp_path, report=lambda write, step: written.append((write, step))
    )
    sender.report(3)
    assert written == []  # nothing was measured
    monitor._bookkeeping.history.add({"step": 1})
    for step in range(30):
        (tmp_path / f"landscape-plane-step{step:08d}.npz").touch()
    for name in ("landscape-line-1", "landscape-line-2", "hessian-density"):
        (tmp_path / f"{name}-step00000001.npz").touch()
    sender.report(3)
    ((write, step),) = written
    pictures = affordable or max_overhead is None
    assert (write.keywords, step) == ({"pictures": pictures}, 3)
    assert asked == ([] if max_overhead is None else [1 + 24 + 1 + 1])
    assert left_out == ([] if pictures else ["pictures of the report"])


def test_the_report_draws_as_many_pictures_as_the_publisher_counts():
    assert publisher._FRAMES == FRAMES
