"""Fixtures of several files."""

from __future__ import annotations

import pytest

from lightning_landscape.training import costs
from tests.training.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock of the package; idle hooks take no time on it."""
    clock = Clock()
    monkeypatch.setattr(costs.time, "perf_counter", clock)
    monkeypatch.setattr(costs, "HOOK_SECONDS", 0.0)
    return clock
