"""What lies in files beside the logs, for the runs that go on from a checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import move_data_to_device

from lightning_landscape.training.data.probe import Probe, why_unreadable
from lightning_landscape.training.output.recorder import Recorder


class Storable(Protocol):
    """What can be written to a file and read back."""

    file: str | None

    def save(self, path: Path) -> None:
        """Write it."""

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read it; ``prepare`` moves tensors to the device."""

    def fingerprint(self) -> str:
        """A hash of what it holds."""

    def clear(self) -> None:
        """Hold nothing."""


def is_entry(value: object) -> bool:
    """Whether ``value`` is a checkpoint's entry of a :class:`StoredFile`."""
    if not isinstance(value, dict):
        return value is None
    return all(isinstance(value.get(part), str) for part in ("file", "hash"))


class StoredFile:
    """The file of something that a resumed run goes on with.

    Args:
        label: what it holds, for messages.

    Attributes:
        entry: what checkpoints hold: the path on rank zero, and the hash; None without a file.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.entry: dict[str, str] | None = None

    def state(self) -> dict[str, str] | None:
        """A copy of the entry, for a checkpoint."""
        return None if self.entry is None else dict(self.entry)

    def holds(self, thing: Storable) -> bool:
        """Whether the entry names its file."""
        return self.entry is not None and self.entry["file"] == thing.file

    def write_as(self, name: str, thing: Storable, recorder: Recorder) -> None:
        """Write it beside the logs under ``name``, once."""
        if thing.file is None:
            thing.file = str(recorder.folder / name)
            recorder.share(name, thing.save)
        self.entry = {"file": thing.file, "hash": thing.fingerprint()}

    def read(self, thing: Storable, recorder: Recorder, trainer: Trainer) -> str:
        """Read this process's file; the reason why that failed, or an empty string."""
        assert self.entry is not None
        path = Path(self.entry["file"])
        # Checkpoints hold the path of rank zero.
        name = path.name.replace("rank0", f"rank{trainer.global_rank}")
        places = [path.parent, recorder.folder]
        if trainer.ckpt_path:
            places += [above / path.parent.name for above in Path(trainer.ckpt_path).parents[:3]]
        to_device = partial(move_data_to_device, device=trainer.strategy.root_device)
        problem = ""  # in the first place where there is a file
        for place in places:
            if not (place / name).is_file():
                continue
            try:
                _check_sums(place / name)
                thing.restore(place / name, to_device)
            except Exception as error:  # a damaged file raises any of a dozen types
                problem = problem or f"its file cannot be read ({why_unreadable(error)})"
                continue
            if trainer.global_rank == 0 and thing.fingerprint() != self.entry["hash"]:
                problem = problem or "its file holds other data"
                thing.clear()
                continue
            thing.file = str(place / name)
            return ""
        return f"{problem or 'its file is missing'} (looked for {name})"


def _check_sums(path: Path) -> None:
    """Raise where the archive is damaged: ``torch.load`` does not look at its checksums."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")


class StoredProbe(StoredFile):
    """The files of a captured probe: each process writes its share to its own.

    Args:
        source: which batches it is captured from.
    """

    def __init__(self, source: Literal["training", "validation"]) -> None:
        super().__init__("probe" if source == "training" else "validation probe")
        self.source = source

    def write(self, probe: Probe, recorder: Recorder, trainer: Trainer) -> None:
        """Write this process's share beside the logs, once."""
        stem = self.label.replace(" ", "-")
        self.write_as(f"{stem}-{probe.samples}-rank{trainer.global_rank}.pt", probe, recorder)
