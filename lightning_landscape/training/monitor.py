"""The base class of the measuring callbacks: Lightning's hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.training.clipping import is_scaled
from lightning_landscape.training.hooks import (
    BATCH_END,
    BATCH_START,
    EVERY_BATCH,
    disable_hooks,
    enable_hooks,
)
from lightning_landscape.training.isolation.sharding import refuse_tensor_parallel
from lightning_landscape.training.lightning_packages import Callback, StateKey, misconfiguration
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.readers import refuse_step_schedulers
from lightning_landscape.training.run_token import run_token
from lightning_landscape.training.session import Session

# Names, because there are two Lightning packages; subclasses, e.g. those of Ray, are included.
_UNSUPPORTED = {"FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}


class Monitor(Quantity, Callback):
    """Base class of the measuring callbacks, including your own.

    A subclass defines what it logs and how it measures that (:meth:`measure`).  The schedule, the
    data, the isolation, the budget and the output are handled here and in ``Session``.  Arguments:
    those that all callbacks share, see ``HessianMonitor``.

    Attributes:
        kind: the first part of its keys; a subclass must set it.
        tags: the scalars it may log, without the prefix.
        moves_weights: whether ``measure`` moves the weights.  That drops the graph of second
            derivatives, so callbacks that do not move them measure first.
        draws: whether pictures are its purpose.  It then measures after the callbacks that log
            scalars, and at the end of the fit if the budget allows it.
        pictures: number of pictures per measurement, for the budget.  Without ``draws`` they are
            drawn when the budget allows, and the last one always.
        needs_batch: whether it uses :meth:`Round.batch_objective`.
        needs_update: whether it uses :meth:`Round.last_update`.

    Example::

        class GradientNorm(Monitor):
            kind, tags, forwards = "gradient", ("norm",), 3

            def measure(self, this_round):
                gradient = this_round.objective(self).gradient()
                squared = sum(float(g.square().sum()) for g in gradient.values())
                return Measured({self.key("norm"): squared**0.5})
    """

    # During a fit.  Only the first of our callbacks in a Trainer has a session.
    _session: Session | None = None
    _trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the Trainer; the first of our callbacks opens the session."""
        if stage != "fit":
            return
        self._check_fit(trainer, pl_module)
        enable_hooks(self)  # an exception may have ended another fit
        monitors = _monitors(trainer)
        for monitor in monitors:  # before the first one opens the session
            monitor._continue_or_start_anew(trainer, pl_module)
        self._trainer = trainer
        leads = self._leads(trainer)
        self._session = Session(trainer, monitors, self._watch) if leads else None
        used = {BATCH_START, BATCH_END} if leads else set()
        disable_hooks(self, [hook for hook in EVERY_BATCH if hook not in used], Monitor)

    def _check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise unless it can measure this module in this Trainer."""
        self._check_trainer(trainer)
        monitors = _monitors(trainer)
        same_prefix = [m for m in monitors if m.prefix == self.prefix]
        if len(same_prefix) > 1:
            raise misconfiguration(
                trainer,
                f"{len(same_prefix)} callbacks would log under {self.prefix!r}: pass a different "
                f"name=... to all but one of them",
            )
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise misconfiguration(
                trainer,
                f"{type(self).__name__}: {type(pl_module).__name__} uses manual optimisation, so "
                f"its training_step cannot be called to measure a loss (it would step the "
                f"optimizer). Pass {type(self).__name__}(loss_fn=lambda pl_module, batch: ...)",
            )
        unsupported = _UNSUPPORTED.intersection(
            kind.__name__ for kind in type(trainer.strategy).__mro__
        )
        if unsupported:
            raise misconfiguration(
                trainer,
                f"{type(self).__name__} cannot measure under {type(trainer.strategy).__name__}, "
                f"whose parameters do not support second derivatives. Use DDPStrategy, or "
                f"ModelParallelStrategy with fully_shard (FSDP2) if the training state does not "
                f"fit on one device",
            )

    def _continue_or_start_anew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a second Trainer or with another module start anew.

        Where a checkpoint is resumed, its state is loaded after this, and the history continues.
        """
        token, last = run_token(trainer, pl_module), self._bookkeeping.run
        if last not in (None, token):
            self.start_anew()
        bookkeeping, present = self._bookkeeping, trainer.callbacks  # type: ignore[attr-defined]
        bookkeeping.run = token
        bookkeeping.listeners = [one for one in bookkeeping.listeners if one in present]

    def _check_trainer(self, trainer: Trainer) -> None:
        owner, other = type(self).__name__, self._trainer
        if self not in _monitors(trainer):
            raise misconfiguration(
                trainer,
                f"{owner}: it is not among the callbacks of this Trainer; pass it to "
                f"Trainer(callbacks=[...]) instead of calling its hooks",
            )
        if other is not None and other is not trainer and other.state.status == "running":
            raise misconfiguration(
                trainer,
                f"{owner}: it is measuring in another Trainer that is still running; pass each "
                f"Trainer a callback of its own",
            )

    def _watch(self, hooks: Sequence[str], enabled: bool) -> None:
        """Enable or disable calls of these hooks."""
        if enabled:
            enable_hooks(self, hooks)
        else:
            disable_hooks(self, hooks, Monitor)

    def _leads(self, trainer: Trainer) -> bool:
        return _monitors(trainer)[:1] == [self]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters: this is the first hook after ``configure_model``."""
        if self._leads(trainer):
            refuse_tensor_parallel(trainer, pl_module)
            refuse_step_schedulers(trainer, _monitors(trainer))
        self.check_parameters([name for name, _ in pl_module.named_parameters()])

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

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if session := self._session:
            with session.measuring_time():
                session.run.clipped_steps.after_backward(trainer.optimizers, is_scaled(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if session := self._session:
            automatic = pl_module.automatic_optimization
            with session.measuring_time():
                session.run.clipped_steps.before_step(optimizer, automatic, is_scaled(trainer))

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
        """Print the closing line and release the session: no ``teardown`` follows."""
        if self._session is not None and self._trainer is trainer:
            self._session.on_exception(trainer)
        self._release_session(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the session, so that the callback can be pickled and refers to no run."""
        if stage == "fit":
            self._release_session(trainer)

    def _release_session(self, trainer: Trainer) -> None:
        if self._trainer in (None, trainer):  # not that of another running Trainer
            self._session = self._trainer = None
            enable_hooks(self)

    @StateKey
    def state_key(self) -> str:
        """Distinguishes callbacks of one class by their ``name``."""
        return self._generate_state_key(name=self.name) + self._origin


def session_of(trainer: Trainer) -> Session:
    """The session of all our callbacks in this Trainer; available after ``setup``."""
    session = _monitors(trainer)[0]._session
    assert session is not None
    return session


def _monitors(trainer: Trainer) -> list[Monitor]:
    """Those that were passed to the Trainer; if there are none, those of the environment."""
    found = [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
    return [monitor for monitor in found if not monitor._origin] or found
