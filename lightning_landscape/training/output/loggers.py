"""Images, text and reports for each kind of logger, through the API of its client library.

The kind is found by the name of the class or of one of its bases, because there are two Lightning
packages.  A client library is imported only where its logger is used.  For other loggers it depends
on their methods.
Exceptions of a client are left to the caller, and its return values are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.training.interrupts import reraise_interrupt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]


def show_image(logger: Any, tag: str, image: Image, step: int) -> bool:
    """Log ``image`` (height, width, 3); False if the logger does not accept images.

    Apart from the kinds known by name, it needs an ``experiment`` with TensorBoard's ``add_image``
    or a method ``log_image(key, images, step=...)`` as in Lightning's W&B logger.
    """
    kind = _kind(logger)
    writer = writer_of(logger)
    if kind in _IMAGES:
        _IMAGES[kind](logger, tag, image, step)
    elif callable(getattr(writer, "add_image", None)):
        _tensorboard_image(logger, tag, image, step)
    elif kind not in _DUMMIES and callable(getattr(logger, "log_image", None)):
        _wandb_image(logger, tag, image, step)
    else:
        return False
    return True


def show_text(logger: Any, tag: str, text: str, step: int) -> bool:
    """Log a line of text; False if the logger does not accept text."""
    kind = _kind(logger)
    writer = writer_of(logger)
    if kind in _TEXTS:
        _TEXTS[kind](logger, tag, text, step)
    elif callable(getattr(writer, "add_text", None)):
        _tensorboard_text(logger, tag, text, step)
    else:
        return False
    return True


def takes_report(logger: Any) -> bool:
    """Whether the logger's client stores HTML pages."""
    return _kind(logger) in _REPORTS


def show_report(logger: Any, path: Path, step: int) -> None:
    """Upload the HTML page ``path``, if :func:`takes_report`."""
    _REPORTS[_kind(logger)](logger, path, step)


def writer_of(logger: Any) -> Any:
    """The client's own object; None for a dummy logger or one without it."""
    return None if _kind(logger) in _DUMMIES else getattr(logger, "experiment", None)


def prefix_of(logger: Any) -> str:
    """The logger's ``prefix``, which Lightning prepends to the names of scalars."""
    prefix = getattr(logger, "_prefix", None)
    separator = getattr(logger, "LOGGER_JOIN_CHAR", None)
    return f"{prefix}{separator}" if isinstance(prefix, str) and prefix and separator else ""


def folder_of(logger: Any, root: str) -> Path:
    """The directory of this logger's run; ``root`` if it has no save directory.

    TensorBoard and CSV loggers make a directory for each run.  For others it is
    ``<name>/<version>`` in the save directory, to which Lightning's ``ModelCheckpoint`` writes too.
    Otherwise two W&B runs in one directory would share their files, and MLflow would list our
    folder as an experiment.  A Trackio logger without a save directory has its own in ``root``.

    It is a local directory, because files are appended to and read again.  If the save directory is
    a URL (``s3://...``), it is ``<name>/<version>`` in ``root``, or in the working directory if
    ``root`` is a URL too, with a warning.

    A path that leaves the save directory is not used, and an error of the logger is not raised: the
    last known directory is used instead, with a warning.
    """
    location: str | Path = root
    folder = _local(root) or Path.cwd()
    try:
        kind = _kind(logger)
        own = kind in ("TensorBoardLogger", "CSVLogger")
        save_dir = logger.log_dir if own else getattr(logger, "save_dir", None)
        if kind == "TrackioLogger":
            save_dir = save_dir or root
        if isinstance(save_dir, (str, Path)):
            location = save_dir
            local_dir = _local(save_dir)
            folder = local_dir or folder
            if local_dir is None or not own:
                folder = _inside(folder, logger.name, logger.version)
    except Exception as error:  # whatever a logger raises
        reraise_interrupt(error)
        rank_zero_warn(
            f"{type(logger).__name__} gives no directory for its run "
            f"({type(error).__name__}: {error}); history.jsonl and landscape/ are written to "
            f"{str(folder)!r}; pass a logger with a save_dir to write them elsewhere"
        )
        return folder
    if _local(location) is None:
        rank_zero_warn(
            f"{location} is not a directory of this machine: history.jsonl and landscape/ are "
            f"written to {str(folder)!r}; copy them if this machine is deleted after the run"
        )
    return folder


def _local(location: str | Path) -> Path | None:
    """``location`` as a path; None for a URL that does not name a local file."""
    scheme, is_url, path = str(location).partition("://")
    if not is_url:
        return Path(location)
    return Path(path) if scheme in ("file", "local") else None


def _inside(save_dir: Path, name: Any, version: Any) -> Path:
    if isinstance(version, int):
        version = f"version_{version}"
    # An absolute part replaces all parts before it.
    path = Path(os.path.normpath(save_dir.joinpath(*(str(p) for p in (name, version) if p))))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(save_dir)):
        raise ValueError(
            f"name={name!r} and version={version!r} lead out of save_dir={str(save_dir)!r}; "
            f"expected names of folders in it"
        )
    return path


