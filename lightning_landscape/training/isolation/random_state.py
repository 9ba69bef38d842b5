"""The global random states: Python's, NumPy's, torch's on the CPU and on every CUDA device.

A generator of a CUDA device is given another state to draw from, and later its own, untouched:
where its state is *set*, cuDNN takes it for seeded anew, and draws from it for the dropout inside
recurrent layers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


class RandomState:
    """The states as they are at construction, to be put back with :meth:`restore`, once."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the state that user code draws from
        self._torch = torch.get_rng_state()
        self._cuda = [(one, one.graphsafe_get_state()) for one in _cuda_generators()]
        for generator, state in self._cuda:
            generator.graphsafe_set_state(state.clone_state())

    def restore(self) -> None:
        """Put the states back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for generator, state in self._cuda:
            generator.graphsafe_set_state(state)


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """The states are as before when this ends, whatever was drawn inside."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def seed_everything(seed: int) -> None:
    """Seed all of them, so that an evaluation repeats its dropout masks and its noise.

    Only while a :class:`RandomState` holds those of the run.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    for generator in _cuda_generators():
        generator.graphsafe_set_state(torch.Generator(generator.device).manual_seed(seed))


def _cuda_generators() -> tuple[torch.Generator, ...]:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators if in_use else ()
