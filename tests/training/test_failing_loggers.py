"""Loggers written by users, of every bad kind: the run ends as without us, and nothing is lost."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_landscape import HessianMonitor, LandscapeMonitor
from lightning_landscape.training.output.loggers import folder_of
from tests.runs import MemoryLogger, differences, rows_of, train
from tests.small import Linear, regression
from tests.training.clock import Timed

FEW = {"every_n_train_steps": 3, "max_overhead": None, "probe_samples": 20}
KEYS = ("hessian/top_eigenvalue", "hessian/edge_ratio")


class Network(Linear):
    """With dropout: a random number that is drawn besides shows in the weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))


class Keeps(MemoryLogger):
    """Takes images too."""

    def __init__(self):
        super().__init__()
        self.images = []

    def log_image(self, key, images, step=None):
        self.images += [(key, step, image.copy()) for image in images]


class Offline(MemoryLogger):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route")


class RefusesSlashes(MemoryLogger):
    def log_metrics(self, metrics, step=None):
        for name in metrics:
            if "/" in name:
                raise ValueError(f"{name!r} is no name")
        super().log_metrics(metrics, step)


class OtherImages(MemoryLogger):
    def log_image(self, picture):
        raise AssertionError("not reached")


class LosesItsClient(MemoryLogger):
    """As the run begins, when Lightning looks, it is there."""

    @property
    def experiment(self):
        if self.rows:
            raise RuntimeError("timed out")


class Nameless(MemoryLogger):
    save_dir = "."

    @property
    def version(self):
        raise NotImplementedError("a cloud")


class Plain:
    """Of no class of Lightning's, and with no more than Lightning calls."""

    name, version, save_dir = "plain", None, None
    log_hyperparams = log_graph = save = finalize = lambda *_: None

    def __init__(self):
        self.rows = []

    values = MemoryLogger.values

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Meddles(Keeps):
    """Draws random numbers, and changes what it is given."""

    @property
    def version(self):
        return f"{random.random()}"

    def draw(self):
        return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    def log_metrics(self, metrics, step=None):
        self.draw()
        super().log_metrics(metrics, step)
        metrics.clear()

    def log_image(self, key, images, step=None):
        self.draw()
        super().log_image(key, images, step)
        for image in images:
            image[:] = 0


