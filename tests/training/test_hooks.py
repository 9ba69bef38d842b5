"""Lightning does not call hooks that would do nothing, and calls all others."""

from __future__ import annotations

from collections import Counter

import pytest
import pytorch_lightning as pl
from pytorch_lightning.profilers import Profiler

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, SharpnessMonitor
from lightning_landscape.training.hooks import EVERY_BATCH
from tests.runs import train
from tests.small import Linear, regression


class Recording(Profiler):
    """Counts the hooks that Lightning calls."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def start(self, action_name):
        self.counts[action_name] += 1

    def stop(self, action_name):
        pass


def of_every_batch(profiler, callback):
    calls = {}
    for name, count in profiler.counts.items():
        if name.startswith(f"[Callback]{type(callback).__name__}"):
            calls[name.rpartition(".")[2]] = count
    return {hook: calls[hook] for hook in EVERY_BATCH if hook in calls}


def test_only_the_first_callback_is_called_per_batch(tmp_path):
    profiler = Recording()
    callbacks = [
        HessianMonitor(every_n_train_steps=10**6),
        SharpnessMonitor(every_n_train_steps=10**6),
        SharpnessEarlyStopping("sharpness/sam", 1e9),
        pl.callbacks.Timer(),
    ]
    train(Linear, regression, callbacks, tmp_path, max_epochs=10, profiler=profiler)
    # The probe is complete after the first epoch of 3 steps.
    assert of_every_batch(profiler, callbacks[0]) == {
        "on_train_batch_start": 3,
        "on_train_batch_end": 30,
        # One step in twenty, to see whether it was clipped.
        "on_after_backward": 2,
        "on_before_optimizer_step": 2,
    }
    assert of_every_batch(profiler, callbacks[1]) == {}
    assert of_every_batch(profiler, callbacks[2]) == {}
    assert of_every_batch(profiler, callbacks[3])["on_before_zero_grad"] == 30  # not ours
    assert [callbacks[0].measured, callbacks[1].measured] == [1, 1]


def test_start_of_a_batch_is_called_if_weights_are_copied(tmp_path):
    profiler = Recording()
    monitor = HessianMonitor(every_n_train_steps=10, update_curvature=True)
    train(Linear, regression, [monitor], tmp_path, max_epochs=10, profiler=profiler)
    assert of_every_batch(profiler, monitor)["on_train_batch_start"] == 30


def test_hooks_of_a_subclass_are_called(tmp_path):
    seen = Counter()

    class Own(SharpnessMonitor):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["start"] += 1
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_before_zero_grad(self, *args):
            seen["zero"] += 1

    slow = {"every_n_train_steps": 10**6}
    for callbacks in ([Own(**slow)], [HessianMonitor(**slow), Own(**slow)]):
        seen.clear()
        train(Linear, regression, callbacks, tmp_path, max_epochs=4)
        assert seen == {"start": 12, "zero": 12}


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_restored_after_the_fit(tmp_path, fails):
    class Failing(Linear):
        def training_step(self, batch, batch_idx):
            if fails and self.global_step == 4:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    callbacks = [HessianMonitor(), SharpnessMonitor()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            train(Failing, regression, callbacks, tmp_path)
    else:
        train(Failing, regression, callbacks, tmp_path)
    for callback in callbacks:
        assert all(callable(getattr(callback, hook)) for hook in EVERY_BATCH)
