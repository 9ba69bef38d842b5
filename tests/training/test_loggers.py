"""What each logger gets, read back with its own client."""

from __future__ import annotations

import collections
import math
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_landscape import HessianMonitor, LandscapeMonitor, landscape_callbacks, read_history
from lightning_landscape.training.output.loggers import show_image, show_text
from lightning_landscape.training.output.recorder import Recorder
from lightning_landscape.training.publisher import Publisher
from tests import wandb_file
from tests.runs import MemoryLogger, rows_of, train
from tests.small import Linear, regression

PICTURES = {"landscape/line", "landscape/plane"}
WHOLE_RUN = {"hessian/eigenvalue", "landscape/film"}  # at the end
IMAGE = np.zeros((4, 5, 3), dtype=np.uint8)


def run(tmp_path, logger, **settings):
    """Twelve steps, four measurements of each callback."""
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=3)
    train(Linear, regression, callbacks, tmp_path, logger=logger, max_epochs=4, **settings)
    return callbacks


def values(callback, key):
    return [(row["step"], row[key]) for row in callback.history]


def steps(callback):
    return [row["step"] for row in callback.history]


def approximately(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


def pngs(folder):
    return sorted(path.name for path in folder.rglob("landscape/*-step*.png"))


def assert_is_report(page, folder):
    """The page is that of the run in ``folder``, with pictures."""
    text = page.read_text()
    assert text == (folder / "report.html").read_text()
    assert 'data-kind="landscape-plane"' in text
    assert "hessian/edge_ratio" in text


# -- Weights & Biases -------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    client = pytest.importorskip("wandb")
    yield client
    client.finish()


@pytest.mark.pictures
def test_wandb(tmp_path, wandb):
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="digits")
    callbacks = run(tmp_path, logger)
    version = logger.version
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    rows = wandb_file.rows(file)
    # What is still being written is read as far as it goes.
    data = file.read_bytes()
    all_records = list(wandb_file.records(data))
    for end in range(0, len(data), 97):
        begun = list(wandb_file.records(data[:end]))
        assert begun == all_records[: len(begun)]
    # W&B drops what would go back in its own count; nothing did.
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    for callback, key in ((callbacks[0], "hessian/edge_ratio"), (callbacks[1], "sharpness/sam")):
        logged = [(row["trainer/global_step"], row[key]) for row in rows if key in row]
        assert logged == approximately(values(callback, key))
    for tag in PICTURES:
        labels = [row["trainer/global_step"] for row in rows if f"{tag}/filenames" in row]
        assert labels == steps(callbacks[2])
        images = list((folder / "files" / "media" / "images").glob(f"{tag}_*.png"))
        assert len(images) == 4
        assert min(imread(path).std() for path in images) > 0.05  # not blank
    (table,) = (folder / "files" / "media" / "table" / "hessian").glob("engine_*.json")
    assert "exact, by double backward" in table.read_text()
    # The files lie in a folder of the run, as Lightning's checkpoints do, and there are no PNGs.
    ours = tmp_path / "digits" / version
    (page,) = (folder / "files" / "media" / "html" / "landscape").glob("report_*.html")
    assert_is_report(page, ours)
    assert [r["trainer/global_step"] for r in rows if "landscape/report/path" in r] == [12]
    assert ("report", f"landscape-report-{version}") in wandb_file.artifacts(file)
    assert [row["step"] for row in read_history(ours / "history.jsonl")][::3] == steps(callbacks[0])
    assert (ours / "landscape").is_dir()
    assert pngs(tmp_path) == []


