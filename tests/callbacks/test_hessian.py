"""HessianMonitor in real runs, compared with closed forms."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, read_history
from lightning_landscape.callbacks.solver import Solver
from lightning_landscape.geometry.eigen import EigenResult
from tests.runs import train
from tests.small import Linear, ones, regression


def spectrum_of(data) -> np.ndarray:
    x = data.dataset.tensors[0].double()
    return np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())


SETTINGS = {"every_n_train_steps": 2, "max_overhead": None, "tol": 1e-6, "max_hvps": 200}


ADAPTIVE = ("Adam", "RMSprop")


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_linear_regression(tmp_path, method):
    data = regression()
    x = data.dataset.tensors[0].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())
    monitor = HessianMonitor(
        every_n_train_steps=2, max_overhead=None, method=method, tol=1e-4, k=2, max_hvps=200
    )
    train(lambda: Linear(lr=0.02), data, [monitor], tmp_path)
    for row in monitor.history:
        assert row["hessian/top_eigenvalue"] == pytest.approx(exact[-1], rel=1e-5)
        assert row["hessian/eigenvalue_2"] == pytest.approx(exact[-2], rel=1e-3)
        assert row["hessian/edge"] == pytest.approx(100.0)
        assert row["hessian/edge_ratio"] == pytest.approx(exact[-1] / 100, rel=1e-5)
        assert row["hessian/residual"] <= 1e-4 * exact[-1] * 1.01
        assert row["hessian/hvps"] >= 2
        assert row["converged"]


def test_summed_loss(tmp_path):
    """N times the curvature of the mean on N examples; the ratio is that of the run's own batch."""
    data = regression()  # 60 examples in batches of 20
    x = data.dataset.tensors[0].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x).numpy())[-1]
    monitor = HessianMonitor(
        every_n_train_steps=2, max_overhead=None, loss_reduction="sum", tol=1e-4
    )
    train(lambda: Linear(lr=1e-4, reduction="sum"), data, [monitor], tmp_path)
    for row in monitor.history:
        assert row["hessian/top_eigenvalue"] == pytest.approx(exact, rel=1e-5)
        assert row["hessian/edge_ratio"] == pytest.approx(exact / 3 * 1e-4 / 2, rel=1e-5)
        assert row["hessian/top_eigenvalue"] / row["hessian/edge"] == pytest.approx(
            row["hessian/edge_ratio"], rel=1e-6
        )


# -- the stability edge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01), 2),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 3.8),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True), 3.8 / 2.8),
        (lambda p: torch.optim.Adam(p, lr=0.01), 38),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), 2),
    ],
)
def test_edge_of_each_optimizer(tmp_path, make, factor):
    class Optimized(Linear):
        def configure_optimizers(self):
            return make(self.parameters())

    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None)
    train(Optimized, regression, [monitor], tmp_path)
    row = monitor.history[-1]
    assert row["hessian/edge"] == pytest.approx(factor / 0.01)
    adaptive = "hessian/preconditioned_eigenvalue" in row
    assert adaptive == (make([nn.Parameter(torch.ones(1))]).__class__.__name__ in ADAPTIVE)
    value = row["hessian/preconditioned_eigenvalue" if adaptive else "hessian/top_eigenvalue"]
    assert row["hessian/edge_ratio"] == pytest.approx(value / row["hessian/edge"], rel=1e-6)


def test_adam_is_measured_preconditioned(tmp_path):
    """P^-1/2 H P^-1/2 by hand, from the optimizer's own state."""

    class Adam(Linear):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    data = regression()
    x = data.dataset.tensors[0].double()
    expected = []

    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            state = trainer.optimizers[0].state[pl_module.layer.weight]
            nu = state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))
            root = (nu.sqrt() + 1e-8).rsqrt().flatten()
            matrix = root[:, None] * (2 * x.T @ x / len(x)) * root
            expected.append(float(torch.linalg.eigvalsh(matrix)[-1]))

    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None, tol=1e-5)
    train(Adam, data, [ByHand(), monitor], tmp_path)
    for row in monitor.history:
        exact = expected[row["step"] - 1]
        assert row["hessian/preconditioned_eigenvalue"] == pytest.approx(exact, rel=1e-4)
        assert row["hessian/edge_ratio"] == pytest.approx(exact / 3800, rel=1e-4)


def test_no_edge_while_clipping_is_active(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None)
    with pytest.warns(match="no stability edge is logged: gradient clipping is active"):
        train(Linear, regression, [monitor], tmp_path, gradient_clip_val=1e-3)
    assert "hessian/edge_ratio" not in monitor.history[0]
    assert "hessian/top_eigenvalue" in monitor.history[0]


