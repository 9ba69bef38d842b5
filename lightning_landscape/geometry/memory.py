"""Free memory, the memory of a graph, and how many graphs can be kept."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import check_callable, check_number

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that the caching allocator has reserved but not allocated.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    return _free_host_memory() if device.type == "cpu" else None


def _free_host_memory() -> int | None:
    """Available memory of the machine and of this process's control groups, as Linux reports it."""
    stated = _fields(_PROC / "meminfo").get("MemAvailable:")
    rooms = [] if stated is None else [1024 * stated]
    rooms += [room for folder in _control_groups() if (room := _room_in(folder)) is not None]
    return min(rooms) if rooms else None


def _control_groups() -> Iterator[Path]:
    """This process's cgroup (version 2) and its parents; in a container its own is the root."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                own = _CGROUPS / line[3:].lstrip("/")
                yield from (own, *(p for p in own.parents if p.is_relative_to(_CGROUPS)))


def _room_in(folder: Path) -> int | None:
    """The group's limit minus its usage, not counting inactive file pages."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return None
    reclaimable = _fields(folder / "memory.stat").get("inactive_file", 0)
    return None if limit == "max" else max(int(limit) - used + reclaimable, 0)


def _fields(path: Path) -> dict[str, int]:
    """The ``name number ...`` lines of a kernel file; empty if there is no such file."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in path.read_text().splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    return {}


@contextlib.contextmanager
def counting_saved(besides: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes saved by graphs built in this context.

    Each storage counts once.  Those of ``besides``, the parameters, do not count.
    """
    known = {p.untyped_storage().data_ptr() for p in besides}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        # Detached, because an output saved by its own node would never be freed.
        return tensor.detach()

    def total() -> int:
        return sum(size for place, size in held.items() if place not in known)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total


class GraphMemory:
    """Limits how many examples' graphs exist at the same time.

    Args:
        examples: graphs of this many examples (in units of an objective's weights) are always
            allowed, e.g. the size of the largest training batch, for which the training step has
            enough memory.  None: the largest batch of the objective.
        share: more graphs are kept only if they take at most this share of the free memory.
        tell: called with a message when graphs are reduced because memory is short, once per
            message; ``warnings.warn`` by default.

    One object can be used for several objectives of the same loss, one after the other: the size of
    a graph is then measured only once.
    """

    def __init__(
        self,
        examples: float | None = None,
        *,
        share: float = 0.5,
        tell: Callable[[str], object] = warnings.warn,
    ) -> None:
        if examples is not None:
            check_number("", "examples", examples, "a number > 0, or None", lambda x: x > 0.0)
        check_number("", "share", share, "a number above 0, at most 1", lambda x: 0.0 < x <= 1.0)
        check_callable("", "tell", tell, "a function that takes a message, e.g. warnings.warn")
        self.examples = examples
        self.share = share
        self.allowed = math.inf  # examples whose graphs may exist at the same time
        self.bytes_per_example: float | None = None  # once measured
        self.bytes_per_graph = 0.0  # the gradient, for any number of examples
        self.cuttable: bool | None = None  # whether pieces of a batch give its loss, once known
        self.cuts = 0  # how often a batch was split
        self._tell = tell
        self._warned: set[str] = set()

    def warn_once(self, message: str) -> None:
        """Pass ``message`` to ``tell`` the first time."""
        if message not in self._warned:
            self._warned.add(message)
            self._tell(message)

    def holds(self, examples: float, graphs: int, free: int | None) -> bool:
        """Whether ``graphs`` graphs of ``examples`` examples in total fit into ``free`` bytes.

        False if either is unknown.  For a large network and batches of one example the gradients
        are the larger part.
        """
        if free is None or self.bytes_per_example is None:
            return False
        needed = examples * self.bytes_per_example + graphs * self.bytes_per_graph
        return needed <= self.share * free
