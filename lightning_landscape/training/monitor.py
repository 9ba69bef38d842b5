"""What all measuring callbacks share: their common arguments, their history, their hooks."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.geometry.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flags,
    check_number,
    few,
    quoted,
)
from lightning_landscape.training.history import History, read_history
from lightning_landscape.training.hooks import BATCH_END, BATCH_START, OF_EVERY_BATCH, rest, wake
from lightning_landscape.training.kept import KeptProbe, is_told
from lightning_landscape.training.losses import ProbeMode, Reduction, UserLoss
from lightning_landscape.training.namespaces import Callback, misconfiguration
from lightning_landscape.training.probe import Probe, Source, check_source
from lightning_landscape.training.records import HISTORY_FILE
from lightning_landscape.training.round import Measured, Round
from lightning_landscape.training.saved import saved_files
from lightning_landscape.training.schedule import Schedule
from lightning_landscape.training.session import Session
from lightning_landscape.training.sharding import refuse_tensor_parallel

if TYPE_CHECKING:
    from lightning_landscape.geometry.objective import Engine
    from lightning_landscape.training.records import Recorder

# By name: there are two Lightning packages, and Ray's strategies inherit from these.
_REFUSED = {"FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}
Fits = tuple[type, ...] | Callable[[Any], bool]  # types, or a test of the value

_STATE: dict[str, Fits] = {
    "last_step": (int, type(None)),
    "measured": (int,),
    "skipped": (int,),
    "probe": is_told,
}


class Listener(Protocol):
    """Told of each new row that holds ``monitor``, inside the round that measured it."""

    monitor: str

    def on_record(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        """A measurement was made; called on every process."""


class Monitor(Callback):
    """Base of the measuring callbacks, and of one of your own.

    A subclass says what it logs and how it is measured (:meth:`measure`).  When, on which data,
    isolated, from which budget, and where the values go, is here and in ``Session``.  Arguments:
    those that all callbacks share, see ``HessianMonitor``.

    Attributes:
        kind: the first part of its keys; a subclass must set it.
        tags: the scalars it may log, without that.
        displaces: it moves the weights, which drops the graph of second derivatives: it is measured
            after those that do not.  ``False`` where it does not.
        draws: pictures are what it is for: it is measured after the scalars, and at the end of the
            fit in any case.
        pictures: how many it draws at each measurement, for the budget.  Without ``draws`` they
            wait until they are affordable, and the last is drawn in any case.
        needs_batch: it uses :meth:`Round.batch_objective`.
        needs_update: it uses :meth:`Round.last_update`.

    Example::

        class GradientNorm(Monitor):
            kind, tags, forwards = "gradient", ("norm",), 3

            def measure(self, this_round):
                gradient = this_round.objective(self).gradient()
                squared = sum(float(g.square().sum()) for g in gradient.values())
                return Measured({self.key("norm"): squared**0.5})
    """

    kind: ClassVar[str] = ""  # first part of the keys
    # Moves the weights, which drops graphs: measured after those that do not.
    displaces: ClassVar[bool] = True
    draws: ClassVar[bool] = False  # makes pictures: measured after the scalars

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = 100,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        probe: Source = None,
        probe_samples: int = 512,
        probe_mode: ProbeMode = "train",
        loss_fn: UserLoss | None = None,
        loss_reduction: Reduction = "mean",
        parameters: str | Sequence[str] | None = None,
        engine: Engine = "auto",
        name: str | None = None,
        prog_bar: bool = False,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        said = type(self).__name__
        if not self.kind:
            raise TypeError(f"class {said}: expected an attribute kind, the first part of its keys")
        if every_n_train_steps is not None:
            every_n_train_steps = check_count(said, "every_n_train_steps", every_n_train_steps)
        if every_n_epochs is not None:
            every_n_epochs = check_count(said, "every_n_epochs", every_n_epochs)
        if every_n_train_steps is None and every_n_epochs is None:
            raise ValueError(
                f"{said}(every_n_train_steps=None, every_n_epochs=None): expected an integer >= 1 "
                f"for at least one of them"
            )
        if max_overhead is not None:
            words = (
                "a share of the training time above 0 (0.05 is 5 per cent), or None for the exact "
                "schedule"
            )
            check_number(said, "max_overhead", max_overhead, words, lambda x: 0.0 < x < math.inf)
            if max_overhead > 1.0:
                rank_zero_warn(
                    f"{quoted(said, 'max_overhead', max_overhead)}: that is {max_overhead:.0%} of "
                    f"the training time; for {max_overhead:g} per cent pass {max_overhead / 100:g}"
                )
        check_source(said, "probe", probe)
        check_choice(said, "probe_mode", probe_mode, ("train", "eval"))
        check_choice(said, "loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice(said, "engine", engine, ("auto", "double_backward", "finite_difference"))
        probe_samples = check_count(said, "probe_samples", probe_samples)
        if loss_fn is not None:
            words = "a function (pl_module, batch) -> loss, or None for training_step"
            check_callable(said, "loss_fn", loss_fn, words, arguments=2)
        parameters = _patterns(said, parameters)
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"{quoted(said, 'name', name)}: expected a word without '/', or None")
        check_flags(said, prog_bar=prog_bar, verbose=verbose)
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.max_overhead = max_overhead
        self.probe = probe
        self.probe_samples = probe_samples
        self.probe_mode: ProbeMode = probe_mode
        self.loss_fn = loss_fn
        self.loss_reduction: Reduction = loss_reduction
        self.parameters = parameters
        self.engine: Engine = engine
        self.name = name
        self.prog_bar = prog_bar
        self.verbose = verbose

        self.schedule = Schedule(every_n_train_steps, every_n_epochs)
        self.probe_in_use: Probe = None  # type: ignore[assignment]  # set by the session
        self.listeners: list[Listener] = []
        self.measured = self.skipped = self.failed = self.faults = 0
        self.seconds_spent = 0.0
        self.last_seconds: float | None = None
        self.last_measured_step: int | None = None
        self.disabled = False
        self.resumed = False
        self._resumed_after = -1  # the last step of the run before
        self.measurements = History()
        self._kept_probe = KeptProbe("training")
        self._said: set[str] = set()
        self._session: Session | None = None
        self._trainer: Trainer | None = None  # while it fits

    # -- what a subclass says ------------------------------------------------------------------

    tags: tuple[str, ...] = ()  # scalars it may log, without the prefix

    needs_batch = False  # the current training batch
    needs_update = False  # the weights before the last step

    def owns(self, key: str) -> bool:
        """Whether this callback may log ``key``."""
        return key in self.keys

    @property
    def charts(self) -> dict[str, list[Any]]:
        """Charts on TensorBoard's custom-scalars page, title -> ``["Multiline", [patterns]]``."""
        return {}

    @property
    def forwards(self) -> int:
        """About how many forwards of the probe one measurement costs, for the budget.

        A gradient is 3, a Hessian-vector product 6.  A subclass may set a plain number.
        """
        return 0

    @property
    def owes(self) -> bool:
        """Whether it measures when the fit ends, if it has not at the last step."""
        return self.draws

    pictures = 0  # drawn at each measurement

    @property
    def coarse(self) -> str:
        """In what the last picture falls short of the others; empty if it does not."""
        return ""

    def settle_for(self, forwards: float | None) -> None:
        """Spend about ``forwards`` at most on the picture that is next; ``None``: all it takes.

        Called on all processes alike, before the picture that is owed at the end of the fit.
        """

    def measure(self, this_round: Round) -> Measured:
        """Measure now.  Runs isolated: whatever it does to the module is undone.

        Called on all processes at the same step; the values must be the same on all of them.
        """
        raise NotImplementedError

    def in_retrospect(self, folder: Path, final: bool) -> Measured:
        """Pictures and files of all that was measured so far, for rank zero; nothing is measured.

        Asked for after 10, 20, 40, 80, ... measurements where that is cheap, and at the end of the
        fit (``final``) in any case.  ``folder`` is where the files of the run lie.
        """
        return Measured()

    @property
    def joins(self) -> bool:
        """Whether the probe's batches may be taken as one: they mean nothing by themselves."""
        return True

    # A second one; where it is captured, by the callback, which closes it on each process.
    further_probe: Probe | None = None

    given_probes: Sequence[Probe] = ()  # any number more, all given by the user

    def begin(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Training starts, ``step`` steps into the run; called on all processes alike."""

    follows_weights = False  # :meth:`follows` is to be asked

    def follows(self, step: int) -> bool:
        """Whether :meth:`follow` wants to see the weights after ``step`` steps."""
        return False

    def follow(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """See the weights; not isolated, nothing may be changed or sent."""

    follows_epochs = False  # :meth:`epoch_begins` is to be called

    def epoch_begins(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See the weights as an epoch begins; not isolated, nothing may be changed or sent."""

    def forget(self) -> None:
        """Drop what one measurement hands to the next; called on all processes after a fault."""

    # -- names and records ---------------------------------------------------------------------

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
    def history(self) -> list[dict[str, Any]]:
        """One plain dict a measurement, oldest first, the last 10,000, ready for pandas.

        Each holds ``step``, ``epoch``, the logged values under their keys, and what they depend
        on (``probe_samples``, ``probe_mode``, ...).  All rows are in ``history.jsonl`` in the log
        directory, with null for NaN: ``read_history`` reads them.  After ``ddp_spawn`` and
        ``ddp_fork``, where training ran in other processes, they are read back from there.
        """
        return self.measurements.rows()

    def own_files(self, folder: Path, part: str) -> dict[int, Path]:
        """Step -> the ``.npz`` of ``part`` in the folder; not those that another run left there."""
        steps = {int(row["step"]) for row in self.measurements.rows()}
        until = self._resumed_after
        stem = self.key(part).replace("/", "-")
        return saved_files(folder, stem, lambda step: step in steps or step <= until)

    def own_rows(self, folder: Path) -> list[dict[str, Any]]:
        """The history, and after a resume the rows before it, where they lie beside the logs."""
        rows = self.measurements.rows()
        path = folder.parent / HISTORY_FILE
        if self._resumed_after < 0 or not path.is_file():
            return rows
        before = (row for row in read_history(path) if row.get("monitor") == self.prefix)
        return [row for row in before if row["step"] <= self._resumed_after] + rows

    @property
    def loss_key(self) -> tuple[Any, ...]:
        """Callbacks with the same key measure the same loss over the same parameters."""
        return (
            id(self.probe_in_use),
            self.probe_mode,
            self.loss_fn,
            self.loss_reduction,
            self.engine,
            None if self.parameters is None else tuple(self.parameters),
            self.joins,
        )

    def say_once(self, message: str) -> None:
        """Warn on rank zero, the same message only once a run, whatever numbers are in it."""
        words = re.sub(r"\d[\d.e+-]*", "#", message)
        if words not in self._said:
            self._said.add(words)
            rank_zero_warn(f"{self.prefix}: {message}")

    # -- probes over checkpoints ---------------------------------------------------------------

    @property
    def kept_probes(self) -> list[tuple[Probe, KeptProbe]]:
        """The probes that are captured where none is given, and what checkpoints tell of them."""
        return [(self.probe_in_use, self._kept_probe)]

    def keep_probes(self, recorder: Recorder, trainer: Trainer) -> None:
        """Write captured probes beside the logs, once: a resumed run goes on with them.

        At the first measurement; after a resume that gave one up, at the first on the new one.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        for probe, kept in self.kept_probes:
            if probe.captured and not kept.names(probe):
                kept.write(probe, recorder, trainer)

    def restore_probe(
        self, probe: Probe, kept: KeptProbe, recorder: Recorder, trainer: Trainer
    ) -> None:
        """After a resume: the probe of the run before, or a new series, which is said."""
        if kept.told is None:
            if self.resumed and trainer.ckpt_path and trainer.global_step > 0:
                self.say_once(
                    f"the checkpoint was written before the first measurement and names no "
                    f"{kept.words}; one is taken from the next {kept.source} batches"
                )
        elif problem := kept.read(probe, recorder, trainer):
            self.give_up_probe(probe, kept, problem)

    def give_up_probe(self, probe: Probe, kept: KeptProbe, problem: str) -> None:
        """Begin a new series: the probe of the run before cannot be had."""
        self.say_once(
            f"the {kept.words} of the run before could not be used: {problem}; a new series starts "
            f"on a new probe"
        )
        probe.forget()
        kept.told = None
        self.schedule.last_step = None

    # -- Lightning's hooks: the first of our callbacks leads -----------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the Trainer; the first of our callbacks opens the session."""
        if stage != "fit":
            return
        self._check_place(trainer)
        monitors = _monitors(trainer)
        twins = [m for m in monitors if m.prefix == self.prefix]
        if len(twins) > 1:
            raise misconfiguration(
                trainer,
                f"{len(twins)} callbacks would log under {self.prefix!r}: give each but one of "
                f"them another name=...",
            )
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise misconfiguration(
                trainer,
                f"{type(self).__name__}: {type(pl_module).__name__} optimises manually, so its "
                f"training_step cannot be called to measure a loss (it would step the optimizer). "
                f"Pass {type(self).__name__}(loss_fn=lambda pl_module, batch: ...)",
            )
        refused = _REFUSED.intersection(kind.__name__ for kind in type(trainer.strategy).__mro__)
        if refused:
            raise misconfiguration(
                trainer,
                f"{type(self).__name__} cannot measure under {type(trainer.strategy).__name__}, "
                f"which keeps the weights where second derivatives do not reach them. Use "
                f"DDPStrategy, or ModelParallelStrategy with fully_shard (FSDP2) where one device "
                f"does not hold the training state",
            )
        wake(self)  # an exception may have ended another fit
        self._trainer = trainer
        self._session = Session(trainer, monitors) if self._leads(trainer) else None
        used = {BATCH_START, BATCH_END} if self._session else set()
        self.pass_over(hook for hook in OF_EVERY_BATCH if hook not in used)

    def _check_place(self, trainer: Trainer) -> None:
        said, other = type(self).__name__, self._trainer
        if self not in _monitors(trainer):
            raise misconfiguration(
                trainer,
                f"{said}: it is not among the callbacks of this Trainer, which call one another; "
                f"pass it to Trainer(callbacks=[...]) instead of calling its hooks",
            )
        if other is not None and other is not trainer and other.state.status == "running":
            raise misconfiguration(
                trainer,
                f"{said}: it is measuring in another Trainer that is still running; give each "
                f"Trainer a callback of its own",
            )

    def pass_over(self, hooks: Iterable[str]) -> None:
        """Spare Lightning the calls of these hooks, unless a subclass made them its own."""
        rest(self, hooks, Monitor)

    def _leads(self, trainer: Trainer) -> bool:
        return _monitors(trainer)[:1] == [self]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first hook that sees parameters made in ``configure_model``."""
        if self._leads(trainer):
            refuse_tensor_parallel(trainer, pl_module)
        self.fits([name for name, _ in pl_module.named_parameters()])

    def fits(self, names: Sequence[str]) -> None:
        """Raise where an argument names none of the module's parameters."""
        for pattern in self.parameters or ():
            if fnmatch.filter(names, pattern):
                continue
            problem = (
                f"{quoted(type(self).__name__, 'parameters', self.parameters)}: no parameter "
                f"matches {pattern!r}; expected glob patterns over names such as {few(names)}"
            )
            if any(fnmatch.filter(names, other) for other in self.parameters or ()):
                self.say_once(problem)
            else:
                raise ValueError(problem)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if session := self._session:
            session.on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if session := self._session:
            session.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if session := self._session:
            session.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if session := self._session:
            session.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if session := self._session:
            session.on_validation_start(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if session := self._session:
            session.on_train_end(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what was done; let go of the session: Lightning tears down nothing after this."""
        if self._session is not None and self._trainer is trainer:
            self._session.on_exception(trainer)
        self._let_go(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the session: a callback that is kept or pickled holds no run."""
        if stage == "fit":
            self._let_go(trainer)

    def _let_go(self, trainer: Trainer) -> None:
        if self._trainer in (None, trainer):  # not what goes on in another
            self._session = self._trainer = None
            wake(self)

    # -- checkpoints: small, plain values ------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes two callbacks of one class by their ``name``."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same series."""
        return {
            "last_step": self.schedule.last_step,
            "measured": self.measured,
            "skipped": self.skipped,
            "probe": self._kept_probe.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the series of the run that wrote the checkpoint."""
        if not usable_state(self.prefix, state_dict, _STATE):
            return
        self.schedule.last_step = state_dict.get("last_step")
        self.measured = state_dict["measured"]
        self.skipped = state_dict["skipped"]
        self._kept_probe.told = state_dict.get("probe")
        self.resumed = True
        self._resumed_after = -1 if self.schedule.last_step is None else self.schedule.last_step


def session_of(trainer: Trainer) -> Session:
    """What all of our callbacks in this Trainer measure in, from ``setup`` on."""
    session = _monitors(trainer)[0]._session
    assert session is not None
    return session


def _monitors(trainer: Trainer) -> list[Monitor]:
    return [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]


def usable_state(said: str, state: object, expected: Mapping[str, Fits]) -> bool:
    """Whether a checkpoint's state is what this version writes; says so where it is not."""
    given = state if isinstance(state, Mapping) else {}
    wrong = [
        key
        for key, fits in expected.items()
        if not (_is(given.get(key), fits) if isinstance(fits, tuple) else fits(given.get(key)))
    ]
    if wrong:
        rank_zero_warn(
            f"{said}: the state in the checkpoint is not one of this version (see {wrong}) and is "
            f"ignored; a new series starts"
        )
    return not wrong


def _is(value: object, types: tuple[type, ...]) -> bool:
    """Whether it is of one of the types; True is no integer here, and no count is negative."""
    if isinstance(value, int):
        return int in types and not isinstance(value, bool) and value >= 0
    return isinstance(value, types)


def _patterns(said: str, parameters: Any) -> list[str] | None:
    """``parameters`` as a list of patterns."""
    if parameters is None:
        return None
    patterns = [parameters] if isinstance(parameters, str) else parameters
    listed = isinstance(patterns, Iterable) and not isinstance(patterns, (bytes, Mapping))
    patterns = list(patterns) if listed else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(
            f"{quoted(said, 'parameters', parameters)}: expected glob patterns over parameter "
            f"names, e.g. ['encoder.*'], or None for all that is trained"
        )
    return patterns
