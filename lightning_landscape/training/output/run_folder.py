"""The directory of a run: of its own, also when two runs write to one log directory at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]


@dataclass
class _Claim:
    """The folder that a Trainer's run writes to, and the lock it holds while it runs."""

    log_dir: Path
    folder: Path
    lock: IO[bytes] | None


_CLAIMS: weakref.WeakKeyDictionary[Trainer, _Claim] = weakref.WeakKeyDictionary()


def claimed_folder(trainer: Trainer, log_dir: Path, *, numbered: bool = False) -> Path:
    """``log_dir``, or a folder in it if another run of this machine is writing there.

    ``numbered``: a new ``<log_dir>/landscape_logs/version_<n>``.  A second fit of the Trainer
    continues in the folder of the first.
    """
    known = _CLAIMS.get(trainer)
    if known is None or known.log_dir != log_dir:
        release_folder(trainer)
        folder = numbered_folder(log_dir) if numbered else log_dir
        known = _CLAIMS[trainer] = _Claim(log_dir, folder, None)
    if known.lock is None and fcntl is not None:
        try:
            known.lock = _lock(known.folder)
        except BlockingIOError:
            folder = known.folder / f"run-{uuid.uuid4().hex[:8]}"
            rank_zero_warn(
                f"another run is writing to {str(known.folder)!r}: history.jsonl and landscape/ of "
                f"this one are written to {str(folder)!r}; give each run a logger with a version "
                f"of its own"
            )
            known.folder = folder
        except OSError:
            pass  # no locks here
    return known.folder


def release_folder(trainer: Trainer) -> None:
    """Let other runs write to the folder."""
    known = _CLAIMS.get(trainer)
    if known is not None and known.lock is not None:
        _lock_path(known.folder).unlink(missing_ok=True)  # while it is locked
        fcntl.flock(known.lock, fcntl.LOCK_UN)  # also of copies in forked processes
        known.lock.close()
        known.lock = None


def _lock(folder: Path) -> IO[bytes]:
    """An open file, locked until it is closed.

    It is in the directory for temporary files, so that log directories hold nothing but logs.
    """
    path = _lock_path(folder)
    while True:
        # Anybody may write to that directory: a link is not followed.
        lock = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # the run that held it has removed the file since


def _lock_path(folder: Path) -> Path:
    digest = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"lightning_landscape-{digest}.lock"


def numbered_folder(root: Path) -> Path:
    """A new ``<root>/landscape_logs/version_<n>``, as Lightning numbers a logger's runs.

    Where nothing can be written, it is not made.
    """
    base = root / "landscape_logs"
    while True:
        names = [path.name for path in base.iterdir()] if base.is_dir() else []
        numbers = [int(m[1]) for name in names if (m := re.fullmatch(r"version_(\d+)", name))]
        folder = base / f"version_{max(numbers, default=-1) + 1}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # made by another run since
            continue
        except OSError:
            pass  # writing to it is what fails, with a warning
        return folder
