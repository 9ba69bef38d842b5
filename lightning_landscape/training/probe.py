"""The fixed set of examples on which the loss is measured."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.geometry.checks import check_count, quoted, shown
from lightning_landscape.training.faults import why_unreadable
from lightning_landscape.training.random_state import RandomState


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """One batch as ``training_step`` gets it, on the device, with its index and example count."""

    batch: Any
    index: int
    size: int

    @classmethod
    def copy_of(cls, batch: Any, index: int) -> ProbeBatch:
        """A copy that shares no tensor with ``batch``."""
        return cls(clone_batch(batch), index, batch_size(batch))


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

    def forget(self) -> None:
        """Start again without batches."""
        self.batches, self.complete, self.closed, self.file = [], False, False, None

    def fingerprint(self) -> str:
        """A hash of all tensors in the batches."""
        digest = hashlib.sha256()
        for held in self.batches:
            for tensor in _tensors_in(held.batch):
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


def clone_batch(batch: Any) -> Any:
    """A copy of ``batch`` that shares no tensor with it; other leaves are shared."""
    return _map_tensors(batch, lambda tensor: tensor.detach().clone())


def cut_batch(held: ProbeBatch, most: int) -> list[ProbeBatch]:
    """``held`` in pieces of at most ``most`` examples; nothing where it cannot be cut.

    Tensors as long as the batch has examples are cut along their first dimension, everything else
    is shared.  Whether the pieces mean what the whole does is for their losses to say.
    """
    starts = range(0, held.size, most)
    found = False

    def piece(start: int, tensor: Tensor) -> Tensor:
        nonlocal found
        if tensor.layout != torch.strided or tensor.ndim == 0 or len(tensor) != held.size:
            return tensor
        found = True
        return tensor[start : start + most]

    try:
        batches = [_map_tensors(held.batch, partial(piece, s), _refuse) for s in starts]
    except _NotCuttable:
        return []
    sizes = [min(most, held.size - start) for start in starts]
    cut = [ProbeBatch(b, held.index, n) for b, n in zip(batches, sizes, strict=True)]
    return cut if found else []


def first_examples(batches: Sequence[ProbeBatch], count: int) -> list[ProbeBatch]:
    """The first ``count`` examples; where a batch cannot be cut, the whole ones before it.

    One batch at least.
    """
    taken: list[ProbeBatch] = []
    for held in batches:
        left = count - sum(batch.size for batch in taken)
        if held.size <= left:
            taken.append(held)
            continue
        pieces = cut_batch(held, left) if left > 0 else []
        return taken + (pieces[:1] if pieces or taken else [held])
    return taken


class _NotCuttable(Exception):
    """A batch whose parts refer to one another: a graph library's, packed sequences."""


def _refuse(value: Any) -> Any:
    raise _NotCuttable


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the first tensor with a dimension, as in Lightning.

    Objects with a ``num_graphs`` or ``batch_size`` attribute say it themselves; 1 where nothing
    tells.
    """
    for name in ("num_graphs", "batch_size"):
        stated = getattr(batch, name, None)
        if isinstance(stated, int) and not isinstance(stated, bool):
            return max(stated, 1)
    for tensor in _tensors_in(batch):
        if tensor.ndim > 0 and len(tensor) > 0:
            return len(tensor)
    return 1


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(batch, note)
    yield from found


def _map_tensors(
    value: Any,
    function: Callable[[Tensor], Tensor],
    indivisible: Callable[[Any], Any] = copy.deepcopy,
) -> Any:
    """``value`` rebuilt with ``function`` applied to its tensors, whatever they sit in.

    ``indivisible`` is applied to objects that know themselves how their tensors belong together.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence) and indivisible is not copy.deepcopy:
        return indivisible(value)
    if isinstance(value, Mapping):
        mapped = {key: _map_tensors(item, function, indivisible) for key, item in value.items()}
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return mapped
        rebuilt = copy.copy(value)  # OrderedDict, BatchEncoding, ...: keep what else they hold
        rebuilt.update(mapped)
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, function, indivisible) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function, indivisible) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            item = _map_tensors(getattr(value, field.name), function, indivisible)
            object.__setattr__(record, field.name, item)
        return record
    if hasattr(value, "__dict__") and hasattr(value, "to"):
        return indivisible(value)  # a graph library's batch, which Lightning moves with .to()
    return value
