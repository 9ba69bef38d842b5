"""The closing line is printed once, however training ends."""

import re
import signal
from contextlib import nullcontext

import pytest
import torch

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, SharpnessMonitor
from tests.runs import train
from tests.small import Quartic, ones
from tests.training.clock import Timed


class Fails(Quartic):
    error: type[BaseException] = ValueError
    at = 5

    def training_step(self, batch, batch_idx):
        if self.global_step == self.at and self.log.__name__ == "log":  # not while measured
            raise self.error("enough")
        return super().training_step(batch, batch_idx)


class Stops(Quartic):
    def training_step(self, batch, batch_idx):
        self.trainer.should_stop = self.global_step == 4
        return super().training_step(batch, batch_idx)


class Interrupted(Fails):
    error = KeyboardInterrupt


class FailsAfterwards(Quartic):
    def on_train_end(self):
        raise ValueError("enough")


@pytest.fixture
def own_sigint():
    """Restore the handler of SIGINT, which Lightning replaces after the first Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def monitors():
    common = {"every_n_train_steps": 2, "max_overhead": None, "probe_samples": 4}
    return [HessianMonitor(**common), SharpnessMonitor(**common)]


def closing_lines(caplog):
    return [m for m in caplog.messages if m.startswith("lightning_landscape: measured")]


@pytest.mark.usefixtures("own_sigint")
@pytest.mark.parametrize(
    ("module", "ends", "settings", "times"),
    [
        (Quartic, None, {"max_epochs": 1}, 6),
        (Fails, ValueError, {}, 3),
        (Interrupted, SystemExit, {}, 3),  # what Lightning makes of KeyboardInterrupt
        (FailsAfterwards, ValueError, {"max_epochs": 1}, 6),
        (Quartic, None, {"max_time": {"microseconds": 1}}, 1),
    ],
    ids=["to the end", "exception", "interrupted", "exception afterwards", "max_time"],
)
def test_closing_line_is_printed_once(module, ends, settings, times, tmp_path, caplog):
    caplog.set_level("INFO")
    if ends is None:
        train(module, ones, monitors(), tmp_path, **settings)
    else:
        with pytest.raises(ends):
            train(module, ones, monitors(), tmp_path, **settings)
    (line,) = closing_lines(caplog)
    counts = rf"measured hessian {times}, sharpness {times} times in [\d.]+ s, [\d.]+ % of the"
    assert re.search(counts, line)


def test_early_stopping(tmp_path, caplog):
    caplog.set_level("INFO")
    stopper = SharpnessEarlyStopping("hessian/top_eigenvalue", 0.0, patience=2)
    train(Quartic, ones, [*monitors(), stopper], tmp_path)
    (line,) = closing_lines(caplog)
    assert "measured hessian 2, sharpness 2 times" in line


def test_no_closing_line_if_training_did_not_start(tmp_path, caplog):
    class Refuses(Quartic):
        def configure_optimizers(self):
            raise ValueError("no optimizer")

    caplog.set_level("INFO")
    with pytest.raises(ValueError, match="no optimizer"):
        train(Refuses, ones, monitors(), tmp_path)
    assert closing_lines(caplog) == []


@pytest.mark.short_runs
@pytest.mark.parametrize(
    ("module", "ends"), [(Fails, pytest.raises(ValueError, match="enough")), (Stops, nullcontext())]
)
def test_skipped_values_of_a_run_that_ends_early(
    module, ends, tmp_path, monkeypatch, clock, caplog
):
    """The first values take 6 of the 7 s for values; all others are skipped."""
    caplog.set_level("INFO")
    Timed(monkeypatch, clock, {HessianMonitor: 6.0})
    monitor = HessianMonitor(every_n_train_steps=1, probe_samples=4)
    torch.manual_seed(0)
    with ends:
        train(module, ones, [monitor], tmp_path)
    (line,) = closing_lines(caplog)
    assert "measured hessian 1 time in" in line
    assert "skipped 4 to stay within it" in line
