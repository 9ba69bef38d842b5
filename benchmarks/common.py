"""Shared by the benchmarks: timing, medians with their spread, markdown tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
CPU = torch.device("cpu")


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """How long ``function`` takes, and what it returns.

    On the CPU this is processor time: equal to wall time for a process of one thread on an idle
    machine, and not biased against long calls on a busy one.
    """
    gc.collect()  # do not count the garbage of previous calls
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _synchronize(device)
    started = clock()
    result = function()
    _synchronize(device)
    return clock() - started, result


def seconds(function: Callable[[], object], device: torch.device = CPU) -> float:
    return timed(function, device)[0]


def in_turns(
    calls: Mapping[str, Callable[[Callable[[], None]], object]], share: float = 0.02
) -> dict[str, float]:
    """Processor time of each call, while all of them are under way; on the CPU.

    Each call has a thread, and one of them runs at a time.  A call receives a function that it
    calls now and then: there the next one continues, once this one has used its ``share`` of
    seconds.  A slow phase of the machine therefore affects all calls equally.
    """
    gc.collect()
    changed, queue = threading.Condition(), deque(calls)

    def run(name: str) -> float:
        def wait() -> float:
            changed.wait_for(lambda: queue[0] == name)
            return time.thread_time()

        def hand_over() -> None:
            nonlocal begun
            if time.thread_time() - begun >= share:
                with changed:
                    queue.rotate(-1)
                    changed.notify_all()
                    begun = wait()

        with changed:
            started = begun = wait()
        try:
            calls[name](hand_over)
            return time.thread_time() - started
        finally:
            with changed:
                queue.popleft()
                changed.notify_all()

    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(zip(calls, pool.map(run, calls), strict=True))


def keep_memory() -> None:
    """Keep freed memory in the process, if the C library is glibc.

    Otherwise memory freed by a forward may be returned to the system, depending on its position,
    and new pages at each forward took up to a sixth of the time of the affected method.
    """
    libraries = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libraries, "mallopt", None)
    if mallopt is not None:
        arenas, mmap_threshold, trim_threshold = -8, -3, -1
        for option, value in ((arenas, 1), (mmap_threshold, 2**25), (trim_threshold, 2**30)):
            mallopt(option, value)


def settle() -> None:
    """After the first calls, exclude all live objects from garbage collection.

    A full collection takes as long as many gradients, and clears the CPU caches.
    """
    gc.collect()
    gc.freeze()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output and progress bars of peers."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """The median and, from four values on, the quartiles; the extremes of fewer."""
    median = statistics.median(values)
    if len(values) < 2:
        return f"{median:{form}}"
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:{form}} ({low:{form}}-{high:{form}})"


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The names, starting with another one at each turn."""
    order = list(names)
    return order[turn % len(order) :] + order[: turn % len(order)]


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Section:
    """The results of a part, and its columns of the summary table at the top.

    Sections with the same ``measure`` share that table: ``columns[network][method]`` is a cell.
    """

    text: str
    measure: str = ""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def summary(sections: Sequence[Section]) -> str:
    tables = []
    for measure in dict.fromkeys(s.measure for s in sections if s.measure):
        columns = {k: c for s in sections if s.measure == measure for k, c in s.columns.items()}
        methods = dict.fromkeys(name for column in columns.values() for name in column)
        rows = [[name, *[c.get(name, "") for c in columns.values()]] for name in methods]
        tables.append(table(measure, ["by", *columns], rows))
    return "\n".join(tables)


def verdict(claim: str, found: float, bound: float, *, at_most: bool = False) -> str:
    """One line: the claim, what was found, and whether it holds."""
    holds = found <= bound if at_most else found >= bound
    sign = "<=" if at_most else ">="
    return f"- {claim}: {found:.3g} ({sign} {bound:g}): {'holds' if holds else 'DOES NOT HOLD'}"