@pytest.mark.pictures
def test_wandb_rows_of_the_user_stay(tmp_path, wandb):
    """As W&B documents it for Lightning: with Lightning's label in the row, not as ``step=``."""

    class Own(Linear):
        def on_train_batch_end(self, *_):
            self.logger.experiment.log({"mine": 1.0, "trainer/global_step": self.global_step})

    logger = WandbLogger(offline=True, save_dir=tmp_path, project="digits")
    monitor = LandscapeMonitor(every_n_train_steps=2, max_overhead=None)
    train(Own, regression, [monitor], tmp_path, logger=logger, max_epochs=3)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = wandb_file.rows(file)
    assert [row["trainer/global_step"] for row in rows if "mine" in row] == list(range(1, 10))
    # Nor do the pictures take the label of the row before.
    pictures = [row for row in rows if "landscape/plane/filenames" in row]
    assert [row["trainer/global_step"] for row in pictures] == steps(monitor)


def test_two_wandb_runs_in_one_folder_do_not_mix(tmp_path, wandb):
    for _ in range(2):
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="digits")
        run(tmp_path, logger)
        wandb.finish()
    assert len(list(tmp_path.glob("digits/*/history.jsonl"))) == 2
    assert not list(tmp_path.rglob("history-1.jsonl"))


# -- MLflow -----------------------------------------------------------------------------------


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return pytest.importorskip("mlflow")


@pytest.mark.pictures
def test_mlflow(tmp_path, mlflow, caplog):
    store = tmp_path / "mlruns"
    logger = MLFlowLogger(tracking_uri=f"file:{store}", save_dir=str(store), prefix="a")
    callbacks = run(tmp_path, logger)
    client = mlflow.MlflowClient(f"file:{store}")
    for callback, key in ((callbacks[0], "hessian/edge_ratio"), (callbacks[1], "sharpness/sam")):
        history = client.get_metric_history(logger.run_id, f"a-{key}")
        assert [(m.step, m.value) for m in history] == approximately(values(callback, key))
    images = [f.path for f in client.list_artifacts(logger.run_id, "images")]
    for tag in PICTURES:
        name = re.escape(f"images/a-{tag}").replace("/", "[/~#]")
        found = [re.match(rf"{name}\D+step\D+(\d+)\D+timestamp.*\.png$", path) for path in images]
        assert sorted(int(match[1]) for match in found if match) == steps(callbacks[2])
    (text,) = client.list_artifacts(logger.run_id, "a-hessian")
    # Our folder lies in the run's and is not taken for an experiment.
    folder = store / logger.name / logger.run_id
    assert (folder / "history.jsonl").is_file()
    assert "exact" in mlflow.artifacts.load_text(f"file:{folder}/artifacts/{text.path}")
    caplog.clear()
    assert {e.name for e in client.search_experiments()} == {"Default", "lightning_logs"}
    assert "Malformed" not in caplog.text
    assert_is_report(folder / "artifacts" / "a-landscape" / "report.html", folder)
    assert pngs(tmp_path) == []


def test_mlflow_names(tmp_path, mlflow):
    """It refuses most punctuation; scalars and images are renamed alike."""
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}", save_dir=str(tmp_path))
    show_image(logger, "landscape/top (5%)/plane", IMAGE, 7)
    show_text(logger, "hessian/all: [1]/engine", "exact", 7)
    logger.log_metrics({"hessian/all: [1]/edge": 2.0, "nan": math.nan}, 7)
    client = mlflow.MlflowClient(f"file:{tmp_path}")
    names = [f.path for f in client.list_artifacts(logger.run_id, "images")]
    assert len(names) == 2  # and a small copy
    assert all("top 5" in name for name in names)
    (text,) = client.list_artifacts(logger.run_id, "hessian/all 1")
    assert text.path == "hessian/all 1/engine-step00000007.txt"
    assert set(client.get_run(logger.run_id).data.metrics) == {"hessian/all 1/edge", "nan"}


# -- Comet: its interface as documented, recorded ---------------------------------------------


class Recorded:
    """Takes the calls that ``comet_ml.Experiment`` takes."""

    def __init__(self):
        self.images, self.texts = [], []

    def log_image(self, image_data, name=None, overwrite=False, image_format="png", step=None):
        self.images.append((name, step, image_data.shape, image_data.dtype))

    def log_text(self, text, step=None, metadata=None):
        self.texts.append((text, step))


