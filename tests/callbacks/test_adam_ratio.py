"""The edge ratio of Adam and similar optimizers: no false alarms and no missed ones."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping
from lightning_landscape.callbacks.solver import _start_of_ratio
from lightning_landscape.geometry.edge_ratio import edge_ratio
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from tests.runs import train

RATIO, SHARE = "hessian/edge_ratio", "hessian/inactive_share"


class Regression(pl.LightningModule):
    """``net`` on (inputs, targets), by squared error."""

    def __init__(self, net, make):
        super().__init__()
        self.net, self.make, self.losses = net(), make, []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


def mlp(*widths, activation=nn.ReLU):
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def watched(every=5, probe=None):
    """A monitor, and early stopping as in the documentation."""
    monitor = HessianMonitor(every_n_train_steps=every, max_overhead=None, probe=probe)
    return monitor, SharpnessEarlyStopping(RATIO, threshold=2.0, patience=3)


# -- healthy runs ----------------------------------------------------------------------------------


def sparse_features():
    x = (torch.rand(32, 20) < 0.15).float()
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) / 3), batch_size=8, shuffle=True)


@pytest.mark.parametrize("seed", [0, 2])
def test_no_alarm_when_inactive_paths_become_active(tmp_path, seed):
    """With a step size of 1/eps the ratio was above 2 from step 24 on, up to 234, in both runs."""
    monitor, stopper = watched()
    run = train(
        lambda: Regression(lambda: mlp(20, 24, 24, 24, 1), lambda p: Adam(p, lr=1e-3)),
        sparse_features, [monitor, stopper], tmp_path, seed=seed, max_steps=60, max_epochs=-1,
    )  # fmt: skip
    assert run.trainer.global_step == 60
    assert stopper.stopped_step is None
    assert max(row[RATIO] for row in monitor.history) < 0.5
    assert 0 < min(row[SHARE] for row in monitor.history) < 1


class Bag(nn.Module):
    """The mean over the rows of some tokens."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(20, 4), mlp(4, 8, 1, activation=nn.Tanh)

    def forward(self, tokens):
        return self.head(self.rows(tokens).mean(1))


def growing_vocabulary():
    """Batches of tokens: two more of the 20 tokens every 8 batches."""
    batches = []
    for step in range(72):
        tokens = torch.randint(4 + step // 8 * 2, (16, 3))
        batches.append((tokens, tokens.float().mean(1, keepdim=True) / 20))
    return DataLoader(batches, batch_size=None)


OPTIMIZERS = {
    "adam": lambda p: Adam(p, lr=5e-3),
    "adam, foreach": lambda p: Adam(p, lr=5e-3, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=5e-3, fused=True),
    "adam, large eps": lambda p: Adam(p, lr=5e-3, eps=1e-2),
    "adam, weight decay": lambda p: Adam(p, lr=5e-3, weight_decay=1e-4),
    "amsgrad": lambda p: Adam(p, lr=5e-3, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=5e-3),
    "nadam": lambda p: NAdam(p, lr=5e-3),
    "radam": lambda p: RAdam(p, lr=5e-3),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3),
    "rmsprop, centered": lambda p: RMSprop(p, lr=1e-3, centered=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_alarm_from_unused_rows_of_an_embedding(tmp_path, make):
    """The probe contains all tokens from the first step on."""
    tokens = torch.arange(20).repeat(2).view(20, 2)
    probe = (tokens, tokens.float().mean(1, keepdim=True) / 20)
    monitor, stopper = watched(8, probe)
    run = train(
        lambda: Regression(Bag, make), growing_vocabulary, [monitor, stopper], tmp_path,
        max_epochs=1,
    )  # fmt: skip
    assert run.trainer.global_step == 72
    assert stopper.stopped_step is None
    assert max(row.get(RATIO, 0.0) for row in monitor.history) < 0.5
    shares = [row[SHARE] for row in monitor.history if SHARE in row]
    if make is OPTIMIZERS["adam, weight decay"]:  # coupled: a gradient for every row at once
        assert shares == [0.0] * len(shares)
        return
    state, rows = run.trainer.optimizers[0].state, run.trainer.lightning_module.net.rows.weight
    square = next(state[rows][key] for key in ("exp_avg_sq", "square_avg") if key in state[rows])
    total = sum(p.numel() for p in run.trainer.lightning_module.parameters())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] == int((square == 0).sum()) / total


# -- runs that diverge -----------------------------------------------------------------------------


def digits():
    """200 scans of digits."""
    x, y = (torch.tensor(part)[:200] for part in load_digits(return_X_y=True))
    x = (x.float() - x.float().mean(0)) / x.float().std()
    return x, nn.functional.one_hot(y, 10).float()


def batches_of(size):
    return DataLoader(TensorDataset(*digits()), batch_size=size, shuffle=True)


DIVERGING = {
    "adam, full batch": (lambda p: Adam(p, lr=1.0), 200),
    "adam, minibatches": (lambda p: Adam(p, lr=3.0), 20),
    "adamw, minibatches": (lambda p: AdamW(p, lr=3.0), 20),
    "amsgrad, full batch": (lambda p: Adam(p, lr=1.0, amsgrad=True), 200),
    "rmsprop, full batch": (lambda p: RMSprop(p, lr=0.3), 200),
}


@pytest.mark.parametrize(("make", "size"), DIVERGING.values(), ids=DIVERGING)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diverging_run_is_stopped(tmp_path, make, size, seed):
    monitor, stopper = watched(5, digits())
    run = train(
        lambda: Regression(lambda: mlp(64, 24, 24, 10, activation=nn.Tanh), make),
        lambda: batches_of(size), [monitor, stopper], tmp_path, seed=seed,
        max_steps=60, max_epochs=-1,
    )  # fmt: skip
    losses = run.trainer.lightning_module.losses
    assert max(losses) > 20 * losses[0]
    assert stopper.stopped_step == 10  # after steps 1, 5 and 10


@pytest.mark.parametrize("make", [Adam, RMSprop])
def test_too_large_rate_is_detected_before_the_loss_rises(tmp_path, make):
    """The gradients grow at once, and P must not grow with them before it does in the optimizer.

    With P as after a step with the whole gradient the Adam run is stopped 14 steps later or never.
    """

    class Raised(Regression):
        def configure_optimizers(self):
            optimizer = self.make(self.parameters())
            raised = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 100.0 if step >= 40 else 1.0
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": raised, "interval": "step"},
            }

    monitor, stopper = watched(1)
    run = train(
        lambda: Raised(
            lambda: mlp(64, 24, 24, 10, activation=nn.Tanh),
            lambda p: make(p, lr=3e-3 if make is Adam else 3e-4),
        ),
        lambda: batches_of(200), [monitor, stopper], tmp_path, max_steps=60, max_epochs=-1,
    )  # fmt: skip
    losses = run.trainer.lightning_module.losses
    ratios = {row["step"]: row[RATIO] for row in monitor.history}
    assert max(ratios[step] for step in range(5, 40)) < 1
    assert min(ratios[step] for step in (40, 41, 42)) > 2
    assert losses[40] < losses[39]  # the loss at the first weights with a ratio above 1
    assert stopper.stopped_step == 42


