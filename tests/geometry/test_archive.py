"""Untrusted archives are read safely."""

from __future__ import annotations

import os
import resource
import threading

import numpy as np
import pytest

from lightning_landscape import Slice
from lightning_landscape.geometry import SpectralDensity
from lightning_landscape.geometry.archive import MAX_BYTES, load_arrays

ONES = Slice((np.arange(3.0),), np.ones(3), 1.0, {})


def test_arrays_are_read(tmp_path):
    ONES.save(tmp_path / "line.npz")
    arrays = load_arrays(tmp_path / "line.npz")
    assert set(arrays) == {"x", "losses", "center_loss", "metadata"}
    np.testing.assert_array_equal(arrays["losses"], np.ones(3))


@pytest.mark.parametrize("kind", [Slice, SpectralDensity])
def test_small_file_with_large_arrays(kind, tmp_path):
    """256 MiB of zeros take 260 kB compressed."""
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, losses=np.zeros(2**28, dtype=np.int8), grid=np.zeros(3))
    assert path.stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"its arrays take 268.* at most {MAX_BYTES:,} are read"):
        kind.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kB


@pytest.mark.parametrize("kind", [Slice, SpectralDensity])
def test_pipe_does_not_block(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    writer = os.open(tmp_path / "pipe.npz", os.O_RDWR | os.O_NONBLOCK)
    end = threading.Timer(0.2, os.close, [writer])  # a reader would wait until then
    end.start()
    with pytest.raises(ValueError, match="not a regular file"):
        kind.load(tmp_path / "pipe.npz")
    end.join()


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "objects.npz", losses=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_arrays(tmp_path / "objects.npz")
