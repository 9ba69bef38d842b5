"""The fixed set of examples on which the loss is measured."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.geometry.checks import check_count, quoted, shown
from lightning_landscape.training.data.batch import ProbeBatch, tensors_in
from lightning_landscape.training.isolation.random_state import RandomState


class Probe:
    """Batches that are kept for the whole run, so that its numbers can be compared.

    Args:
        source: ``None``: the training batches that pass by are kept, until there are ``samples``
            examples.  A ``DataLoader``: its first batches, until there are ``samples`` examples;
            an iterator too, which serves one fit.  A list: a list of batches, all of them.
            Anything else, a tuple or a dict say: one batch.
        samples: examples wanted, over all processes.  Fewer bias eigenvalues upwards.

    Raises:
        TypeError: ``source`` is no data: text, a number, a ``Dataset`` without a loader.
        ValueError: it is an empty list; ``samples`` is no integer above 0.

    One object may be given to several callbacks; without one, callbacks that ask for the same
    number of samples share what is kept.
    """

    def __init__(self, source: Any = None, samples: int = 512) -> None:
        check_source("Probe", "source", source)
        self.source = source
        self.samples = check_count("", "samples", samples)
        self.batches: list[ProbeBatch] = []
        self.complete = False
        self.closed = False  # this process gets no more batches for it
        self.file: str | None = None  # where it was written

    @property
    def captured(self) -> bool:
        """Whether the batches come from training, not from the user."""
        return self.source is None

    @property
    def size(self) -> int:
        """Examples held by this process."""
        return sum(batch.size for batch in self.batches)

    def offer(self, batch: Any, index: int, count: Callable[[int], int]) -> None:
        """Add a copy of a batch; ``count`` adds up examples over processes."""
        self.add(ProbeBatch.copy_of(batch, index), count)

    def add(self, copied: ProbeBatch | None, count: Callable[[int], int]) -> None:
        """Add a batch; ``None``: this process has none, but the others wait for its count."""
        if self.complete:
            return
        if copied is not None:
            self.batches.append(copied)
        self.complete = count(self.size) >= self.samples

    def load(self, prepare: Callable[[Any], Any]) -> None:
        """Read the batches that the user gave; ``prepare`` moves one to the device."""
        state = RandomState()  # iterating a DataLoader draws a seed from the global state
        try:
            for index, batch in enumerate(_batches_of(self.source)):
                self.batches.append(ProbeBatch.copy_of(prepare(batch), index))
                endless = isinstance(self.source, (DataLoader, Iterator))
                if endless and self.size >= self.samples:
                    break
        finally:
            state.restore()
        if not self.batches:
            spent = isinstance(self.source, Iterator)
            raise ValueError(
                f"probe={type(self.source).__name__}: it holds no batch"
                + (", or all were taken from it before" if spent else "")
                + "; pass a DataLoader or a list with one batch at least"
            )
        self.complete = True

    def clear(self) -> None:
        """Start again without batches."""
        self.batches, self.complete, self.closed, self.file = [], False, False, None

    def fingerprint(self) -> str:
        """A hash of all tensors in the batches."""
        digest = hashlib.sha256()
        for held in self.batches:
            for tensor in tensors_in(held.batch):
                content = tensor.detach().cpu().contiguous()
                digest.update(f"{tuple(content.shape)}{content.dtype}".encode())
                digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the batches to ``path``.

        Raises:
            ValueError: they hold objects that a load with ``weights_only=True`` refuses.
        """
        rows = [{"batch": b.batch, "index": b.index, "size": b.size} for b in self.batches]
        torch.save(rows, path)
        try:
            torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # pickle, zip and torch raise many kinds
            path.unlink()
            raise ValueError(
                f"the probe's batches hold what cannot be read back safely "
                f"({why_unreadable(error)}), so that a resumed run starts on a new probe; allow "
                f"classes that you trust with torch.serialization.add_safe_globals([...])"
            ) from error

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read back what :meth:`save` wrote."""
        rows = torch.load(path, weights_only=True, map_location="cpu")
        self.batches = [ProbeBatch(prepare(r["batch"]), r["index"], r["size"]) for r in rows]
        self.complete = True


def why_unreadable(error: Exception) -> str:
    """Why ``torch.load`` refused a file, in one line; its own ten advise to unpickle the file."""
    line = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return line.partition(". ")[0] or type(error).__name__


# What people pass for data by mistake.
_NO_DATA = (str, bytes, bool, int, float, complex, type, torch.nn.Module, Path)


def check_source(said: str, argument: str, source: Any) -> None:
    """Raise where ``source`` cannot be batches for training_step."""
    words = (
        "expected a DataLoader, a list of batches, one batch (a tuple or a dict of tensors, as "
        "training_step takes it), or a Probe"
    )
    if isinstance(source, str):
        words += "; in a LightningCLI, the path of a function annotated -> DataLoader or -> Probe"
    if isinstance(source, list) and not source:
        raise ValueError(f"{quoted(said, argument, source)}: it holds no batch; {words}")
    refused = (*_NO_DATA, Dataset, *((Probe,) if said == "Probe" else ()))
    if (
        isinstance(source, refused)
        or inspect.isroutine(source)
        or hasattr(source, "train_dataloader")  # a datamodule, of either package
    ):
        raise TypeError(f"{quoted(said, argument, source)}: {words}")
    for index, batch in enumerate(source if isinstance(source, list) else ()):
        if batch is None or isinstance(batch, _NO_DATA):
            raise TypeError(
                f"{quoted(said, argument, source)}: its item {index} is {shown(batch)}; {words}"
            )


# Whatever holds batches; the classes for a LightningCLI, which makes one of them from a path.
Source = DataLoader[Any] | Probe | Any


def probe_of(source: Source, samples: int) -> Probe:
    """``source`` as a probe of its own, unless it is one."""
    return source if isinstance(source, Probe) else Probe(source, samples)


def _batches_of(source: Any) -> Iterator[Any]:
    if isinstance(source, (list, DataLoader, Iterator)):
        yield from source
    else:
        yield source
