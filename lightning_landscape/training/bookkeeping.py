"""What the session notes about one callback, and which of it goes into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.data.stored import StoredFile, StoredProbe, is_entry
from lightning_landscape.training.output.history import History
from lightning_landscape.training.schedule import Schedule

LOSS, VALIDATION = "loss", "validation"  # roles of probes


class Listener(Protocol):
    """Called with each new row that holds ``monitor``, inside the round that measured it."""

    monitor: str

    def on_record(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        """A measurement was made; called on every process."""


@dataclass
class Bookkeeping:
    """What the session notes about one callback.

    Attributes:
        schedule: when it is due.
        probes: role -> data; ``"loss"`` is there once a fit has begun.
        stored: role -> the file of a captured probe; other files of a callback by their own roles.
        history: its rows.
        measured: measurements made.
        skipped: measurements left out to stay within the budget.
        failed: measurements that raised an error.
        failed_in_a_row: of these, since the last one that succeeded.
        seconds_spent: on it, in all.
        last_seconds: on its last measurement; None before the first.
        last_measured_step: the label of its last measurement.
        disabled: it measures no more.
        resumed: its state came from a checkpoint.
        resumed_after: the last measured step of the run before; -1 without one.
        listeners: see :class:`Listener`.
        warnings: the messages given by ``warn_once``.
    """

    schedule: Schedule
    probes: dict[str, Probe] = field(default_factory=dict)
    stored: dict[str, StoredFile] = field(default_factory=lambda: {LOSS: StoredProbe("training")})
    history: History = field(default_factory=History)
    measured: int = 0
    skipped: int = 0
    failed: int = 0
    failed_in_a_row: int = 0
    seconds_spent: float = 0.0
    last_seconds: float | None = None
    last_measured_step: int | None = None
    disabled: bool = False
    resumed: bool = False
    resumed_after: int = -1
    listeners: list[Listener] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)


Fits = tuple[type, ...] | Callable[[Any], bool]  # types, or a test of the value

STATE: dict[str, Fits] = {
    "last_step": (int, type(None)),
    "measured": (int,),
    "skipped": (int,),
    "probe": is_entry,
}


def usable_state(owner: str, state: object, expected: Mapping[str, Fits]) -> bool:
    """Whether a checkpoint's state is what this version writes; warns where it is not."""
    given = state if isinstance(state, Mapping) else {}
    wrong = [
        key
        for key, fits in expected.items()
        if not (_is(given.get(key), fits) if isinstance(fits, tuple) else fits(given.get(key)))
    ]
    if wrong:
        rank_zero_warn(
            f"{owner}: the state in the checkpoint is not one of this version (see {wrong}) and is "
            f"ignored; a new series starts"
        )
    return not wrong


def _is(value: object, types: tuple[type, ...]) -> bool:
    """Whether it is of one of the types; True is no integer here, and no count is negative."""
    if isinstance(value, int):
        return int in types and not isinstance(value, bool) and value >= 0
    return isinstance(value, types)
