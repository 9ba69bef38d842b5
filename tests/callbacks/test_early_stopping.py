"""Early stopping: patience in measurements, the decision, and the stated reason."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, SharpnessMonitor
from tests.runs import train
from tests.small import Quartic, ones


def fake_trainer(can_stop: bool = True, fast_dev_run: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        should_stop=False,
        fast_dev_run=fast_dev_run,
        fit_loop=SimpleNamespace(_can_stop_early=can_stop),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )


def feed(stopper, values, trainer=None, every=10):
    """Pass values to the stopper; return the step at which it stops the run, or None."""
    trainer = trainer or fake_trainer()
    for index, value in enumerate(values):
        stopper.on_record(trainer, {"step": every * (index + 1), stopper.monitor: value})
        if trainer.should_stop:
            return every * (index + 1)
    return None


@pytest.mark.parametrize(
    ("values", "settings", "stops"),
    [
        ([1, 3, 3, 3, 3], {}, 40),
        ([3, 3, 1, 3, 3, 3], {}, 60),  # in a row
        ([3, 3, 1, 3, 3, 1], {}, None),
        ([3, 1], {"patience": 1}, 10),
        ([2, 2, 2, 2], {}, None),  # at the threshold is not above it
        ([3, 3, 3, 3, 3], {"min_steps": 30}, 50),  # earlier ones are not counted
        ([3, 1, 1, 1], {"stop_when": "below", "min_steps": 30, "patience": 2}, 40),
        ([1, math.nan, 1], {}, 20),  # at once
        ([1, 1, math.inf], {}, 30),
        ([1, -math.inf], {"stop_when": "below", "min_steps": 100}, 20),
    ],
)
def test_patience(values, settings, stops):
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 2.0, **settings)
    assert feed(stopper, values) == stops
    assert stopper.stopped_step == stops
    assert bool(stopper.stopping_reason) == (stops is not None)


def test_reason_is_logged():
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 2.0, patience=2)
    feed(stopper, [3.0, 4.0])
    assert stopper.stopping_reason == (
        "hessian/edge_ratio = 4 at step 20, above 2 for 2 measurements in a row"
    )


def test_warn_does_not_stop_and_warns_once_per_crossing():
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 2.0, patience=1, action="warn")
    with pytest.warns(match="above 2 for 1 measurement in a row") as caught:
        assert feed(stopper, [3, 3, 3, 1, 3, 3]) is None
    assert len(caught) == 2


def test_minimum_of_the_trainer_is_respected():
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 2.0, patience=1)
    trainer = fake_trainer(can_stop=False)
    assert feed(stopper, [3, 3], trainer) is None
    assert stopper.stopped_step is None
    trainer.fit_loop._can_stop_early = True
    stopper.on_train_epoch_end(trainer, None)
    assert trainer.should_stop
    assert stopper.stopped_step == 20


def test_value_below_the_threshold_cancels_a_pending_stop():
    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 2.0, patience=1)
    trainer = fake_trainer(can_stop=False)
    feed(stopper, [3, 1], trainer)
    trainer.fit_loop._can_stop_early = True
    stopper.on_train_epoch_end(trainer, None)
    assert not trainer.should_stop


# -- with a real Trainer ----------------------------------------------------------------------


class Rising(Quartic):
    """L = -w^4/4: the weight runs away and the gradient's norm |w|^3 rises for ever."""

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def monitor(**settings):
    return SharpnessMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=4, **settings)


KEY = "sharpness/gradient_norm"


@pytest.mark.parametrize("order", ["stopper first", "monitor first"])
def test_order_of_callbacks_does_not_matter(tmp_path, order):
    stopper = SharpnessEarlyStopping(KEY, 5.0, patience=2)
    measuring = monitor()
    callbacks = [stopper, measuring] if order == "stopper first" else [measuring, stopper]
    run = train(lambda: Rising(0.05), ones, callbacks, tmp_path, max_epochs=20)
    beyond = [row["step"] for row in measuring.history if row[KEY] > 5.0]
    assert stopper.stopped_step == beyond[1] == run.trainer.global_step
    assert measuring.history[-1]["step"] == stopper.stopped_step  # not a step later


def test_stale_value_does_not_count_for_patience(tmp_path):
    """Measured after steps 1, 3 and 6, logged at every step by others: three measurements."""
    stopper = SharpnessEarlyStopping(KEY, 0.0, patience=3)
    run = train(lambda: Rising(0.001), ones, [stopper, monitor()], tmp_path, max_epochs=20)
    assert run.trainer.global_step == stopper.stopped_step == 6