@pytest.mark.parametrize("schedule", ["every_n_train_steps", "every_n_epochs"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_ratio_on_the_batches_of_the_step(tmp_path, accumulate, schedule):
    data = regression()
    x = data.dataset.tensors[0].double()
    monitor = HessianMonitor(
        batch_edge_ratio=True, **{**SETTINGS, "every_n_train_steps": None, schedule: 1}
    )
    train(
        lambda: Linear(lr=0.02), data, [monitor], tmp_path, precision="64-true",
        accumulate_grad_batches=accumulate, max_epochs=4,
    )  # fmt: skip
    steps_an_epoch = math.ceil(3 / accumulate)
    for row in monitor.history:
        position = (row["step"] - 1) % steps_an_epoch
        batches = range(3)[position * accumulate : (position + 1) * accumulate]
        piece = x[20 * batches.start : 20 * batches.stop]
        # Lightning divides the loss of each by accumulate_grad_batches, also of fewer.
        hessian = 2 * piece.T @ piece / (20 * accumulate)
        exact = np.linalg.eigvalsh(hessian.numpy())[-1]
        assert row["hessian/batch_edge_ratio"] == pytest.approx(exact * 0.02 / 2, rel=1e-6)


class InTurn(pl.LightningModule):
    """Two parts, each with its own optimizer and quadratic loss, as in a GAN.

    The generator steps at the third of five batches, and the critic at the others.
    """

    parts, weight = ("critic", "generator"), {"critic": 1.0, "generator": 3.0}
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.generator = (nn.Linear(5, 1, bias=False) for _ in range(2))

    def loss_of(self, part, batch):
        x, y = batch
        return self.weight[part] * (getattr(self, part)(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        turn = int(batch_idx % 3 == 2)
        optimizer = self.optimizers()[turn]
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(self.parts[turn], batch))
        optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.critic.parameters(), lr=0.02),
            torch.optim.SGD(self.generator.parameters(), lr=0.004, momentum=0.9),
        ]


@pytest.mark.parametrize("along_update", [True, False])
def test_optimizers_that_step_in_turn(along_update, tmp_path):
    """Each monitor uses the optimizer of its parameters and the batches of its steps."""
    data = regression(batch_size=12)
    x = data.dataset.tensors[0].double()
    hessians = [2 * piece.T @ piece / 12 for piece in x.split(12)]
    edges = {"critic": 2 / 0.02, "generator": (2 + 2 * 0.9) / 0.004}
    weights = {part: [] for part in InTurn.parts}

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for part, kept in weights.items():
                kept.append(getattr(pl_module, part).weight.detach().clone().flatten())

        def on_train_end(self, trainer, pl_module):
            self.on_train_batch_start(trainer, pl_module, None, 0)

    common = {**SETTINGS, "every_n_train_steps": 1, "probe": data, "batch_edge_ratio": True}
    monitors = {
        part: HessianMonitor(
            name=part,
            parameters=f"{part}.*",
            loss_fn=lambda module, batch, part=part: module.loss_of(part, batch),
            update_curvature=along_update,
            **common,
        )
        for part in InTurn.parts
    }
    with pytest.warns(UserWarning, match="generator/batch_edge_ratio is not logged at steps that"):
        train(
            InTurn, data, [*monitors.values(), Keep()], tmp_path, precision="64-true", max_epochs=3
        )
    for part, monitor in monitors.items():
        of_probe = InTurn.weight[part] * 2 * x.T @ x / len(x)
        exact = float(torch.linalg.eigvalsh(of_probe)[-1])
        assert [row["step"] for row in monitor.history] == list(range(1, 16))
        for row in monitor.history:
            index = (row["step"] - 1) % 5
            found = {key.rpartition("/")[2]: value for key, value in row.items()}
            assert found["edge"] == pytest.approx(edges[part])
            assert found["top_eigenvalue"] == pytest.approx(exact, rel=1e-6)
            assert found["edge_ratio"] == pytest.approx(exact / edges[part], rel=1e-6)
            stepped = (index == 2) == (part == "generator")
            assert ("batch_edge_ratio" in found) == stepped
            assert ("update_curvature" in found) == (stepped and along_update)
            if stepped:
                of_batch = InTurn.weight[part] * hessians[index]
                top = float(torch.linalg.eigvalsh(of_batch)[-1])
                assert found["batch_edge_ratio"] == pytest.approx(top / edges[part], rel=1e-6)
            if stepped and along_update:
                update = weights[part][row["step"]] - weights[part][row["step"] - 1]
                along = float(update @ of_probe @ update / (update @ update))
                assert found["update_curvature"] == pytest.approx(along, rel=1e-6)


def test_one_monitor_for_several_optimizers(tmp_path):
    """The ratio is that of the part closest to the edge of its optimizer."""
    data = regression()
    x = data.dataset.tensors[0].double()
    exact = float(torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1])
    monitor = HessianMonitor(
        loss_fn=lambda module, batch: sum(module.loss_of(part, batch) for part in module.parts),
        **SETTINGS,
    )
    with pytest.warns(UserWarning, match="edge is not logged: .* thresholds run from 100 to 950"):
        train(InTurn, data, [monitor], tmp_path, precision="64-true")
    for row in monitor.history:
        assert row["hessian/top_eigenvalue"] == pytest.approx(3 * exact, rel=1e-6)
        assert row["hessian/edge_ratio"] == pytest.approx(exact / 100, rel=1e-6)
        assert "hessian/edge" not in row