# Each with what is said of it.
BAD = {
    Offline: "Offline could not be written (ConnectionError: no route); training",
    RefusesSlashes: "RefusesSlashes could not be written (ValueError: 'hessian/",
    OtherImages: "OtherImages could not be written (TypeError: ",
    LosesItsClient: "LosesItsClient could not be written (RuntimeError: timed out); training",
    Nameless: "Nameless gives no directory for its run (NotImplementedError: a cloud); ",
    Plain: "",
    Meddles: "",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(Network, regression, (), tmp_path_factory.mktemp("plain"), max_epochs=3).state


def run(plain, folder, loggers):
    """``(the callbacks, our warnings)`` of nine steps that end as without them."""
    monitors = [HessianMonitor(**FEW), LandscapeMonitor(resolution=2, line_resolution=0, **FEW)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(Network, regression, monitors, folder, logger=loggers, max_epochs=3)
    assert differences(plain, found.state) == []
    assert [[row["step"] for row in m.history] for m in monitors] == [[1, 3, 6, 9]] * 2
    assert all(m.failed == 0 for m in monitors)
    (file,) = folder.rglob("history.jsonl")
    rows = rows_of(file)
    for monitor in monitors:
        assert [row for row in rows if row["monitor"] == monitor.prefix] == monitor.history
    told = [str(w.message) for w in caught]
    return monitors, [m for m in told if "could not be" in m or "gives no directory" in m]


def has_all(logger, monitor):
    expected = [[(row["step"], row[key]) for row in monitor.history] for key in KEYS]
    assert [logger.values(key) for key in KEYS] == expected


def pictures(logger):
    return [(key, step) for key, step, _ in logger.images if key == "landscape/plane"]


@pytest.mark.pictures
@pytest.mark.parametrize("kind", BAD)
def test_alone(kind, plain, tmp_path):
    logger = kind()
    (monitor, _), told = run(plain, tmp_path, logger)
    assert [message[: len(BAD[kind])] for message in told] == [BAD[kind]] * bool(BAD[kind])
    if kind not in (Offline, RefusesSlashes):
        has_all(logger, monitor)
    kept = sorted(p.name for p in tmp_path.rglob("landscape-plane-step*.png"))
    assert len(kept) == (0 if kind is Meddles else 4)


@pytest.mark.pictures
def test_all_of_them_between_two_good_ones(plain, tmp_path):
    """The second good one gets, after all of the bad, just what the first got."""
    first, *bad, last = (kind() for kind in (Keeps, *BAD, Offline, Keeps))
    (monitor, _), told = run(plain, tmp_path, [first, *bad, last])
    for logger in (first, last):
        has_all(logger, monitor)
        assert pictures(logger) == [("landscape/plane", step) for step in (1, 3, 6, 9)]
    assert differences(first.rows, last.rows) == []
    assert differences(first.images, last.images) == []
    assert min(image.std() for _, _, image in last.images) > 10  # not blank
    # Once each, and which of two alike it was; the folder is only asked of the first.
    said = {words for kind, words in BAD.items() if words and kind not in (Offline, Nameless)}
    both = [f"Offline, trainer.loggers[{i}], could not be written" for i in (1, len(BAD) + 1)]
    assert len(told) == len(said) + 2
    for words in (*said, *both):
        assert sum(message.startswith(words) for message in told) == 1, words


@pytest.mark.pictures
def test_one_that_draws_random_numbers_for_an_image_that_was_put_off(plain, tmp_path):
    """Under a limit, here one that is never reached, images of scalar callbacks come later."""

    class DrawsForImages(Keeps):
        def log_image(self, key, images, step=None):
            torch.rand(1)
            super().log_image(key, images, step)

    logger = DrawsForImages()
    monitor = HessianMonitor(**{**FEW, "max_overhead": 1e9}, density_samples=2)
    found = train(Network, regression, [monitor], tmp_path, logger=logger, max_epochs=3)
    assert differences(plain, found.state) == []
    drawn = [step for key, step, _ in logger.images if key == "hessian/density"]
    assert drawn == [1, 3, 6, 9]  # and not at the end only


@pytest.mark.short_runs
def test_a_slow_one_is_charged(plain, tmp_path, monkeypatch, clock):
    class Slow(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            clock.now += 6.0
            super().log_metrics(metrics, step)

    Timed(monkeypatch, clock, {})
    monitor = HessianMonitor(every_n_train_steps=1, probe_samples=20, max_overhead=0.05)
    logger = Slow()
    found = train(Network, regression, [monitor], tmp_path, logger=logger, max_epochs=3)
    assert differences(plain, found.state) == []
    # The first takes 6 of the 7 s that there are for values.
    assert logger.values(KEYS[0]) == [(1, monitor.history[0][KEYS[0]])]
    assert monitor.skipped == 8
    assert monitor._bookkeeping.seconds_spent == 6.0


# -- the folder of the run -------------------------------------------------------------------------


class Named(MemoryLogger):
    def __init__(self, save_dir, name, version):
        super().__init__()
        self._parts = save_dir, name, version

    save_dir = property(lambda self: self._parts[0])
    name = property(lambda self: self._parts[1])
    version = property(lambda self: self._parts[2])


@pytest.mark.parametrize(
    ("name", "version", "place"),
    [
        ("..", "0", None),
        ("a", "../../b", None),
        ("/elsewhere", 3, None),
        ("a", "/elsewhere", None),
        ("a/../b", "../c", "c"),
        ("a/b", 3, "a/b/version_3"),
        ("a", None, "a"),
        ("..name", "..", "."),
    ],
)
def test_files_stay_in_the_save_directory(name, version, place, tmp_path):
    for save_dir in (tmp_path / "logs", str(tmp_path / "logs"), "logs", ".", ""):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = folder_of(Named(save_dir, name, version), "otherwise")
        within = tmp_path / save_dir
        assert (tmp_path / folder).resolve() == within.joinpath(place or ".").resolve()
        told = [str(w.message) for w in caught]
        assert len(told) == (place is None)
        for message in told:
            assert re.search(f"name='{name}' and version='.*' lead out of save_dir='", message)


def test_an_absolute_name_in_the_save_directory(tmp_path):
    assert folder_of(Named(tmp_path, str(tmp_path / "a"), 1), "") == tmp_path / "a" / "version_1"


def test_a_run_whose_logger_leads_out(plain, tmp_path):
    run(plain, tmp_path / "logs", Named(tmp_path / "logs", "../..", "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert (tmp_path / "logs" / "history.jsonl").is_file()


# -- directories of other machines -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_dir", "root", "place", "told"),
    [
        ("s3://bucket/runs", "logs", "logs/a/version_3", "s3://bucket/runs is not a directory"),
        ("s3://bucket/runs", "gs://root", "a/version_3", "s3://bucket/runs is not a directory"),
        (None, "gs://root", ".", "gs://root is not a directory of this machine"),
        ("runs", "gs://root", "runs/a/version_3", None),
        ("file://{}/runs", "gs://root", "runs/a/version_3", None),
    ],
)
def test_files_go_to_this_machine(save_dir, root, place, told, tmp_path):
    logger = Named(save_dir and save_dir.format(tmp_path), "a", 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = folder_of(logger, root)
    assert (tmp_path / folder).resolve() == (tmp_path / place).resolve()
    assert [str(w.message)[: len(told or "")] for w in caught] == [told] * (told is not None)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_run_whose_logs_are_elsewhere(kind, plain, tmp_path):
    """Lightning writes there, to fsspec's memory here; nothing of ours is in a folder "memory:"."""
    run(plain, tmp_path / "logs", kind(f"memory://{kind.__name__}"))
    files = tmp_path / "logs" / "lightning_logs" / "version_0"
    assert (files / "history.jsonl").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_run_without_loggers_whose_root_is_elsewhere(tmp_path):
    monitor = HessianMonitor(**FEW)
    train(Network, regression, [monitor], "memory://bucket", logger=False)
    folder = tmp_path / "landscape_logs" / "version_0"
    assert rows_of(folder / "history.jsonl") == monitor.history
    assert sorted(path.name for path in folder.iterdir()) == ["history.jsonl", "landscape"]
    assert [path.name for path in tmp_path.iterdir()] == ["landscape_logs"]
