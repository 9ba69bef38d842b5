"""Evaluate a module's loss in the middle of its training and leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_landscape.training.isolation.module_state import ModuleState
from lightning_landscape.training.isolation.parameter_hooks import without_parameter_hooks
from lightning_landscape.training.isolation.random_state import RandomState, seed_everything
from lightning_landscape.training.isolation.sharding import Whole, unsharded

# Where Lightning's logger connector keeps what `self.log` wrote.
_CONNECTOR_STATE = (
    "_current_fx",
    "_first_loop_iter",
    "_callback_metrics",
    "_logged_metrics",
    "_progress_bar_metrics",
)


class Isolation:
    """What :func:`isolated` hands out: a place to evaluate losses in."""

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        seed: int,
        whole: Whole,
        hooked: Sequence[str] = (),
    ) -> None:
        self.whole = whole
        self.hooked = hooked  # parameters whose hooks are not called meanwhile
        self._module = pl_module
        self._seed = seed
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        trained = {id(p) for p in pl_module.parameters() if id(whole.trained(p)) in held}
        self._state = ModuleState(pl_module, trained)

    @contextlib.contextmanager
    def evaluation(self, index: int = 0, *, mode: str = "train") -> Iterator[None]:
        """Around one evaluation of the loss on the probe's batch ``index``.

        Every evaluation of that batch sees the same random numbers and the same module state.
        """
        seed_everything(self._seed + index)
        self._state.set_mode(None if mode == "train" else False)
        self._state.begin_evaluation()
        try:
            for module in self._module.modules():
                if hasattr(module, "log_dict") and hasattr(module, "_current_fx_name"):
                    # Also keeps `sync_dist=True` from communicating.  Undone with the attributes.
                    module.__dict__.update(log=_log_nothing, log_dict=_log_nothing)
            with self.whole.precision():
                yield
        finally:
            self._state.end_evaluation()

    def leave_training(self) -> None:
        """Go to eval mode in the middle of an evaluation."""
        self._state.set_mode(False)

    def restore(self) -> None:
        """Put the module back as it was."""
        self._state.restore()


@contextlib.contextmanager
def isolated(
    trainer: Trainer,
    pl_module: LightningModule,
    seed: int = 0,
    agree: Callable[[], None] = lambda: None,
) -> Iterator[Isolation]:
    """Everything that measuring may change is what it was when this ends, also by an exception.

    That is: weights, buffers, gradients, flags and attributes of the module
    (:class:`ModuleState`), the global random states, and whatever ``self.log`` and ``self.logger``
    in the user's code write to.  Optimizers, schedulers and scalers are never touched.  A module
    in shards is whole meanwhile (:func:`unsharded`, which ``agree`` is for).
    """
    random_state = RandomState()
    try:
        with (
            without_parameter_hooks(pl_module) as hooked,
            unsharded(pl_module, agree) as whole,
            _silenced(trainer, pl_module),
        ):
            isolation = Isolation(trainer, pl_module, seed, whole, hooked)
            try:
                yield isolation
            finally:
                isolation.restore()
    finally:
        random_state.restore()


@contextlib.contextmanager
def _silenced(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Send what the user's code logs nowhere.

    Shadowing ``log`` is not enough: a loss object may hold ``module.log`` itself.  So the results
    that ``log`` writes to are exchanged for empty ones as well.
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
        trainer.loggers = [DummyLogger()] if loggers else []
        pl_module._current_fx_name = "training_step"
        yield
    finally:
        pl_module._current_fx_name = fx_name
        trainer.loggers = loggers
        for loop, results in loops:
            loop._results = results
        for name, value in connector_state.items():
            setattr(connector, name, value)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""
