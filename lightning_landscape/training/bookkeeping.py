"""The state that the session keeps for one callback, and the part of it in checkpoints."""

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
    """Called with the row of each new measurement of the callback that logs ``monitor``.

    ``least_values``: values without which it cannot act.
    """

    monitor: str
    least_values: int

    def on_record(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        """Handle a new measurement; called on every process."""


@dataclass
class Bookkeeping:
    """The state that the session keeps for one callback.

    Attributes:
        schedule: when it is due.
        probes: role -> data; ``"loss"`` is set when a fit begins.
        stored: role -> the file of a captured probe; other files have roles of their own.
        history: its rows.
        measured: measurements made.
        skipped: measurements skipped to stay within the budget.
        failed: measurements that raised an error.
        failed_in_a_row: failures since the last measurement that succeeded.
        seconds_spent: seconds of all its measurements.
        last_seconds: seconds of its last measurement; None before the first.
        last_measured_step: the step of its last measurement.
        concat: whether its loss is evaluated on all of the probe as one batch; None: not decided.
        series: 1, and one more each time that a decision on its loss proved wrong.
        tries_again: whether it measures again at once, because training had yet to draw something.
        last_history: the rows of the run before, in a second Trainer.
        run: token of the run that it measures; None before the first.
        disabled: whether it has stopped measuring.
        resumed: whether its state was loaded from a checkpoint.
        resumed_after: the last measured step of the run before; -1 without one.
        listeners: see :class:`Listener`.
        heard: key -> how many of its values the listeners have had.
        read: keys that callbacks and schedulers of Lightning read.
        published: key -> the step of its value in ``trainer.callback_metrics``.
        warnings: the messages that ``warn_once`` has given.
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
    concat: bool | None = None
    series: int = 1
    tries_again: bool = False
    last_history: History | None = None
    run: str | None = None
    disabled: bool = False
    resumed: bool = False
    resumed_after: int = -1
    listeners: list[Listener] = field(default_factory=list)
    heard: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    published: dict[str, int] = field(default_factory=dict)
    warnings: set[str] = field(default_factory=set)

    def state(self) -> dict[str, Any]:
        """The entry in a checkpoint, with which a resumed run continues the series."""
        return {
            "last_step": self.schedule.last_step,
            "measured": self.measured,
            "skipped": self.skipped,
            "probe": self.stored[LOSS].state(),
            "concat": self.concat,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue the series of the run that wrote the entry."""
        last_step = state.get("last_step")
        self.schedule.last_step = last_step
        self.measured, self.skipped = state["measured"], state["skipped"]
        self.stored[LOSS].entry = state.get("probe")
        self.concat = state.get("concat")
        self.resumed = True
        self.resumed_after = -1 if last_step is None else last_step
        if self.last_history is not None:  # of a second Trainer that resumes the run
            self.history, self.last_history = self.last_history, None


Check = tuple[type, ...] | Callable[[Any], bool]  # accepted types, or a function of the value

STATE: dict[str, Check] = {
    "last_step": (int, type(None)),
    "measured": (int,),
    "skipped": (int,),
    "probe": is_entry,
    "concat": lambda value: value is None or isinstance(value, bool),
}


def usable_state(owner: str, state: object, expected: Mapping[str, Check]) -> bool:
    """Whether a checkpoint's state has the format of this version; warns if not."""
    entries = state if isinstance(state, Mapping) else {}
    wrong = [key for key, check in expected.items() if not _passes(entries.get(key), check)]
    if wrong:
        rank_zero_warn(
            f"{owner}: the state in the checkpoint does not have the format of this version (see "
            f"{wrong}) and is ignored; a new series starts"
        )
    return not wrong


def _passes(value: object, check: Check) -> bool:
    """Whether ``value`` passes ``check``; integers are counts, so neither bools nor negative."""
    if not isinstance(check, tuple):
        return check(value)
    if isinstance(value, int):
        return int in check and not isinstance(value, bool) and value >= 0
    return isinstance(value, check)
