"""Evaluate a module's loss during training without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.training.isolation.errors import NotYetError, TrainingChangedError
from lightning_landscape.training.isolation.iterators import Recordings
from lightning_landscape.training.isolation.module_state import ModuleState
from lightning_landscape.training.isolation.parameter_hooks import without_parameter_hooks
from lightning_landscape.training.isolation.random_state import RandomState, seed_everything
from lightning_landscape.training.isolation.reachable import reachable_through
from lightning_landscape.training.isolation.sharding import UnshardedParameters, unsharded
from lightning_landscape.training.isolation.silent_logger import silent_logger

# Attributes of Lightning's logger connector to which `self.log` writes.
_CONNECTOR_STATE = (
    "_current_fx",
    "_first_loop_iter",
    "_callback_metrics",
    "_logged_metrics",
    "_progress_bar_metrics",
)


def _logs(module: Any) -> bool:
    """Whether it is a LightningModule of either package."""
    return hasattr(module, "log_dict") and hasattr(module, "_current_fx_name")


class Isolation:
    """Evaluates losses without side effects; made by :func:`isolated`.

    Attributes:
        unsharded: the full parameters, and the shards that the optimizers step.
        changed: on exit, the error if something could not be restored.
    """

    changed: TrainingChangedError | None = None

    def __init__(
        self,
        pl_module: LightningModule,
        seed: int,
        unsharded: UnshardedParameters,
        hooked: Sequence[str],
        state: ModuleState,
    ) -> None:
        self.unsharded = unsharded
        self.logged_size: int | None = None  # batch_size of self.log in the last evaluation
        self.hooked = hooked  # parameters whose hooks are disabled
        self._seed = seed
        self._state = state
        self._logging = [m for m in pl_module.modules() if _logs(m)]

    @contextlib.contextmanager
    def evaluation(
        self, index: int = 0, *, mode: str = "train", kind: Hashable = None
    ) -> Iterator[None]:
        """Around one evaluation of the loss on the probe's batch ``index``.

        Every evaluation of that batch sees the same random numbers and the same module state.
        ``kind``: evaluations of one kind and mode touch the same state; None: unknown.
        """
        self.logged_size = None
        seed_everything(self._seed + index)
        self._state.set_mode(None if mode == "train" else False)
        # Another batch may touch other parts of the state, such as the counts of its labels.
        known = None if kind is None else (mode, kind, index)
        self._state.begin_evaluation(index, known)
        complete = False
        try:
            for module in self._logging:
                # Also prevents `sync_dist=True` from communicating; restored as an attribute.
                module.__dict__.update(log=self._log_nothing, log_dict=self._log_nothing)
            with self.unsharded.autocast():
                yield
            complete = True
        finally:
            self._state.end_evaluation(complete)

    def _log_nothing(self, *args: Any, batch_size: Any = None, **kwargs: Any) -> None:
        """Replaces ``log`` and ``log_dict``."""
        if isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0:
            self.logged_size = batch_size

    def leave_training(self) -> None:
        """Switch to eval mode during an evaluation."""
        self._state.set_mode(False)

    def restore(self) -> None:
        """Restore the module, and what it can reach."""
        self.changed = self._state.restore()


@contextlib.contextmanager
def isolated(
    trainer: Trainer,
    pl_module: LightningModule,
    seed: int = 0,
    sync: Callable[[], None] = lambda: None,
    recordings: Recordings | None = None,
    losses: Sequence[Any] = (),
) -> Iterator[Isolation]:
    """Restore on exit everything that measuring may change, also after an exception.

    That is: weights, buffers, gradients, flags and all Python state that the module can reach, also
    through its Trainer (:class:`ModuleState`), the global random states, and everything that
    ``self.log`` and ``self.logger`` write to in the user's code.  Inside, a sharded module has full
    parameters; for ``sync`` see :func:`unsharded`, for ``recordings`` :class:`Recordings`.
    ``losses`` are functions that are evaluated in the place of ``training_step``.
    """
    random_state = RandomState()
    try:
        with (
            without_parameter_hooks(pl_module) as hooked,
            unsharded(pl_module, sync) as parameters,
            _without_logging(trainer, pl_module) as silent,
        ):
            optimized = {
                id(parameter)
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
            own = pl_module.parameters()
            state = ModuleState(
                pl_module,
                trained={id(p) for p in own if id(parameters.shard_of(p)) in optimized},
                also={f"loss_fn {number}": loss for number, loss in enumerate(losses)},
                beside=reachable_through(trainer),
                recordings=recordings,
                silent=silent,
            )
            isolation = Isolation(pl_module, seed, parameters, hooked, state)
            try:
                yield isolation
            finally:
                isolation.restore()
    finally:
        random_state.restore()


@contextlib.contextmanager
def isolated_reading(pl_module: LightningModule, source: object) -> Iterator[None]:
    """Restore on exit what reading ``source`` changes: random states, its samplers, the module.

    The module's hooks for batches run inside.

    Raises:
        ValueError: reading would draw from an iterator that training reads.
    """
    random_state = RandomState()
    state = ModuleState(pl_module, beside={"probe": source})
    try:
        state.begin_evaluation()
        yield
    except NotYetError as error:
        raise ValueError(
            f"the given probe cannot be read without drawing what training reads: {error}; pass "
            f"probe=[...], a list of batches"
        ) from error
    finally:
        changed = state.restore()
        random_state.restore()
    if changed is not None:
        raise changed


@contextlib.contextmanager
def _without_logging(trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[int, Any]]:
    """Discard everything that the user's code logs; gives what stands in for the loggers, by id.

    Shadowing ``log`` is not enough: a loss object may hold a reference to ``module.log``.  So the
    results that ``log`` writes to are replaced by empty ones too.
    """
    connector = trainer._logger_connector
    connector_state = {name: getattr(connector, name) for name in _CONNECTOR_STATE}
    for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
        setattr(connector, name, dict(connector_state[name]))
    epoch_loop = trainer.fit_loop.epoch_loop
    loops: list[tuple[Any, Any]] = [
        (loop, loop._results) for loop in (epoch_loop, epoch_loop.val_loop)
    ]
    loggers = trainer.loggers
    fx_name = pl_module._current_fx_name
    try:
        for loop, results in loops:
            loop._results = type(results)(training=results.training)
            loop._results.batch, loop._results.batch_size = results.batch, results.batch_size
        silent = {id(logger): silent_logger(logger) for logger in loggers}
        trainer.loggers = list(silent.values())
        pl_module._current_fx_name = "training_step"
        yield silent
    finally:
        pl_module._current_fx_name = fx_name
        trainer.loggers = loggers
        for loop, results in loops:
            loop._results = results
        for name, value in connector_state.items():
            setattr(connector, name, value)
