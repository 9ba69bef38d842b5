"""Captured, given and shared probes."""

from __future__ import annotations

import functools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessMonitor,
)
from lightning_landscape.training.probes import Probes
from lightning_landscape.training.run_state import RunState
from tests.runs import train
from tests.small import Linear, Quartic, ones, regression
from tests.training.clock import Timed

# -- captured during training ----------------------------------------------------------------------


def steps(callback) -> list[int]:
    return [row["step"] for row in callback.history]


@pytest.mark.parametrize(("samples", "first"), [(512, 10), (40, 10), (37, 10), (36, 9), (1, 1)])
def test_capture_ends_with_the_first_epoch(tmp_path, samples, first):
    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None, probe_samples=samples)
    train(Quartic, ones, [monitor], tmp_path)
    assert steps(monitor) == [first]
    assert monitor.history[0]["probe_samples"] == min(4 * math.ceil(samples / 4), 40)


def test_capture_ends_with_validation(tmp_path):
    class Validated(Quartic):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return ones()

    monitor = HessianMonitor(every_n_train_steps=100, max_overhead=None)
    train(Validated, ones, [monitor], tmp_path, val_check_interval=4)
    assert steps(monitor) == [5]
    assert monitor.history[0]["probe_samples"] == 16


def test_batches_without_a_loss_are_skipped(tmp_path):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    monitor = HessianMonitor(max_overhead=None)
    train(Skips, regression, [monitor], tmp_path)
    assert monitor.history[0]["probe_samples"] == 40


@pytest.mark.parametrize("skipped", [1, 2])
def test_later_batch_without_a_loss_does_not_change_the_probe(tmp_path, skipped):
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


def test_callbacks_share_a_captured_probe(tmp_path):
    callbacks = [HessianMonitor(), SharpnessMonitor(), LandscapeMonitor(probe_samples=20)]
    train(Linear, regression, callbacks, tmp_path)
    assert callbacks[0].loss.probe is callbacks[1].loss.probe
    assert callbacks[2].loss.probe is not callbacks[0].loss.probe
    assert callbacks[2].loss.probe.size == 20


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


def test_float64_inputs_stay(tmp_path):
    data = TensorDataset(torch.ones(8, 1, dtype=torch.float64))
    monitor = HessianMonitor(max_overhead=None)
    train(Quartic, DataLoader(data, batch_size=4), [monitor], tmp_path, precision="64-true")
    assert monitor.history[0]["hessian/top_eigenvalue"] > 0


@pytest.mark.short_runs
@pytest.mark.parametrize(
    ("steps", "limits"),
    [
        (60, [0.1]),
        (60, [0.1, 1.0]),
        (60, [0.1, None]),
        (1000, [0.1]),
        (-1, [0.1]),  # unknown length
    ],
)
def test_probe_size_does_not_depend_on_the_length_of_the_run(
    tmp_path, monkeypatch, clock, steps, limits
):
    """A short run has fewer values, on the same examples."""
    Timed(monkeypatch, clock, {})
    monitors = [
        SharpnessMonitor(max_overhead=limit, name=f"at{place}")
        for place, limit in enumerate(limits)
    ]

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 40

    data = functools.partial(regression, 1040)
    settings = {"max_epochs": -1, "max_steps": steps, "min_steps": 40}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Linear, data, [*monitors, Stop()], tmp_path, **settings)
    for monitor in monitors:  # 512 are wanted, of 20 at a time
        assert {row["probe_samples"] for row in monitor.history} == {520}
    assert not [w for w in caught if "the probe holds" in str(w.message)]


class Uncopyable:
    """Like an object of a graph library that cannot be copied."""

    def to(self, device):
        return self

    def __deepcopy__(self, memo):
        raise RuntimeError("no copy of this")


def probes_of(*callbacks):
    trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=None)
    return Probes(callbacks, RunState(trainer))


def test_batch_that_cannot_be_copied_fails_the_capturing_callbacks(tmp_path):
    callbacks = [HessianMonitor(), SharpnessMonitor(probe=(torch.ones(2, 1),)), LandscapeMonitor()]
    found = probes_of(*callbacks)
    failures = []
    for batch in ((torch.ones(4, 1),), Uncopyable()):
        found.copy_batch(batch, 0)
        found.add_copied(lambda quantity, error: failures.append((quantity, str(error))))
    assert failures == [(callbacks[0], "no copy of this"), (callbacks[2], "no copy of this")]
    assert callbacks[0].loss.probe.size == 0  # starts again
    assert len(found.captured()) == 1


def test_batch_is_added_once(tmp_path):
    monitor = HessianMonitor(probe_samples=8)
    found = probes_of(monitor)
    batch = torch.ones(4, 1)
    found.copy_batch(batch, 3)
    batch.zero_()  # by training_step
    for _ in range(2):
        found.add_copied(pytest.fail)
    (held,) = monitor.loss.probe.batches
    assert (held.index, held.size, held.batch.tolist()) == (3, 4, [[1.0]] * 4)
    assert not monitor.loss.probe.complete
    found.copy_batch(batch, 4)
    found.add_copied(pytest.fail, size=5)
    assert monitor.loss.probe.complete
    assert monitor.loss.probe.size == 9
    found.copy_batch(Uncopyable(), 5)  # not copied: the probe is complete
    found.add_copied(pytest.fail)


# -- given -----------------------------------------------------------------------------------------


def test_one_probe_for_each_source():
    loader, probe = regression(), Probe(samples=20)
    sources = [loader, loader, regression(), probe, probe, None, None]
    callbacks = [HessianMonitor(probe=source) for source in sources]
    probes_of(*callbacks)
    held = [callback.loss.probe for callback in callbacks]
    assert [held.index(one) for one in held] == [0, 0, 2, 3, 3, 5, 5]
    assert held[3] is probe


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


def test_shuffling_probe_loader_does_not_affect_training(tmp_path):
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