# -- the values, by hand ---------------------------------------------------------------------------


class Rare(pl.LightningModule):
    """Linear regression whose second feature is nearly absent from training."""

    def __init__(self, make, reduction="mean"):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64))
        self.make, self.reduction = make, reduction

    def loss(self, batch):
        return nn.functional.mse_loss(batch[0] @ self.w, batch[1], reduction=self.reduction)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make([self.w])


def rare(scale, examples):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(examples, generator=generator, dtype=torch.float64)
    return x * torch.tensor([1.0, scale, 0.0]), y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_gradient_can_change_the_preconditioner(tmp_path, reduction):
    """P of the second weight is sqrt((b2 nu + (1 - b2) g^2)/(1 - b2^(t+1))) + eps, g the gradient
    of the probe, of the first one sqrt(nu/(1 - b2^t)) + eps; the third has none.  A summed loss of
    8 examples has 8/20 of the gradient and of the Hessian of the probe's 20."""
    x, y = rare(1.0, 20)
    x[:, 2] = 1.0
    expected = []

    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            state = trainer.optimizers[0].state[pl_module.w]
            nu, t = state["exp_avg_sq"].detach().clone(), float(state["step"])
            share = 8 / 20 if reduction == "sum" else 1 / 20
            g = 2 * share * x.T @ (x @ pl_module.w.detach() - y)
            # As long as the gradients so far, if it is longer.
            g = g * min(1.0, float((nu.sum() / (1 - 0.999**t)).sqrt() / g.norm()))
            p = (nu / (1 - 0.999**t)).sqrt() + 1e-8
            p[1] = ((0.999 * nu + 0.001 * g**2) / (1 - 0.999 ** (t + 1))).sqrt()[1] + 1e-8
            root = np.sqrt(0.01 * 0.1 / 1.9 / p[:2].numpy())
            hessian = (2 * share * x.T @ x)[:2, :2].numpy()
            expected.append(np.linalg.eigvalsh(root[:, None] * hessian * root)[-1] / 2)

    monitor = HessianMonitor(
        every_n_train_steps=1, max_overhead=None, tol=1e-6, rtol=0, probe=(x, y),
        loss_reduction=reduction,
    )  # fmt: skip
    train(
        lambda: Rare(lambda p: Adam(p, lr=0.01), reduction),
        DataLoader(TensorDataset(*rare(1e-5, 40)), batch_size=8), [ByHand(), monitor], tmp_path,
        precision="64-true",
    )  # fmt: skip
    assert len(monitor.history) == 10
    for row in monitor.history:
        assert row[RATIO] == pytest.approx(expected[row["step"] - 1], rel=1e-5)
        assert row[SHARE] == pytest.approx(1 / 3)


