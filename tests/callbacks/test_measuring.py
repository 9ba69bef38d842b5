"""When values are measured, at which weights, and where they go."""

from __future__ import annotations

import json
import math
import re
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessMonitor,
    Slice,
    landscape_callbacks,
)
from tests.runs import train
from tests.small import Linear, Quartic, ones, regression

ADAPTIVE = ("Adam", "RMSprop")


def steps(callback) -> list[int]:
    return [row["step"] for row in callback.history]


# -- when -------------------------------------------------------------------------------------


def test_first_when_the_probe_is_complete_then_every_n_steps(tmp_path):
    captured = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=12)
    given = HessianMonitor(
        every_n_train_steps=4, max_overhead=None, probe=(torch.ones(3, 1),), name="given"
    )
    train(Quartic, ones, [captured, given], tmp_path)
    assert steps(captured) == [3, 8, 13, 18]  # 12 examples are there after 3 batches of 4
    assert steps(given) == [1, 5, 9, 13, 17]


@pytest.mark.parametrize(("samples", "first"), [(512, 10), (40, 10), (37, 10), (36, 9), (1, 1)])
def test_the_capture_ends_with_the_first_epoch(tmp_path, samples, first):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe_samples=samples)
    train(Quartic, ones, [monitor], tmp_path)
    assert steps(monitor) == [first]
    assert monitor.history[0]["probe_samples"] == min(4 * math.ceil(samples / 4), 40)


def test_the_capture_ends_with_validation(tmp_path):
    class Validated(Quartic):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return ones()

    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    train(Validated, ones, [monitor], tmp_path, val_check_interval=4)
    assert steps(monitor) == [5]
    assert monitor.history[0]["probe_samples"] == 16


def test_every_n_epochs(tmp_path):
    monitor = HessianMonitor(
        every_n_train_steps=None, every_n_epochs=2, max_overhead=None, probe_samples=8
    )
    train(Quartic, ones, [monitor], tmp_path, max_epochs=5)
    assert steps(monitor) == [2, 20, 40]


def test_accumulation_counts_optimizer_steps(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path, accumulate_grad_batches=3)
    assert run.trainer.global_step == 8  # 10 batches in threes: 4 steps an epoch
    assert steps(monitor) == [1, 3, 5, 7]


def test_manual_optimisation_counts_batches_not_optimizer_steps(tmp_path):
    class Two(Quartic):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.v = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            for optimizer, p in zip(self.optimizers(), (self.w, self.v), strict=True):
                optimizer.zero_grad()
                self.manual_backward(p.pow(4).sum() / 4)
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD([self.w], lr=0.01), torch.optim.SGD([self.v], lr=0.01)

    monitor = HessianMonitor(
        every_n_train_steps=4,
        max_overhead=None,
        probe_samples=4,
        loss_fn=lambda module, batch: module.w.pow(4).sum() / 4,
        parameters="w",
    )
    run = train(Two, ones, [monitor], tmp_path)
    assert run.trainer.global_step == 40
    assert steps(monitor) == [1, 5, 9, 13, 17]


# -- at which weights -------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_label_belongs_to_the_weights_of_the_training_loss_logged_there(tmp_path, accumulate):
    """H = 6 sqrt(L): the logged loss at step s gives the eigenvalue that must stand at s."""
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path, accumulate_grad_batches=accumulate)
    losses = dict(run.logger.values("train_loss"))
    compared = 0
    for step, value in run.logger.values("hessian/top_eigenvalue"):
        if step in losses:
            assert value == pytest.approx(6 * math.sqrt(losses[step]), rel=1e-5)
            compared += 1
    assert compared >= 2


# -- the values -------------------------------------------------------------------------------


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


def test_sharpness_of_linear_regression(tmp_path):
    """On a quadratic one SAM step is exactly rho ||g|| + rho^2/2 g'Hg/||g||^2."""
    monitor = SharpnessMonitor(every_n_train_steps=2, max_overhead=None, rho=0.1)
    train(Linear, regression, [monitor], tmp_path, precision="64-true")
    for row in monitor.history:
        exact = 0.1 * row["sharpness/gradient_norm"] + 0.005 * row["sharpness/gradient_curvature"]
        assert row["sharpness/sam"] == pytest.approx(exact, rel=1e-9)


