"""No edge is logged where autograd's gradient is not the derivative of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_landscape import HessianMonitor
from lightning_landscape.geometry import Objective
from lightning_landscape.geometry.gradient_check import gradient_mismatch
from tests.runs import differences, train
from tests.small import Linear, regression


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Two(Linear):
    """Two layers; ``between`` acts on the activations."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)

    def between(self, x):
        return x

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.layer(self.between(torch.tanh(self.first(x)))), y)


class ActivationHook(Two):
    def between(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: 3 * gradient)
        return x


class ModuleHook(Two):
    def __init__(self):
        super().__init__()
        self.first.register_full_backward_hook(lambda module, inputs, outputs: None)
        self.layer.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))


class Reversal(Two):
    def between(self, x):
        return Reversed.apply(x)


class StraightThrough(Two):
    """Activations rounded to halves, with the gradient of the identity."""

    def between(self, x):
        return x + ((2 * x).round() / 2 - x).detach()


class Detached(Two):
    """Predicts from inputs that are scaled by a detached prediction."""

    def between(self, x):
        return x * (1 + x.norm().detach())


@pytest.mark.parametrize(
    "module", [ActivationHook, ModuleHook, Reversal, StraightThrough, Detached]
)
def test_no_edge_and_a_warning(module, tmp_path):
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, batch_edge_ratio=True)
    with pytest.warns(UserWarning, match="no stability edge is logged: the gradient that autograd"):
        with_us = train(module, regression, [monitor], tmp_path)
    plain = train(module, regression, [], tmp_path / "plain")
    assert differences(plain.state, with_us.state) == []
    assert monitor.history
    for row in monitor.history:
        assert {"hessian/edge", "hessian/edge_ratio", "hessian/batch_edge_ratio"}.isdisjoint(row)
        assert "the gradient that autograd gives" in row["altered_gradient"]


def test_ordinary_network_has_an_edge(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None)
    train(Two, regression, [monitor], tmp_path)
    assert all("hessian/edge_ratio" in row for row in monitor.history)
    assert not any("altered_gradient" in row for row in monitor.history)


@pytest.mark.parametrize(("factor", "mismatch"), [(1.0, 0.0), (2.0, 0.5), (0.5, 1.0), (-1.0, 2.0)])
def test_mismatch_of_a_scaled_gradient(factor, mismatch):
    """Along ``f g`` instead of ``g`` the derivative is ``f |g|^2``, and not ``f^2 |g|^2``."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    scales = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)

    def loss():
        seen = w.clone()
        if seen.requires_grad:
            seen.register_hook(lambda gradient: factor * gradient)
        return (scales * seen**2).sum() / 2

    found = gradient_mismatch(Objective(loss, {"w": w}))
    assert found == pytest.approx(abs(1 / factor - 1), abs=1e-6)
    assert found == pytest.approx(mismatch, abs=1e-6)


@pytest.mark.parametrize("loss", [lambda w: 0 * w.sum(), lambda w: (w / 0).sum()])
def test_no_mismatch_without_a_finite_gradient(loss):
    w = nn.Parameter(torch.ones(3))
    assert gradient_mismatch(Objective(lambda: loss(w), {"w": w})) is None
