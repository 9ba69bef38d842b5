"""Bounded memory and work in a run: no repeated work, no growth, and a full device."""

import gc
import math
import re
import weakref
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from lightning_landscape.geometry import Objective, batches, line_slice, top_eigenvalues
from lightning_landscape.training import objectives
from tests.oracles import arguments
from tests.runs import differences, train
from tests.small import regression


class Net(pl.LightningModule):
    """Counts its evaluations while it is measured; ``most`` examples fit into a graph."""

    most = math.inf
    norm = False

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(6) if self.norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        probing = self.log.__name__ == "_log_nothing"
        if probing:
            seen((len(x), torch.is_grad_enabled()))
        if probing and torch.is_grad_enabled() and len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tight(Net):
    most = 4


class TightNorm(Tight):
    norm = True


seen = Mock()  # isolation restores all other state
EXACT = {"every_n_train_steps": 6, "max_overhead": None}


def probe(examples=20):
    return tuple(next(iter(regression(examples, examples))))


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.reset_mock()


def measured(make, tmp_path, monkeypatch, free, callbacks=None):
    """History of a HessianMonitor with 20 examples in one batch while training uses 6."""
    monkeypatch.setattr(batches, "free_memory", lambda device: free)
    monitor = HessianMonitor(probe=probe(), **EXACT)
    outcome = train(make, regression(60, 6), callbacks or [monitor], tmp_path, max_epochs=1)
    return monitor, outcome


@pytest.mark.parametrize(
    ("make", "free", "largest"),
    [(Net, 2**40, 20), (Net, None, 6), (Tight, 2**40, 4), (Tight, None, 4)],
    ids=["enough", "unknown", "full", "full and unknown"],
)
def test_graphs_fit_into_memory(make, free, largest, tmp_path, monkeypatch, recwarn):
    reference, _ = measured(Net, tmp_path / "a", monkeypatch, 2**40)
    seen.reset_mock()
    monitor, outcome = measured(make, tmp_path / "b", monkeypatch, free)
    graphs = [size for size, graph in arguments(seen) if graph]
    assert max(graphs[-10:]) <= largest  # known by the last measurement
    assert len(monitor.history) == 2
    for row, truth in zip(monitor.history, reference.history, strict=True):
        for key in ("hessian/top_eigenvalue", "hessian/edge_ratio"):
            assert row[key] == pytest.approx(truth[key], rel=1e-4)
    messages = [str(w.message) for w in recwarn if "in pieces" in str(w.message)]
    assert len(messages) == (largest < 20)
    without = train(Net, regression(60, 6), [], tmp_path / "c", max_epochs=1)
    assert not differences(without.state, outcome.state)


def test_batchnorm_is_not_split_and_fails_with_advice(tmp_path, recwarn):
    monitor = HessianMonitor(probe=probe(), every_n_train_steps=2, max_overhead=None)
    outcome = train(TightNorm, regression(60, 6), [monitor], tmp_path, max_epochs=1)
    messages = " ".join(str(warning.message) for warning in recwarn)
    assert messages.count("not split: the pieces give losses of") == 1
    assert re.search("OutOfMemoryError.*stops measuring.*use less memory", messages)
    assert monitor.history == []
    assert monitor.failed == 3
    without = train(TightNorm, regression(60, 6), [], tmp_path, max_epochs=1)
    assert not differences(without.state, outcome.state)


def test_nothing_is_computed_twice_in_a_round(tmp_path, monkeypatch):
    """Loss, gradient and graph are shared by all that measure the same loss at one step."""
    made = []

    class Kept(Objective):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(objectives, "Objective", Kept)
    data = probe()
    settings = {"probe": data, "every_n_train_steps": 6, "max_overhead": None}
    callbacks = [
        LandscapeMonitor(span=(-1.0, 1.0), resolution=3, line_resolution=11, **settings),
        SharpnessMonitor(**settings),
        HessianMonitor(**settings),
    ]
    train(Net, regression(60, 6), callbacks, tmp_path, max_epochs=1)
    assert len(made) == 3  # one a round, and the last picture's
    # One graph gives loss and gradient for all; one product along the gradient; then SAM's loss,
    # 10 points of each of two lines and 8 of the plane, whose middles are known.
    hvps = int(callbacks[2].history[1]["hessian/hvps"]) + 1
    assert (made[1].forwards, made[1].gradients, made[1].hvps) == (1 + 20 + 8, 1, hvps)


def test_sharpness_alone_builds_one_graph(tmp_path, monkeypatch):
    """Its gradient is computed from the graph of its product."""
    train(Net, regression(60, 6), [SharpnessMonitor(probe=probe(), **EXACT)], tmp_path, max_steps=1)
    # Two forwards to see that the loss does not vary; a graph of 6 to count its bytes.
    assert arguments(seen) == [(20, False)] * 2 + [(6, True), (20, True), (20, False)]


# -- over many measurements -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["kept", "bounded"])
def test_nothing_grows_over_a_thousand_measurements(memory, monkeypatch):
    """Exact counts of live objects instead of the process's memory, with the collector off."""
    monkeypatch.setattr(batches, "free_memory", lambda device: 2**40 if memory == "kept" else None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, params = torch.randn(8, 3), dict(net.named_parameters())
    graphs = weakref.WeakSet()

    class Token:
        def __init__(self, tensor):
            self.tensor = tensor
            graphs.add(self)

    def term(rows):
        def loss():
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: Token(tensor.detach()), lambda token: token.tensor
            ):
                return net(rows).square().mean()

        return 4.0, loss

    last, alive = None, []
    gc.collect()
    gc.disable()
    try:
        for turn in range(1000):
            objective = Objective([term(x[:4]), term(x[4:])], params, check_deterministic=False)
            last = top_eigenvalues(objective, init=last, max_hvps=6)
            objective.gradient()
            held = len(graphs)
            objective.loss_at(last.eigenvectors[0])
            del objective
            with torch.no_grad():
                for p in params.values():
                    p.mul_(0.999)
            if turn % 100 == 99:
                tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
                alive.append((tensors, len(graphs)))
                assert (held > 0) == (memory == "kept")
    finally:
        gc.enable()
    assert alive == [alive[0]] * 10
    assert alive[0][1] == 0


# -- no waiting for a device, no copies between devices -------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_product_and_slice_do_not_read_from_the_device():
    """Reading a number waits for the device: once a call for the guard of the weights, once at the
    end of a slice for its losses; never once a point, never a copy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    x, params = torch.randn(9, 5), dict(net.named_parameters())
    parts = [(3.0, lambda i=i: net(x[i : i + 3]).square().mean()) for i in (0, 3, 6)]
    objective = Objective(parts, params, check_deterministic=False)
    v = objective.gradient()
    objective.hvp(v)
    with Calls() as product:
        objective.hvp(v)
    waits = [name for name in product.names if name in ("_local_scalar_dense", "equal")]
    assert waits == ["equal"]
    assert "_to_copy" not in product.names
    counted = []
    for resolution in (5, 25):
        with Calls() as line:
            line_slice(objective, v, resolution=resolution)
        counted.append(line.names.count("_local_scalar_dense") + line.names.count("equal"))
        # One pass over the displaced weights a point, and one copy to put them back.
        assert line.names.count("_foreach_copy_") == 1
        displaced = [name for name in line.names if name == "add"]
        assert len(displaced) == (resolution - 1) * len(params)
    assert counted[0] == counted[1]
