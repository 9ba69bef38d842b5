"""Checks for every supported version of Lightning: ``python checks.py lightning.pytorch``.

It needs the installed package and jsonargparse, and nothing from the checkout: ``make
check-environments`` runs a copy of this file in new virtual environments, the ordinary tests run it
for the packages that are there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    read_history,
)
from lightning_landscape.measure import measure

CALLBACKS = (
    HessianMonitor,
    SharpnessMonitor,
    LandscapeMonitor,
    InterpolationMonitor,
    GeneralizationMonitor,
    SharpnessEarlyStopping,
)


def loader() -> DataLoader:
    """48 labelled points in batches of 8: 6 steps an epoch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=8)


def probe() -> Probe:
    """The first two batches of :func:`loader`."""
    return Probe(list(loader())[:2])


def squared(pl_module: Any, batch: Any) -> Any:
    """A ``loss_fn`` without annotations."""
    return pl_module.net(batch[0]).square().mean()


squared.__annotations__ = {}


def classifier_of(pl: Any) -> type:
    """A LightningModule of this package: BatchNorm, dropout, logging, momentum."""

    class Classifier(pl.LightningModule):
        def __init__(self, width: int = 6, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1),
                nn.Linear(width, 3),
            )  # fmt: skip

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.5)

        def train_dataloader(self) -> DataLoader:
            return loader()

        def val_dataloader(self) -> DataLoader:
            return loader()

    return Classifier


def every_callback() -> list[Any]:
    """One of each, small; measured at steps 1, 4, 8 and 12."""
    common = {"every_n_train_steps": 4, "max_overhead": None, "probe_samples": 8}
    return [
        HessianMonitor(k=2, trace_samples=2, **common),
        SharpnessMonitor(critical=True, **common),
        LandscapeMonitor(resolution=5, line_resolution=5, **common),
        InterpolationMonitor(resolution=5, **common),
        GeneralizationMonitor(**common),
        SharpnessEarlyStopping("hessian/edge_ratio", threshold=1e9),
    ]


def fit(
    pl: Any,
    callbacks: Any,
    folder: Path,
    ckpt_path: Any = None,
    automatic: bool = True,
    **settings: Any,
) -> Any:
    """The Trainer after two epochs, 12 steps."""
    pl.seed_everything(1)
    module = classifier_of(pl)()
    module.automatic_optimization = automatic
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "callbacks": callbacks,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
            **settings,
        }
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def trained(pl: Any, callbacks: Any, folder: Path) -> tuple[dict[str, bytes], torch.Tensor, Any]:
    """All parameters and buffers byte by byte, the state of the random numbers, the metrics."""
    trainer = fit(pl, callbacks, folder)
    state = {n: t.numpy().tobytes() for n, t in trainer.lightning_module.state_dict().items()}
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if "/" not in n}
    return state, torch.get_rng_state(), metrics


def check_training_is_bitwise_equal(pl: Any, folder: Path) -> list[Any]:
    """Returns the histories."""
    state, rng, metrics = trained(pl, [], folder)
    callbacks = every_callback()
    watched_state, watched_rng, watched_metrics = trained(pl, callbacks, folder)
    assert watched_state == state
    assert torch.equal(watched_rng, rng)
    assert watched_metrics == metrics
    for monitor in callbacks[:-1]:
        assert monitor.failed == 0, monitor
        assert {row["step"] for row in monitor.history} >= {1, 4, 8}, monitor
    return [monitor.history for monitor in callbacks[:-1]]


def check_one_callback_without_a_list(pl: Any, folder: Path) -> None:
    for monitor in every_callback()[:-1]:
        fit(pl, monitor, folder, max_epochs=1)
        assert monitor.history, monitor


