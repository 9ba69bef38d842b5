"""Changes to FSDP2 modules are undone; models that cannot be measured raise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from lightning_landscape.geometry.stability import stability_edge
from lightning_landscape.training.isolation.sharding import unsharded
from tests.integration.members import Mlp
from tests.integration.processes import both, forks, on_two


class Net(nn.Module):
    """Unshards and reshards parameters in its forward, in all ways that FSDP2 allows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.c.shout = self.c.forward
        self.broken: list[Exception] = []

    def forward(self, x):
        if isinstance(self.c, FSDPModule):
            handle = self.c.unshard(async_op=True)  # gathers ahead
            handle and handle.wait()
        x = self.b(torch.tanh(self.a(x)))
        if self.broken:
            raise self.broken[0]
        return self.c.shout(x).square().mean()


def grouped(net, policy):
    fully_shard([net.a, net.b], reshard_after_forward=False, mp_policy=policy)
    fully_shard(net.c, mp_policy=policy)
    register_fsdp_forward_method(net.c, "shout")
    net.c.set_reshard_after_backward(False)
    fully_shard(net, mp_policy=policy)
    return net


def everything(net):
    """The attributes of the modules, of FSDP's states and of their parameter groups."""
    found = [(name, id(p), p.requires_grad) for name, p in net.named_parameters()]
    for module in net.modules():
        found += [(key, id(value)) for key, value in vars(module).items()]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found.append([(key, id(hook)) for key, hook in hooks.items()])
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            for holder in (state, *state._fsdp_param_groups):
                found += [(key, str(value)) for key, value in sorted(vars(holder).items())]
    return found


def sharded_pair(rank, policy=MixedPrecisionPolicy()):  # noqa: B008
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    return plain, grouped(Net(), policy)


@forks
@pytest.mark.parametrize("fault", [False, True])
def test_fsdp_state_is_restored(fault):
    def work(rank):
        plain, net = sharded_pair(rank)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        twin = torch.optim.Adam(plain.parameters(), lr=0.1)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            for model, stepper in ((net, optimizer), (plain, twin)):
                stepper.zero_grad()
                model(x).backward()
                stepper.step()
            net.c.reshard()
            before = everything(net)
            try:
                with unsharded(net) as whole:
                    assert not any(isinstance(p, DTensor) for p in net.parameters())
                    params = dict(net.named_parameters())
                    for name, p in plain.named_parameters():
                        assert torch.allclose(params[name], p)
                    loss = net(x)
                    assert torch.allclose(loss, plain(x))
                    gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                    sum(g.square().sum() for g in gradient).backward()
                    edge = stability_edge(whole.view_optimizers([optimizer]), params)
                    expected = stability_edge([twin], dict(plain.named_parameters()))
                    for name, scale in expected.scale.items():
                        assert torch.allclose(edge.scale[name], scale, rtol=1e-4)
                    if fault:
                        net.broken.append(OverflowError())
                        net(x)
            except OverflowError:
                net.broken.clear()
            assert everything(net) == before

    both(work)


@forks
def test_unsharded_parameters_are_gathered_again():
    def work(rank):
        _, net = sharded_pair(rank)
        with torch.no_grad():
            net(torch.ones(1, 3))
        assert not isinstance(net.a.weight, DTensor)  # reshard_after_forward=False
        with torch.no_grad():
            net.a.reshard()
            net.a.weight.mul_(2.0)
            net.a.unshard()
        with unsharded(net) as whole:
            assert isinstance(whole.shard_of(net.a.weight), DTensor)
        assert isinstance(net.a.weight, DTensor)

    both(work)


@forks
def test_mixed_precision():
    """Autocast replaces FSDP's casts, with weights as precise as the shards."""

    def work(rank):
        plain, net = sharded_pair(rank, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = float(net(x))
            with unsharded(net) as parameters, parameters.autocast():
                assert net.a.weight.dtype == torch.float32
                assert net.a(x).dtype == torch.bfloat16
                assert float(net(x)) == pytest.approx(theirs, rel=2e-2)
            assert theirs != float(plain(x))

    both(work)


class Split(Mlp):
    def configure_model(self):
        mesh = self.device_mesh["tensor_parallel"]
        if not isinstance(self.net[0].weight, DTensor):
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(use_local_output=False)})


class SplitAndSharded(Split):
    def configure_model(self):
        super().configure_model()
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@forks
@pytest.mark.parametrize("kind", [Split, SplitAndSharded])
def test_tensor_parallelism_raises(kind):
    def work(rank):
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, logger=False, max_steps=1,
            callbacks=[HessianMonitor()], enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(kind())

    for answer in on_two(work):
        assert isinstance(answer, MisconfigurationException)
        assert "tensor parallelism" in str(answer)
        assert "fully_shard" in str(answer)


@pytest.mark.parametrize("monitor", [HessianMonitor, SharpnessMonitor, LandscapeMonitor])
@pytest.mark.parametrize(
    "name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"]
)
def test_unsupported_strategies_raise(name, monitor):
    """Detected by name, because they cannot run here; so are subclasses, such as Ray's."""
    strategy = type("Own", (type(name, (), {}),), {})()
    callback = monitor()
    trainer = SimpleNamespace(callbacks=[callback], strategy=strategy)
    module = SimpleNamespace(automatic_optimization=True)
    with pytest.raises(MisconfigurationException, match=r"under Own.*DDPStrategy.*fully_shard"):
        callback.setup(trainer, module, "fit")
