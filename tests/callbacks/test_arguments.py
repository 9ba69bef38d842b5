"""Invalid arguments: the message names the argument, its value and what to pass."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessMonitor,
    landscape_callbacks,
)
from tests.runs import train
from tests.small import Linear, Manual, Quartic, ones, regression


@pytest.mark.parametrize(
    "kind",
    [
        GeneralizationMonitor,
        HessianMonitor,
        InterpolationMonitor,
        LandscapeMonitor,
        SharpnessMonitor,
    ],
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_train_steps": 0}, ValueError, r"every_n_train_steps=0\): expected an integer"),
        ({"every_n_train_steps": 2.0}, ValueError, r"every_n_train_steps=2.0\)"),
        ({"every_n_train_steps": True}, ValueError, r"every_n_train_steps=True\)"),
        ({"every_n_epochs": -1}, ValueError, r"every_n_epochs=-1\): expected an integer >= 1"),
        ({"every_n_train_steps": None}, ValueError, r"every_n_train_steps=None, every_n_epochs=No"),
        ({"max_overhead": 0.0}, ValueError, r"max_overhead=0.0\): expected a share .*or None for"),
        ({"max_overhead": float("nan")}, ValueError, r"max_overhead=nan\)"),
        ({"probe_samples": 0}, ValueError, r"probe_samples=0\): expected an integer >= 1"),
        ({"probe_samples": None}, ValueError, r"probe_samples=None\)"),
        ({"probe_mode": "test"}, ValueError, r"probe_mode='test'\): expected 'train' or 'eval'"),
        ({"loss_reduction": "none"}, ValueError, r"loss_reduction='none'\): expected 'mean' or"),
        ({"engine": "jax"}, ValueError, r"engine='jax'\): expected 'auto' or 'double_backward'"),
        ({"loss_fn": 3}, TypeError, r"loss_fn=3\): expected a function \(pl_module, batch\)"),
        ({"name": "a/b"}, ValueError, r"name='a/b'\): expected a word without '/'"),
        ({"name": ""}, ValueError, r"name=''\)"),
    ],
)
def test_common_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=kind.__name__ + r"\(" + message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (HessianMonitor, {"k": 0}, r"HessianMonitor\(k=0\): expected an integer >= 1"),
        (HessianMonitor, {"k": 1.5}, r"k=1.5"),
        (HessianMonitor, {"method": "arpack"}, r"method='arpack'\): expected 'lanczos' or 'power'"),
        (HessianMonitor, {"tol": 0.0}, r"tol=0.0\): expected a number between 0 and 1"),
        (HessianMonitor, {"tol": float("nan")}, r"tol=nan"),
        (HessianMonitor, {"rtol": 1.0}, r"rtol=1.0\): expected a number from 0 to 1, or None"),
        (HessianMonitor, {"rtol": -0.1}, r"rtol=-0.1\)"),
        (HessianMonitor, {"k": 5, "max_hvps": 4}, r"max_hvps=4\): expected an integer >= k=5"),
        (SharpnessMonitor, {"rho": 0.0}, r"SharpnessMonitor\(rho=0.0\): expected a finite number"),
        (SharpnessMonitor, {"rho": float("inf")}, r"rho=inf"),
        (LandscapeMonitor, {"directions": "pac"}, r"directions='pac'\): expected 'random' or"),
        (LandscapeMonitor, {"directions": ("random",) * 3}, r"expected one or two"),
        (LandscapeMonitor, {"span": (1.0, 1.0)}, r"span=\(1.0, 1.0\)\): expected two finite"),
        (LandscapeMonitor, {"span": (0.0, float("inf"))}, r"span=\(0.0, inf\)"),
        (LandscapeMonitor, {"resolution": 1}, r"resolution=1\): expected an integer >= 2, or 0"),
        (LandscapeMonitor, {"resolution": (5, 2.5)}, r"resolution=2.5"),
        (LandscapeMonitor, {"line_resolution": -2}, r"line_resolution=-2"),
        (LandscapeMonitor, {"resolution": 0, "line_resolution": 0}, r"nothing is left to draw"),
    ],
)
def test_own_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (HessianMonitor, {"trace_samples": 1}, r"trace_samples=1\): expected an integer >= 2"),
        (HessianMonitor, {"density_samples": -3}, r"density_samples=-3"),
        (HessianMonitor, {"blocks": "layer"}, r"blocks='layer'\): expected True, False or a map"),
        (SharpnessMonitor, {"worst_case_norm": "l1"}, r"worst_case_norm='l1'\): expected 'l2' or"),
        (SharpnessMonitor, {"sigma": 0.0}, r"sigma=0.0\): expected a finite number > 0"),
        (SharpnessMonitor, {"epsilon": -1.0}, r"epsilon=-1.0"),
        (SharpnessMonitor, {"critical_rtol": 1.0}, r"critical_rtol=1.0\): expected a number from"),
        (SharpnessMonitor, {"worst_case_steps": 0}, r"worst_case_steps=0\): expected an integer"),
        (SharpnessMonitor, {"samples": 1}, r"samples=1\): expected an integer >= 2"),
    ],
)
def test_optional_quantities(kind, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**arguments)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_probe_arguments(samples):
    with pytest.raises(ValueError, match=f"samples={samples}: expected an integer >= 1"):
        Probe(samples=samples)


def test_manual_optimisation_needs_a_loss(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Pass SharpnessMonitor\(loss_fn=lambda"):
        train(Manual, regression, [SharpnessMonitor()], tmp_path)


def test_two_callbacks_of_one_name(tmp_path):
    """Lightning rejects them in the Trainer's list; the package in ``configure_callbacks``."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HessianMon"):
        train(Linear, regression, [HessianMonitor(), HessianMonitor()], tmp_path)

    class SameKeys(HessianMonitor):
        pass

    with pytest.raises(MisconfigurationException, match="2 callbacks would log under 'hessian'"):
        train(Linear, regression, [HessianMonitor(), SameKeys()], tmp_path)
    named = [HessianMonitor(), HessianMonitor(name="second")]
    train(Linear, regression, named, tmp_path)
    assert "hessian/second/top_eigenvalue" in named[1].history[0]