class CometLogger(MemoryLogger):
    def __init__(self):
        super().__init__()
        self.experiment = Recorded()


class MyCometLogger(CometLogger):
    pass


@pytest.mark.pictures
@pytest.mark.parametrize("kind", [CometLogger, MyCometLogger])
def test_comet(tmp_path, kind):
    logger = kind()
    callbacks = run(tmp_path, logger)
    assert logger.values("hessian/edge_ratio") == values(callbacks[0], "hessian/edge_ratio")
    for tag in PICTURES:
        found = [call for call in logger.experiment.images if call[0] == tag]
        assert [step for _, step, _, _ in found] == steps(callbacks[2])
        assert all(shape[2] == 3 and dtype == np.uint8 for _, _, shape, dtype in found)
    assert ("hessian/engine: exact, by double backward", 3) in logger.experiment.texts
    assert pngs(tmp_path) == []


# -- Trackio, for which Lightning has no logger of its own --------------------------------------


class TrackioLogger(MemoryLogger):
    """With the client's run as ``experiment``, as Lightning's own loggers have it."""

    name = "digits"

    def __init__(self, trackio):
        super().__init__()
        self.experiment = trackio.init(project=self.name)

    @property
    def version(self):
        return self.experiment.name

    def log_metrics(self, metrics, step=None):
        self.experiment.log(dict(metrics), step=step)

    def finalize(self, status):
        self.experiment.finish()


@pytest.mark.pictures
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logger = TrackioLogger(trackio)
    callbacks = run(tmp_path, logger)
    rows = SQLiteStorage.get_logs("digits", logger.version)
    found = {key: [(r["step"], r[key]) for r in rows if key in r] for row in rows for key in row}
    for callback, key in ((callbacks[0], "hessian/edge_ratio"), (callbacks[1], "sharpness/sam")):
        assert found[key] == approximately(values(callback, key))
    media = tmp_path / "trackio" / "media"
    for tag in PICTURES:
        assert [step for step, _ in found[tag]] == steps(callbacks[2])
        images = [imread(media / value["file_path"]) for _, value in found[tag]]
        assert min(image.std() for image in images) > 0.05  # not blank
    assert found["hessian/engine"][0][1]["_value"] == "exact, by double backward"
    assert "| `hessian/edge_ratio` |" in found["landscape/summary"][0][1]["_value"]
    ((step, page),) = found["landscape/report"]
    assert step == 12
    assert_is_report(media / page["file_path"], tmp_path / "digits" / logger.version)
    assert pngs(tmp_path) == []


class FakeTrackio(ModuleType):
    """The part of Trackio's interface that is used, recorded."""

    def __init__(self):
        super().__init__("trackio")
        self.logged = []
        for kind in ("Image", "Markdown", "Html"):
            setattr(self, kind, lambda value, kind=kind: (kind, value))

    def log(self, metrics, step=None):
        self.logged += [(key, value, step) for key, value in metrics.items()]

    def init(self, project):
        return SimpleNamespace(name="first", log=self.log, finish=lambda: None)


@pytest.fixture
def fake_trackio(monkeypatch):
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    return trackio


@pytest.mark.pictures
def test_trackio_recorded(tmp_path, fake_trackio):
    callbacks = run(tmp_path, TrackioLogger(fake_trackio))
    for tag in PICTURES:
        images = [(value, step) for key, value, step in fake_trackio.logged if key == tag]
        assert [step for _, step in images] == steps(callbacks[2])
        assert all(kind == "Image" and image.dtype == np.uint8 for (kind, image), _ in images)
    assert ("hessian/engine", ("Markdown", "exact, by double backward"), 3) in fake_trackio.logged
    report = tmp_path / "digits" / "first" / "report.html"
    assert ("landscape/report", ("Html", report), 12) in fake_trackio.logged
    assert pngs(tmp_path) == []


