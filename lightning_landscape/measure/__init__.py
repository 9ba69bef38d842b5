"""Measure a finished model: ``python -m lightning_landscape.measure --module ... --data ...``.

The callbacks are those of a live run.  A fit begins from the checkpoint, so that weights, learning
rates, the optimizer's state and the counters are what they were; they measure once; and it ends
before its first batch.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_landscape.callbacks.suite import landscape_callbacks
from lightning_landscape.geometry.checks import (
    check_callable,
    check_count,
    check_flags,
    check_mapping,
    check_path,
    quoted,
)
from lightning_landscape.measure.checkpoint import (
    build_data,
    build_module,
    is_complete,
    read_checkpoint,
    step_of,
)
from lightning_landscape.measure.offline import Offline
from lightning_landscape.training.lightning_packages import CALLBACKS, PACKAGES, package_of
from lightning_landscape.training.losses import UserLoss
from lightning_landscape.training.monitor import Monitor

__all__ = ["Measurement", "measure"]

# What Lightning says of runs that are to be trained on.
_NOT_HERE = (
    ".*callbacks used to create the checkpoint need to be provided",
    ".*Experiment logs directory .* exists and is not empty",
    ".*does not have many workers",
    ".*number of training batches .* is smaller than the logging interval",
    ".*`LeafSpec`.* is deprecated",
)


@dataclass(frozen=True)
class Measurement:
    """What was measured on one model.

    Attributes:
        step: training steps behind the weights, the label of all values.
        values: scalars under their keys.
        rows: one plain dict a callback, as in ``history.jsonl``.
        log_dir: where ``history.jsonl``, ``landscape/`` and the loggers' files are.
        report: the HTML page, if one was asked for.
    """

    step: int
    values: dict[str, float]
    rows: list[dict[str, Any]]
    log_dir: Path
    report: Path | None


def measure(
    module: nn.Module | type[nn.Module],
    data: Any = None,
    *,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[Any] | None = None,
    logdir: str | Path = "landscape_logs",
    probe_samples: int = 512,
    loss_fn: UserLoss | None = None,
    init: Mapping[str, Any] | None = None,
    report: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Measurement:
    """Measure a model that is not being trained, as the callbacks would have while it was.

    Given the probe of the live run, values are bit for bit those that a callback would have had at
    the step of the checkpoint.  Only an eigenvalue may differ, within its residual: a live solver
    starts from its last result.

    Args:
        module: the ``LightningModule``, or its class, which is built from the ``hyper_parameters``
            that the checkpoint holds (``save_hyperparameters()``) and from ``init``.
        data: where the probe comes from, the first examples in the loader's own order, so one that
            shuffles gives another probe each time: a ``DataLoader``, a list of batches, a
            ``LightningDataModule`` or its class, or a function that returns one of these.
            ``None``: the module's own ``train_dataloader``.  For callbacks that were given a probe
            it is not used.
        checkpoint: a file that Lightning's ``Trainer`` saved; the module has its weights
            afterwards.  ``None``: the module as it is, at step 0.  Without the optimizer's state
            (``save_weights_only=True``) learning rates are those of ``configure_optimizers``.
        callbacks: what is measured; ``None``: ``landscape_callbacks(max_overhead=None)``.  Their
            schedules and limits do not matter here.  Where the checkpoint knows them, they go on
            with their probes and colour scales.
        logdir: a new ``version_<n>`` in it gets what a live run's log directory has.
        probe_samples: how many examples the default callbacks take.
        loss_fn: for the default callbacks, see ``HessianMonitor``.
        init: arguments of a module's class; they overrule the checkpoint's.
        report: write ``report.html`` too.
        progress: show a progress bar, on a terminal.
        settings: arguments of the ``Trainer`` that the loss or the edge depends on, as in training:
            ``precision``, ``gradient_clip_val``, ``accelerator``, ...

    Quantities about a step (``hessian/batch_edge_ratio``, ``hessian/update_curvature``,
    ``sharpness/critical``, the direction ``"update"``) are left out, which is said.  One process,
    one device.  Files are read with ``weights_only=True``.  Weights are not changed otherwise;
    gradients are cleared, as at the start of any fit.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not one, or cannot be read safely; ``data`` holds no batch.
        TypeError: an argument of another kind; arguments of the module's class that are missing.
        RuntimeError: every measurement failed; the warnings say why.

    Example::

        measure(Classifier, train_loader, checkpoint="last.ckpt").values["hessian/top_eigenvalue"]
    """
    refused = sorted(_OURS & settings.keys())
    if refused:
        raise TypeError(
            f"measure({refused[0]}=...): this is not to be set, no training is done; leave it out"
        )
    _check(checkpoint, logdir, init, settings)
    check_flags("measure", report=report, progress=progress)
    saved = None if checkpoint is None else read_checkpoint(checkpoint)
    built = build_module(module, saved, dict(init or {}))
    fit_data = build_data(data, saved)
    chosen = _callbacks(callbacks, probe_samples, loss_fn)
    monitors = [callback for callback in chosen if isinstance(callback, Monitor)]
    known = {id(monitor): len(monitor.history) for monitor in monitors}

    offline = Offline(saved, progress=progress, source=f"measure(data={data!r:.80})")
    if not built.training:
        warnings.warn(
            f"{type(built).__name__} is in eval mode, and so it is measured, also by a callback "
            f"with probe_mode='train': call train() on it first if it is not meant to be",
            stacklevel=2,
        )
    lightning = package_of(built)  # its Trainer takes no module of the other
    trainer = lightning.Trainer(
        **{
            "devices": 1,
            "logger": _loggers(lightning.loggers, logdir),
            "callbacks": [offline, *chosen],
            # As many as schedulers can be made for, and more than have passed.
            "max_epochs": 1 if saved is None else int(saved["epoch"]) + 2,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )
    resumes = saved is not None and is_complete(saved)
    # An older Lightning takes no such argument; read_checkpoint has read the file safely already.
    takes = inspect.signature(trainer.fit).parameters
    safely = {"weights_only": True} if "weights_only" in takes else {}
    with warnings.catch_warnings():
        for message in _NOT_HERE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(
            built,
            ckpt_path=str(checkpoint) if resumes else None,
            **safely,
            **fit_data,
        )
    rows = [row for m in monitors for row in m.history[known[id(m)] :]]
    if not rows:
        raise RuntimeError(
            f"measure({type(built).__name__}): nothing could be measured, see the warnings above"
        )
    values = {
        key: value for m in monitors for row in rows for key, value in row.items() if m.owns(key)
    }
    log_dir = Path(trainer.log_dir)
    page = None
    if report:
        from lightning_landscape.report import write_report

        page = write_report(log_dir)
    step = 0 if saved is None else step_of(saved, built)
    return Measurement(step, values, rows, log_dir, page)


# What makes the fit one without training, in one process.
_OURS = {
    "callbacks", "logger", "devices", "num_nodes", "strategy", "max_epochs", "max_steps",
    "min_epochs", "min_steps", "max_time", "num_sanity_val_steps", "enable_checkpointing",
    "fast_dev_run", "barebones", "limit_train_batches", "overfit_batches",
}  # fmt: skip


def _check(checkpoint: object, logdir: object, init: object, settings: dict[str, Any]) -> None:
    """Raise where an argument is of another kind."""
    if checkpoint is not None:
        expected = "the path of a checkpoint that a Trainer has saved, or None"
        check_path("measure", "checkpoint", checkpoint, expected)
    check_path("measure", "logdir", logdir, "a directory")
    if init is not None:
        expected = "a mapping from argument to value, of the module's class, or None"
        check_mapping("measure", "init", init, expected)
    known = inspect.signature(PACKAGES[0].Trainer).parameters
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"{quoted('measure', name, value)}: expected an argument of the Trainer"
                + (f", such as {near[0]!r}" if near else "")
            )


def _callbacks(
    given: Sequence[Any] | None, probe_samples: int, loss_fn: UserLoss | None
) -> list[Any]:
    check_count("measure", "probe_samples", probe_samples)
    if loss_fn is not None:
        expected = "a function (pl_module, batch) -> loss, or None for training_step"
        check_callable("measure", "loss_fn", loss_fn, expected, arguments=2)
    if given is None:
        return landscape_callbacks(max_overhead=None, probe_samples=probe_samples, loss_fn=loss_fn)
    if isinstance(given, CALLBACKS):
        given = [given]
    listed = isinstance(given, (list, tuple))
    if loss_fn is not None:
        raise TypeError(
            "measure(callbacks=..., loss_fn=...): give it to the callbacks, e.g. "
            "HessianMonitor(loss_fn=...)"
        )
    if not listed or not any(isinstance(callback, Monitor) for callback in given):
        raise TypeError(
            f"measure(callbacks={given!r:.80}): expected measuring callbacks, e.g. "
            f"[HessianMonitor(max_overhead=None)], or None for the usual ones"
        )
    return list(given)


def _loggers(loggers: Any, logdir: str | Path) -> list[Any]:
    board = loggers.TensorBoardLogger(str(logdir), name="")
    return [board, loggers.CSVLogger(str(logdir), name="", version=board.version)]
