"""The loss is evaluated in the Trainer's precision."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_landscape import HessianMonitor, LandscapeMonitor
from tests.runs import train
from tests.small import Linear, regression


def spectrum_of(data) -> np.ndarray:
    x = data.dataset.tensors[0].double()
    return np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("64-true", 1e-9), ("32-true", 1e-5), ("bf16-mixed", 1e-2), ("bf16-true", 1e-2)],
)
def test_precisions(tmp_path, precision, tolerance):
    """bfloat16 keeps 8 bits: its products err by up to half a per cent each."""
    data = regression()
    exact = spectrum_of(data)[-1]
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None)
    train(Linear, data, [monitor], tmp_path, precision=precision)
    assert monitor.failed == 0
    for row in monitor.history:
        assert row["hessian/top_eigenvalue"] == pytest.approx(exact, rel=tolerance)


class Logged(Linear):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True)
        return loss


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
def test_loss_has_the_trainers_precision(tmp_path, precision):
    """With one batch the loss that training logs at a step is bitwise that of the probe.

    bfloat16 is some 1e-3 away from the others.
    """
    monitor = LandscapeMonitor(every_n_train_steps=1, max_overhead=None, resolution=2)
    run = train(Logged, regression(batch_size=60), [monitor], tmp_path, precision=precision)
    logged = dict(run.logger.values("train_loss"))
    compared = [row for row in monitor.history if row["step"] in logged]
    assert len(compared) >= 1
    for row in compared:
        assert row["center_loss"] == pytest.approx(logged[row["step"]], rel=1e-7)
