"""SharpnessMonitor in real runs, compared with closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_landscape import SharpnessEarlyStopping, SharpnessMonitor
from tests.runs import train
from tests.small import Linear, Quartic, ones, regression


def spectrum_of(data) -> np.ndarray:
    x = data.dataset.tensors[0].double()
    return np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())


def test_sharpness_of_linear_regression(tmp_path):
    """On a quadratic one SAM step is exactly rho ||g|| + rho^2/2 g'Hg/||g||^2."""
    monitor = SharpnessMonitor(every_n_train_steps=2, max_overhead=None, rho=0.1)
    train(Linear, regression, [monitor], tmp_path, precision="64-true")
    for row in monitor.history:
        exact = 0.1 * row["sharpness/gradient_norm"] + 0.005 * row["sharpness/gradient_curvature"]
        assert row["sharpness/sam"] == pytest.approx(exact, rel=1e-9)


def test_critical_sharpness_of_gradient_descent(tmp_path):
    """Along -g of a quadratic: g'Hg/||g||^2 at the weights before the step, labelled with them."""
    data = regression(60, 60)
    x, y = (t.double() for t in data.dataset.tensors)
    matrix = 2 * x.T @ x / len(x)
    weights = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.append(pl_module.layer.weight.detach().clone())

    class Scheduled(Linear):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    monitor = SharpnessMonitor(
        every_n_train_steps=2, max_overhead=None, critical=True, critical_rtol=1e-4
    )
    run = train(Scheduled, data, [monitor, Keep()], tmp_path, precision="64-true", max_epochs=7)
    logged = run.logger.values("sharpness/critical")
    assert [step for step, _ in logged] == [0, 1, 3, 5]
    for step, value in logged:
        gradient = 2 * x.T @ (x @ weights[step].flatten() - y.flatten()) / len(x)
        exact = float(gradient @ matrix @ gradient / (gradient @ gradient))
        assert value == pytest.approx(exact, rel=2e-4)
    rows = [row for row in monitor.history if "sharpness/critical" in row]
    assert [row["step"] for row in rows] == [0, 1, 3, 5]
    assert monitor.measured == 4


def test_other_definitions_on_a_quadratic(tmp_path):
    data = regression()
    exact = spectrum_of(data)
    monitor = SharpnessMonitor(
        every_n_train_steps=2, max_overhead=None, worst_case=True, average=True, keskar=True,
        sigma=0.01, samples=200,
    )  # fmt: skip
    train(Linear, data, [monitor], tmp_path, precision="64-true")
    for row in monitor.history:
        assert row["sharpness/worst_case"] >= row["sharpness/sam"] > 0
        bound = 0.05 * row["sharpness/gradient_norm"] + 0.5 * 0.05**2 * exact[-1]
        assert row["sharpness/worst_case"] <= bound * (1 + 1e-9)
        error = abs(row["sharpness/average"] - 0.5e-4 * exact.sum())
        assert error < 4 * row["sharpness/average_stderr"]
        assert row["sharpness/keskar"] > 0
        assert "l2" in row["worst_case_definition"]


def test_stopping_on_a_value_of_the_previous_weights(tmp_path):
    monitor = SharpnessMonitor(
        every_n_train_steps=3, max_overhead=None, critical=True, probe_samples=4
    )
    stopper = SharpnessEarlyStopping("sharpness/critical", 0.0, patience=2)
    train(Quartic, ones, [stopper, monitor], tmp_path)
    assert stopper.stopped_step == 2