def test_empty_probe(tmp_path):
    with pytest.raises(ValueError, match=r"HessianMonitor\(probe=\[\]\): it holds no batch"):
        HessianMonitor(probe=[])
    with pytest.raises(ValueError, match="probe=DataLoader: it holds no batch"):
        train(Linear, regression, [HessianMonitor(probe=DataLoader([]))], tmp_path)


def test_invalid_probe_warns_and_training_continues(tmp_path):
    monitor = HessianMonitor(
        probe=(torch.ones(4, 3), torch.ones(4, 1)), every_n_train_steps=1, max_overhead=None
    )
    with pytest.warns(match=r"hessian: a measurement failed \(RuntimeError.*shapes") as caught:
        run = train(Linear, regression, [monitor], tmp_path)
    assert run.trainer.global_step == 6
    assert monitor.disabled
    assert monitor.failed == 3
    messages = [str(w.message) for w in caught if "a measurement failed" in str(w.message)]
    assert "3 times in a row and stops measuring" in messages[-1]


def test_loss_that_is_not_a_scalar(tmp_path):
    def wrong(pl_module, batch):
        return {"total": 1.0}

    monitor = HessianMonitor(loss_fn=wrong)
    with pytest.warns(match="loss_fn returned dict: expected a scalar tensor"):
        train(Linear, regression, [monitor], tmp_path)


def test_given_batch_without_a_loss(tmp_path):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if len(batch[0]) == 3 else super().training_step(batch, batch_idx)

    monitor = HessianMonitor(probe=(torch.ones(3, 5), torch.ones(3, 1)))
    with pytest.warns(match=r"training_step returned NoneType for a probe batch.*pass loss_fn"):
        train(Skips, regression, [monitor], tmp_path)


def test_no_trained_parameter(tmp_path):
    class Apart(Linear):
        """The optimizer holds a parameter that does not belong to the module."""

        def configure_optimizers(self):
            self.__dict__["loose"] = nn.Parameter(torch.ones(1))
            return torch.optim.SGD([self.__dict__["loose"]], lr=0.1)

    with pytest.warns(match="none requires a gradient: expected at least one trainable"):
        train(Apart, regression, [HessianMonitor()], tmp_path)


def test_share_that_looks_like_percent_warns():
    with pytest.warns(UserWarning, match=r"max_overhead=5\): that is 500% .* pass 0\.05"):
        HessianMonitor(max_overhead=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianMonitor(max_overhead=1.0)


def test_nan_loss_is_logged_as_nan(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, max_overhead=None)
    run = train(lambda: Quartic(lr=1e20), ones, [monitor], tmp_path)
    values = [value for _, value in run.logger.values("hessian/top_eigenvalue")]
    assert values[0] != values[0]
    assert monitor.failed == 0


def test_nondeterministic_loss_is_reported(tmp_path):
    noise = random.SystemRandom()  # it has no state that could be restored

    def noisy(pl_module, batch):
        return pl_module.layer(batch[0]).square().mean() * (1 + noise.random())

    with pytest.warns(match="two evaluations of the probe at the same weights gave"):
        train(Linear, regression, [SharpnessMonitor(loss_fn=noisy)], tmp_path)


def test_landscape_callbacks_stop():
    callbacks = landscape_callbacks(stop_above=1.5, patience=2)
    assert [type(c).__name__ for c in callbacks[:3]] == [
        "HessianMonitor",
        "SharpnessMonitor",
        "LandscapeMonitor",
    ]
    assert (callbacks[3].threshold, callbacks[3].patience) == (1.5, 2)


def test_landscape_callbacks_by_name():
    chosen = landscape_callbacks(monitors=["generalization", "hessian"], stop_above=1.5)
    assert [type(c).__name__ for c in chosen] == [
        "GeneralizationMonitor",
        "HessianMonitor",
        "SharpnessEarlyStopping",
    ]
    assert [c.probe_mode for c in chosen[:2]] == ["eval", "train"]
