"""Which parameters the loss is a function of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_landscape import HessianMonitor
from tests.runs import train
from tests.small import Linear, regression


def test_parameter_patterns(tmp_path):
    class Two(Linear):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(5, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss(self.layer(x), y) + 100 * self.other(x).square().mean()

    data = regression()
    x = data.dataset.tensors[0].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())[-1]
    monitor = HessianMonitor(
        every_n_train_steps=5, max_overhead=None, parameters="layer.*", tol=1e-4
    )
    train(Two, data, [monitor], tmp_path)
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(exact, rel=1e-5)
    wrong = HessianMonitor(every_n_train_steps=5, max_overhead=None, parameters=["layers.*"])
    with pytest.raises(ValueError, match=r"parameters=\['layers.\*'\]\): no parameter matches"):
        train(Two, data, [wrong], tmp_path)

    class Frozen(Two):
        """Frozen parameters may be trained later."""

        def __init__(self):
            super().__init__()
            self.other.requires_grad_(False)

    later = HessianMonitor(every_n_train_steps=5, max_overhead=None, parameters=["other.*"])
    with pytest.warns(match=r"parameters=\['other.\*'\] matches none of the trained"):
        train(Frozen, data, [later], tmp_path)


def test_unused_and_frozen_parameters(tmp_path):
    class Partly(Linear):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    train(Partly, regression, [monitor], tmp_path)
    assert len(monitor.history) == 1
