"""Measure a finished model: ``python -m lightning_landscape.measure --module ... --data ...``.

The callbacks are those of training.  A fit is started from the checkpoint, which restores weights,
learning rates, the optimizer's state and the counters.  The callbacks measure once, and the fit
ends before its first batch.
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

# Lightning's warnings about settings of training.
_IRRELEVANT_WARNINGS = (
    ".*callbacks used to create the checkpoint need to be provided",
    ".*Experiment logs directory .* exists and is not empty",
    ".*does not have many workers",
    ".*number of training batches .* is smaller than the logging interval",
    ".*`LeafSpec`.* is deprecated",
    "LIGHTNING_LANDSCAPE: the Trainer has measuring callbacks of its own",
)


@dataclass(frozen=True)
class Measurement:
    """The values measured on one model.

    Attributes:
        step: number of training steps of the model, the label of all values.
        values: scalars under their keys.
        rows: one plain dict per callback, as in ``history.jsonl``.
        log_dir: where ``history.jsonl``, ``landscape/`` and the loggers' files are.
        report: the HTML page, if ``report`` was set.
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
    """Measure a saved model, as the callbacks would have measured it during training.

    With the probe of the training run, values are bit for bit those of a callback at the step of
    the checkpoint, except that an eigenvalue may differ within its residual: during training the
    solver starts from its last result.

    Args:
        module: the ``LightningModule``, or its class, which is built from the ``hyper_parameters``
            that the checkpoint holds (``save_hyperparameters()``) and from ``init``.
        data: the source of the probe, which is the first examples in the loader's order (so with
            shuffling it differs each time): a ``DataLoader``, a list of batches, a
            ``LightningDataModule`` or its class, or a function that returns one of these.
            ``None``: the module's own ``train_dataloader``.  Not used for callbacks that have a
            probe.
        checkpoint: a file saved by Lightning's ``Trainer``; its weights are loaded into the module.
            ``None``: the module with its current weights, at step 0.  Without the optimizer's state
            (``save_weights_only=True``) learning rates are those of ``configure_optimizers``.
        callbacks: the measuring callbacks; ``None``: ``landscape_callbacks(max_overhead=None)``.
            Their schedules and limits are ignored.  Callbacks with a state in the checkpoint use
            the probes and colour scales of the training run.
        logdir: a new ``version_<n>`` in it has the same files as the log directory of a training.
        probe_samples: number of examples in the probe of the default callbacks.
        loss_fn: for the default callbacks, see ``HessianMonitor``.
        init: arguments for the module's class; they take precedence over the checkpoint's.
        report: write ``report.html`` too.
        progress: show a progress bar, on a terminal.
        settings: arguments of the ``Trainer`` on which the loss or the edge depends, as in
            training: ``precision``, ``gradient_clip_val``, ``accelerator``, ...

    Quantities about a step (``hessian/batch_edge_ratio``, ``hessian/update_curvature``,
    ``sharpness/critical``, the direction ``"update"``) are left out, with a warning.  Runs in
    one process on one device.  Files are read with ``weights_only=True``.  Apart from loading a
    checkpoint, weights are not changed; gradients are cleared, as at the start of any fit.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the file is not a checkpoint, or cannot be read safely; ``data`` holds no batch.
        TypeError: an argument of a wrong type; a missing argument of the module's class.
        RuntimeError: every measurement failed; the warnings say why.

    Example::

        measure(Classifier, train_loader, checkpoint="last.ckpt").values["hessian/top_eigenvalue"]
    """
    reserved = sorted(_RESERVED & settings.keys())
    if reserved:
        raise TypeError(
            f"measure({reserved[0]}=...): it cannot be set, nothing is trained; leave it out"
        )
    _check_types(checkpoint, logdir, init, settings)
    check_flags("measure", report=report, progress=progress)
    saved = None if checkpoint is None else read_checkpoint(checkpoint)
    built = build_module(module, saved, dict(init or {}))
    fit_data = build_data(data, saved)
    chosen = _callbacks(callbacks, probe_samples, loss_fn)
    monitors = [callback for callback in chosen if isinstance(callback, Monitor)]
    known = {id(monitor): len(monitor.history) for monitor in monitors}
    for monitor in monitors:
        monitor._bookkeeping.run = None  # not a new run of these callbacks

    offline = Offline(saved, progress=progress, source=f"measure(data={data!r:.80})")
    if not built.training:
        warnings.warn(
            f"{type(built).__name__} is in eval mode and is measured in that mode, also by "
            f"callbacks with probe_mode='train'; call train() first to measure it in train mode",
            stacklevel=2,
        )
    lightning = package_of(built)  # its Trainer does not accept modules of the other package
    trainer = lightning.Trainer(
        **{
            "devices": 1,
            "logger": _loggers(lightning.loggers, logdir),
            "callbacks": [offline, *chosen],
            # Some schedulers need a finite number; and more than the epochs so far.
            "max_epochs": 1 if saved is None else int(saved["epoch"]) + 2,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )
    resumes = saved is not None and is_complete(saved)
    # Older versions of Lightning have no such argument; read_checkpoint has checked the file.
    parameters = inspect.signature(trainer.fit).parameters
    safely = {"weights_only": True} if "weights_only" in parameters else {}
    with warnings.catch_warnings():
        for message in _IRRELEVANT_WARNINGS:
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


# Set by `measure`: a fit without training, in one process.
_RESERVED = {
    "callbacks", "logger", "devices", "num_nodes", "strategy", "max_epochs", "max_steps",
    "min_epochs", "min_steps", "max_time", "num_sanity_val_steps", "enable_checkpointing",
    "fast_dev_run", "barebones", "limit_train_batches", "overfit_batches",
}  # fmt: skip


def _check_types(
    checkpoint: object, logdir: object, init: object, settings: dict[str, Any]
) -> None:
    """Raise if an argument has a wrong type."""
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
    is_list = isinstance(given, (list, tuple))
    if loss_fn is not None:
        raise TypeError(
            "measure(callbacks=..., loss_fn=...): pass loss_fn to the callbacks instead, e.g. "
            "HessianMonitor(loss_fn=...)"
        )
    if not is_list or not any(isinstance(callback, Monitor) for callback in given):
        raise TypeError(
            f"measure(callbacks={given!r:.80}): expected measuring callbacks, e.g. "
            f"[HessianMonitor(max_overhead=None)], or None for the usual ones"
        )
    return list(given)


def _loggers(loggers: Any, logdir: str | Path) -> list[Any]:
    tensorboard = loggers.TensorBoardLogger(str(logdir), name="")
    return [tensorboard, loggers.CSVLogger(str(logdir), name="", version=tensorboard.version)]
