"""Captured probes in files beside the logs, for the runs that go on from a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import move_data_to_device

from lightning_landscape.training.probe import Probe

if TYPE_CHECKING:
    from lightning_landscape.training.records import Recorder


class KeptProbe:
    """Where one captured probe lies, each process's share in its own file, and its hash.

    Args:
        source: which batches it is captured from.

    Attributes:
        told: what checkpoints hold: the file of rank zero and its hash; None without a file.
    """

    def __init__(self, source: Literal["training", "validation"]) -> None:
        self.source = source
        self.words = "probe" if source == "training" else "validation probe"
        self.told: dict[str, str] | None = None

    def state(self) -> dict[str, str] | None:
        """For a checkpoint."""
        return None if self.told is None else dict(self.told)

    def write(self, probe: Probe, recorder: Recorder, trainer: Trainer) -> None:
        """Write this process's share beside the logs, once."""
        if probe.file is None:
            stem = self.words.replace(" ", "-")
            name = f"{stem}-{probe.samples}-rank{trainer.global_rank}.pt"
            probe.file = str(recorder.folder / name)
            recorder.share(name, probe.save)
        self.told = {"file": probe.file, "hash": probe.fingerprint()}

    def read(self, probe: Probe, recorder: Recorder, trainer: Trainer) -> str:
        """Read this process's share; why that cannot be, or an empty string."""
        assert self.told is not None
        path = Path(self.told["file"])
        # Checkpoints hold the path of rank zero.
        name = path.name.replace("rank0", f"rank{trainer.global_rank}")
        places = [path.parent, recorder.folder]
        if trainer.ckpt_path:
            places += [above / path.parent.name for above in Path(trainer.ckpt_path).parents[:3]]
        to_device = partial(move_data_to_device, device=trainer.strategy.root_device)
        problem = "its file is missing"
        for place in places:
            if not (place / name).is_file():
                continue
            try:
                probe.restore(place / name, to_device)
            except Exception as error:  # a damaged file raises any of a dozen types
                problem = f"its file cannot be read ({error})"
                continue
            if trainer.global_rank == 0 and probe.fingerprint() != self.told["hash"]:
                problem = "its file holds other data"
                probe.forget()
                continue
            probe.file = str(place / name)
            return ""
        return f"{problem} (looked for {name})"
