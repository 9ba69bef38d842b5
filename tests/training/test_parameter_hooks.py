"""Hooks on parameters change the gradient of training, and no derivative of the measured loss."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lightning_landscape import HessianMonitor
from lightning_landscape.training.isolation.parameter_hooks import without_parameter_hooks
from tests.runs import differences, train
from tests.small import Linear, regression

HOOKS = {
    "times 3": lambda gradient: 3 * gradient,
    "clamped": lambda gradient: gradient.clamp(-1e-3, 1e-3),
    "masked": lambda gradient: gradient * torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]]),
    "only looks": lambda gradient: None,
}


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("hook", HOOKS)
def test_eigenvalue_is_that_of_the_loss(hook, engine, tmp_path):
    class Hooked(Linear):
        def on_fit_start(self):
            self.layer.weight.register_hook(HOOKS[hook])

    monitor = HessianMonitor(
        every_n_train_steps=1, max_overhead=None, engine=engine, tol=1e-4, rtol=0
    )
    plain = train(Hooked, regression, [], tmp_path / "plain")
    with pytest.warns(
        UserWarning, match=r"no stability edge .*hooks of .*layer.weight.* \(register_h"
    ):
        with_us = train(Hooked, regression, [monitor], tmp_path)
    assert differences(plain.state, with_us.state) == []
    x = regression().dataset.tensors[0].double()
    expected = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    rows = monitor.history
    assert [row["hessian/top_eigenvalue"] for row in rows] == pytest.approx(
        [expected] * len(rows), rel=1e-3
    )
    assert not any("hessian/edge_ratio" in row or "hessian/edge" in row for row in rows)


def test_hooks_are_restored():
    layer, calls = torch.nn.Linear(2, 1), []
    handle = layer.weight.register_hook(lambda gradient: calls.append(1))

    def backward():
        layer(torch.ones(1, 2)).sum().backward()
        return len(calls)

    assert backward() == 1
    with without_parameter_hooks(layer) as names:
        assert names == ["weight"]
        assert backward() == 1
    assert backward() == 2
    with contextlib.suppress(ZeroDivisionError), without_parameter_hooks(layer):
        raise ZeroDivisionError
    assert backward() == 3
    handle.remove()
    assert backward() == 3
    with without_parameter_hooks(layer) as names:
        assert names == []