# -- TensorBoard ------------------------------------------------------------------------------


def _tensorboard_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.experiment.add_image(prefix_of(logger) + tag, image, global_step=step, dataformats="HWC")


def _tensorboard_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.experiment.add_text(prefix_of(logger) + tag, text, global_step=step)


# -- Weights & Biases -------------------------------------------------------------------------
# Without W&B's own step, which must not decrease.  The label is trainer/global_step, as in
# Lightning: a value in the row and the x axis of all charts, which may decrease.


def _wandb_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.log_image(tag, [image], step=step)


def _wandb_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.log_text(tag, columns=["step", "text"], data=[[step, text]], step=step)


def _wandb_report(logger: Any, path: Path, step: int) -> None:
    # As it is: the page does not allow the style sheet that W&B would insert.
    page = import_module("wandb").Html(str(path), inject=False)
    logger.log_metrics({_REPORT: page}, step=step)
    run = logger.experiment
    run.log_artifact(str(path), name=f"landscape-report-{run.id}", type="report")


# -- MLflow -----------------------------------------------------------------------------------


def _mlflow_image(logger: Any, tag: str, image: Image, step: int) -> None:
    key = _mlflow_name(prefix_of(logger) + tag)
    logger.experiment.log_image(logger.run_id, image, key=key, step=step)


def _mlflow_text(logger: Any, tag: str, text: str, step: int) -> None:
    file = f"{_mlflow_name(prefix_of(logger) + tag)}-step{step:08d}.txt"
    logger.experiment.log_text(logger.run_id, text, file)


def _mlflow_report(logger: Any, path: Path, step: int) -> None:
    folder = _mlflow_name(prefix_of(logger) + _REPORT).rpartition("/")[0]
    logger.experiment.log_artifact(logger.run_id, str(path), folder)


def _mlflow_name(name: str) -> str:
    """The name as Lightning converts it for scalars: MLflow rejects other characters."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)


# -- Comet ------------------------------------------------------------------------------------


def _comet_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.experiment.log_image(image, name=tag, step=step)


def _comet_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.experiment.log_text(f"{tag}: {text}", step=step)


# -- Trackio ----------------------------------------------------------------------------------
# Lightning has no logger for it yet: this is a class TrackioLogger of another package, or the
# user's own.


def _log_to_trackio(logger: Any, tag: str, kind: str, value: Any, step: int) -> None:
    trackio = import_module("trackio")
    # Without an `experiment` with this method, Trackio's current run.
    log = getattr(writer_of(logger), "log", trackio.log)
    log({prefix_of(logger) + tag: getattr(trackio, kind)(value)}, step=step)


def _trackio_image(logger: Any, tag: str, image: Image, step: int) -> None:
    _log_to_trackio(logger, tag, "Image", image, step)


def _trackio_text(logger: Any, tag: str, text: str, step: int) -> None:
    _log_to_trackio(logger, tag, "Markdown", text, step)


def _trackio_report(logger: Any, path: Path, step: int) -> None:
    _log_to_trackio(logger, _REPORT, "Html", path, step)


# -- LitLogger --------------------------------------------------------------------------------


def _litlogger_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.experiment[tag].append(import_module("litlogger").Image(image), step=step)


def _litlogger_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.experiment[tag].append(import_module("litlogger").Text(text), step=step)


def _litlogger_report(logger: Any, path: Path, step: int) -> None:
    logger.experiment[f"{_REPORT}{path.suffix}"] = import_module("litlogger").File(str(path))


# -- kinds of loggers -------------------------------------------------------------------------

_IMAGES: dict[str, Callable[[Any, str, Image, int], None]] = {
    "TensorBoardLogger": _tensorboard_image,
    "WandbLogger": _wandb_image,
    "MLFlowLogger": _mlflow_image,
    "CometLogger": _comet_image,
    "TrackioLogger": _trackio_image,
    "LitLogger": _litlogger_image,
}
_TEXTS: dict[str, Callable[[Any, str, str, int], None]] = {
    "TensorBoardLogger": _tensorboard_text,
    "WandbLogger": _wandb_text,
    "MLFlowLogger": _mlflow_text,
    "CometLogger": _comet_text,
    "TrackioLogger": _trackio_text,
    "LitLogger": _litlogger_text,
}
_REPORT = "landscape/report"
_REPORTS: dict[str, Callable[[Any, Path, int], None]] = {
    "WandbLogger": _wandb_report,
    "MLFlowLogger": _mlflow_report,
    "TrackioLogger": _trackio_report,
    "LitLogger": _litlogger_report,
}
# Their ``experiment`` has every attribute, and does nothing.
_DUMMIES = ("DummyLogger",)
_KNOWN = {*_IMAGES, *_DUMMIES, "CSVLogger"}


def _kind(logger: Any) -> str:
    """The name of the known class that ``logger`` is an instance of, or an empty string."""
    names = (kind.__name__ for kind in type(logger).__mro__)
    return next((name for name in names if name in _KNOWN), "")
