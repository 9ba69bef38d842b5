"""Failed measurements: the warning, and when a callback stops measuring."""

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
# A TypeError or ValueError raised here is about an argument, and its message says what to pass.
_SELF_EXPLAINING = {_PACKAGE / part for part in ("geometry", "callbacks", "training/output")}
# Files that call the code of a user-defined callback, or are called by it.
_CALLERS_OF_USER_CODE = {_PACKAGE / "training" / name for name in ("measuring.py", "quantity.py")}

# After this many failures in a row a callback stops measuring; training continues.
_FAILURES_ALLOWED = 3


class OverBudgetError(RuntimeError):
    """A measurement was ended, because it would have exceeded the budget: there is no value."""


def stop_measuring(quantity: Quantity, error: BaseException, rank: int) -> None:
    """Warn that a measurement would change training, or has changed it, and make no more."""
    quantity._bookkeeping.failed += 1
    quantity._bookkeeping.disabled = True
    _warn(f"{quantity.prefix}: {error}. It stops measuring", error, rank)


def count_failure(
    quantity: Quantity, error: BaseException, rank: int, batch_kind: str = ""
) -> None:
    """Warn of a failed measurement; after three in a row the callback stops measuring.

    ``batch_kind``: the :func:`kind_of` the training batches, if known.
    """
    bookkeeping = quantity._bookkeeping
    bookkeeping.failed += 1
    bookkeeping.failed_in_a_row += 1
    bookkeeping.disabled = bookkeeping.failed_in_a_row >= _FAILURES_ALLOWED
    ending = (
        f"it failed {bookkeeping.failed_in_a_row} times in a row and stops measuring; "
        f"training continues"
        if bookkeeping.disabled
        else "training and measuring continue"
    )
    quantity.reset_warm_start()
    message = f"{quantity.prefix}: a measurement failed ({_describe(error)}); {ending}"
    if remedy := _remedy(quantity, error, batch_kind):
        message += f". {remedy}"
    _warn(message, error, rank)


def _warn(message: str, error: BaseException, rank: int) -> None:
    if rank == 0:
        rank_zero_warn(message)
    elif not isinstance(error, OtherRankError):
        warnings.warn(f"process {rank}: {message}", stacklevel=2)


def _describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)
    where = f", {Path(place[-1].filename).name} line {place[-1].lineno}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def kind_of(batch: object) -> str:
    """The structure of a batch in a word or two, for messages."""
    if isinstance(batch, (tuple, list)):
        return f"sequences of {len(batch)}"
    names = {dict: "dicts", Tensor: "tensors"}
    return names.get(type(batch), f"objects of type {type(batch).__name__}")


def _remedy(quantity: Quantity, error: BaseException, batch_kind: str) -> str:
    if out_of_memory(error):
        return (
            "To use less memory, pass probe=... in smaller batches, or engine='finite_difference'"
        )
    places = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    argument = isinstance(error, (TypeError, ValueError))
    if argument and places and not _SELF_EXPLAINING.isdisjoint(places[-1].parents):
        return ""
    ours = [place for place in places if _PACKAGE in place.parents]
    if ours and ours[-1] in _CALLERS_OF_USER_CODE:
        return ""  # raised by a user-defined callback
    probe = quantity._bookkeeping.probes.get(LOSS)
    source = None if probe is None else probe.source
    if isinstance(source, list) and any(isinstance(item, Tensor) for item in source):
        # A DataLoader over pairs yields such lists.
        return (
            "probe is a list, so each of its items was used as a batch; if the list is one batch, "
            "pass probe=tuple(batch)"
        )
    if batch_kind and probe is not None and probe.batches:
        kind = kind_of(probe.batches[0].batch)
        if kind != batch_kind:
            return (
                f"The batches of the probe are {kind}, those of training are {batch_kind}: pass a "
                f"probe of the same structure, e.g. probe=next(iter(train_loader))"
            )
    return (
        "If training_step cannot be called on the probe at this point, pass a fixed probe=... that "
        "fits it, or loss_fn=lambda pl_module, batch: ..."
    )