def test_a_summed_loss(tmp_path):
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
def test_the_edge_of_each_optimizer(tmp_path, make, factor):
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
        """What is frozen now may be trained later."""

        def __init__(self):
            super().__init__()
            self.other.requires_grad_(False)

    later = HessianMonitor(every_n_train_steps=5, max_overhead=None, parameters=["other.*"])
    with pytest.warns(match=r"parameters=\['other.\*'\] matches none of the trained"):
        train(Frozen, data, [later], tmp_path)


# -- where to ---------------------------------------------------------------------------------


def test_history_file_and_memory_agree(tmp_path):
    callbacks = [
        HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4),
        SharpnessMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4),
    ]
    train(Quartic, ones, callbacks, tmp_path)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[::2] == callbacks[0].history
    assert rows[1::2] == callbacks[1].history
    # A second run in the same folder does not mix with the first one's rows.
    train(Quartic, ones, [HessianMonitor(max_overhead=None, probe_samples=4)], tmp_path)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "history-1.jsonl").read_text().splitlines() == lines


@pytest.mark.pictures
def test_without_a_logger(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=10)
    train(Linear, regression, callbacks, tmp_path, logger=False)
    assert [len(c.history) for c in callbacks] == [1, 1, 2]
    assert (tmp_path / "history.jsonl").exists()
    assert sorted(p.suffix for p in (tmp_path / "landscape").iterdir()).count(".png") == 6


@pytest.mark.pictures
def test_tensorboard_and_csv(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None, every_n_train_steps=2)
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    train(Linear, regression, callbacks, tmp_path, logger=loggers, max_epochs=3)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for key in ("top_eigenvalue", "residual", "hvps", "edge", "edge_ratio"):
        logged = [(e.step, e.value) for e in events.Scalars(f"hessian/{key}")]
        kept = [(row["step"], row[f"hessian/{key}"]) for row in callbacks[0].history]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in kept]
    for key in ("sam", "gradient_norm", "gradient_curvature"):
        assert [e.step for e in events.Scalars(f"sharpness/{key}")] == steps(callbacks[1])
    assert {"landscape/line", "landscape/plane"} <= set(tags["images"])
    assert [e.step for e in events.Images("landscape/plane")] == steps(callbacks[2])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    patterns = re.findall(rb"hessian/[a-z_]+\$", layout)
    assert b"hessian/top_eigenvalue$" in patterns
    assert b"hessian/edge$" in patterns
    table = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "hessian/top_eigenvalue" in table.splitlines()[0]
    saved = sorted((tmp_path / "tb" / "version_0" / "landscape").glob("landscape-plane-*.npz"))
    assert [Slice.load(path).metadata["step"] for path in saved] == steps(callbacks[2])


def test_a_layout_of_the_user_is_left_alone(tmp_path):
    class Own(Linear):
        def on_fit_start(self):
            self.logger.experiment.add_custom_scalars({"mine": {"a": ["Multiline", ["loss"]]}})

    logger = TensorBoardLogger(tmp_path, name="tb")
    monitor = HessianMonitor(max_overhead=None)
    with pytest.warns(match="custom-scalars layout already"):
        train(Own, regression, [monitor], tmp_path, logger=logger)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    layouts = events.Tensors("custom_scalars__config__")
    assert len(layouts) == 1
    assert b"mine" in layouts[0].tensor_proto.string_val[0]


def test_callback_metrics_serve_lightnings_own_callbacks(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=3, max_overhead=None, probe_samples=4)
    best = ModelCheckpoint(
        tmp_path, monitor="hessian/top_eigenvalue", every_n_train_steps=3, save_top_k=1
    )
    stopping = EarlyStopping("hessian/edge_ratio", patience=50)
    run = train(
        Quartic, ones, [stopping, monitor, best], tmp_path, enable_checkpointing=True, logger=None
    )
    lowest = min(row["hessian/top_eigenvalue"] for row in monitor.history[:-1])
    assert float(best.best_model_score) <= lowest * (1 + 1e-6)
    assert run.trainer.callback_metrics["hessian/top_eigenvalue"] == pytest.approx(
        monitor.history[-1]["hessian/top_eigenvalue"]
    )


