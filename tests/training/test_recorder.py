"""Files beside the logs, and loggers that fail."""

from __future__ import annotations

import errno
import json
import math
import warnings
from types import SimpleNamespace

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import HessianMonitor, read_history
from lightning_landscape.training.output.history import read_rows
from lightning_landscape.training.output.recorder import Recorder
from tests.runs import MemoryLogger, train
from tests.small import Linear, Quartic, ones, regression


class Records:
    """The attributes of a Trainer that a recorder uses."""

    loggers = (MemoryLogger(),)
    is_global_zero = True
    fast_dev_run = False

    def __init__(self, folder, **settings):
        self.default_root_dir = str(folder)
        self.strategy = SimpleNamespace(broadcast=lambda item: item)
        vars(self).update(settings)


ROW = {"step": 1, "monitor": "hessian", "value": 2.0}


def test_rows_are_strict_json(tmp_path):
    row = {**ROW, "lost": math.nan, "deep": {"far": -math.inf}}
    Recorder(Records(tmp_path)).row(row, continued=False)
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(line, parse_constant=refuse) == {**ROW, "lost": None, "deep": {"far": None}}
    (read,) = read_history(tmp_path / "history.jsonl")
    assert math.isnan(read["lost"])


def test_history_of_another_run_is_renamed(tmp_path):
    def steps(name):
        return [row["step"] for row in read_history(tmp_path / name)]

    for step, continued in ((1, False), (2, False), (3, True)):
        recorder = Recorder(Records(tmp_path))
        recorder.row({**ROW, "step": step}, continued=continued)
        recorder.row({**ROW, "step": step + 10}, continued=continued)
        recorder.release()
    assert steps("history-1.jsonl") == [1, 11]
    assert steps("history.jsonl") == [2, 3, 12, 13]
    Recorder(Records(tmp_path)).row({**ROW, "step": 4}, continued=False)
    assert steps("history-2.jsonl") == [2, 3, 12, 13]
    assert steps("history.jsonl") == [4]


def test_incomplete_line_does_not_affect_others(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "val')
    Recorder(Records(tmp_path)).row({**ROW, "step": 3}, continued=True)
    rows, damaged = read_rows(path)
    assert [row["step"] for row in rows] == [1, 3]
    assert damaged == 1


def test_files_are_written_atomically(tmp_path):
    recorder = Recorder(Records(tmp_path))
    recorder.file("a-step1.txt", lambda path: path.write_text("whole"))

    def fails(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.warns(UserWarning, match="a-step1.txt could not be written .*free disk space"):
        recorder.file("a-step1.txt", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for the same file at all steps
        recorder.file("a-step22.txt", fails)
    assert [path.name for path in recorder.folder.iterdir()] == ["a-step1.txt"]
    assert (recorder.folder / "a-step1.txt").read_text() == "whole"


@pytest.mark.parametrize("settings", [{"is_global_zero": False}, {"fast_dev_run": True}])
def test_settings_that_write_nothing(settings, tmp_path):
    calls = []
    recorder = Recorder(Records(tmp_path, **settings))
    recorder.row(ROW, continued=False)
    recorder.file("a.txt", calls.append)
    recorder.picture("a", lambda: calls.append("drawn"), 1)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_custom_layout_of_the_user_is_kept(tmp_path):
    class Own(Linear):
        def on_fit_start(self):
            self.logger.experiment.add_custom_scalars({"mine": {"a": ["Multiline", ["loss"]]}})

    logger = TensorBoardLogger(tmp_path, name="tb")
    monitor = HessianMonitor(max_overhead=None)
    with pytest.warns(match="custom-scalars layout already"):
        train(Own, regression, [monitor], tmp_path, logger=logger)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    layouts = events.Tensors("custom_scalars__config__")
    assert len(layouts) == 1
    assert b"mine" in layouts[0].tensor_proto.string_val[0]


def test_failing_logger_does_not_end_the_run(tmp_path):
    class Broken(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("hessian/") for key in metrics):
                raise OSError("disk full")

    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4)
    with pytest.warns(match="Broken could not be written .OSError: disk full") as caught:
        train(Quartic, ones, [monitor], tmp_path, logger=Broken())
    assert len([w for w in caught if "disk full" in str(w.message)]) == 1
    assert len(monitor.history) == 5