def test_share_is_logged_for_adaptive_optimizers_only(tmp_path):
    monitors = []
    for make in (lambda p: Adam(p, lr=0.01), lambda p: SGD(p, lr=0.01)):
        monitors.append(HessianMonitor(every_n_train_steps=2, max_overhead=None))
        data = DataLoader(TensorDataset(*rare(1.0, 16)), batch_size=8)
        run = train(lambda: Rare(make), data, [monitors[-1]], tmp_path, precision="64-true")  # noqa: B023
        logged = [value for _, value in run.logger.values(SHARE)]
        assert logged == [row[SHARE] for row in monitors[-1].history if SHARE in row]
    adam, sgd = monitors
    assert [row[SHARE] for row in adam.history] == pytest.approx([1 / 3] * len(adam.history))
    assert all(SHARE not in row for row in sgd.history)
    assert adam.owns(SHARE)


def test_no_ratio_without_a_previous_gradient(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None, probe=rare(1.0, 8))
    x, y = rare(1.0, 8)
    data = DataLoader(TensorDataset(0 * x, y), batch_size=8)
    with pytest.warns(match="no stability edge is logged: Adam .* no step has had a gradient yet"):
        train(
            lambda: Rare(lambda p: Adam(p, lr=0.01)), data, [monitor], tmp_path, precision="64-true"
        )
    assert all(RATIO not in row and row["hessian/top_eigenvalue"] > 0 for row in monitor.history)


def test_start_where_the_gradient_is_zero():
    """With few products the search starts from S^1/2 g, which may be 0."""
    a, b = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (0.0, 1.0))
    objective = Objective(
        lambda: 2 * a.square().sum() + 3 * (b - 2).square().sum(), {"a": a, "b": b}
    )
    adam = Adam([a, b], lr=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.zeros_like(b)
    adam.step()
    with torch.no_grad():
        a.zero_()
    edge = stability_edge(adam, objective.params)
    monitor = HessianMonitor()
    monitor._solver.limit_products(2)
    found = monitor._solver.ratio("preconditioned", objective, edge, top_eigenvalues(objective))
    assert found.ratio == pytest.approx(0.1 / 19 * 4 / 2)
    assert found.ratio == pytest.approx(
        edge_ratio(objective, edge, top_eigenvalues(objective)).ratio
    )
    assert math.isfinite(found.residual)


def test_ratio_starts_from_the_top_eigenvector():
    """P alike for all parameters: S^1/2 v is the solution itself, with one product to see it."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.zeros(60, dtype=torch.float64))
    matrix = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.T / 60
    objective = Objective(lambda: 0.5 * w @ matrix @ w + w.sum(), {"w": w})
    step = torch.full((60,), 0.1, dtype=torch.float64)  # a tensor: a problem of its own
    edge = StabilityEdge({"w": step}, {"w": 0.0}, 1.0, "", {"w": 0.1 / step}, False)
    plain = top_eigenvalues(objective, tol=1e-8, max_hvps=200)
    solver = HessianMonitor()._solver
    cold = edge_ratio(objective, edge, plain, hint=objective.gradient(), tol=1e-2)
    found = solver.ratio("preconditioned", objective, edge, plain)
    assert found.ratio == pytest.approx(0.05 * float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9)
    assert found.solved.hvps < cold.solved.hvps
    # The eigenvector, and the search outside of it.
    assert found.solved.hvps <= 1 + 5


def test_previous_solution_far_from_the_top_eigenvector_is_used():
    v = {"w": torch.tensor([1.0, 0.0])}
    plain = EigenResult(torch.ones(1), (v,), torch.zeros(1), 1, True)
    edge = StabilityEdge({"w": torch.tensor([4.0, 9.0])}, {"w": 0.0}, 1.0, "", {"w": 1.0}, False)
    near, far = ({"w": torch.tensor(place)} for place in ([0.9, 0.1], [0.1, 0.9]))
    for last, kept in ((near, 1), (far, 2)):
        start = _start_of_ratio(replace(plain, eigenvectors=(last,)), edge, plain)
        assert len(start.eigenvectors) == kept
        assert start.eigenvectors[0]["w"].tolist() == [2.0, 0.0]
        assert start.eigenvectors[-1] is (last if kept == 2 else start.eigenvectors[0])
    assert _start_of_ratio(None, edge, plain)["w"].tolist() == [2.0, 0.0]
    nowhere = replace(edge, scale={"w": torch.tensor([0.0, 9.0])})
    assert _start_of_ratio(None, nowhere, plain) is None
