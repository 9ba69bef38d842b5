"""The part of a callback without hooks: its arguments, keys, cost and ``measure``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.geometry.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flags,
    check_number,
    quoted,
)
from lightning_landscape.geometry.objective import Engine
from lightning_landscape.training.bookkeeping import LOSS, STATE, Bookkeeping, usable_state
from lightning_landscape.training.data.probe import Source, check_source
from lightning_landscape.training.losses import LossReduction, LossSpec, ProbeMode, UserLoss
from lightning_landscape.training.names import RENAMED, RESERVED
from lightning_landscape.training.output.history import read_history
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.output.recorder import HISTORY_FILE
from lightning_landscape.training.output.run_files import saved_files
from lightning_landscape.training.parameters import check_patterns, patterns_of
from lightning_landscape.training.round import Round
from lightning_landscape.training.schedule import EveryNSteps, Schedule


class Quantity:
    """The part of :class:`Monitor` without hooks: what is measured, of which loss, and its cost."""

    kind: ClassVar[str] = ""  # the first part of the keys
    moves_weights: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    tags: tuple[str, ...] = ()  # scalars it may log, without the prefix
    pictures = 0  # pictures per measurement
    needs_batch = False  # needs the current training batch
    needs_clipping = False  # whether the last steps were clipped
    needs_update = False  # needs the weights before the last step
    tracks_weights = False  # wants_weights and on_weights are called
    tracks_epochs = False  # on_epoch_weights is called

    def __init__(
        self,
        *,
        every_n_train_steps: EveryNSteps = "auto",
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        grace_seconds: float = 30.0,
        probe: Source = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "train",
        loss_fn: UserLoss | None = None,
        loss_reduction: LossReduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        save_probe: bool = True,
        name: str | None = None,
        prog_bar: bool = False,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if not self.kind:
            raise TypeError(
                f"class {owner}: expected an attribute kind, the first part of its keys"
            )
        named = isinstance(every_n_train_steps, str) and every_n_train_steps == "auto"
        if every_n_train_steps is not None and not named:
            every_n_train_steps = check_count(
                owner, "every_n_train_steps", every_n_train_steps, 1, ", 'auto', or None"
            )
        if every_n_epochs is not None:
            every_n_epochs = check_count(owner, "every_n_epochs", every_n_epochs)
        if every_n_train_steps is None and every_n_epochs is None:
            raise ValueError(
                f"{owner}(every_n_train_steps=None, every_n_epochs=None): expected an integer >= 1 "
                f"for at least one of them"
            )
        if max_overhead is not None:
            expected = (
                "a share of the training time above 0 (0.05 is 5 per cent), or None for the exact "
                "schedule"
            )
            check_number(
                owner, "max_overhead", max_overhead, expected, lambda x: 0.0 < x < math.inf
            )
            if max_overhead > 1.0:
                rank_zero_warn(
                    f"{quoted(owner, 'max_overhead', max_overhead)}: that is {max_overhead:.0%} of "
                    f"the training time; for {max_overhead:g} per cent pass {max_overhead / 100:g}"
                )
        expected = "seconds >= 0; 0: only max_overhead counts"
        check_number(owner, "grace_seconds", grace_seconds, expected, lambda x: 0.0 <= x < math.inf)
        check_source(owner, "probe", probe)
        check_choice(owner, "probe_mode", probe_mode, ("train", "eval"))
        check_choice(owner, "loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice(owner, "engine", engine, ("auto", "double_backward", "finite_difference"))
        probe_samples = check_count(owner, "probe_samples", probe_samples)
        if loss_fn is not None:
            expected = "a function (pl_module, batch) -> loss, or None for training_step"
            check_callable(owner, "loss_fn", loss_fn, expected, arguments=2)
        parameters = patterns_of(owner, parameters)
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"{quoted(owner, 'name', name)}: expected a word without '/', or None")
        check_flags(owner, save_probe=save_probe, prog_bar=prog_bar, verbose=verbose)
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.max_overhead = max_overhead
        self.grace_seconds = grace_seconds
        self.probe = probe
        self.probe_samples = probe_samples
        self.probe_mode: ProbeMode = probe_mode
        self.loss_fn = loss_fn
        self.loss_reduction: LossReduction = loss_reduction
        self.parameters = parameters
        self.engine: Engine = engine
        self.save_probe = save_probe
        self.name = name
        self.prog_bar = prog_bar
        self.verbose = verbose

        self._bookkeeping = Bookkeeping(Schedule(every_n_train_steps, every_n_epochs))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name in RENAMED:
                raise TypeError(
                    f"class {cls.__name__}: {name!r} is now called {RENAMED[name]!r}; rename it"
                )
            if name in RESERVED:
                raise TypeError(
                    f"class {cls.__name__}: {name!r} is an attribute of Monitor itself; choose "
                    f"another name"
                )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RENAMED:
            raise AttributeError(
                f"{type(self).__name__}: {name!r} is now called {RENAMED[name]!r}; rename it"
            )
        is_method = callable(getattr(Quantity, name, None)) and not callable(value)
        is_own = name == "_bookkeeping" and isinstance(value, Bookkeeping)
        if is_method or (name in RESERVED and not is_own):
            raise AttributeError(
                f"{type(self).__name__}: {name!r} is an attribute of Monitor itself; choose "
                f"another name"
            )
        super().__setattr__(name, value)

    # -- what a subclass defines ---------------------------------------------------------------

    def measure(self, this_round: Round) -> Measured:
        """Measure.  Runs in isolation: all changes to the module are undone.

        Called on all processes at the same step; the values must be the same on all of them.
        """
        raise NotImplementedError

    @property
    def forwards(self) -> int:
        """Approximate cost of one measurement, in forwards of the probe, for the budget.

        A gradient is 3, a Hessian-vector product 6.  A subclass may set a plain number.
        """
        return 0

    @property
    def main_tags(self) -> tuple[str, ...]:
        """The scalars that the summary at the end of the fit shows."""
        return self.tags[:1]

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``."""
        return key in self.keys

    @property
    def charts(self) -> dict[str, list[Any]]:
        """Charts on TensorBoard's custom-scalars page, title -> ``["Multiline", [patterns]]``."""
        return {}

    @property
    def allows_concat(self) -> bool:
        """Whether the probe's batches may be concatenated: nothing is measured per batch."""
        return True

    @property
    def measures_at_end(self) -> bool:
        """Whether it measures at the end of the fit, if it has not at the last step."""
        return self.draws

    @property
    def reduced_resolution(self) -> str:
        """How the resolution of the last picture was reduced; empty if it was not."""
        return ""

    def fit_to_budget(self, forwards: float | None) -> bool:
        """Use at most about ``forwards`` for the next picture; ``None``: no limit.

        Called on all processes, before the last picture at the end of the fit.  Returns False if
        even the smallest one takes more; then none is made.
        """
        return forwards is None or self.forwards <= forwards

    def run_summary(self, folder: Path, final: bool) -> Measured:
        """Pictures and files of all measurements so far; called on rank zero.

        Called after 10, 20, 40, 80, ... measurements if that is cheap, and always at the end of the
        fit (``final``).  ``folder`` holds the files of the run.
        """
        return Measured()

    def prepare(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Prepare for training, which starts at ``step``; called on all processes."""

    def wants_weights(self, step: int) -> bool:
        """Whether :meth:`on_weights` is to be called after ``step`` steps."""
        return False

    def on_weights(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Read the weights.  Not isolated: change nothing and do not communicate."""

    def on_epoch_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the weights at the start of an epoch.  As :meth:`on_weights`, not isolated."""

    def reset_warm_start(self) -> None:
        """Drop all warm starts; called on all processes after a failed measurement."""

    def start_anew(self) -> None:
        """Drop everything of the last run: this fit has another Trainer or another module."""
        last = self._bookkeeping
        for probe in last.probes.values():
            probe.start_anew()
        self._bookkeeping = Bookkeeping(
            Schedule(self.every_n_train_steps, self.every_n_epochs),
            probes={r: probe for r, probe in last.probes.items() if r != LOSS or probe.complete},
            stored=last.stored,
            listeners=last.listeners,
            last_history=last.history,
        )
        for stored in last.stored.values():
            stored.entry = None
        self.reset_warm_start()

    def check_parameters(self, names: Sequence[str]) -> None:
        """Raise if an argument matches none of the module's parameters."""
        check_patterns(type(self).__name__, self.parameters or (), names, self.warn_once)

    # -- names, loss, records ------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """``kind`` or ``kind/name``: the first part of every key."""
        return f"{self.kind}/{self.name}" if self.name else self.kind

    def key(self, tag: str) -> str:
        """The full key of a tag, e.g. ``hessian/top_eigenvalue``."""
        return f"{self.prefix}/{tag}"

    @property
    def keys(self) -> list[str]:
        """The keys of all scalars this callback may log."""
        return [self.key(tag) for tag in self.tags]

    @property
    def loss(self) -> LossSpec:
        """The loss that it measures; available once a fit has begun."""
        return LossSpec(
            self._bookkeeping.probes[LOSS],
            self.probe_mode,
            self.loss_fn,
            self.loss_reduction,
            self.engine,
            None if self.parameters is None else tuple(self.parameters),
            self.allows_concat,
        )

    @property
    def concat(self) -> bool | None:
        """Whether the loss is evaluated on all of the probe as one batch; None: not decided."""
        return self._bookkeeping.concat

    def note_concat(self, concat: bool, series: int) -> None:
        """The decision; a later ``series`` than before if an earlier one was wrong."""
        bookkeeping = self._bookkeeping
        bookkeeping.concat = concat
        if series == bookkeeping.series:
            return
        bookkeeping.series = series
        bookkeeping.history.supersede()
        self.reset_warm_start()
        self.warn_once(
            "all of the probe as one batch no longer has the loss of its batches, which is what "
            "training descends: from now on they are evaluated one by one, and a new series "
            "starts; the earlier rows of the history are marked as superseded"
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """One plain dict per measurement, oldest first: the last 10,000, ready for pandas.

        Each has ``step``, ``epoch``, the logged values under their keys, and the settings they
        depend on (``probe_samples``, ``probe_mode``, ...).  All rows are in ``history.jsonl`` in
        the log directory, with null for NaN; ``read_history`` reads them.  After ``ddp_spawn`` and
        ``ddp_fork``, where training ran in other processes, this property reads that file.
        """
        return self._bookkeeping.history.rows()

    @property
    def measured(self) -> int:
        """Measurements made."""
        return self._bookkeeping.measured

    @property
    def skipped(self) -> int:
        """Measurements skipped to stay within the budget."""
        return self._bookkeeping.skipped

    @property
    def failed(self) -> int:
        """Measurements that raised an error."""
        return self._bookkeeping.failed

    @property
    def seconds_spent(self) -> float:
        """Seconds of all its measurements and pictures."""
        return self._bookkeeping.seconds_spent

    @property
    def is_watched(self) -> bool:
        """Whether a stopper, another callback or a scheduler acts on one of its values."""
        return bool(self._bookkeeping.listeners or self._bookkeeping.read)

    @property
    def must_measure(self) -> bool:
        """Whether a callback of Lightning would end the fit without a first value."""
        return bool(self._bookkeeping.read and not self._bookkeeping.published)

    @property
    def disabled(self) -> bool:
        """Whether it has stopped measuring."""
        return self._bookkeeping.disabled

    def run_files(self, folder: Path, part: str) -> dict[int, Path]:
        """Step -> the ``.npz`` of ``part`` in the folder, without those of other runs."""
        bookkeeping = self._bookkeeping
        steps = {int(row["step"]) for row in self.history}
        stem = self.key(part).replace("/", "-")
        return saved_files(
            folder, stem, lambda step: step in steps or step <= bookkeeping.resumed_after
        )

    def run_rows(self, folder: Path) -> list[dict[str, Any]]:
        """The history, preceded after a resume by the rows of the run before."""
        last, path = self._bookkeeping.resumed_after, folder.parent / HISTORY_FILE
        if last < 0 or not path.is_file():
            return self.history
        before = (row for row in read_history(path) if row.get("monitor") == self.prefix)
        return [row for row in before if row["step"] <= last] + self.history

    def warn_once(self, message: str) -> None:
        """Warn on rank zero, once per run for messages that differ only in their numbers."""
        pattern = re.sub(r"\d[\d.e+-]*", "#", message)
        if pattern not in self._bookkeeping.warnings:
            self._bookkeeping.warnings.add(pattern)
            rank_zero_warn(f"{self.prefix}: {message}")

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run continues the series; plain values only."""
        return self._bookkeeping.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series of the run that wrote the checkpoint."""
        if usable_state(self.prefix, state_dict, STATE):
            self._bookkeeping.load(state_dict)
