"""One run's measuring: which callback measures when, on which probe, from one budget.

The first of our callbacks in a Trainer's list leads: it opens the session in ``setup`` and its
hooks drive it.  All callbacks that are due at a step measure in one round, inside one isolation,
so that they share what is computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_landscape.geometry.faults import OtherRankError
from lightning_landscape.geometry.memory import GraphMemory
from lightning_landscape.training.faults import count_fault
from lightning_landscape.training.isolation import isolated
from lightning_landscape.training.losses import takes_iterator
from lightning_landscape.training.probe import Probe, ProbeBatch, batch_size, clone_batch
from lightning_landscape.training.processes import Processes
from lightning_landscape.training.publisher import Publisher
from lightning_landscape.training.round import Measured, Round
from lightning_landscape.training.schedule import Budget

if TYPE_CHECKING:
    from lightning_landscape.training.monitor import Monitor

# Seconds: what a callback must have spent for a picture along the run to be little beside it.
_WORTH_A_PICTURE = 2.0

_Result = TypeVar("_Result")


@dataclass
class Before:
    """The weights before a step, as the optimizers hold them, or why there are none."""

    weights: dict[int, Tensor] = field(default_factory=dict)  # id of a parameter -> its copy
    rates: dict[int, float] = field(default_factory=dict)  # and its learning rate
    fault: Exception | None = None


class Session:
    """The measuring side of one ``fit``."""

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        # Scalars first, and of them those that need the graphs which others drop.
        self.monitors = sorted(monitors, key=lambda monitor: (monitor.draws, monitor.displaces))
        given = [m.max_overhead for m in monitors if m.max_overhead is not None]
        self.budget = Budget(min(given) if given else None)
        self.checked: set[Any] = set()
        self.train_batch_size = self._largest_batch = 1
        self._graph_memory: dict[Any, GraphMemory] = {}
        self._probe_sizes: dict[int, int] = {}
        self.last_batch = Probe()
        self.processes = Processes(trainer)
        self._before = Before()
        self._before_at = -1  # trainer.global_step when it was copied
        self._publisher = Publisher(trainer, self.monitors)
        self._forward_seconds: float | None = None
        self._stepped = -1  # trainer.global_step at the last batch that stepped
        self._fetches_itself = False  # training_step takes the iterator, not a batch
        self._offered: list[Probe] = []  # those that took the batch of this step
        self._assign_probes()

    # -- hooks, called by the leading callback -------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the probes that were given or, on resuming, kept; start the clock."""
        self._stepped = trainer.global_step
        self._fetches_itself = takes_iterator(pl_module)

        def prepare(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        # Lightning saves its counter before it moves on, and makes up for that after this hook.
        begins_at = trainer.fit_loop.epoch_loop._batches_that_stepped + bool(trainer.ckpt_path)
        for monitor in self.monitors:
            if (monitor.schedule.last_step or 0) > begins_at:
                monitor.schedule.last_step = None  # another run, with a callback used before
            if monitor.further_probe is not None and not monitor.further_probe.complete:
                self._load(monitor.further_probe, prepare)
            self._begin(monitor, trainer, pl_module, begins_at)
            probe = monitor.probe_in_use
            if probe.complete:
                continue
            if probe.captured:
                self._restore_probe(monitor, trainer)
            else:
                self._load(probe, prepare)
        self.budget.start()
        # A checkpoint written at the end of an epoch needs no making up for.
        self._follow(trainer, pl_module, min(begins_at, trainer.global_step))

    def _begin(
        self, monitor: Monitor, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> None:
        """An argument that does not fit the module ends the run on all processes."""
        try:
            self.processes.together(partial(monitor.begin, trainer, pl_module, step))
        except OtherRankError as error:
            raise RuntimeError("what was given could not be read on another process") from error

    def _follow(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Show the weights to those that follow them; the time counts."""
        following = [m for m in self.monitors if not m.disabled and m.follows(step)]
        if not following:
            return
        started = self._clock(pl_module)
        for monitor in following:
            monitor.follow(trainer, pl_module, step)
        self.budget.charge(self._clock(pl_module) - started)

    def _load(self, probe: Probe, prepare: Callable[[Any], Any]) -> None:
        """A process that cannot read its share ends the run on all, or they would wait for it."""
        try:
            self.processes.together(partial(probe.load, prepare))
        except OtherRankError as error:
            raise RuntimeError("the given probe could not be read on another process") from error

    def _restore_probe(self, monitor: Monitor, trainer: Trainer) -> None:
        monitor.restore_probe(self._publisher.recorder, trainer)
        probe = monitor.probe_in_use
        found = self.processes.total(probe.complete)
        if 0 < found < self.processes.count:  # a file is missing for one process only
            monitor.give_up_probe("another process has none")

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Keep what will be wanted: a batch before it can be edited, weights before they move."""
        coming = [m for m in self.monitors if not m.disabled and self._due(m, trainer)]
        if self._before.fault is not None:
            self._before, self._before_at = Before(), -1
        if not self._fetches_itself:
            self._try_to(partial(self._keep_batch, batch, batch_idx, coming))
        wanting = [*coming, *(m for m in self.monitors if m.draws and self._ends(trainer))]
        if any(m.needs_update for m in wanting) and self._before_at != trainer.global_step:
            self._before_at = trainer.global_step
            self._try_to(partial(self._keep_weights, trainer))

    def _try_to(self, keep: Callable[[], None]) -> None:
        """Keep a copy; a fault (no room, say) is told when the copies are wanted."""
        try:
            keep()
        except Exception as error:
            self.last_batch.batches, self._before = [], Before(fault=error)

    def _keep_weights(self, trainer: Trainer) -> None:
        if self._before.fault is None:
            self._before = _copied(trainer)

    def _keep_batch(self, batch: Any, batch_idx: int, coming: Sequence[Monitor]) -> None:
        self._offered = self._captured_probes()
        for probe in self._offered:
            self._offer(probe, batch, batch_idx)
        if any(m.needs_batch for m in coming):
            self.last_batch.batches = []  # not an older one if this cannot be copied
            self.last_batch.batches = [ProbeBatch(clone_batch(batch), batch_idx, batch_size(batch))]

    def _offer(self, probe: Probe, batch: Any, batch_idx: int) -> None:
        """Add the batch to a probe; on all processes, or on none."""
        offer = partial(probe.offer, batch, batch_idx, self.processes.total)
        try:
            self.processes.together(offer)
        except Exception as error:  # a batch that cannot be copied
            probe.forget()
            for monitor in self.monitors:
                if monitor.probe_in_use is probe:
                    self._count(monitor, error)

    def kept_before(self) -> Before:
        """The weights before the last step.

        Raises:
            RuntimeError: they, or the batch of that step, could not be kept.
        """
        if self._before.fault is not None:
            fault = self._before.fault
            raise RuntimeError(
                f"what was there before the step could not be kept ({fault})"
            ) from fault
        return self._before

    @staticmethod
    def _ends(trainer: Trainer) -> bool:
        """Whether this is the last step of the fit, as far as can be foreseen: pictures follow."""
        epochs, steps = trainer.max_epochs, trainer.max_steps
        last_epoch = epochs is not None and epochs > 0 and trainer.current_epoch + 1 >= epochs
        # A step of every optimizer may count.
        last_step = steps > 0 and trainer.global_step + len(trainer.optimizers) >= steps
        return bool(last_step or (last_epoch and trainer.is_last_batch))

    def _due(self, monitor: Monitor, trainer: Trainer) -> bool:
        """Whether the schedule has it measure at the end of this batch, if that steps."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return monitor.schedule.due(step, trainer.current_epoch, trainer.is_last_batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, if the optimizer has stepped and somebody is due."""
        if self._fetches_itself:  # at the start of the batch nothing had been fetched yet
            self._try_to(partial(self._keep_batch, batch, batch_idx, self.monitors))
        if pl_module.automatic_optimization and not outputs:
            for probe in self._offered:
                probe.withdraw()  # training_step gave no loss for it
        if trainer.is_last_batch:
            self._complete_probes()
        if trainer.global_step == self._stepped:
            return  # accumulating, or weight averaging's extra epoch, or a step that was skipped
        self._stepped = trainer.global_step
        self.train_batch_size = batch_size(batch)
        self._largest_batch = max(self._largest_batch, self.train_batch_size)
        # The label under which Lightning logs the training loss of the weights as they are now:
        # its own counter moves on after this hook.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self._follow(trainer, pl_module, step)
        due = [
            monitor
            for monitor in self.monitors
            if monitor.probe_in_use.complete
            and not monitor.disabled
            and self._due(monitor, trainer)
        ]
        if due:
            self._run(trainer, pl_module, due, step)
            self.last_batch.batches = []
            if not self._ends(trainer):
                self._before, self._before_at = Before(), -1

    def on_validation_start(self, trainer: Trainer) -> None:
        """The capture ends here at the latest."""
        if not trainer.sanity_checking:
            self._complete_probes()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One picture in any case from those that draw; then say what was done."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._complete_probes()
        last = [
            monitor
            for monitor in self.monitors
            if monitor.draws
            and monitor.probe_in_use.complete
            and not monitor.disabled
            and monitor.last_measured_step != step
        ]
        if last and step > 0:
            self._measure(trainer, pl_module, last, step, final=True)
        for monitor in self.monitors:
            if monitor.measurements and trainer.is_global_zero:
                self._look_back(pl_module, monitor, step, final=True)
        rank_zero_info(self.closing_line())

    # -- a round -------------------------------------------------------------------------------

    def _run(
        self, trainer: Trainer, pl_module: LightningModule, due: list[Monitor], step: int
    ) -> None:
        if self._forward_seconds is None and all(m.draws for m in due) and self._limited(due):
            self._time_a_forward(trainer, pl_module, due[0], step)
        # Rank zero holds the clock; the others follow, or they would wait for one another.
        names = [m.prefix for m in self._affordable(due)]
        names = trainer.strategy.broadcast(names)
        chosen = [m for m in due if m.prefix in names]  # scalars before pictures
        for monitor in due:
            monitor.schedule.last_step = step
            monitor.skipped += monitor not in chosen
        if chosen:
            self._measure(trainer, pl_module, chosen, step)

    def _affordable(self, due: list[Monitor]) -> list[Monitor]:
        """Those whose predicted cost the budget allows, beside the pictures owed at the end."""
        exact = [m for m in due if m.max_overhead is None]
        limited = [m for m in due if m.max_overhead is not None]
        # Scalars go together, or cheap ones would starve a dearer one for ever.
        scalars = [m for m in limited if not m.draws]
        owed = [m for m in self.monitors if m.draws and m.max_overhead and not m.disabled]
        # Put aside for those pictures, but not more than half: scalars come first.
        reserve = min(sum(self._predicted(m) or 0.0 for m in owed), 0.5 * self.budget.earned)
        cost = reserve + sum(self._predicted(m) or 0.0 for m in scalars)
        if not self.budget.affords(cost):
            return exact + [m for m in scalars if not m.measured]
        chosen = exact + scalars
        for monitor in limited:
            price = self._predicted(monitor)
            if monitor.draws and price is not None and self.budget.affords(cost + price):
                cost += price
                chosen.append(monitor)
        return chosen

    def _limited(self, monitors: Sequence[Monitor]) -> bool:
        return any(m.max_overhead is not None for m in monitors)

    def _predicted(self, monitor: Monitor) -> float | None:
        """Seconds that the next measurement takes: as the last one, or from its forwards."""
        if monitor.last_seconds is not None:
            return monitor.last_seconds
        return None if self._forward_seconds is None else monitor.forwards * self._forward_seconds

    def _time_a_forward(
        self, trainer: Trainer, pl_module: LightningModule, monitor: Monitor, step: int
    ) -> None:
        started = self._clock(pl_module)
        with self._isolated(trainer, pl_module, [monitor], step) as this_round:
            if this_round is None:
                return
            loss = partial(lambda this_round: this_round.objective(monitor).loss(), this_round)
            if self._attempt(monitor, loss) is None:
                return
        elapsed = self._clock(pl_module) - started
        self._forward_seconds = elapsed / max(this_round.work, 1)
        self.budget.charge(elapsed)

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        monitors: Sequence[Monitor],
        step: int,
        final: bool = False,
    ) -> None:
        """Measure inside an isolation; write and draw after it, with the run's own loggers."""
        begun = self._clock(pl_module)
        found: list[tuple[Monitor, Measured, float]] = []
        with self._isolated(trainer, pl_module, monitors, step) as this_round:
            if this_round is None:
                return
            for monitor in monitors:
                started = self._clock(pl_module)
                measured = self._attempt(monitor, partial(monitor.measure, this_round))
                if measured is None:
                    this_round.release()
                else:
                    measured.facts |= this_round.engine(monitor)
                    found.append((monitor, measured, self._clock(pl_module) - started))
            if self._forward_seconds is None:
                elapsed = self._clock(pl_module) - begun
                self._forward_seconds = elapsed / max(this_round.work, 1)
        for monitor, measured, seconds in found:
            started = self._clock(pl_module)
            samples = self.probe_size(monitor.probe_in_use)
            self._publisher.publish(pl_module, monitor, measured, step, samples, final)
            monitor.last_seconds = seconds + self._clock(pl_module) - started
            monitor.seconds_spent += monitor.last_seconds
        self.budget.charge(self._clock(pl_module) - begun)
        for monitor, _, _ in () if final or not trainer.is_global_zero else found:
            cheap = monitor.max_overhead is None or monitor.seconds_spent > _WORTH_A_PICTURE
            if cheap and _is_milestone(monitor.measured):
                self._look_back(pl_module, monitor, step, final=False)

    def _look_back(
        self, pl_module: LightningModule, monitor: Monitor, step: int, final: bool
    ) -> None:
        """Draw all that was measured so far, on rank zero alone.

        Charged, but no part of what the next measurement is predicted to take.
        """
        begun = self._clock(pl_module)
        self._publisher.look_back(monitor, step, final)
        seconds = self._clock(pl_module) - begun
        monitor.seconds_spent += seconds
        self.budget.charge(seconds)

    @contextlib.contextmanager
    def _isolated(
        self, trainer: Trainer, pl_module: LightningModule, monitors: Sequence[Monitor], step: int
    ) -> Iterator[Round | None]:
        """A round inside an isolation; None where not even that could be set up."""
        with contextlib.ExitStack() as stack:
            isolation = isolated(trainer, pl_module, agree=self.processes.meet)
            try:
                entered = self.processes.together(partial(stack.enter_context, isolation))
            except Exception as error:  # here or on another process; the run goes on
                for monitor in monitors:
                    self._count(monitor, error)
                yield None
                return
            yield Round(trainer, pl_module, entered, self, step)

    def _attempt(self, monitor: Monitor, compute: Callable[[], _Result]) -> _Result | None:
        """``compute()``, or None after a fault here or on another process."""
        try:
            result = self.processes.together(compute)
        except Exception as error:  # any fault of the user's loss, of a solver or of a device
            self._count(monitor, error)
            return None
        monitor.faults = 0
        return result

    def _count(self, monitor: Monitor, error: Exception) -> None:
        count_fault(monitor, error, self.processes.rank)

    # -- probes --------------------------------------------------------------------------------

    def _assign_probes(self) -> None:
        """One probe per source: captured ones are shared by the number of samples wanted."""
        shared: dict[Any, Probe] = {}
        for monitor in self.monitors:
            if monitor.probe_in_use is not None and monitor.probe_in_use.complete:
                continue  # a second fit goes on with the same data
            if isinstance(monitor.probe, Probe):
                monitor.probe_in_use = monitor.probe
                continue
            key = (None, monitor.probe_samples) if monitor.probe is None else id(monitor.probe)
            if key not in shared:
                shared[key] = Probe(monitor.probe, monitor.probe_samples)
            monitor.probe_in_use = shared[key]

    def _captured_probes(self) -> list[Probe]:
        probes = {id(m.probe_in_use): m.probe_in_use for m in self.monitors if not m.disabled}
        return [p for p in probes.values() if p.captured and not p.complete]

    def _complete_probes(self) -> None:
        for probe in self._captured_probes():
            # Complete everywhere or nowhere: a process may have dropped all it had.
            having = self.processes.total(bool(probe.batches))
            probe.complete = having == self.processes.count

    # -- small things --------------------------------------------------------------------------

    @property
    def reducer(self) -> Callable[[Tensor], Tensor] | None:
        """Sums over processes; None with one process."""
        return None if self.processes.count == 1 else self.processes.sum

    def graph_memory(self, loss_key: Any, monitor: Monitor) -> GraphMemory:
        """What the run knows about the graphs of one loss; those of a training batch have room."""
        memory = self._graph_memory.setdefault(loss_key, GraphMemory(tell=monitor.say_once))
        memory.examples = self._largest_batch
        return memory

    def probe_size(self, probe: Probe) -> int:
        """Examples of a complete probe, over all processes."""
        if id(probe) not in self._probe_sizes:
            self._probe_sizes[id(probe)] = self.processes.total(probe.size)
        return self._probe_sizes[id(probe)]

    @staticmethod
    def _clock(pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()

    def closing_line(self) -> str:
        """What was measured, skipped and spent, in one line."""
        counts = ", ".join(f"{m.prefix} {m.measured}" for m in self.monitors)
        skipped = sum(m.skipped for m in self.monitors)
        failed = sum(m.failed for m in self.monitors)
        share = 100 * self.budget.share
        line = (
            f"lightning_landscape: measured {counts} times in {self.budget.spent:.1f} s, "
            f"{share:.1f} % of the {self.budget.trained:.1f} s spent training"
        )
        if skipped:
            line += f"; skipped {skipped} to stay within max_overhead={self.budget.max_overhead}"
        return line + (f"; {failed} failed" if failed else "")


def _is_milestone(count: int) -> bool:
    """10, 20, 40, 80, ..."""
    tens, rest = divmod(count, 10)
    return rest == 0 and tens > 0 and tens & (tens - 1) == 0


def _copied(trainer: Trainer) -> Before:
    """Of shards only the own ones: nothing is sent."""
    held = [(p, g) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    weights = {id(p): p for p, _ in held}
    return Before(
        {key: p.detach().clone() for key, p in weights.items()},
        # Read here: a scheduler may change them before the batch ends.
        {id(p): float(g["lr"]) for p, g in held},
    )