def test_no_curvature_along_a_zero_update(tmp_path):
    """Logging NaN would end a run that stops at NaN."""
    monitor = HessianMonitor(update_curvature=True, **SETTINGS)
    with pytest.warns(UserWarning, match="hessian/update_curvature is not logged at steps that"):
        train(lambda: Linear(lr=0.0), regression, [monitor], tmp_path)
    assert monitor.measured > 1
    assert not any("hessian/update_curvature" in row for row in monitor.history)


# -- optional quantities ---------------------------------------------------------------------------


def test_smallest_eigenvalue_trace_and_frobenius(tmp_path):
    data = regression()
    exact = spectrum_of(data)
    monitor = HessianMonitor(min_eigenvalue=True, trace_samples=200, **SETTINGS)
    train(Linear, data, [monitor], tmp_path, precision="64-true")
    for row in monitor.history:
        assert row["hessian/min_eigenvalue"] == pytest.approx(exact[0], rel=1e-4)
        error = abs(row["hessian/trace"] - exact.sum())
        assert error < 4 * row["hessian/trace_stderr"]
        assert row["hessian/frobenius"] == pytest.approx(np.linalg.norm(exact), rel=0.05)


class Diagonal(pl.LightningModule):
    """L(w) = mean(x) sum_i s_i w_i^2 / 2: the eigenvalues are the s_i."""

    def __init__(self, spectrum):
        super().__init__()
        self.w = nn.Parameter(torch.ones(len(spectrum)))
        self.register_buffer("spectrum", torch.as_tensor(spectrum))

    def training_step(self, batch, batch_idx):
        return batch[0].mean() * (self.spectrum * self.w**2).sum() / 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def test_residual_bounds_hold_for_all_values(tmp_path):
    """Some eigenvalue lies within the residual of each; with few products, far from exact."""
    exact = np.geomspace(1.0, 100.0, 40)
    monitor = HessianMonitor(
        k=3, min_eigenvalue=True, blocks=True, every_n_train_steps=2, max_overhead=None,
        tol=0.2, rtol=0, max_hvps=10,
    )  # fmt: skip
    train(lambda: Diagonal(exact), ones(), [monitor], tmp_path, precision="64-true")
    errors = []
    for row in (*monitor.history, *read_history(next(tmp_path.rglob("history.jsonl")))):
        residuals = row["residuals"]
        names = ("top_eigenvalue", "eigenvalue_2", "eigenvalue_3", "min_eigenvalue")
        assert set(residuals) == {
            *(f"hessian/{name}" for name in names), "hessian/edge_ratio", "hessian/block/w",
            "hessian/preconditioned_eigenvalue",
        }  # fmt: skip
        assert residuals["hessian/top_eigenvalue"] == row["hessian/residual"]
        for name in names:
            found, within = row[f"hessian/{name}"], residuals[f"hessian/{name}"]
            error = np.abs(exact - found).min()
            assert error <= within <= 0.2 * 100.0
            errors.append(error)
        # Adam divides by |g| = s_i here, so that its matrix is diagonal too: its top lies nearby.
        assert 0 < residuals["hessian/edge_ratio"] <= 0.2 * row["hessian/edge_ratio"] * 1.01
        shares = [
            residuals[key] / row[key]
            for key in ("hessian/edge_ratio", "hessian/preconditioned_eigenvalue")
        ]
        assert shares[0] == pytest.approx(shares[1])
    assert max(errors) > 0.01  # otherwise the check would be trivial


def test_value_within_its_residual_is_logged(tmp_path):
    exact = np.concatenate([[-0.05], np.geomspace(0.5, 1000.0, 60)])
    known = {"every_n_train_steps": 2, "max_overhead": None, "min_eigenvalue": True}
    with pytest.warns(UserWarning, match=r"hessian/min_eigenvalue is small .*pass a smaller tol"):
        train(lambda: Diagonal(exact), ones(), [HessianMonitor(**known)], tmp_path)
    tight = HessianMonitor(**known, tol=1e-6, rtol=0, max_hvps=300)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is small compared with")
        train(lambda: Diagonal(exact), ones(), [tight], tmp_path, precision="64-true")
    assert tight.history[-1]["hessian/min_eigenvalue"] == pytest.approx(-0.05, rel=1e-3)


