"""When a measurement is due, and how many batches are still to come."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from lightning_landscape.training.schedule import Schedule, batches_ahead
from tests.runs import train
from tests.small import Linear, regression


def test_schedule():
    plan = Schedule(10, None)
    assert plan.due(7, 0, False)  # the first time at once
    plan.last_step = 7
    assert next(step for step in range(8, 40) if plan.due(step, 0, False)) == 10
    epochs = Schedule(None, 3)
    epochs.last_step = 1
    due = [(epoch, ends) for epoch in range(7) for ends in (False, True)]
    assert [e for e, ends in due if epochs.due(5, e, ends)] == [2, 5]


@pytest.mark.parametrize(
    ("steps", "count", "every"),
    [
        (237, 50, 5),
        (250, 50, 5),
        (251, 50, 6),
        (20, 50, 1),
        (1500, 5, 300),
        (float("inf"), 50, 100),
    ],
)
def test_auto(steps, count, every):
    plan = Schedule("auto", None)
    plan.set_length(steps, count, at_end=False)
    assert plan.n == every
    given = Schedule(7, None)
    given.set_length(steps, count, at_end=False)
    assert given.n == 7


def test_auto_with_epochs():
    plan = Schedule("auto", 2)
    plan.set_length(100, 50, at_end=False)
    assert plan.n is None
    plan.last_step = 1
    assert [e for e in range(6) if plan.due(9 + e, e, True)] == [1, 3, 5]


def test_not_before_selects_a_later_multiple():
    plan = Schedule(10, None)
    plan.set_length(237, 50, at_end=False)
    plan.last_step, plan.not_before = 8, 100.5
    assert plan.next_step == 110
    assert not plan.due(100, 0, False)
    plan.not_before = 237
    assert plan.next_step == 230
    plan.last_step = 230
    assert plan.next_step == 240
    at_end = Schedule(10, None)  # made when training has ended
    at_end.set_length(237, 5, at_end=True)
    at_end.last_step, at_end.not_before = 8, 237
    assert at_end.next_step == 240


def test_not_before_with_epochs():
    plan = Schedule(None, 2)
    plan.last_step, plan.not_before = 1, 20
    assert [plan.due(step, 1, True) for step in (19, 20)] == [False, True]


def test_skipped_multiples_are_counted():
    plan = Schedule(10, None)
    assert [plan.advance(step) for step in (7, 10, 20, 50, 55, 60)] == [0, 0, 0, 2, 0, 0]


class TwoOptimizers(Linear):
    """Steps each of two optimizers at every batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=self.lr) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "settings", "ahead"),
    [
        (Linear, {"max_epochs": 4}, 11),  # of 12
        (Linear, {"max_epochs": 4, "max_steps": 5}, 4),
        (Linear, {"max_epochs": 4, "max_steps": 100}, 11),
        (Linear, {"max_epochs": -1, "max_steps": 5}, 4),
        (Linear, {"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, 10),
        (TwoOptimizers, {"max_epochs": -1, "max_steps": 10}, 4),
    ],
)
def test_batches_ahead(tmp_path, kind, settings, ahead):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(batches_ahead(trainer))

    train(kind, regression, [Look()], tmp_path, **settings)
    assert seen[0] == ahead
    assert seen[-1] <= 1


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": -1, "max_steps": -1}, {"max_epochs": None}, {"max_time": "00:00:10:00"}],
)
def test_unknown_number_of_batches(tmp_path, settings):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(batches_ahead(trainer))
            trainer.should_stop = True

    train(Linear, regression, [Look()], tmp_path, **settings)
    assert seen == [float("inf")]


def test_second_fit_ignores_steps_of_the_first():
    plan = Schedule(10, None)
    plan.last_step, plan.not_before = 20, 400.0
    plan.set_length(60, 50, at_end=False)
    assert plan.next_step == 30
