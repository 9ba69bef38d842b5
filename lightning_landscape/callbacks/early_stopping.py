"""Stop, or warn, when a measured quantity crosses a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_landscape.geometry.checks import check_choice, check_count, check_number
from lightning_landscape.training.bookkeeping import usable_state
from lightning_landscape.training.hooks import EVERY_BATCH, disable_hooks, enable_hooks
from lightning_landscape.training.lightning_packages import Callback, StateKey, misconfiguration
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.run_token import run_token


class SharpnessEarlyStopping(Callback):
    """Stop training when a quantity measured by another callback crosses a threshold.

    It decides during the measurement, once for each new value, so its position in the list of
    callbacks does not matter.  A value that is NaN or infinite stops training at once.

    Args:
        monitor: a key that a monitor in the same Trainer logs, e.g. ``"hessian/edge_ratio"``.
        threshold: the value to compare with, in units of that key.
        stop_when: ``"above"``: too sharp.  ``"below"``: flat enough; requires ``min_steps``,
            because many runs begin flat.
        patience: number of measurements (not steps) in a row that must be beyond the threshold.
        min_steps: measurements before this step are not counted.
        action: ``"stop"`` the run, or only ``"warn"``, once per crossing.

    Attributes:
        stopped_step: the step of the measurement that stopped the run (or of the last warning),
            else ``None``.
        stopping_reason: why, in one sentence, else ``""``.
        wait_count: measurements in a row beyond the threshold so far.

    The Trainer's ``min_epochs`` and ``min_steps`` take precedence: training does not stop before
    they are reached, and then the latest measurement decides.  ``fast_dev_run`` is never stopped.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: no callback in the Trainer logs ``monitor``.

    Example::

        stopper = SharpnessEarlyStopping("hessian/edge_ratio", threshold=1.5)
        trainer = Trainer(callbacks=[HessianMonitor(), stopper])
    """

    def __init__(
        self,
        monitor: str,
        threshold: float,
        stop_when: Literal["above", "below"] = "above",
        patience: int = 3,
        min_steps: int = 0,
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        super().__init__()
        owner = "SharpnessEarlyStopping"
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(
                f"{owner}(monitor={monitor!r}): expected a key such as 'hessian/top_eigenvalue'"
            )
        expected = "a finite number, in units of the monitored key"
        check_number(owner, "threshold", threshold, expected, math.isfinite)
        check_choice(owner, "stop_when", stop_when, ("above", "below"))
        check_choice(owner, "action", action, ("stop", "warn"))
        patience = check_count(owner, "patience", patience)
        min_steps = check_count(owner, "min_steps", min_steps, least=0)
        if stop_when == "below" and min_steps == 0:
            raise ValueError(
                f"{owner}(stop_when='below', min_steps=0): many runs begin flat; pass the step "
                f"from which a small value means something, e.g. min_steps=1000"
            )
        self.monitor = monitor
        self.threshold = float(threshold)
        self.stop_when: Literal["above", "below"] = stop_when
        self.patience = patience
        self.min_steps = min_steps
        self.action: Literal["stop", "warn"] = action
        self.wait_count = 0
        self.stopped_step: int | None = None
        self.stopping_reason = ""
        self._pending: tuple[int, str] | None = None  # decided before the Trainer's minimum
        self._warned = False  # of the present crossing
        self._warned_of_missing = False
        self._run: str | None = None  # token of the run that it watches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that logs the key."""
        if stage != "fit":
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
        source = next((m for m in monitors if m.owns(self.monitor)), None)
        if source is None:
            available = sorted(key for m in monitors for key in m.keys)
            raise misconfiguration(
                trainer,
                f"SharpnessEarlyStopping(monitor={self.monitor!r}): no callback of this Trainer "
                f"logs that; "
                + (
                    f"available: {available}; pass one of these"
                    if available
                    else "add a HessianMonitor, for example"
                ),
            )
        token = run_token(trainer, pl_module)
        if self._run not in (None, token):  # a second Trainer; a checkpoint is loaded after this
            self.wait_count, self.stopped_step, self.stopping_reason = 0, None, ""
            self._pending, self._warned = None, False
        self._run = token
        listeners = source._bookkeeping.listeners
        if self not in listeners:
            listeners.append(self)
        enable_hooks(self)  # an exception may have ended another fit
        disable_hooks(self, EVERY_BATCH, Callback)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enable the hooks again."""
        if stage == "fit":
            enable_hooks(self)

    def on_record(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        """Count a new measurement and act; called on every process."""
        if self.monitor not in row:
            if not self._warned_of_missing:
                self._warned_of_missing = True
                rank_zero_warn(
                    f"SharpnessEarlyStopping: a measurement has no {self.monitor!r} and is not "
                    f"counted; pass a key that every measurement has"
                )
            return
        step, value = int(row["step"]), float(row[self.monitor])
        reason = self._count(step, value)
        # Values are the same on all processes; if one differs, all follow a process that acts.
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            self._act(trainer, step, reason or f"{self.monitor} crossed on another process")
        else:
            self._pending, self._warned = None, False

    def _count(self, step: int, value: float) -> str | None:
        """Count one value; returns the reason to act, or None."""
        if not math.isfinite(value):
            return f"{self.monitor} is {value} at step {step}"
        beyond = value > self.threshold if self.stop_when == "above" else value < self.threshold
        if not beyond or step < self.min_steps:
            self.wait_count = 0
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        return (
            f"{self.monitor} = {value:.4g} at step {step}, {self.stop_when} {self.threshold:g} for "
            f"{self.wait_count} measurement{'s' if self.wait_count > 1 else ''} in a row"
        )

    def _act(self, trainer: Trainer, step: int, reason: str) -> None:
        if self.action == "warn":
            if not self._warned:
                self._warned = True
                self.stopped_step, self.stopping_reason = step, reason
                rank_zero_warn(f"SharpnessEarlyStopping: {reason}")
            return
        self._pending = (step, reason)
        self._stop_if_allowed(trainer)

    def _stop_if_allowed(self, trainer: Trainer) -> None:
        """Stop, unless the Trainer must continue: Lightning would not forget an early request."""
        if self._pending is None or getattr(trainer, "fast_dev_run", False):
            return
        if not trainer.fit_loop._can_stop_early:
            return
        self.stopped_step, self.stopping_reason = self._pending
        self._pending = None
        trainer.should_stop = True
        rank_zero_info(f"SharpnessEarlyStopping: training stops, {self.stopping_reason}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the Trainer's minimum has been reached now."""
        self._stop_if_allowed(trainer)

    @property
    def least_values(self) -> int:
        """Values without which it cannot stop."""
        return self.patience

    @StateKey
    def state_key(self) -> str:
        """Distinguishes several of these by their monitor and threshold."""
        key: str = self._generate_state_key(
            monitor=self.monitor, threshold=self.threshold, stop_when=self.stop_when
        )
        return key + self._origin

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain values."""
        return {
            "wait_count": self.wait_count,
            "stopped_step": self.stopped_step,
            "stopping_reason": self.stopping_reason,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        expected = {
            "wait_count": (int,),
            "stopped_step": (int, type(None)),
            "stopping_reason": (str,),
        }
        if not usable_state("SharpnessEarlyStopping", state_dict, expected):
            return
        self.wait_count = state_dict["wait_count"]
        self.stopped_step = state_dict.get("stopped_step")
        self.stopping_reason = state_dict["stopping_reason"]
