"""What each kind of logger takes besides scalars: images and text, in the client's own words.

A kind is known by the name of its class or of one above it, for there are two Lightning packages,
and no client library is imported here.  A logger of another kind is known by what it can do.
Whatever a client raises is for the caller to catch, and what it returns is not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_warn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]


def show_image(logger: Any, tag: str, image: Image, step: int) -> bool:
    """Hand over ``image`` (height, width, 3); False where the logger takes none.

    Besides the kinds known by name: an ``experiment`` with TensorBoard's ``add_image``, or a
    logger with ``log_image(key, images, step=...)`` as Lightning's W&B logger has it.
    """
    kind = _kind(logger)
    writer = writer_of(logger)
    if kind in _IMAGES:
        _IMAGES[kind](logger, tag, image, step)
    elif callable(getattr(writer, "add_image", None)):
        _tensorboard_image(logger, tag, image, step)
    elif kind not in _NOTHING and callable(getattr(logger, "log_image", None)):
        _wandb_image(logger, tag, image, step)
    else:
        return False
    return True


def show_text(logger: Any, tag: str, text: str, step: int) -> bool:
    """Hand over a line of text; False where the logger takes none."""
    kind = _kind(logger)
    writer = writer_of(logger)
    if kind in _TEXTS:
        _TEXTS[kind](logger, tag, text, step)
    elif callable(getattr(writer, "add_text", None)):
        _tensorboard_text(logger, tag, text, step)
    else:
        return False
    return True


def writer_of(logger: Any) -> Any:
    """The client's own object; None where there is none, or one that only pretends."""
    return None if _kind(logger) in _NOTHING else getattr(logger, "experiment", None)


def prefix_of(logger: Any) -> str:
    """What Lightning puts before the names of scalars: the logger's own ``prefix``."""
    prefix = getattr(logger, "_prefix", None)
    joint = getattr(logger, "LOGGER_JOIN_CHAR", None)
    return f"{prefix}{joint}" if isinstance(prefix, str) and prefix and joint else ""


def folder_of(logger: Any, root: str) -> Path:
    """Where the files of this logger's run lie; ``root`` where it has no save directory.

    TensorBoard and CSV make a folder for each run; for others this is ``<name>/<version>`` in the
    save directory, where Lightning's ``ModelCheckpoint`` writes too.  Two W&B runs in one directory
    would otherwise mix, and MLflow would take our folder for an experiment of its own.

    A folder of this machine, for the files are appended to and read again: where the save directory
    is a URL (``s3://...``), ``<name>/<version>`` in ``root``, or in the working directory where
    that is one too; which is said.

    What leads out of the save directory is not followed, and a logger that fails is no reason to
    fail: the files go to the last place that is known then, which is said.
    """
    place: str | Path = root
    folder = _local(root) or Path.cwd()
    try:
        own = _kind(logger) in ("TensorBoardLogger", "CSVLogger")
        save_dir = logger.log_dir if own else getattr(logger, "save_dir", None)
        if isinstance(save_dir, (str, Path)):
            place = save_dir
            here = _local(save_dir)
            folder = here or folder
            if here is None or not own:
                folder = _inside(folder, logger.name, logger.version)
    except Exception as error:  # whatever a logger raises
        rank_zero_warn(
            f"{type(logger).__name__} does not tell the folder of its run "
            f"({type(error).__name__}: {error}); history.jsonl and landscape/ go to {str(folder)!r}"
        )
        return folder
    if _local(place) is None:
        rank_zero_warn(
            f"{place} is not a directory of this machine: history.jsonl and landscape/ go to "
            f"{str(folder)!r}; keep them if this machine is gone after the run"
        )
    return folder


def _local(place: str | Path) -> Path | None:
    """As a path; None for a URL that is not one of a file."""
    scheme, is_url, path = str(place).partition("://")
    if not is_url:
        return Path(place)
    return Path(path) if scheme in ("file", "local") else None


def _inside(save_dir: Path, name: Any, version: Any) -> Path:
    if isinstance(version, int):
        version = f"version_{version}"
    # An absolute part replaces all before it.
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
# Never with a step of W&B's own, which may not fall: the label is Lightning's trainer/global_step,
# a value in the row and the x axis of all charts.  It may.


def _wandb_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.log_image(tag, [image], step=step)


def _wandb_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.log_text(tag, columns=["step", "text"], data=[[step, text]], step=step)


# -- MLflow -----------------------------------------------------------------------------------


def _mlflow_image(logger: Any, tag: str, image: Image, step: int) -> None:
    key = _mlflow_name(prefix_of(logger) + tag)
    logger.experiment.log_image(logger.run_id, image, key=key, step=step)


def _mlflow_text(logger: Any, tag: str, text: str, step: int) -> None:
    file = f"{_mlflow_name(prefix_of(logger) + tag)}-step{step:08d}.txt"
    logger.experiment.log_text(logger.run_id, text, file)


def _mlflow_name(name: str) -> str:
    """What Lightning makes of the names of scalars: other letters are refused."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)


# -- Comet ------------------------------------------------------------------------------------


def _comet_image(logger: Any, tag: str, image: Image, step: int) -> None:
    logger.experiment.log_image(image, name=tag, step=step)


def _comet_text(logger: Any, tag: str, text: str, step: int) -> None:
    logger.experiment.log_text(f"{tag}: {text}", step=step)


# -- which is which ---------------------------------------------------------------------------

_IMAGES: dict[str, Callable[[Any, str, Image, int], None]] = {
    "TensorBoardLogger": _tensorboard_image,
    "WandbLogger": _wandb_image,
    "MLFlowLogger": _mlflow_image,
    "CometLogger": _comet_image,
}
_TEXTS: dict[str, Callable[[Any, str, str, int], None]] = {
    "TensorBoardLogger": _tensorboard_text,
    "WandbLogger": _wandb_text,
    "MLFlowLogger": _mlflow_text,
    "CometLogger": _comet_text,
}
# Answers to every name, and does nothing.
_NOTHING = ("DummyLogger",)
_KNOWN = {*_IMAGES, *_NOTHING, "CSVLogger"}


def _kind(logger: Any) -> str:
    """The name of the known class that this is one of, or an empty string."""
    names = (kind.__name__ for kind in type(logger).__mro__)
    return next((name for name in names if name in _KNOWN), "")
