"""How much memory there is, how much a graph takes, and so how many graphs may be kept."""

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
    """Bytes that can still be allocated on ``device``; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator holds and nobody uses.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    return _free_host_memory() if device.type == "cpu" else None


def _free_host_memory() -> int | None:
    """What Linux says is available, to the machine and to this process's control groups."""
    stated = _fields(_PROC / "meminfo").get("MemAvailable:")
    rooms = [] if stated is None else [1024 * stated]
    rooms += [room for folder in _control_groups() if (room := _room_in(folder)) is not None]
    return min(rooms) if rooms else None


def _control_groups() -> Iterator[Path]:
    """This process's group of version 2, and those above it; a container sees its own as root."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                own = _CGROUPS / line[3:].lstrip("/")
                yield from (own, *(p for p in own.parents if p.is_relative_to(_CGROUPS)))


def _room_in(folder: Path) -> int | None:
    """The group's limit less what it uses; file pages that nobody reads any more do not count."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return None
    reclaimable = _fields(folder / "memory.stat").get("inactive_file", 0)
    return None if limit == "max" else max(int(limit) - used + reclaimable, 0)


def _fields(path: Path) -> dict[str, int]:
    """``name number ...`` lines of a file of the kernel's; empty where there is no such file."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in path.read_text().splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    return {}


@contextlib.contextmanager
def counting_saved(besides: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Gives a function: the bytes that graphs built meanwhile hold, each storage counted once.

    Not those of ``besides``: the parameters are there anyway.
    """
    known = {p.untyped_storage().data_ptr() for p in besides}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        # Detached: an output that its own node held would never be freed.
        return tensor.detach()

    def total() -> int:
        return sum(size for place, size in held.items() if place not in known)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total


class GraphMemory:
    """How many examples' graphs may be there at once, and what a run has learned about them.

    Args:
        examples: graphs of so many examples (in the unit of an objective's weights) are allowed
            whatever memory says: those of the largest training batch, which its training step
            found room for.  None: those of the largest batch that the objective has.
        share: more than those are kept only if they take at most this share of the memory that is
            known to be free.
        tell: is given what was done for want of memory, each thing once; a warning by default.

    One object may serve several objectives, one after the other, of the same loss: the size of a
    graph is then counted once.
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
        self.allowed = math.inf  # examples whose graphs may be there at once
        self.bytes_per_example: float | None = None  # once counted
        self.bytes_per_graph = 0.0  # the gradient at its end, however few its examples
        self.cuttable: bool | None = None  # whether pieces of a batch give its loss, once seen
        self._tell = tell
        self._told: set[str] = set()

    def warn_once(self, message: str) -> None:
        """Tell what was done, if it has not been told."""
        if message not in self._told:
            self._told.add(message)
            self._tell(message)

    def holds(self, examples: float, graphs: int, free: int | None) -> bool:
        """Whether so many graphs, of ``examples`` together, are known to fit into ``free`` bytes.

        Of a large network on batches of one example the gradients are most of it.
        """
        if free is None or self.bytes_per_example is None:
            return False
        needed = examples * self.bytes_per_example + graphs * self.bytes_per_graph
        return needed <= self.share * free
