"""Figures of a whole run: which files they are made from, and where they are written."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import HessianMonitor, LandscapeMonitor, Slice
from lightning_landscape.training.measuring import _at_milestone
from lightning_landscape.training.output.run_files import load_evenly, saved_files
from tests.runs import differences, train
from tests.small import Linear, regression

EACH = {"every_n_train_steps": 1, "max_overhead": None, "probe_samples": 20}
SMALL = {"resolution": 3, "line_resolution": 3}


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.mark.slow
@pytest.mark.pictures
def test_event_file_contains_the_figures_of_the_run(tmp_path):
    now_and_then = {**EACH, "every_n_train_steps": 10}
    monitors = [
        HessianMonitor(density_samples=2, **EACH),
        LandscapeMonitor(surface=True, **SMALL, **now_and_then),
        LandscapeMonitor(name="lines", resolution=0, line_resolution=3, **now_and_then),
    ]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with_us = train(Linear, regression, monitors, tmp_path, logger=logger, max_epochs=7)
    events = events_of(tmp_path)
    images = events.Tags()["images"]
    for tag in ("landscape/film", "landscape/lines/film", "hessian/density_film"):
        assert tag in images
        assert [event.step for event in events.Images(tag)] == [21]
    # After 10 and 20 measurements, and at the end.
    assert [event.step for event in events.Images("hessian/eigenvalue")] == [10, 20, 21]
    assert {tag for tag in events.Tags()["tensors"] if tag.startswith("landscape/surface")} == {
        f"landscape/surface_{part}" for part in ("VERTEX", "FACE", "COLOR")
    }
    surfaces = events.Tensors("landscape/surface_VERTEX")
    assert [event.step for event in surfaces] == [1, 10, 20, 21]
    folder = tmp_path / "landscape"
    names = ("landscape-plane.gif", "landscape-lines-line-1.gif")
    assert all((folder / name).read_bytes()[:6] == b"GIF89a" for name in names)
    assert not list(folder.glob(".*"))
    plain = train(
        Linear, regression, [], tmp_path, logger=TensorBoardLogger(tmp_path, "plain"), max_epochs=7
    )
    for part in ("parameters", "optimizers", "rng"):
        assert differences(plain.state[part], with_us.state[part]) == [], part


def test_time_of_the_figures_counts_as_measuring(tmp_path, monkeypatch):
    monitor = LandscapeMonitor(**SMALL, **EACH)
    spent = []

    def slow(self, folder, final):
        import time

        time.sleep(0.5)
        spent.append((final, self._bookkeeping.seconds_spent, self._bookkeeping.last_seconds))
        raise OSError("no room")

    monkeypatch.setattr(LandscapeMonitor, "run_summary", slow)
    with pytest.warns(match="landscape: a picture of the whole run could not be written"):
        train(Linear, regression, [monitor], tmp_path)
    ((final, before, last),) = spent
    assert final
    assert monitor._bookkeeping.seconds_spent - before > 0.4
    assert monitor._bookkeeping.last_seconds == last  # not in the estimate for the next one


@pytest.mark.pictures
def test_files_of_other_runs_and_damaged_files_are_skipped(tmp_path, monkeypatch):
    folder = tmp_path / "landscape"
    folder.mkdir()
    older = Slice((np.arange(3.0), np.arange(3.0)), np.ones((3, 3)), 1.0)
    older.save(folder / "landscape-plane-step00009999.npz")
    seen = {}

    class Watched(LandscapeMonitor):
        def run_summary(self, folder, final):
            (folder / "landscape-plane-step00000003.npz").write_bytes(b"PK damaged")
            (folder / "landscape-plane-step00000004.npz").unlink()
            seen["steps"] = list(self.run_files(folder, "plane"))
            return super().run_summary(folder, final)

    from lightning_landscape.callbacks import landscape_measurement as landscape

    whole = landscape._film_slices
    monkeypatch.setattr(
        landscape, "_film_slices", lambda files, most: seen.setdefault(most, whole(files, most))
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be.*")
        train(Linear, regression, [Watched(**SMALL, **EACH)], tmp_path)
    assert seen["steps"] == [1, 2, 3, 5, 6]
    assert [slice.metadata["step"] for slice in seen[30]] == [1, 2, 5, 6]
    assert (folder / "landscape-plane.gif").exists()


def test_reduced_last_slice_is_not_in_the_film(tmp_path):
    from lightning_landscape.callbacks.landscape_measurement import _film_slices

    def save(step, points, **metadata):
        axis = np.linspace(-1.0, 1.0, points)
        path = tmp_path / f"landscape-plane-step{step:08d}.npz"
        losses = np.ones((points, points))
        Slice((axis, axis), losses, 1.0, {"step": step, **metadata}).save(path)
        return path

    less = {"coarse": {"wanted": [15, 15], "taken": [5, 5]}}
    files = [save(1, 15), save(2, 15), save(3, 5, **less)]
    assert [slice.metadata["step"] for slice in _film_slices(files, most=9)] == [1, 2]
    # After a resume with another resolution the newest of full size counts.
    files += [save(4, 7), save(5, 5, **less)]
    assert [slice.metadata["step"] for slice in _film_slices(files, most=9)] == [4]
    assert [slice.metadata["step"] for slice in _film_slices(files[-1:], most=9)] == [5]


def test_no_film_of_one_slice(tmp_path):
    """The probe is complete at the end of the only epoch."""
    monitor = LandscapeMonitor(**SMALL)
    train(Linear, regression, [monitor], tmp_path, max_epochs=1)
    assert [row["step"] for row in monitor.history] == [3]
    assert not [p for p in (tmp_path / "landscape").iterdir() if p.suffix == ".gif"]


def test_resume_in_the_same_folder_shows_the_whole_run(tmp_path):
    def monitors():
        return [HessianMonitor(**EACH), LandscapeMonitor(**SMALL, **EACH)]

    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(
        Linear, regression, [*monitors(), saver], tmp_path, max_epochs=2, enable_checkpointing=True
    )
    resumed = monitors()
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(Linear, regression, resumed, tmp_path, max_epochs=3, ckpt_path=last)
    folder = tmp_path / "landscape"
    assert [row["step"] for row in resumed[0].history] == [7, 8, 9]
    assert [row["step"] for row in resumed[0].run_rows(folder)] == list(range(1, 10))
    assert list(resumed[1].run_files(folder, "plane")) == list(range(1, 10))
    # Another run in this folder shows its own slices.
    fresh = monitors()
    train(Linear, regression, fresh, tmp_path, max_epochs=1)
    assert list(fresh[1].run_files(folder, "plane")) == [1, 2, 3]


def test_only_selected_files_are_loaded(tmp_path):
    paths = [tmp_path / f"landscape-plane-step{step:08d}.npz" for step in range(100)]
    for path in paths:
        path.touch()
    (tmp_path / "landscape-plane-2-step00000001.npz").touch()
    found = saved_files(tmp_path, "landscape-plane", lambda step: step % 2 == 0)
    assert list(found.values()) == paths[::2]
    loads = []

    def load(path):
        loads.append(path)
        if path == paths[0]:
            raise ValueError("damaged")
        return path.name

    assert list(load_evenly(paths, load, most=3)) == [paths[1], paths[50], paths[99]]
    assert len(loads) <= 6
    assert load_evenly(paths[:1], load, most=3) == {}
    assert saved_files(tmp_path / "nowhere", "x", lambda step: True) == {}


def test_milestones():
    monitor, counts = HessianMonitor(max_overhead=None), []
    for count in range(1000):
        monitor._bookkeeping.measured = count
        counts += [count] if _at_milestone(monitor) else []
    assert counts == [10, 20, 40, 80, 160, 320, 640]
