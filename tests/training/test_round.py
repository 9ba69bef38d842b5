"""The Round interface of callbacks that evaluate the module themselves."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lightning_landscape import HessianMonitor, InterpolationMonitor, Measured, Monitor
from lightning_landscape.training.data import batch as batches
from tests.oracles import arguments
from tests.runs import differences, train
from tests.small import Linear, regression


class Noisy(Linear):
    """Dropout, BatchNorm and a counter."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        return self.loss(self.layer(self.drop(self.norm(x))), y)


class Plain(Noisy):
    """Its batches are evaluated as one."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.Identity(), nn.Identity()


class ByHand(Monitor):
    """The mean loss computed with the module, and that of the objective."""

    kind = "by_hand"

    def measure(self, this_round):
        objective, module = this_round.objective(self), this_round.pl_module
        held = this_round.batches(self)
        losses = []
        for batch in held:
            with this_round.evaluation(self, batch) as copy, torch.no_grad():
                losses.append(float(module.training_step(copy, 0)) * batch.size)
                copy[0].zero_()  # only a copy
        mean = sum(losses) / sum(batch.size for batch in held)
        return Measured(facts={"means": [mean, float(objective.loss())], "batches": len(held)})


@pytest.mark.parametrize(("kind", "count"), [(Noisy, 3), (Plain, 1)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_evaluation_equals_the_objective(kind, count, mode, tmp_path):
    plain = train(kind, regression, [], tmp_path / "plain", max_epochs=3)
    monitor = ByHand(every_n_train_steps=1, max_overhead=None, probe_mode=mode)
    with_us = train(kind, regression, [monitor], tmp_path, max_epochs=3)
    assert differences(plain.state, with_us.state) == []
    assert monitor.measured == 7
    for row in monitor.history:
        by_hand, expected = row["means"]
        assert by_hand == pytest.approx(expected, rel=1e-6)
    counts = {row["batches"] for row in monitor.history}
    assert counts == ({1} if mode == "eval" else {count})


def test_callbacks_of_one_loss_share_it(tmp_path, monkeypatch):
    """Whether batches can be evaluated as one is determined once, not per callback."""
    count = [0]
    concat = batches._concat

    def counted(*args):
        count[0] += 1
        return concat(*args)

    def of(*kinds):
        count[0] = 0
        made = [kind(every_n_train_steps=10**6, max_overhead=None) for kind in kinds]
        evaluations = Mock()  # isolation restores all other state

        class Counting(Plain):
            def training_step(self, batch, batch_idx):
                if self.log.__name__ != "log":
                    evaluations(len(batch[0]))
                return super().training_step(batch, batch_idx)

        train(Counting, regression, made, tmp_path, max_epochs=1)
        assert [m.failed for m in made] == [0] * len(made)
        return arguments(evaluations)

    monkeypatch.setattr(batches, "_concat", counted)
    both = of(HessianMonitor, InterpolationMonitor)
    alone = [of(HessianMonitor), of(InterpolationMonitor)]
    # The batches one by one, which only the first of both has to look at; twice, for the noise.
    small = [sum(size < 60 for size in sizes) for sizes in (both, *alone)]
    assert small[0] == small[1] == small[2] > 0
