"""Files beside the logs that a run resumed from a checkpoint reads again."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import move_data_to_device, rank_zero_info

from lightning_landscape.training.data.probe import Probe, why_unreadable
from lightning_landscape.training.interrupts import reraise_interrupt
from lightning_landscape.training.output.recorder import Recorder


class Storable(Protocol):
    """An object that can be written to a file and read again."""

    file: str | None

    def save(self, path: Path) -> None:
        """Write it."""

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read it; ``prepare`` moves tensors to the device."""

    def fingerprint(self) -> str:
        """A hash of the content."""

    def clear(self) -> None:
        """Drop the content."""


def is_entry(value: object) -> bool:
    """Whether ``value`` is a checkpoint's entry of a :class:`StoredFile`."""
    if not isinstance(value, dict):
        return value is None
    return all(isinstance(value.get(part), str) for part in ("file", "hash"))


class StoredFile:
    """The file of an object that a resumed run continues with.

    Args:
        label: the kind of content, for messages.

    Attributes:
        entry: the entry in checkpoints: the path on rank zero, and the hash; None without a file.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.entry: dict[str, str] | None = None

    def state(self) -> dict[str, str] | None:
        """A copy of the entry, for a checkpoint."""
        return None if self.entry is None else dict(self.entry)

    def holds(self, item: Storable) -> bool:
        """Whether the entry names the file of ``item``."""
        return self.entry is not None and self.entry["file"] == item.file

    def write_as(self, name: str, item: Storable, recorder: Recorder) -> None:
        """Write it beside the logs under ``name``, once."""
        if item.file is None:
            item.file = str(recorder.folder / name)
            recorder.file_on_this_rank(name, item.save)
        self.entry = {"file": item.file, "hash": item.fingerprint()}

    def read(self, item: Storable, recorder: Recorder, trainer: Trainer) -> str:
        """Read this process's file; returns why that failed, or an empty string."""
        assert self.entry is not None
        path = Path(self.entry["file"])
        # Checkpoints hold the path of rank zero.
        name = path.name.replace("rank0", f"rank{trainer.global_rank}")
        folders = [path.parent, recorder.folder]
        if trainer.ckpt_path:
            folders += [above / path.parent.name for above in Path(trainer.ckpt_path).parents[:3]]
        to_device = partial(move_data_to_device, device=trainer.strategy.root_device)
        problem = ""  # of the first file found
        for folder in folders:
            if not (folder / name).is_file():
                continue
            try:
                _verify_checksums(folder / name)
                item.restore(folder / name, to_device)
            except Exception as error:  # a damaged file raises one of a dozen types
                reraise_interrupt(error)
                problem = problem or f"its file cannot be read ({why_unreadable(error)})"
                continue
            if trainer.global_rank == 0 and item.fingerprint() != self.entry["hash"]:
                problem = problem or "its file holds other data"
                item.clear()
                continue
            item.file = str(folder / name)
            return ""
        return f"{problem or 'its file is missing'} (looked for {name})"


def _verify_checksums(path: Path) -> None:
    """Raise if the archive is damaged; ``torch.load`` does not verify its checksums."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")


class StoredProbe(StoredFile):
    """The files of a captured probe: each process writes its batches to its own file.

    Args:
        source: the batches from which the probe is captured.
    """

    def __init__(self, source: Literal["training", "validation"]) -> None:
        super().__init__("probe" if source == "training" else "validation probe")
        self.source = source

    def write(self, probe: Probe, recorder: Recorder, trainer: Trainer) -> None:
        """Write this process's batches beside the logs, once."""
        name = f"{self.source}-examples-{probe.samples}-rank{trainer.global_rank}.pt"
        if probe.file is None:
            rank_zero_info(
                f"lightning_landscape: {recorder.folder / name} holds {self.source} examples, so "
                f"that a resumed run measures the same ones; save_probe=False leaves it out"
            )
        self.write_as(name, probe, recorder)
