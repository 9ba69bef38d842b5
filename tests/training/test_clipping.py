"""Steps with clipped gradients are detected, however they are clipped."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_landscape import HessianMonitor
from tests.runs import differences, train
from tests.small import Linear, Manual, regression

EVERY = {"every_n_train_steps": 3, "max_overhead": None}


class BeforeStep(Linear):
    """Clips in a hook of the module."""

    def on_before_optimizer_step(self, optimizer):
        clip_grad_norm_(self.parameters(), 1e-3)


class InOptimizerStep(Linear):
    """Clips between the closure and the step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        def clipped():
            loss = optimizer_closure()
            clip_grad_value_(self.parameters(), 1e-3)
            return loss

        optimizer.step(clipped)


class OwnClipping(Linear):
    def configure_gradient_clipping(self, optimizer, *_, **__):
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")


class ClippedByHand(Manual):
    """Manual optimization, clipped by Lightning's method."""

    limit = 1e-3

    def before_step(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=self.limit)


class ManualRarely(ClippedByHand):
    limit = 1e9


def loss_of(module, batch):
    return module.loss(module.layer(batch[0]), batch[1])


CLIPPED = {
    "norm": (Linear, {"gradient_clip_val": 1e-3}),
    "value": (Linear, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "accumulated": (Linear, {"gradient_clip_val": 1e-3, "accumulate_grad_batches": 2}),
    "hook": (BeforeStep, {}),
    "optimizer_step": (InOptimizerStep, {}),
    "configure_gradient_clipping": (OwnClipping, {}),
    "manual": (ClippedByHand, {}),
}
RARELY = {
    "none": (Linear, {}),
    "norm": (Linear, {"gradient_clip_val": 1e9}),
    "manual": (ManualRarely, {}),
}


def fit(module, options, path, **more):
    given = {"loss_fn": loss_of} if issubclass(module, Manual) else {}
    monitor = HessianMonitor(batch_edge_ratio=not given, **EVERY, **given)
    return monitor, train(module, regression, [monitor], path, **options, **more)


@pytest.mark.parametrize("case", CLIPPED)
def test_no_ratio_if_steps_are_clipped(case, tmp_path):
    with pytest.warns(UserWarning, match=r"gradient clipping is active \(100%"):
        monitor, with_us = fit(*CLIPPED[case], tmp_path, max_epochs=8)
    plain = train(CLIPPED[case][0], regression, [], tmp_path / "plain", max_epochs=8,
                  **CLIPPED[case][1])  # fmt: skip
    assert differences(plain.state, with_us.state) == []
    assert len(monitor.history) >= 4
    for row in monitor.history:
        assert row["hessian/clipped_share"] == 1.0
        assert {"hessian/edge", "hessian/edge_ratio", "hessian/batch_edge_ratio"}.isdisjoint(row)
        assert "hessian/top_eigenvalue" in row


@pytest.mark.parametrize("case", RARELY)
def test_ratio_if_the_threshold_is_not_reached(case, tmp_path):
    monitor, _ = fit(*RARELY[case], tmp_path, max_epochs=8)
    x = regression().dataset.tensors[0].double()
    exact = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    for row in monitor.history:
        assert row["hessian/clipped_share"] == 0.0
        assert row["hessian/edge_ratio"] == pytest.approx(0.01 * exact / 2, rel=1e-3)


def test_one_step_of_many_may_be_clipped(tmp_path):
    """One clipped step of 20 keeps the ratio; two do not."""

    class Sometimes(Linear):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step >= self.first:
                clip_grad_norm_(self.parameters(), 1e-6)

    def ratios(first):
        Sometimes.first = first
        monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None)
        train(Sometimes, regression, [monitor], tmp_path, max_epochs=35)
        last = monitor.history[-1]
        assert last["step"] == 105
        return last["hessian/clipped_share"], "hessian/edge_ratio" in last

    # Steps 1, 10, 15, ..., 105 are checked, and of these the last 20 count.
    assert ratios(first=10**6) == (0.0, True)
    assert ratios(first=104) == (0.05, True)
    assert ratios(first=99) == (0.1, False)
