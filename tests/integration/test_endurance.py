"""2,000 steps with a measurement each: only the history grows."""

import gc
import io
import itertools
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lightning_landscape
from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    read_history,
)
from tests.runs import differences, train
from tests.small import regression

STEPS, DRAWN = 2000, 400  # steps in all, and between pictures
LOOKS = (360, 1160, 1960)  # as many pictures in between
OURS = str(Path(lightning_landscape.__file__).parent)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        evaluations.count += 1
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


evaluations = Mock(count=0)  # isolation restores all other state


class Watch(pl.Callback):
    """Records the state at some steps, and the calls in the ten steps before each.

    It must be the last callback in the list.
    """

    def __init__(self, monitors):
        self.monitors = monitors
        self.tensors, self.objects, self.states = [], [], []
        self.evaluated = []
        self.counts = Mock(called=[])  # isolation would restore a list of its own

    @property
    def called(self):
        return self.counts.called

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step + 10 in LOOKS:
            self.called.append(0)
            sys.setprofile(self._count)
        elif trainer.global_step in LOOKS:
            sys.setprofile(None)
            self._look(trainer)

    def _count(self, frame, event, _):
        self.called[-1] += event == "c_call" or frame.f_code.co_filename.startswith(OURS)

    def _look(self, trainer):
        self.evaluated.append(evaluations.count)
        for logger in trainer.loggers:
            logger.save()
        gc.collect()
        rows = [row for monitor in self.monitors for row in monitor._bookkeeping.history.rows()]
        counted = {id(part) for row in rows for part in (row, *row.values())}
        alive = [thing for thing in gc.get_objects() if id(thing) not in counted]
        self.objects.append(len(alive))
        self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in alive))
        saved = io.BytesIO()
        torch.save([callback.state_dict() for callback in trainer.callbacks], saved)
        self.states.append(len(saved.getvalue()))


@pytest.mark.slow
def test_two_thousand_measurements(tmp_path):
    data = tuple(next(iter(regression(20, 20))))
    exact = {"probe": data, "max_overhead": None}
    sharpness = SharpnessMonitor(every_n_train_steps=1, **exact)
    hessian = HessianMonitor(every_n_train_steps=10, **exact)
    monitors = [
        sharpness,
        hessian,
        GeneralizationMonitor(every_n_train_steps=10, validation_probe=data, **exact),
        LandscapeMonitor(every_n_train_steps=DRAWN, resolution=5, line_resolution=5, **exact),
        InterpolationMonitor(every_n_train_steps=DRAWN, resolution=5, **exact),
    ]
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 0.0, action="warn")
    watch = Watch(monitors)
    loggers = [TensorBoardLogger(tmp_path, "board", ""), CSVLogger(tmp_path, "csv", "")]

    def run(callbacks, logger):
        settings = {"max_steps": STEPS, "max_epochs": -1, "logger": logger}
        return train(Net, regression(2000, 20), callbacks, tmp_path, **settings)

    with pytest.warns(match="SharpnessEarlyStopping") as caught:
        watched = run([*monitors, stopper, watch], loggers)
    assert sum("SharpnessEarlyStopping" in str(warning.message) for warning in caught) == 1

    # Memory: only the rows of the history grow, up to 10,000.
    assert watch.tensors == [watch.tensors[0]] * 3
    assert max(watch.objects) - min(watch.objects) <= 50, watch.objects
    assert max(watch.states) < 4096
    assert max(watch.states) - min(watch.states) <= 64  # an entry of its archive is padded to that

    # Work: evaluations of the loss, products, calls of Python functions.
    evaluated = [later - before for before, later in itertools.pairwise(watch.evaluated)]
    assert evaluated[1] <= evaluated[0]
    products = [row["hessian/hvps"] for row in hessian.history]
    third = len(products) // 3
    assert sum(products[-third:]) <= sum(products[:third])
    assert watch.called[-1] <= 1.1 * watch.called[0], watch.called

    # On disk: all rows, a few bytes per number, and only the documented files.
    board = tmp_path / "board"
    rows = read_history(board / "history.jsonl")
    at = {m.prefix: [row["step"] for row in rows if row["monitor"] == m.prefix] for m in monitors}
    assert at["sharpness"] == list(range(1, STEPS + 1))
    assert at["hessian"] == at["generalization"] == [1, *range(10, STEPS + 1, 10)]
    assert at["landscape"] == at["interpolation"] == [1, *range(DRAWN, STEPS + 1, DRAWN)]
    size = {path.name: path.stat().st_size for path in board.rglob("*") if path.is_file()}
    assert size.pop("history.jsonl") <= 500 * len(rows)
    (events,) = board.glob("events.*")
    scalars = sum("/" in key for row in rows for key in row)
    pictures = 3 * len(at["landscape"]) + 1 + 7  # the film; the eigenvalue at 10, 20, 40, ...
    assert size.pop(events.name) <= 64 * scalars + 65_536 * pictures
    slices = ("landscape-line-1", "landscape-line-2", "landscape-plane", "interpolation-line")
    for name, step in itertools.product(slices, at["landscape"]):
        assert size.pop(f"{name}-step{step:08d}.npz") <= 2048
    assert set(size) == {"hparams.yaml", "interpolation-reference.pt", "landscape-plane.gif"}
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(any("/" in key for key in row) for row in rows)

    without = run([], False)
    for part in ("parameters", "optimizers", "rng"):
        assert not differences(without.state[part], watched.state[part])
