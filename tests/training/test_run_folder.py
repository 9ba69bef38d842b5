"""Runs do not write into the files of other runs."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl

from lightning_landscape import HessianMonitor, read_history
from lightning_landscape.training.output import run_folder
from tests.runs import train
from tests.small import Linear, regression

OFTEN = {"every_n_train_steps": 5, "max_overhead": None, "probe_samples": 4}


def rows(folder):
    """The rows of a file without their run ids, and the set of these."""
    found = read_history(folder / "history.jsonl")
    return [{k: v for k, v in row.items() if k != "run"} for row in found], {
        row["run"] for row in found
    }


class Inner(pl.Callback):
    """Trains another module, with the same root directory, in the middle of a run."""

    def __init__(self, root):
        self.root = root
        self.monitor = HessianMonitor(**OFTEN)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            train(Linear, regression, [self.monitor], self.root, max_epochs=2)


def test_concurrent_runs_in_one_directory(tmp_path):
    inner, outer = Inner(tmp_path), HessianMonitor(**OFTEN)
    with pytest.warns(match="another run is writing to .*give each run a logger with a version"):
        train(Linear, regression, [outer, inner], tmp_path, max_epochs=10)
    [folder] = tmp_path.glob("run-*")
    (first, runs), (second, other_runs) = rows(tmp_path), rows(folder)
    assert first == outer.history
    assert second == inner.monitor.history
    assert len(runs) == len(other_runs) == 1
    assert runs != other_runs
    assert (folder / "landscape").is_dir()


def test_next_run_is_not_considered_concurrent(tmp_path, recwarn):
    for _ in range(2):
        train(Linear, regression, [HessianMonitor(**OFTEN)], tmp_path)
    assert not [w for w in recwarn if "another run" in str(w.message)]
    assert {p.name for p in tmp_path.iterdir()} >= {"history.jsonl", "history-1.jsonl"}
    assert not list(tmp_path.glob("run-*"))


def test_runs_without_loggers_are_numbered(tmp_path):
    for number in range(2):
        monitor = HessianMonitor(**OFTEN)
        run = train(Linear, regression, [monitor], tmp_path, logger=False)
        folder = tmp_path / "landscape_logs" / f"version_{number}"
        assert rows(folder)[0] == monitor.history
    count = len(monitor.history)
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.trainer.lightning_module, regression())
    assert len(monitor.history) > count  # a second fit continues in the same folder
    assert len((folder / "history.jsonl").read_text().splitlines()) == len(monitor.history)


def test_root_that_cannot_be_written(tmp_path):
    (tmp_path / "landscape_logs").write_text("a file")
    folder = run_folder.numbered_folder(tmp_path)
    assert folder == tmp_path / "landscape_logs" / "version_0"
    assert (tmp_path / "landscape_logs").read_text() == "a file"


def test_runs_share_a_directory_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)  # Windows
    monitor = HessianMonitor(**OFTEN)
    train(Linear, regression, [monitor], tmp_path)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [r["step"] for r in monitor.history]


def test_locks_are_removed(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(run_folder.tempfile, "tempdir", str(tmp_path / "temporary"))
    train(Linear, regression, [HessianMonitor(**OFTEN)], tmp_path / "run")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_lock_on_a_removed_file_is_not_used(tmp_path, monkeypatch):
    """Another run removes the file after this one has opened it, and before it is locked."""
    path = run_folder._lock_path(tmp_path)
    locked = []
    flock = run_folder.fcntl.flock

    def removed_before(lock, flags):
        if not locked:
            path.unlink()
        locked.append(lock)
        flock(lock, flags)

    monkeypatch.setattr(run_folder.fcntl, "flock", removed_before)
    lock = run_folder._lock(tmp_path)
    assert len(locked) == 2
    with pytest.raises(BlockingIOError):
        run_folder._lock(tmp_path)
    lock.close()
    path.unlink()
