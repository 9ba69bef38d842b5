"""The rows of a callback, and those measured in a process launched for the fit."""

from __future__ import annotations

import json

from lightning_landscape import HessianMonitor
from lightning_landscape.training.output.history import History


def test_last_ten_thousand_rows_are_kept(tmp_path):
    monitor = HessianMonitor()
    for step in range(10_050):
        monitor._bookkeeping.history.add({"step": step})
    assert [len(monitor.history), monitor.history[0]["step"]] == [10_000, 50]


def test_rows_of_another_process_are_read_once(tmp_path, monkeypatch):
    """Only rows of the same callback, from the first that it measured."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = [
        {"step": 2, "monitor": "hessian"},  # of the run before
        {"step": 4, "monitor": "hessian"},
        {"step": 4, "monitor": "sharpness"},
        {"step": 6, "monitor": "hessian"},
    ]
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = History()
    for row in (rows[1], rows[3]):  # by the copy in the other process
        history.write_address(path, row)
    assert history.rows() == [rows[1], rows[3]]
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
    path.unlink()
    assert history.rows() == [rows[1], rows[3]]


def test_superseded_rows():
    history = History()
    history.add({"step": 1})
    history.supersede()
    history.add({"step": 2})
    assert history.rows() == [{"step": 1, "superseded": True}, {"step": 2}]
