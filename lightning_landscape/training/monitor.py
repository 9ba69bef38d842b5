"""The base of the measuring callbacks: Lightning's hooks."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_landscape.training.hooks import (
    BATCH_END,
    BATCH_START,
    EVERY_BATCH,
    disable_hooks,
    enable_hooks,
)
from lightning_landscape.training.isolation.sharding import refuse_tensor_parallel
from lightning_landscape.training.lightning_packages import Callback, misconfiguration
from lightning_landscape.training.quantity import Quantity
from lightning_landscape.training.session import Session

# By name: there are two Lightning packages, and Ray's strategies inherit from these.
_REFUSED = {"FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}


class Monitor(Quantity, Callback):
    """Base of the measuring callbacks, and of one of your own.

    A subclass defines what it logs and how it is measured (:meth:`measure`).  When, on which data,
    isolated, within which budget, and where the values go, is decided here and in ``Session``.
    Arguments: those that all callbacks share, see ``HessianMonitor``.

    Attributes:
        kind: the first part of its keys; a subclass must set it.
        tags: the scalars it may log, without that.
        moves_weights: it moves the weights, which drops the graph of second derivatives: it is
            measured after those that do not.  ``False`` where it does not.
        draws: pictures are its purpose: it is measured after the scalars, and at the end of the fit
            in any case.
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

    # While it fits.  The first of our callbacks in a Trainer has the session.
    _session: Session | None = None
    _trainer: Trainer | None = None

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
        enable_hooks(self)  # an exception may have ended another fit
        self._trainer = trainer
        leads = self._leads(trainer)
        self._session = Session(trainer, monitors, self._watch_batches) if leads else None
        used = {BATCH_START, BATCH_END} if leads else set()
        disable_hooks(self, [hook for hook in EVERY_BATCH if hook not in used], Monitor)

    def _check_place(self, trainer: Trainer) -> None:
        owner, other = type(self).__name__, self._trainer
        if self not in _monitors(trainer):
            raise misconfiguration(
                trainer,
                f"{owner}: it is not among the callbacks of this Trainer, which call one another; "
                f"pass it to Trainer(callbacks=[...]) instead of calling its hooks",
            )
        if other is not None and other is not trainer and other.state.status == "running":
            raise misconfiguration(
                trainer,
                f"{owner}: it is measuring in another Trainer that is still running; give each "
                f"Trainer a callback of its own",
            )

    def _watch_batches(self, wanted: bool) -> None:
        """Whether Lightning is to call the hook before each batch."""
        if wanted:
            enable_hooks(self, [BATCH_START])
        else:
            disable_hooks(self, [BATCH_START], Monitor)

    def _leads(self, trainer: Trainer) -> bool:
        return _monitors(trainer)[:1] == [self]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first hook that sees parameters made in ``configure_model``."""
        if self._leads(trainer):
            refuse_tensor_parallel(trainer, pl_module)
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
            enable_hooks(self)

    @property
    def state_key(self) -> str:
        """Distinguishes two callbacks of one class by their ``name``."""
        return self._generate_state_key(name=self.name)


def session_of(trainer: Trainer) -> Session:
    """What all of our callbacks in this Trainer measure in, from ``setup`` on."""
    session = _monitors(trainer)[0]._session
    assert session is not None
    return session


def _monitors(trainer: Trainer) -> list[Monitor]:
    return [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