def test_a_trackio_logger_that_hides_its_run(fake_trackio):
    """The client's current run is used."""
    hides = type("TrackioLogger", (MemoryLogger,), {})()
    assert show_image(hides, "landscape/plane", IMAGE, 7)
    assert show_text(hides, "hessian/engine", "exact", 8)
    image, text = fake_trackio.logged
    assert image == ("landscape/plane", ("Image", IMAGE), 7)
    assert text == ("hessian/engine", ("Markdown", "exact"), 8)


# -- LitLogger: Lightning's class, and its client without the platform --------------------------


class FakeFile:
    def __init__(self, value):
        self.value = value


class FakeImage(FakeFile):
    pass


class FakeText(FakeFile):
    pass


class FakeExperiment:
    """A dictionary of lists and files, like the client's."""

    def __init__(self, **settings):
        self.series, self.files = collections.defaultdict(Appended), {}

    def __getitem__(self, key):
        return self.series[key]

    def __setitem__(self, key, value):
        self.files[key] = value

    def print_url(self):
        pass

    def finalize(self, status=None):
        pass


class Appended(list):
    def append(self, value, step=None):
        super().append((step, value))


@pytest.mark.pictures
def test_litlogger_recorded(tmp_path, monkeypatch):
    loggers = pytest.importorskip("pytorch_lightning.loggers.litlogger")
    litlogger = SimpleNamespace(
        Experiment=FakeExperiment, Image=FakeImage, Text=FakeText, File=FakeFile
    )
    monkeypatch.setitem(sys.modules, "litlogger", litlogger)
    logger = loggers.LitLogger(tmp_path, name="digits")
    callbacks = run(tmp_path, logger)
    series = logger.experiment.series
    key = "hessian/edge_ratio"
    assert series[key] == values(callbacks[0], key)
    for tag in PICTURES:
        assert [step for step, _ in series[tag]] == steps(callbacks[2])
        assert all(isinstance(image, FakeImage) for _, image in series[tag])
        assert all(image.value.dtype == np.uint8 for _, image in series[tag])
    step, text = series["hessian/engine"][0]
    assert (step, type(text), text.value) == (3, FakeText, "exact, by double backward")
    page = logger.experiment.files["landscape/report.html"]
    assert_is_report(Path(page.value), Path(logger.save_dir) / logger.name / logger.version)
    assert pngs(tmp_path) == []


@pytest.mark.pictures
def test_litlogger(tmp_path, monkeypatch):
    """The real client; its classes that call the platform are replaced."""
    pytest.importorskip("litlogger")
    loggers = pytest.importorskip("pytorch_lightning.loggers.litlogger")
    module = sys.modules["litlogger.experiment"]  # litlogger.experiment is the current one
    uploaded = []

    def keep(**settings):
        data = Path(settings["file_path"]).read_bytes()
        name = settings.get("name") or settings["remote_path"]
        uploaded.append((name, settings.get("step"), data))

    clients = {name: mock.MagicMock() for name in ("AuthApi", "MetricsApi", "ArtifactsApi")}
    metrics = clients["MetricsApi"].return_value
    metrics.get_or_create_experiment_metrics.return_value = (mock.MagicMock(tags=[]), True)
    metrics.get_last_steps.return_value = {}
    for name, client in clients.items():
        monkeypatch.setattr(module, name, client)
    monkeypatch.setattr(module, "MediaApi", lambda client: SimpleNamespace(upload_media=keep))
    for name in ("_resolve_teamspace", "build_experiment_url", "get_accessible_url", "signal"):
        monkeypatch.setattr(module, name, mock.MagicMock())
    files = mock.MagicMock(upload_experiment_file_artifact=keep)
    monkeypatch.setattr(sys.modules["litlogger.media"], "ArtifactsApi", lambda client: files)

    logger = loggers.LitLogger(tmp_path, name="digits", save_logs=False)
    callbacks = run(tmp_path, logger)
    logger.experiment.finalize()
    key = "hessian/edge_ratio"
    assert list(logger.experiment[key]) == [value for _, value in values(callbacks[0], key)]
    found = collections.defaultdict(list)
    for name, step, data in uploaded:
        found[name].append((step, data))
    for tag in PICTURES:
        assert [step for step, _ in found[tag]] == steps(callbacks[2])
        assert all(data.startswith(b"\x89PNG") for _, data in found[tag])
    assert found["hessian/engine"][0] == (3, b"exact, by double backward")
    ((_, page),) = found["landscape/report.html"]
    ours = Path(logger.save_dir) / logger.name / logger.version / "report.html"
    assert page == ours.read_bytes()