def check_logs(pl: Any, folder: Path, loggers: Any = None) -> None:
    """Scalars and images in TensorBoard's files, scalars in a CSV, rows beside them.

    ``loggers``: this package's; else a module with the same two.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = loggers or pl.loggers
    board = loggers.TensorBoardLogger(str(folder), name="logs")
    table = loggers.CSVLogger(str(folder), name="table")
    monitors = every_callback()
    fit(pl, monitors, folder, logger=[board, table])
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0})
    events.Reload()
    (scalar, *_) = events.Scalars("hessian/top_eigenvalue")
    assert scalar.step == 1
    assert math.isclose(
        scalar.value, monitors[0].history[0]["hessian/top_eigenvalue"], rel_tol=1e-6
    )
    assert {"landscape/plane", "landscape/line"} <= {*events.Tags()["images"]}
    assert "hessian/top_eigenvalue" in (Path(table.log_dir) / "metrics.csv").read_text()
    rows = read_history(Path(board.log_dir) / "history.jsonl")
    of_hessian = [row for row in rows if row["monitor"] == "hessian"]
    assert len({row.pop("run") for row in of_hessian}) == 1
    assert of_hessian == monitors[0].history


def check_stopping_and_checkpoints(pl: Any, folder: Path) -> None:
    """SharpnessEarlyStopping, Lightning's EarlyStopping and ModelCheckpoint, and resuming."""
    stopper = SharpnessEarlyStopping("hessian/top_eigenvalue", threshold=-1e9, patience=2)
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=8)
    trainer = fit(pl, [stopper, monitor], folder)
    assert stopper.stopped_step == trainer.global_step == 3, stopper.stopped_step

    key = "hessian/top_eigenvalue"
    early = pl.callbacks.EarlyStopping(key, patience=1, mode="min", check_on_train_epoch_end=True)
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder / "kept", monitor=key, save_top_k=-1, save_last=True
    )
    monitor = HessianMonitor(every_n_epochs=1, max_overhead=None)
    fit(pl, [keep, early, monitor], folder, enable_checkpointing=True)
    assert torch.isfinite(early.best_score)
    assert float(keep.best_model_score) in [
        float(torch.tensor(row[key], dtype=torch.float32)) for row in monitor.history
    ]
    again = HessianMonitor(every_n_epochs=1, max_overhead=None)
    fit(pl, again, folder, ckpt_path=keep.last_model_path, max_epochs=3)
    assert again._bookkeeping.resumed
    assert [row["step"] for row in again.history] == [18]


def check_exceptions_are_of_this_package(pl: Any, folder: Path) -> None:
    own = importlib.import_module(f"{pl.__name__}.utilities.exceptions").MisconfigurationException
    for callback in (HessianMonitor(), SharpnessEarlyStopping("hessian/typo", threshold=1.0)):
        raised: type[BaseException] | None = None
        try:
            fit(pl, callback, folder, automatic=False)
        except Exception as error:
            raised = type(error)
        assert raised is own, raised


def check_processes(pl: Any, folder: Path) -> None:
    """Training in other processes: the history is returned, and the processes measure as one."""
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=16)
    fit(pl, monitor, folder, max_epochs=1, strategy="ddp_fork", devices=2)
    assert [(row["step"], row["probe_samples"]) for row in monitor.history] == [(1, 16), (2, 16)]


def check_finished_models(pl: Any, folder: Path) -> None:
    keep = pl.callbacks.ModelCheckpoint(dirpath=folder / "finished", save_last=True)
    monitor = SharpnessMonitor(every_n_train_steps=12, max_overhead=None, probe=probe())
    fit(pl, [monitor, keep], folder, enable_checkpointing=True)
    found = measure(
        classifier_of(pl),
        checkpoint=keep.last_model_path,
        callbacks=[SharpnessMonitor(probe=probe())],
        logdir=folder / "finished",
        progress=False,
        accelerator="cpu",
    )
    assert found.step == monitor.history[-1]["step"] == 12
    assert found.values["sharpness/sam"] == monitor.history[-1]["sharpness/sam"]


def command_line(pl: Any, folder: Path, *arguments: str) -> tuple[Any, str]:
    """The Trainer of a LightningCLI with ``arguments``, and its output."""
    cli = importlib.import_module(f"{pl.__name__}.cli")
    printed = io.StringIO()
    trainer = None
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),
    ):
        trainer = cli.LightningCLI(
            classifier_of(pl),
            trainer_defaults={
                "accelerator": "cpu",
                "max_epochs": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(folder),
            },
            save_config_kwargs={"overwrite": True},
            args=list(arguments),
        ).trainer
    return trainer, printed.getvalue()


