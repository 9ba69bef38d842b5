"""The rows that a callback keeps."""

from __future__ import annotations

from lightning_landscape import HessianMonitor


def test_ten_thousand_rows_are_kept(tmp_path):
    monitor = HessianMonitor()
    for step in range(10_050):
        monitor._bookkeeping.history.add({"step": step})
    assert [len(monitor.history), monitor.history[0]["step"]] == [10_000, 50]