# -- the report at the end ----------------------------------------------------------------------


def reports(trackio):
    return [step for key, _, step in trackio.logged if key == "landscape/report"]


def small_run(tmp_path, fake_trackio, **settings):
    monitor = HessianMonitor(max_overhead=None, every_n_train_steps=3)
    logger = TrackioLogger(fake_trackio)
    train(Linear, regression, [monitor], tmp_path, logger=logger, max_epochs=1, **settings)


def test_no_report_without_a_logger_that_stores_it(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    train(Linear, regression, [HessianMonitor(max_overhead=None)], tmp_path, logger=logger)
    assert not list(tmp_path.rglob("report.html"))


def test_no_report_without_a_measurement(tmp_path, fake_trackio):
    monitor = HessianMonitor(every_n_epochs=9, every_n_train_steps=None, max_overhead=None)
    monitor.measure = mock.Mock(side_effect=RuntimeError("none"))
    with pytest.warns(match="none"):
        train(Linear, regression, [monitor], tmp_path, logger=TrackioLogger(fake_trackio))
    assert reports(fake_trackio) == []
    assert not list(tmp_path.rglob("report.html"))


def test_no_report_of_a_run_that_failed_nor_of_a_trial(tmp_path, fake_trackio):
    class Fails(Linear):
        def on_train_epoch_end(self):
            raise ZeroDivisionError

    monitor = HessianMonitor(max_overhead=None, every_n_train_steps=1)
    with pytest.raises(ZeroDivisionError):
        train(Fails, regression, [monitor], tmp_path, logger=TrackioLogger(fake_trackio))
    assert monitor.measured
    small_run(tmp_path, fake_trackio, fast_dev_run=True)
    assert reports(fake_trackio) == []


def test_a_report_that_cannot_be_written(tmp_path, fake_trackio, monkeypatch):
    def fail(folder, *, pictures):
        raise ValueError("no ink")

    monkeypatch.setattr(Publisher, "write_report", staticmethod(fail))
    with pytest.warns(match=r"the report could not be written .ValueError: no ink.; try python -m"):
        small_run(tmp_path, fake_trackio)
    assert reports(fake_trackio) == []


def test_a_report_that_cannot_be_uploaded(tmp_path, fake_trackio):
    def fail(path):
        raise ConnectionError("no route")

    fake_trackio.Html = fail
    said = (
        r"the report for TrackioLogger could not be uploaded \(ConnectionError: no route\); upload"
    )
    with pytest.warns(match=said) as warned:
        small_run(tmp_path, fake_trackio)
    assert len([w for w in warned if "no route" in str(w.message)]) == 1
    assert list(tmp_path.rglob("report.html"))


def test_the_first_process_reports(tmp_path, fake_trackio):
    trainer = Trainer(
        logger=TrackioLogger(fake_trackio), accelerator="cpu", default_root_dir=tmp_path
    )
    assert Recorder(trainer).takes_report
    with mock.patch.object(type(trainer), "is_global_zero", False):
        assert not Recorder(trainer).takes_report


def test_a_report_draws_no_random_numbers(tmp_path, fake_trackio):
    def draw(path):
        torch.rand(1)
        return path

    drawn = []
    for html in (draw, lambda path: path):
        fake_trackio.Html = html
        small_run(tmp_path, fake_trackio)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1]