def test_values_are_logged_once_not_repeated(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4)
    run = train(Quartic, ones, [monitor], tmp_path)
    assert [s for s, _ in run.logger.values("hessian/top_eigenvalue")] == steps(monitor)


def test_a_failing_logger_does_not_fail_the_run(tmp_path):
    from tests.runs import MemoryLogger

    class Broken(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("hessian/") for key in metrics):
                raise OSError("disk full")

    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4)
    with pytest.warns(match="Broken could not be written .OSError: disk full") as caught:
        train(Quartic, ones, [monitor], tmp_path, logger=Broken())
    assert len([w for w in caught if "disk full" in str(w.message)]) == 1
    assert len(monitor.history) == 4


# -- probes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data,
        lambda data: list(data),
        lambda data: tuple(data.dataset.tensors),
        lambda data: Probe(data),
        lambda data: DataLoader(data.dataset, batch_size=7),
    ],
    ids=["loader", "list of batches", "one batch", "Probe", "ragged last batch"],
)
def test_given_probes_are_the_same_data(tmp_path, make):
    data = regression()
    x = data.dataset.tensors[0].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())[-1]
    monitor = HessianMonitor(max_overhead=None, probe=make(data), tol=1e-4)
    train(Linear, data, [monitor], tmp_path)
    assert monitor.history[0]["step"] == 1
    assert monitor.history[0]["probe_samples"] == 60
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(exact, rel=1e-6)


def test_a_shuffling_probe_loader_does_not_disturb_training(tmp_path):
    data = regression()
    shuffled = DataLoader(data.dataset, batch_size=20, shuffle=True)
    plain = train(Linear, lambda: DataLoader(data.dataset, batch_size=20, shuffle=True), ())
    probed = HessianMonitor(max_overhead=None, probe=shuffled)
    run = train(
        Linear, lambda: DataLoader(data.dataset, batch_size=20, shuffle=True), [probed], tmp_path
    )
    assert torch.equal(
        plain.state["parameters"]["layer.weight"], run.state["parameters"]["layer.weight"]
    )


def test_callbacks_share_what_they_keep(tmp_path):
    callbacks = [HessianMonitor(), SharpnessMonitor(), LandscapeMonitor(probe_samples=20)]
    train(Linear, regression, callbacks, tmp_path)
    assert callbacks[0].loss.probe is callbacks[1].loss.probe
    assert callbacks[2].loss.probe is not callbacks[0].loss.probe
    assert callbacks[2].loss.probe.size == 20


def test_batches_without_a_loss_are_left_out(tmp_path):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    monitor = HessianMonitor(max_overhead=None)
    train(Skips, regression, [monitor], tmp_path)
    assert monitor.history[0]["probe_samples"] == 40


@pytest.mark.parametrize("skipped", [1, 2])
def test_a_later_batch_without_a_loss_leaves_the_probe_alone(tmp_path, skipped):
    """The Hessian of a linear regression is 2 X'X / N, of the first batch at every step."""

    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    monitor = HessianMonitor(
        every_n_train_steps=1, max_overhead=None, probe_samples=20, tol=1e-5, batch_edge_ratio=True
    )
    with pytest.warns(match="batch_edge_ratio is not logged at steps whose batches gave no loss"):
        train(Skips, regression, [monitor], tmp_path)
    x = regression().dataset.tensors[0][:20].double()
    exact = np.linalg.eigvalsh((2 * x.T @ x / 20).numpy())[-1]
    values = [row["hessian/top_eigenvalue"] for row in monitor.history]
    assert values == pytest.approx([exact] * 6, rel=1e-5)
    without = [row["step"] for row in monitor.history if "hessian/batch_edge_ratio" not in row]
    assert without == [1 + skipped, 4 + skipped]


def test_dict_batches_and_one_argument(tmp_path):
    class Keyed(Linear):
        def training_step(self, batch):
            return {"loss": self.loss(self.layer(batch["x"]), batch["y"]), "note": "kept"}

    x, y = regression().dataset.tensors
    rows = [{"x": a, "y": b, "name": "s"} for a, b in zip(x, y, strict=True)]
    monitor = HessianMonitor(max_overhead=None, tol=1e-4)
    train(Keyed, DataLoader(rows, batch_size=20), [monitor], tmp_path)
    exact = np.linalg.eigvalsh((2 * x.double().T @ x.double() / len(x)).numpy())[-1]
    assert monitor.history[0]["hessian/top_eigenvalue"] == pytest.approx(exact, rel=1e-5)


