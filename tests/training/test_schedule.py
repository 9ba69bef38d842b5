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
    assert next(step for step in range(8, 40) if plan.due(step, 0, False)) == 17
    epochs = Schedule(None, 3)
    epochs.last_step = 1
    due = [(epoch, ends) for epoch in range(7) for ends in (False, True)]
    assert [e for e, ends in due if epochs.due(5, e, ends)] == [2, 5]


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


def test_nobody_knows_how_long_it_will_be(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(batches_ahead(trainer))
            trainer.should_stop = True

    train(Linear, regression, [Look()], tmp_path, max_epochs=-1, max_steps=-1)
    assert seen == [float("inf")]
