"""A measurement that failed: the warning, and when a callback stops measuring."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_landscape.geometry.errors import OtherRankError, out_of_memory
from lightning_landscape.training.bookkeeping import LOSS
from lightning_landscape.training.quantity import Quantity

_PACKAGE = Path(__file__).parents[1]
# Where a TypeError or a ValueError is about an argument, and says what to pass.
_SELF_EXPLAINING = {_PACKAGE / part for part in ("geometry", "callbacks", "training/output")}
# The files that call the code of a user's own callback, or are called by it.
_CALLERS = {_PACKAGE / "training" / name for name in ("measuring.py", "quantity.py")}

# After this many failures in a row a callback stops measuring; the run goes on in any case.
_FAILURES_ALLOWED = 3


def count_failure(quantity: Quantity, error: BaseException, rank: int) -> None:
    """Warn of a measurement that failed; after three in a row the callback measures no more."""
    noted = quantity._bookkeeping
    noted.failed_in_a_row += 1
    noted.failed += 1
    noted.disabled = noted.failed_in_a_row >= _FAILURES_ALLOWED
    ending = (
        f"it failed {noted.failed_in_a_row} times in a row and measures no more; training goes on"
        if noted.disabled
        else "training goes on, and so does measuring"
    )
    quantity.reset_warm_start()
    message = f"{quantity.prefix}: a measurement failed ({_described(error)}); {ending}"
    if remedy := _remedy(quantity, error):
        message += f". {remedy}"
    if rank == 0:
        rank_zero_warn(message)
    elif not isinstance(error, OtherRankError):
        warnings.warn(f"process {rank}: {message}", stacklevel=2)


def _described(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)
    where = f", {Path(place[-1].filename).name} line {place[-1].lineno}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def _remedy(quantity: Quantity, error: BaseException) -> str:
    if out_of_memory(error):
        return "Less memory: probe=... in smaller batches, or engine='finite_difference'"
    places = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    argument = isinstance(error, (TypeError, ValueError))
    if argument and places and not _SELF_EXPLAINING.isdisjoint(places[-1].parents):
        return ""
    ours = [place for place in places if _PACKAGE in place.parents]
    if ours and ours[-1] in _CALLERS:
        return ""  # raised by the code of a user's own callback
    probe = quantity._bookkeeping.probes.get(LOSS)
    source = None if probe is None else probe.source
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
