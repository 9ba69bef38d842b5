"""Two processes that run by turns, so that the machine's speed is the same for both.

Where other programs share the machine, two equal runs differ by 10 % and more, one after the other
or each on a core of its own.  By turns of some milliseconds they differ by about 1 %.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}

# -- in a process that trains ---------------------------------------------------------------------


class Turns:
    """The turns of this process.  When the other one has ended, it goes on alone.

    ``time.perf_counter`` stops while the process waits.

    Attributes:
        waited: seconds.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Wait for the first turn.

        ``descriptor``: of a socket that is connected to the other process; None: there is none.
        """
        self.waited = 0.0
        self._connection = None if descriptor is None else socket.socket(fileno=descriptor)
        self._clock = clock = time.perf_counter
        time.perf_counter = lambda: clock() - self.waited
        self._wait()

    def pass_on(self) -> None:
        """Let the other process run, and wait for the next turn."""
        if self._connection is None:
            return
        try:
            self._connection.send(b"x")
        except BrokenPipeError:
            return  # it has ended
        self._wait()

    def _wait(self) -> None:
        started = self._clock()
        if self._connection is not None:
            self._connection.recv(1)
        self.waited += self._clock() - started


class ByTurns:
    """The batches of a sampler.  Every ``every`` batches the turn is passed on."""

    def __init__(self, sampler: Any, turns: Turns, every: int = 20) -> None:
        self._sampler, self._turns, self._every, self._drawn = sampler, turns, every, 0

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._sampler:
            self._drawn += 1
            if self._drawn % self._every == 0:
                self._turns.pass_on()
            yield batch


# -- in the process that starts them --------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        result: the last line that it printed, as JSON, with the seconds ``"waited"``.
        messages: what it wrote to stderr.
        seconds: from its start to its end, without those that it waited.
    """

    result: dict[str, Any]
    messages: str
    seconds: float


def run_alone(command: Sequence[str]) -> Finished:
    """Run ``python command`` on one thread."""
    return _finish(*_start(command))


def run_by_turns(first: Sequence[str], second: Sequence[str]) -> list[Finished]:
    """Run two at once, each with the argument of :class:`Turns` appended."""
    ends = socket.socketpair()
    started = [_start(each, end) for each, end in zip((first, second), ends, strict=True)]
    ends[1].send(b"x")  # the first one begins
    for end in ends:
        end.close()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: _finish(*one), started))


def _start(
    command: Sequence[str], turns: socket.socket | None = None
) -> tuple[subprocess.Popen[str], float]:
    inherited = () if turns is None else (turns.fileno(),)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, inherited)],
        env={**os.environ, **_ONE_THREAD},
        pass_fds=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, started


def _finish(process: subprocess.Popen[str], started: float) -> Finished:
    printed, messages = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{messages}")
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return Finished(result, messages, seconds - result["waited"])
