"""Output on the terminal: values in Lightning's progress bars, progress bars of long slices."""

import contextlib
import io
import re
import time

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn

from lightning_landscape import HessianMonitor, InterpolationMonitor, LandscapeMonitor
from lightning_landscape.geometry import (
    Objective,
    line_between,
    line_slice,
    plane_slice,
    plane_through,
    progress,
)
from tests.runs import train
from tests.small import Growing, Quartic, ones
from tests.terminal import terminal

KEY = "hessian/top_eigenvalue"


class Look(pl.Callback):
    """Reads the bar's text after each step."""

    def __init__(self, text):
        self.text, self.seen = text, {}

    def on_train_batch_end(self, trainer, *_):
        self.seen[trainer.global_step] = self.text(trainer.progress_bar_callback)


def tqdm_text(bar):
    return str(bar.train_progress_bar)


def rich_text(bar):
    for column in bar.progress.columns:
        column.max_refresh = None  # otherwise the column may return cached text
        column._renderable_cache.clear()
    console = bar.progress.console
    with console.capture() as captured:
        console.print(bar.progress.get_renderable())
    return captured.get().replace("\n", " ")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TQDMProgressBar(refresh_rate=1), tqdm_text),
        (lambda: RichProgressBar(console_kwargs={"width": 400}), rich_text),
    ],
    ids=["tqdm", "rich"],
)
def test_last_values_stay_in_the_bar(make, text, tmp_path):
    """Between measurements and over epochs; the bar is drawn before later callbacks run."""
    if text is rich_text:
        pytest.importorskip("rich")
    monitor = HessianMonitor(
        every_n_train_steps=7, max_overhead=None, probe_samples=4, prog_bar=True
    )
    look = Look(text)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, callbacks=[make(), monitor, look],
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Quartic(), ones())
    measured = {row["step"]: row[KEY] for row in monitor.history}
    assert list(measured) == [1, 7, 14, 21, 28]
    assert list(look.seen) == list(range(1, 31))
    for step, shown in look.seen.items():
        found = [float(value) for value in re.findall(rf"{KEY}[:=] *([\d.]+)", shown)]
        before = [at for at in measured if at < step]
        if before:  # tqdm shows three digits, Rich three decimals
            assert found == [pytest.approx(measured[before[-1]], abs=6e-3)], (step, shown)
        else:
            assert found == []


# -- slices without a Trainer ----------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    """Show bars after 50 ms."""
    monkeypatch.setattr(progress, "_LONG", 0.05)
    monkeypatch.setattr(progress, "_EVERY", 0.02)


def slow(seconds):
    w = nn.Parameter(torch.ones(2))

    def loss():
        time.sleep(seconds)
        return (w**2).sum()

    return Objective(loss, {"w": w}, check_deterministic=False)


E = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
SLICES = {
    "line": lambda loss, **kw: line_slice(loss, E[0], resolution=21, **kw),
    "plane": lambda loss, **kw: plane_slice(loss, *E, resolution=5, **kw),
    "between": lambda loss, **kw: line_between(loss, *E, resolution=20, **kw),
    "through": lambda loss, **kw: plane_through(loss, *E, resolution=5, **kw),
}


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("kind", SLICES)
def test_long_slice_shows_progress(kind):
    with terminal() as shown:
        SLICES[kind](slow(0.02))
        text = shown()
    assert "measuring" in text
    shares = [int(share) for share in re.findall(r"(\d+) %", text)]
    assert len(set(shares)) > 2
    assert shares == sorted(shares)
    assert re.search(r"\d+ of 2\d forwards, 0:00:0\d left", text)


@pytest.mark.usefixtures("quickly")
def test_no_bar(monkeypatch):
    """With ``progress=False``, and on all processes but rank zero."""
    with terminal() as shown:
        for slice_of in SLICES.values():
            slice_of(slow(0.02), progress=False)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        SLICES["line"](slow(0.02))
        assert shown() == ""
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        SLICES["line"](slow(0.02))
        assert "measuring" in shown()


def test_no_bar_for_quick_slices(monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 1e-3)
    monkeypatch.setattr(progress, "_LONG", 30.0)
    with terminal() as shown:
        SLICES["line"](slow(0.01))
        assert shown() == ""


@pytest.mark.usefixtures("quickly")
def test_no_output_without_a_terminal():
    file = io.StringIO()
    with contextlib.redirect_stderr(file):
        SLICES["line"](slow(0.02))
    assert file.getvalue() == ""


def test_callbacks_show_no_bar(tmp_path, monkeypatch):
    """Lightning has a bar of its own."""
    monkeypatch.setattr(progress, "_LONG", 0.0)  # any bar would be shown at once
    monkeypatch.setattr(progress, "_EVERY", 1e-3)
    common = {"max_overhead": None, "probe_samples": 4, "every_n_train_steps": 100}
    held_out = [[torch.ones(4, 1)]]
    callbacks = [
        LandscapeMonitor(**common, resolution=2, line_resolution=2, validation_probe=held_out),
        InterpolationMonitor(**common, third={"w": torch.tensor([0.0, 1.0])}, plane_resolution=2),
    ]
    with terminal() as shown:
        train(Growing, ones, callbacks, tmp_path, max_epochs=1)
        assert "forward" not in shown()
        SLICES["line"](slow(0.01))
        assert "forward" in shown()
    written = {path.name.split("-step")[0] for path in tmp_path.rglob("*.npz")}
    kinds = ("line-1", "line-2", "plane")
    assert written >= {*(f"landscape-{kind}" for kind in kinds), "interpolation-plane"}
