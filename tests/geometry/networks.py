"""Three small smooth networks in float64, each with its loss and its dense Hessian."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles import F64, dense_hessian, generator, normal


class Attention(nn.Module):
    """One self-attention block, by the fused kernel or written out."""

    def __init__(self, size=4, heads=2):
        super().__init__()
        self.heads, self.fused = heads, True
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, 3)

    def forward(self, x):
        batch, length, size = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, size // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
            mixed = weights @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, size).mean(1))


class Problem:
    """A network with data; ``loss()`` is the function for an Objective."""

    def __init__(self, module, x, classes=3):
        self.module, self.x = module, x
        self.y = torch.randint(classes, (len(x),), generator=generator(1), device="cpu").to(
            x.device
        )
        # Larger than the default initialisation, so that the curvature is not all at the end.
        with torch.no_grad():
            for seed, p in enumerate(module.parameters()):
                p.copy_(0.7 * normal(*p.shape, seed=seed).to(p))

    def loss(self):
        return F.cross_entropy(self.module(self.x), self.y)

    def half(self, rank):
        """The loss on one of two unequal shares of the data, with its size."""
        part = slice(0, 4) if rank == 0 else slice(4, None)
        size = len(self.x[part])
        return size, lambda: F.cross_entropy(self.module(self.x[part]), self.y[part])

    @property
    def params(self):
        return dict(self.module.named_parameters())

    @cached_property
    def hessian(self):
        def loss(module):
            return F.cross_entropy(module(self.x), self.y)

        fused = getattr(self.module, "fused", None)
        if fused is not None:  # the written-out attention is the oracle
            self.module.fused = False
        try:
            return dense_hessian(self.module, loss)
        finally:
            if fused is not None:
                self.module.fused = fused


def mlp(dtype=F64):
    module = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)
    return Problem(module, normal(11, 4).to(dtype))


def conv_net():
    """With BatchNorm in eval mode, on running statistics that are not the initial ones."""
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).to(F64)
    problem = Problem(module, normal(9, 1, 6, 6))
    module.train()
    module(problem.x)
    module.eval()
    return problem


def attention():
    return Problem(Attention().to(F64), normal(7, 5, 4))


NETWORKS = {"mlp": mlp, "conv_net": conv_net, "attention": attention}


class OnceTanh(torch.autograd.Function):
    """tanh whose backward cannot be differentiated, like many custom kernels."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Once(nn.Module):
    def forward(self, x):
        return OnceTanh.apply(x)


def without_double_backward():
    """The network of :func:`mlp`, and the same with the custom tanh."""
    smooth = mlp()
    layers = [Once() if isinstance(layer, nn.Tanh) else layer for layer in smooth.module]
    once = Problem(nn.Sequential(*layers), smooth.x)
    return smooth, once
