"""Time spent on measuring, and estimates before anything has been timed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lightning_landscape.training import costs
from lightning_landscape.training.costs import Costs, Stopwatch
from lightning_landscape.training.data.probe import Probe


def test_time_is_divided_into_measuring_and_training(clock):
    time = Stopwatch()
    clock.now = 6.0
    with contextlib.suppress(ZeroDivisionError), time.measuring(clock):
        clock.now = 8.0
        assert (time.spent, time.trained) == (2.0, 6.0)  # already
        raise ZeroDivisionError
    clock.now = 12.0
    assert (time.spent, time.trained, time.share) == (2.0, 10.0, 0.2)
    time.start()
    assert (time.spent, time.trained, time.share) == (0.0, 0.0, 0.0)


def test_first_batch_is_excluded_from_estimates(clock):
    known = Costs()
    clock.now = 30.0  # with one-time work
    known.count_batches(1)
    assert known.seconds_per_batch == 30.0  # nothing else is known
    clock.now = 36.0
    known.count_batches(4)
    assert known.seconds_per_batch == 2.0
    probe, known.batch_size = Probe((torch.zeros(60, 2),)), 20
    probe.load(lambda batch: batch)
    assert known.forward_seconds(probe) == 2.0  # a third of a step, on three times the examples


def test_first_drawing_includes_the_import(monkeypatch, clock):
    known = Costs()
    monkeypatch.setitem(costs.sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(costs.sys.modules, "matplotlib.figure")
    assert known.drawing_seconds(2) == pytest.approx(0.2 + 0.6)
    assert known.drawing_seconds(0) == 0.0
    known.drawing = 0.05
    assert known.drawing_seconds(2) == pytest.approx(0.1)
