"""The summary at the end of a fit, and warnings about missing values."""

from __future__ import annotations

import math

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, landscape_callbacks
from lightning_landscape.training.closing import as_lines, as_markdown, judgement, summary
from tests.runs import train
from tests.small import Quartic, ones


def monitor_with(ratios, first=10, every=10, **more):
    monitor = HessianMonitor()
    for index, ratio in enumerate(ratios):
        row = {"step": first + every * index, "hessian/edge_ratio": ratio, **more}
        monitor._bookkeeping.history.add(row)
    return monitor


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.2, 0.5, 0.9, 1.05, 0.97, 1.1], "stayed near 1 from step 30: this learning rate is at"),
        ([1.0, 1.0, 1.0], "stayed near 1 from step 10"),
        ([0.9, 2.0, 0.9, 3.0, 1.4, 2.0], "was above 1.3 from step 40: steps overshoot"),
        ([0.1, 1.4, 1.2, 1.5], "varied from 1.2 to 1.5 in the last 3 values: around"),
        ([0.5, 2.0, 0.5, 1.9], "varied from 0.5 to 2 in the last 3 values: around"),
        ([5.0, 0.9, 1.0, 1.2], "stayed near 1 from step 20"),
        ([0.1, 0.6, 0.3], "ended at 0.3, at most 0.6 at step 20: below the edge"),
        ([2.0, 0.7, 0.6, 0.5], "ended at 0.5, at most 2 at step 10"),
        ([1.0, 1.0, 1.0, math.nan], "was not finite at step 40, the last measurement"),
        ([math.nan], "was not finite at step 10"),
    ],
)
def test_judgement(ratios, expected):
    assert judgement([monitor_with(ratios)]).startswith(f"hessian/edge_ratio {expected}")


@pytest.mark.parametrize("ratios", [[], [1.0, 1.0], [None, 1.0, None, 1.0]])
def test_no_judgement_from_fewer_than_three_values(ratios):
    assert judgement([monitor_with(ratios)]) == ""


def test_judgement_uses_converged_values_only():
    key = "hessian/edge_ratio"
    assert judgement([monitor_with([1.0] * 5, unconverged=[key])]) == ""
    assert summary([monitor_with([1.0] * 5, superseded=True)]) == []
    monitor = monitor_with([5.0] * 3)
    for step in (40, 50):
        row = {"step": step, key: 1.0, "series": 2}
        monitor._bookkeeping.history.add(row)
    assert summary([monitor]) == [
        (key, "1 at step 40, 1 at step 50, highest 1 at step 40 (2 values)")
    ]


def test_summary():
    monitor = monitor_with([0.5, 2.0, float("nan"), 1.0])
    assert summary([monitor]) == [
        ("hessian/edge_ratio", "0.5 at step 10, 1 at step 40, highest 2 at step 20 (3 values)")
    ]
    assert summary([monitor_with([0.5])]) == [("hessian/edge_ratio", "0.5 at step 10 (1 value)")]
    assert summary([HessianMonitor()]) == []
    many = [monitor_with([1.0], **{"hessian/top_eigenvalue": 2.0}) for _ in range(9)]
    assert len(as_lines(summary(many), "a sentence")) <= 7  # eight with the closing line


def test_summary_as_text():
    rows = [("a/b", "1 at step 2"), ("longer/key", "3")]
    assert as_lines(rows, "so.") == ["  a/b         1 at step 2", "  longer/key  3", "  so."]
    assert as_markdown(rows, "so.", "line").split("\n\n") == [
        "| key | values |\n|---|---|\n| `a/b` | 1 at step 2 |\n| `longer/key` | 3 |",
        "so.",
        "line",
    ]


def test_summary_is_printed_and_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = {"every_n_train_steps": 2, "max_overhead": None, "probe_samples": 4}
    callbacks = landscape_callbacks(**settings)
    logger = TensorBoardLogger(tmp_path)
    train(Quartic, ones, callbacks, tmp_path, max_epochs=1, logger=logger)
    (message,) = [m for m in caplog.messages if m.startswith("lightning_landscape: measured")]
    lines = message.splitlines()
    assert len(lines) <= 8
    first, last = callbacks[0].history[0], callbacks[0].history[-1]
    value = f"{first['hessian/top_eigenvalue']:.3g} at step {first['step']}"
    value += f", {last['hessian/top_eigenvalue']:.3g} at step {last['step']}"
    assert any(line.split()[0] == "hessian/top_eigenvalue" and value in line for line in lines)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (text,) = events.Tensors("landscape/summary/text_summary")
    assert value in text.tensor_proto.string_val[0].decode()


def test_fit_without_values_warns(tmp_path):
    monitor = HessianMonitor(every_n_epochs=5, every_n_train_steps=None, max_overhead=None)
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", threshold=1.0)
    with pytest.warns(match=r"got [01] values? in 10 steps and needs 3: it could not have stopped"):
        train(Quartic, ones, [monitor, stopper], tmp_path, max_epochs=1)