def test_blocks(tmp_path):
    class Two(Linear):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(5, 1, bias=False)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss(self.layer(x), y) + 0.5 * self.loss(self.other(x), y)

    data = regression()
    exact = spectrum_of(data)
    monitor = HessianMonitor(blocks=True, trace_samples=50, **SETTINGS)
    stopper = SharpnessEarlyStopping("hessian/block/other", 1e9)
    train(Two, data, [monitor, stopper], tmp_path, precision="64-true")
    row = monitor.history[-1]
    assert row["hessian/block/layer"] == pytest.approx(exact[-1], rel=1e-6)
    assert row["hessian/block/other"] == pytest.approx(exact[-1] / 2, rel=1e-6)
    assert row["hessian/block_trace/layer"] == pytest.approx(exact.sum(), rel=0.5)


def test_curvature_along_the_update(tmp_path):
    """Gradient descent on a quadratic: the update is -lr H (w - w*), known from the weights."""
    data = regression(60, 60)
    x, y = (t.double() for t in data.dataset.tensors)
    matrix = 2 * x.T @ x / len(x)
    weights = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.append(pl_module.layer.weight.detach().clone())

    monitor = HessianMonitor(update_curvature=True, **SETTINGS)
    train(Linear, data, [monitor, Keep()], tmp_path, precision="64-true", max_epochs=7)
    for row in monitor.history:
        before = weights[row["step"] - 1].flatten()
        gradient = 2 * x.T @ (x @ before - y.flatten()) / len(x)
        exact = gradient @ matrix @ gradient / (gradient @ gradient)
        assert row["hessian/update_curvature"] == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.pictures
def test_spectral_density_is_drawn_and_saved(tmp_path):
    monitor = HessianMonitor(density_samples=3, **SETTINGS)
    train(Linear, regression, [monitor], tmp_path)
    folder = tmp_path / "landscape"
    saved = sorted(folder.glob("hessian-density-*.npz"))
    assert len(saved) == len(monitor.history)
    assert len(list(folder.glob("hessian-density-*.png"))) == len(saved)
    with np.load(saved[0]) as file:
        spacing = file["grid"][1] - file["grid"][0]
        assert file["density"].sum() * spacing == pytest.approx(1.0, rel=1e-6)


# -- solvers and engines ---------------------------------------------------------------------------


def test_two_monitors_use_their_own_settings(tmp_path):
    rough = HessianMonitor(every_n_train_steps=2, max_overhead=None, tol=0.5)
    tight = HessianMonitor(name="tight", **SETTINGS)
    power = HessianMonitor(name="power", **{**SETTINGS, "method": "power", "tol": 1e-4})
    same = HessianMonitor(name="same", every_n_train_steps=2, max_overhead=None, tol=0.5)
    data = regression()
    train(Linear, data, [rough, tight, power, same], tmp_path, precision="64-true")
    exact = spectrum_of(data)[-1]
    for row in tight.history:
        assert row["hessian/tight/residual"] <= 1e-6 * exact
        assert row["hessian/tight/top_eigenvalue"] == pytest.approx(exact, rel=1e-9)
    assert all(row["hessian/power/hvps"] > 0 for row in power.history)
    assert [row["hessian/same/hvps"] for row in same.history] == [0] * same.measured  # shared


def test_wrong_second_derivative_warns(tmp_path):
    class Wrong(torch.autograd.Function):
        """x^2 y with a backward in which the derivative by x does not depend on y."""

        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x**2 * y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g * 2 * x * y.detach(), g * x**2

    class Module(Linear):
        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def training_step(self, batch, batch_idx):
            return Wrong.apply(self.x, self.y).sum() + super().training_step(batch, batch_idx)

    settings = {"every_n_train_steps": 3, "max_overhead": None}
    with pytest.warns(match="wrong second derivative; pass engine='finite_difference'"):
        train(Module, regression, [HessianMonitor(**settings)], tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            Module, regression, [HessianMonitor(engine="finite_difference", **settings)], tmp_path
        )
    assert not [w for w in caught if "second derivative" in str(w.message)]


def test_each_problem_leaves_products_for_later_ones():
    """20 products for three problems that need at least 2 each."""
    solver = Solver("lanczos", 1e-2, None, 50)
    assert solver.settings()["max_hvps"] == 50
    assert not solver.is_limited
    solver.limit_products(20, 3, 2)
    used = EigenResult(torch.ones(1), ({"w": torch.ones(1)},), torch.zeros(1), 9, True)
    assert solver.settings()["max_hvps"] == 16
    assert solver.is_limited
    solver.store("top", used)
    assert solver.settings()["max_hvps"] == 9
    solver.store("preconditioned", used)
    assert solver.settings()["max_hvps"] == 2
    solver.limit_products(math.inf)
    assert solver.settings()["max_hvps"] == 50