@pytest.mark.parametrize(("settings", "least"), [({"min_epochs": 3}, 30), ({"min_steps": 25}, 25)])
def test_min_epochs_and_min_steps_of_the_trainer(tmp_path, settings, least):
    stopper = SharpnessEarlyStopping(KEY, 0.0, patience=1)
    run = train(
        lambda: Rising(0.001), ones, [monitor(), stopper], tmp_path, max_epochs=20, **settings
    )
    assert least <= run.trainer.global_step <= least + 3
    assert run.trainer.should_stop


def test_pending_stop_does_not_change_what_lightning_logs(tmp_path):
    settings = {"min_epochs": 3, "max_epochs": 3, "log_every_n_steps": 7}
    plain = train(lambda: Rising(0.001), ones, [], tmp_path, **settings)
    stopper = SharpnessEarlyStopping(KEY, 0.0, patience=1)
    run = train(lambda: Rising(0.001), ones, [monitor(), stopper], tmp_path, **settings)
    assert run.logger.values("train_loss") == plain.logger.values("train_loss")


def test_fast_dev_run_is_not_stopped(tmp_path):
    stopper = SharpnessEarlyStopping(KEY, 0.0, patience=1)
    run = train(lambda: Rising(0.001), ones, [monitor(), stopper], tmp_path, fast_dev_run=4)
    assert run.trainer.global_step == 4
    assert not run.trainer.should_stop


def test_divergence_to_nan_stops(tmp_path):
    stopper = SharpnessEarlyStopping(KEY, 1e30, patience=100)
    run = train(lambda: Quartic(lr=10.0), ones, [monitor(), stopper], tmp_path, max_epochs=20)
    assert run.trainer.global_step < 40
    assert "is nan" in stopper.stopping_reason or "is inf" in stopper.stopping_reason


def test_unknown_key(tmp_path):
    stopper = SharpnessEarlyStopping("hessian/edge_ration", 1.0)
    with pytest.raises(
        Exception, match=r"no callback of this Trainer logs that; available.*'hessi"
    ):
        train(Quartic, ones, [HessianMonitor(), stopper], tmp_path)
    with pytest.raises(Exception, match="add a HessianMonitor"):
        train(Quartic, ones, [stopper], tmp_path)


def test_key_that_is_not_measured_warns_once(tmp_path):
    class Adagrad(Quartic):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters())

    stopper = SharpnessEarlyStopping("hessian/edge_ratio", 0.0, patience=1)
    callbacks = [HessianMonitor(max_overhead=None, every_n_train_steps=2), stopper]
    with pytest.warns(match="a measurement has no 'hessian/edge_ratio'") as caught:
        train(Adagrad, ones, callbacks, tmp_path)
    assert len([w for w in caught if "a measurement has no" in str(w.message)]) == 1


def test_patience_continues_after_a_resume(tmp_path):
    stopper = SharpnessEarlyStopping(KEY, 2.0)
    feed(stopper, [3, 3])
    later = SharpnessEarlyStopping(KEY, 2.0)
    later.load_state_dict(stopper.state_dict())
    assert feed(later, [3]) == 10
    assert all(type(v) in (int, str, type(None)) for v in stopper.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": ""}, ValueError, r"monitor=''.: expected a key such as"),
        ({"monitor": 3}, ValueError, r"monitor=3"),
        ({"threshold": "high"}, TypeError, r"threshold='high'.: expected a finite number"),
        ({"threshold": math.nan}, ValueError, r"threshold=nan.: expected a finite number"),
        ({"threshold": True}, TypeError, r"threshold=True"),
        ({"stop_when": "over"}, ValueError, r"stop_when='over'.: expected 'above' or 'below'"),
        ({"action": "halt"}, ValueError, r"action='halt'.: expected 'stop' or 'warn'"),
        ({"patience": 0}, ValueError, r"patience=0.: expected an integer >= 1"),
        ({"patience": 1.5}, ValueError, r"patience=1.5"),
        ({"min_steps": -1}, ValueError, r"min_steps=-1.: expected an integer >= 0"),
        ({"stop_when": "below"}, ValueError, r"stop_when='below', min_steps=0.*min_steps=1000"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SharpnessEarlyStopping(**{"monitor": "hessian/edge_ratio", "threshold": 1.0, **arguments})


def test_two_stoppers_on_one_key(tmp_path):
    """A warning and a stop may watch the same key."""
    callbacks = [
        monitor(),
        SharpnessEarlyStopping(KEY, 1.0, action="warn", patience=1),
        SharpnessEarlyStopping(KEY, 5.0, patience=1),
    ]
    with pytest.warns(match="above 1"):
        train(lambda: Rising(0.05), ones, callbacks, tmp_path, max_epochs=20)
    assert callbacks[1].stopped_step < callbacks[2].stopped_step
