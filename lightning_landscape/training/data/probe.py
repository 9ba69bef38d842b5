"""The fixed set of examples on which the loss is measured."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.geometry.checks import check_count, quoted, shown
from lightning_landscape.training.data.batch import ProbeBatch
from lightning_landscape.training.isolation.random_state import RandomState


class Probe:
    """A fixed set of batches for the whole run, so that values at different steps are comparable.

    Args:
        source: ``None``: the first training batches are kept, until there are ``samples``
            examples.  A ``DataLoader``: its first batches, until there are ``samples`` examples;
            likewise an iterator, which lasts for one fit.  A list: a list of batches, all of them.
            Anything else, e.g. a tuple or a dict: one batch.
        samples: number of examples, over all processes.  Fewer bias eigenvalues upwards.

    Raises:
        TypeError: ``source`` is not data: text, a number, a ``Dataset`` without a loader.
        ValueError: ``source`` is an empty list; ``samples`` is not an integer above 0.

    One object may be passed to several callbacks.  Callbacks without a probe that have the same
    ``probe_samples`` share one.
    """

    def __init__(self, source: Any = None, samples: int = 512) -> None:
        check_source("Probe", "source", source)
        self.source = source
        self.samples = check_count("", "samples", samples)
        self.internal = False  # made by a callback, not by the user
        self.batches: list[ProbeBatch] = []
        self.complete = False
        self.closed = False  # this process adds no more batches
        self.sized = False  # the sizes of its batches were compared with those that are logged
        self.file: str | None = None  # the file it was written to

    @property
    def captured(self) -> bool:
        """Whether the batches are captured during the fit."""
        return self.source is None

    @property
    def size(self) -> int:
        """Examples on this process."""
        return sum(batch.size for batch in self.batches)

    def offer(self, batch: Any, index: int, count: Callable[[int], int]) -> None:
        """Add a copy of a batch; ``count`` adds up examples over processes."""
        self.add(ProbeBatch.copy_of(batch, index), count)

    def add(self, copied: ProbeBatch | None, count: Callable[[int], int]) -> None:
        """Add a batch; ``None``: this process has none, and only takes part in ``count``."""
        if self.complete:
            return
        if copied is not None:
            self.batches.append(copied)
        self.complete = count(self.size) >= self.samples

    def load(self, prepare: Callable[[Any], Any]) -> None:
        """Read the batches of ``source``; ``prepare`` moves one to the device."""
        state = RandomState()  # iterating a DataLoader draws a seed from the global state
        try:
            for index, batch in enumerate(_batches_of(self.source)):
                self.batches.append(ProbeBatch.copy_of(prepare(batch), index))
                limited = isinstance(self.source, (DataLoader, Iterator))
                if limited and self.size >= self.samples:
                    break
        finally:
            state.restore()
        if not self.batches:
            exhausted = isinstance(self.source, Iterator)
            raise ValueError(
                f"probe={type(self.source).__name__}: it holds no batch"
                + (", or all of them have been used before" if exhausted else "")
                + "; pass a DataLoader or a list with one batch at least"
            )
        self.complete = True

    def start_anew(self) -> None:
        """Remove the batches before another run, unless the user shares the probe between runs.

        What came from an iterator cannot be read again and is kept.
        """
        if self.internal and not isinstance(self.source, Iterator):
            self.clear()

    def clear(self) -> None:
        """Remove all batches."""
        self.batches, self.complete, self.closed, self.file = [], False, False, None
        self.sized = False

    def fingerprint(self) -> str:
        """A hash of all data in the batches, also of what objects hold."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for content in _data_in(batch.batch, set()):
                digest.update(content)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the batches to ``path``.

        Raises:
            ValueError: they hold objects that ``torch.load`` with ``weights_only=True`` rejects.
        """
        rows = [{"batch": b.batch, "index": b.index, "size": b.size} for b in self.batches]
        torch.save(rows, path)
        try:
            torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # pickle, zip and torch raise many kinds
            path.unlink()
            raise ValueError(
                f"the probe's batches hold objects that cannot be loaded safely "
                f"({why_unreadable(error)}), so that a resumed run starts on a new probe; allow "
                f"classes that you trust with torch.serialization.add_safe_globals([...]), or pass "
                f"the same probe=... to both runs"
            ) from error

    def restore(self, path: Path, prepare: Callable[[Any], Any]) -> None:
        """Read the batches that :meth:`save` wrote."""
        rows = torch.load(path, weights_only=True, map_location="cpu")
        self.batches = [ProbeBatch(prepare(r["batch"]), r["index"], r["size"]) for r in rows]
        self.complete = self.sized = True


def _data_in(item: Any, seen: set[int]) -> Iterator[bytes]:
    """The content of all tensors, arrays, numbers and text in an object, in order."""
    if isinstance(item, Tensor):
        content = item.detach().cpu()
        content = content.to_dense() if content.layout != torch.strided else content
        yield f"{tuple(content.shape)}{content.dtype}".encode()
        yield content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(item, np.ndarray) and item.dtype != object:
        yield f"{item.shape}{item.dtype}".encode() + item.tobytes()
    elif item is None or isinstance(item, (int, float, complex, str, bytes)):
        yield repr(item).encode()
    elif id(item) not in seen:
        seen.add(id(item))
        if isinstance(item, Mapping):
            parts = [part for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, np.ndarray)):
            parts = list(item)
        else:
            parts = [part for pair in getattr(item, "__dict__", {}).items() for part in pair]
        for part in parts:
            yield from _data_in(part, seen)


def why_unreadable(error: Exception) -> str:
    """Why ``torch.load`` rejected a file, in one line, without its advice to unpickle the file."""
    line = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return line.partition(". ")[0] or type(error).__name__


# Types that are passed as data by mistake.
_NOT_DATA = (str, bytes, bool, int, float, complex, type, torch.nn.Module, Path)


def check_source(owner: str, argument: str, source: Any) -> None:
    """Raise if ``source`` cannot be batches for training_step."""
    expected = (
        "expected a DataLoader, a list of batches, one batch (a tuple or a dict of tensors, as "
        "training_step takes it), or a Probe"
    )
    if isinstance(source, str):
        expected += (
            "; in a LightningCLI, the path of a function annotated -> DataLoader or -> Probe"
        )
    if isinstance(source, list) and not source:
        raise ValueError(f"{quoted(owner, argument, source)}: it holds no batch; {expected}")
    refused = (*_NOT_DATA, Dataset, *((Probe,) if owner == "Probe" else ()))
    if (
        isinstance(source, refused)
        or inspect.isroutine(source)
        or hasattr(source, "train_dataloader")  # a datamodule, of either package
    ):
        raise TypeError(f"{quoted(owner, argument, source)}: {expected}")
    for index, batch in enumerate(source if isinstance(source, list) else ()):
        if batch is None or isinstance(batch, _NOT_DATA):
            raise TypeError(
                f"{quoted(owner, argument, source)}: its item {index} is {shown(batch)}; {expected}"
            )


# Anything that holds batches; a LightningCLI makes one of the named classes from a path.
Source = DataLoader[Any] | Probe | Any


def probe_of(source: Source, samples: int) -> Probe:
    """``source`` if it is a probe, else a new probe of it."""
    if isinstance(source, Probe):
        return source
    probe = Probe(source, samples)
    probe.internal = True
    return probe


def _batches_of(source: Any) -> Iterator[Any]:
    if isinstance(source, (list, DataLoader, Iterator)):
        yield from source
    else:
        yield source
