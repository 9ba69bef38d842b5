"""The global random states: Python's, NumPy's, torch's on the CPU and on every CUDA device.

A CUDA generator gets another state object in the meantime, and then its own one again.  Setting
the state would make cuDNN reseed the dropout of recurrent layers, which draws from the generator.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


class RandomState:
    """The states at construction; :meth:`restore` may be called once."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the state that user code draws from
        self._torch = torch.get_rng_state()
        self._cuda = [(g, g.graphsafe_get_state()) for g in _cuda_generators()]
        for generator, state in self._cuda:
            generator.graphsafe_set_state(state.clone_state())

    def restore(self) -> None:
        """Restore the states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for generator, state in self._cuda:
            generator.graphsafe_set_state(state)


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global random states on exit."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def seed_everything(seed: int) -> None:
    """Seed all global generators, so that each evaluation has the same dropout masks and noise.

    To be called only while a :class:`RandomState` holds the states of the run.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    for generator in _cuda_generators():
        generator.graphsafe_set_state(torch.Generator(generator.device).manual_seed(seed))


def _cuda_generators() -> tuple[torch.Generator, ...]:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators if in_use else ()