# -- TensorBoard, CSV, none, several ----------------------------------------------------------


@pytest.mark.pictures
def test_tensorboard_with_a_prefix(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix="a(b)")
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=2)
    callbacks[2].surface = True
    train(Linear, regression, callbacks, tmp_path, logger=logger, max_epochs=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for tag in PICTURES:
        assert [e.step for e in events.Images(f"a(b)-{tag}")] == steps(callbacks[2])
    assert events.Tensors("a(b)-hessian/engine/text_summary")
    assert events.Tensors("a(b)-landscape/surface_VERTEX")
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [p for chart in layout.category[0].chart for p in chart.multiline.tag]
    scalars = events.Tags()["scalars"]
    drawn = {tag for tag in scalars for pattern in patterns if re.match(pattern, tag)}
    assert drawn == {f"a(b)-hessian/{key}" for key in ("edge", "edge_ratio", "top_eigenvalue")}


@pytest.mark.pictures
@pytest.mark.parametrize("logger", ["csv", "dummy", "none", "own"])
def test_pictures_are_files_where_nobody_takes_them(tmp_path, logger):
    made = {
        "csv": lambda: CSVLogger(tmp_path, name=""),
        "dummy": DummyLogger,
        "none": lambda: False,
        "own": MemoryLogger,
    }[logger]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be written")
        callbacks = run(tmp_path, made)
    kept = collections.Counter(name.split("-step")[0] for name in pngs(tmp_path))
    whole = {"hessian-eigenvalue": 1, "landscape-film": 1}
    assert kept == {"landscape-line": 4, "landscape-plane": 4, **whole}
    (path,) = tmp_path.rglob("history.jsonl")
    rows = [row for row in rows_of(path) if row["monitor"] == "hessian"]
    assert rows == callbacks[0].history


@pytest.mark.pictures
def test_a_logger_of_the_users_own(tmp_path):
    """It takes images if it has what Lightning's W&B logger has."""

    class Own(MemoryLogger):
        def __init__(self):
            super().__init__()
            self.images = []

        def log_image(self, key, images, step=None):
            self.images += [(key, step, image.shape[2]) for image in images]

    logger = Own()
    callbacks = run(tmp_path, logger)
    assert {key for key, _, _ in logger.images} == PICTURES | WHOLE_RUN
    assert [s for key, s, _ in logger.images if key == "landscape/plane"] == steps(callbacks[2])
    assert pngs(tmp_path) == []


@pytest.mark.pictures
def test_several_loggers_and_one_that_fails(tmp_path):
    class Fails(CometLogger):
        def __init__(self):
            super().__init__()
            self.experiment.log_image = self.experiment.log_text = self.fail

        def fail(self, *_, **__):
            raise ConnectionError("no route")

    comet, board = CometLogger(), TensorBoardLogger(tmp_path, name="tb", version="")
    with pytest.warns(match="Fails could not be written .ConnectionError: no route"):
        callbacks = run(tmp_path, [Fails(), comet, board, CSVLogger(tmp_path), DummyLogger()])
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("landscape/plane")] == steps(callbacks[2])
    assert len(comet.experiment.images) == 10
    assert pngs(tmp_path) == []
    with pytest.warns(match="no route"):
        run(tmp_path / "alone", Fails())
    assert len(pngs(tmp_path / "alone")) == 10


def test_fast_dev_run_hands_over_nothing(tmp_path):
    logger = CometLogger()
    run(tmp_path, logger, fast_dev_run=True)
    assert logger.experiment.images == logger.experiment.texts == []
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_does_not_know_its_name(tmp_path):
    class Nameless(MemoryLogger):
        save_dir = str(tmp_path)

        @property
        def name(self):
            raise RuntimeError("offline")

    monitor = HessianMonitor(max_overhead=None)
    train(Linear, regression, [monitor], tmp_path, logger=Nameless())
    assert (tmp_path / "history.jsonl").is_file()
