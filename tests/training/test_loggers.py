"""What each logger gets, read back with its own client."""

from __future__ import annotations

import collections
import math
import re
import warnings

import numpy as np
import pytest
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_landscape import HessianMonitor, LandscapeMonitor, landscape_callbacks, read_history
from lightning_landscape.training.output.loggers import show_image, show_text
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
