"""A measurement that failed: what is said, and when a callback stops measuring."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_landscape.geometry.errors import OtherRankError, out_of_memory

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor

# Where a TypeError or a ValueError is about an argument, and says what to pass.
_SPEAKING = {Path(__file__).parents[1] / part for part in ("geometry", "callbacks")}

# After this many faults in a row a callback stops measuring; the run never stops for them.
_FAULTS_ALLOWED = 3


def count_fault(monitor: Monitor, error: Exception, rank: int) -> None:
    """Tell of a measurement that failed; after three in a row the callback measures no more."""
    monitor.faults += 1
    monitor.failed += 1
    disabled = monitor.faults >= _FAULTS_ALLOWED
    ending = (
        f"it failed {monitor.faults} times in a row and measures no more; training goes on"
        if disabled
        else "training goes on, and so does measuring"
    )
    monitor.disabled = disabled
    monitor.forget()
    told = f"{monitor.prefix}: a measurement failed ({_told(error)}); {ending}"
    if remedy := _remedy(monitor, error):
        told += f". {remedy}"
    if rank == 0:
        rank_zero_warn(told)
    elif not isinstance(error, OtherRankError):
        warnings.warn(f"process {rank}: {told}", stacklevel=2)


def why_unreadable(error: Exception) -> str:
    """Why ``torch.load`` refused a file, in one line; its own ten advise to unpickle the file."""
    line = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return line.partition(". ")[0] or type(error).__name__


def _told(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)
    where = f", {Path(place[-1].filename).name} line {place[-1].lineno}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def _remedy(monitor: Monitor, error: Exception) -> str:
    if out_of_memory(error):
        return "Less memory: probe=... in smaller batches, or engine='finite_difference'"
    place = traceback.extract_tb(error.__traceback__)
    folders = Path(place[-1].filename).parents if place else ()
    if isinstance(error, (TypeError, ValueError)) and not _SPEAKING.isdisjoint(folders):
        return ""
    source = monitor.probe_in_use.source if monitor.probe_in_use is not None else None
    if isinstance(source, list) and any(isinstance(item, Tensor) for item in source):
        # What a DataLoader yields for pairs is such a list.
        return (
            "probe is a list, so each of its items was taken as a batch; where it is one batch, "
            "pass probe=tuple(batch)"
        )
    return (
        "If training_step cannot be called on the probe at this point, pass a fixed probe=... that "
        "fits it, or loss_fn=lambda pl_module, batch: ..."
    )