def test_unused_and_frozen_parameters(tmp_path):
    class Partly(Linear):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    monitor = HessianMonitor(max_overhead=None)
    train(Partly, regression, [monitor], tmp_path)
    assert len(monitor.history) == 1


def test_fast_dev_run_writes_nothing(tmp_path):
    callbacks = landscape_callbacks(max_overhead=None)
    train(Linear, regression, callbacks, tmp_path, fast_dev_run=True)
    assert callbacks[0].measured == 1
    assert list(tmp_path.iterdir()) == []


def test_ten_thousand_rows_are_kept(tmp_path):
    monitor = HessianMonitor()
    for step in range(10_050):
        monitor._bookkeeping.history.add({"step": step})
    assert [len(monitor.history), monitor.history[0]["step"]] == [10_000, 50]


def test_float64_inputs_stay(tmp_path):
    data = TensorDataset(torch.ones(8, 1, dtype=torch.float64))
    monitor = HessianMonitor(max_overhead=None)
    train(Quartic, DataLoader(data, batch_size=4), [monitor], tmp_path, precision="64-true")
    assert monitor.history[0]["hessian/top_eigenvalue"] > 0


def test_verbose_prints_each_measurement(tmp_path, caplog):
    caplog.set_level("INFO")
    monitor = SharpnessMonitor(every_n_train_steps=5, max_overhead=None, verbose=True)
    train(Quartic, ones, [monitor], tmp_path)
    told = [r.message for r in caplog.records if "sharpness/sam" in r.message]
    assert [line.split(":")[0] for line in told] == [f"step {s}" for s in steps(monitor)]


def test_barebones(tmp_path):
    monitor = HessianMonitor(max_overhead=None, probe_samples=4)
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None}
    train(Quartic, ones, [monitor], tmp_path, log_every_n_steps=None, **bare)
    assert monitor.measured == 1


def test_values_in_the_progress_bar(tmp_path):
    monitor = HessianMonitor(max_overhead=None, probe_samples=4, prog_bar=True)
    run = train(Quartic, ones, [monitor], tmp_path)
    shown = run.trainer.progress_bar_metrics
    assert shown["hessian/top_eigenvalue"] == pytest.approx(
        monitor.history[-1]["hessian/top_eigenvalue"], rel=1e-3
    )


class Once(torch.autograd.Function):
    """A kernel whose backward has no backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(4)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 4 * grad * x**3


class OnceQuartic(Quartic):
    def training_step(self, batch, batch_idx):
        return batch[0].mean() * Once.apply(self.w).sum() / 4


@pytest.mark.parametrize(
    ("module", "engine", "told"),
    [
        (Quartic, "double_backward", "exact, by double backward"),
        (OnceQuartic, "finite_difference", "central differences of gradients (no double backward"),
    ],
)
def test_the_engine_is_told_once(tmp_path, module, engine, told):
    """As text in TensorBoard, in every row of the history, and as a warning where it is not exact.

    The gradient is w^3 and the curvature 3 w^2 = 3 g^(2/3) either way.
    """
    monitors = [
        HessianMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4),
        SharpnessMonitor(every_n_train_steps=2, max_overhead=None, probe_samples=4),
    ]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, ones, monitors, tmp_path, logger=logger)
    for monitor in monitors:
        assert len(monitor.history) > 5
        assert {row["engine"] for row in monitor.history} == {engine}
    for curved, sloped in zip(monitors[0].history, monitors[1].history, strict=True):
        expected = pytest.approx(3 * sloped["sharpness/gradient_norm"] ** (2 / 3), rel=1e-3)
        assert sloped["sharpness/gradient_curvature"] == expected
        assert curved["hessian/top_eigenvalue"] == expected
    events = EventAccumulator(str(tmp_path)).Reload()
    for kind in ("hessian", "sharpness"):
        (event,) = events.Tensors(f"{kind}/engine/text_summary")
        assert event.tensor_proto.string_val[0].decode().startswith(told)
    said = [w for w in caught if "Hessian-vector products are" in str(w.message)]
    assert len(said) == (engine == "finite_difference")
