"""Estimates of time before anything was timed."""

from __future__ import annotations

import pytest

from lightning_landscape.training import costs
from lightning_landscape.training.costs import Costs


def test_the_first_drawing_includes_the_import(monkeypatch, clock):
    known = Costs()
    monkeypatch.setitem(costs.sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(costs.sys.modules, "matplotlib.figure")
    assert known.drawing_seconds(2) == pytest.approx(0.2 + 0.6)
    assert known.drawing_seconds(0) == 0.0
    known.drawing = 0.05
    assert known.drawing_seconds(2) == pytest.approx(0.1)