def check_command_line(pl: Any, folder: Path) -> None:
    one = "--trainer.callbacks"
    trainer, output = command_line(
        pl, folder, "fit", f"{one}+=HessianMonitor", f"{one}.every_n_train_steps=2",
        f"{one}.max_overhead=null", f"{one}.probe_samples=8", f"{one}+=SharpnessEarlyStopping",
        f"{one}.monitor=hessian/edge_ratio", f"{one}.threshold=-1",
    )  # fmt: skip
    assert trainer is not None, output
    monitor = next(c for c in trainer.callbacks if isinstance(c, HessianMonitor))
    assert [row["step"] for row in monitor.history] == [1, 2, 4]
    assert trainer.global_step == 4

    for arguments, complaint in (
        ((f"{one}+=HessianMonitor", f"{one}.every_n_train_stepz=2"), "every_n_train_stepz"),
        ((f"{one}+=HessianMonitor", f"{one}.method=lancos"), "Literal['lanczos', 'power']"),
        ((f"{one}+=HessianMonitor", f"{one}.tol=small"), "Expected a <class 'float'>"),
        ((f"{one}+=HessianMonitor", f"{one}.loss_fn={__name__}.nothing"), "nothing"),
        ((f"{one}+=LandscapeMonitor", f"{one}.directions=gradent"), "'gradient'"),
    ):
        trainer, output = command_line(pl, folder, "fit", *arguments)
        assert trainer is None, arguments
        assert complaint in output, output

    for callback in CALLBACKS:
        _, output = command_line(pl, folder, "fit", f"{one}.help={callback.__name__}")
        arguments = callback.__init__.__annotations__.keys() - {"return"}
        for argument in arguments:
            _, found, description = output.partition(f"\n  {one}.{argument} ")
            assert found, (callback, argument)
            text = description.partition("(type: ")[0].replace(argument.upper(), "").split()
            assert len(text) >= 3, (callback, argument, text)


def check_yaml(pl: Any, folder: Path) -> None:
    """Loss and probe by import path, sequences and mappings; the saved config is equivalent."""
    here = __name__
    callbacks = [
        {
            "class_path": "lightning_landscape.HessianMonitor",
            "init_args": {
                "every_n_train_steps": 5,
                "max_overhead": None,
                "loss_fn": f"{here}.squared",
                "probe": f"{here}.probe",
                "parameters": ["net.0.*", "net.4.*"],
                "blocks": {"net.0.weight": "first", "net.4.weight": "last"},
            },
        },
        {
            "class_path": "lightning_landscape.LandscapeMonitor",
            "init_args": {
                "directions": ["gradient", "random"],
                "span": [-1, 1],
                "resolution": [5, 5],
                "probe": {"class_path": f"{here}.loader"},
            },
        },
        {
            "class_path": "lightning_landscape.InterpolationMonitor",
            "init_args": {"other_probes": {"old": f"{here}.loader"}, "resolution": 5},
        },
        {
            "class_path": "lightning_landscape.SharpnessEarlyStopping",
            "init_args": {"monitor": "hessian/block/first", "threshold": 1e9, "action": "warn"},
        },
    ]
    config = folder / "config.yaml"
    config.write_text(json.dumps({"trainer": {"callbacks": callbacks}}))  # JSON is YAML
    trainer, output = command_line(pl, folder, "fit", f"--config={config}")
    assert trainer is not None, output
    hessian, landscape, interpolation = (
        next(c for c in trainer.callbacks if isinstance(c, kind))
        for kind in (HessianMonitor, LandscapeMonitor, InterpolationMonitor)
    )
    assert hessian.loss.probe.size == 16
    assert hessian.loss_fn is squared
    assert {"hessian/block/first", "hessian/block/last"} <= hessian.history[0].keys()
    assert landscape.loss.probe.size == 48
    assert "interpolation/old_loss" in interpolation.history[0]
    saved = Path(trainer.log_dir) / "config.yaml"
    _, output = command_line(pl, folder, "fit", f"--config={saved}", "--print_config")
    for line in (f"loss_fn: {here}.squared", f"class_path: {here}.probe", "net.0.weight: first"):
        assert line in output, output


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run all checks for the package named on the command line."""
    name, *absent = sys.argv[1:]
    pl = importlib.import_module(name)
    for other in absent:
        assert importlib.util.find_spec(other) is None, f"{other} is installed"
    warnings.simplefilter("ignore")
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            check(pl, Path(folder))
        print(f"{name} {pl.__version__}, torch {torch.__version__}: {check.__name__}", flush=True)


if __name__ == "__main__":
    importlib.import_module("checks").main()  # the config refers to its functions by path
