"""Read ``.npz`` files that anybody may have written."""

from __future__ import annotations

import math
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# A slice or a density takes well below 1 MB.
MAX_BYTES = 2**26


def load_arrays(path: str | Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """All arrays of a ``.npz`` file, by name.  Nothing is unpickled.

    The size is read from the headers, before memory is allocated: a small file can hold an array of
    many GB.

    Raises:
        ValueError: not a regular file (a pipe would block), or larger than 64 MiB in memory.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("it is not a regular file")
    with zipfile.ZipFile(path) as archive:
        total = sum(_nbytes(archive, name) for name in archive.namelist())
    if total > MAX_BYTES:
        raise ValueError(f"its arrays take {total:,} bytes; at most {MAX_BYTES:,} are read")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _nbytes(archive: zipfile.ZipFile, name: str) -> int:
    """The bytes of an array in memory, by its header."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return max(math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size)
