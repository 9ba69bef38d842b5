"""A measurement that failed: what is said, and when a callback stops measuring."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.geometry.faults import OtherRankError, out_of_memory

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor

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
    told = f"{monitor.prefix}: a measurement failed ({_told(error)}); {ending}. {_remedy(error)}"
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


def _remedy(error: Exception) -> str:
    if out_of_memory(error):
        return "Less memory: probe=... in smaller batches, or engine='finite_difference'"
    return (
        "If training_step cannot be called on the probe at this point, pass a fixed probe=... that "
        "fits it, or loss_fn=lambda pl_module, batch: ..."
    )
