"""Tensors that training_step changes, in place or by another."""

from __future__ import annotations

import torch
from torch import nn

from tests.constructs.base import Construct


class InPlace(Construct):
    """a buffer, in place"""

    def start(self):
        self.register_buffer("scale", torch.ones(1))

    def factor(self, batch):
        self.scale.mul_(0.999)
        return self.scale.clone()


class Rebound(Construct):
    """a buffer that is rebound"""

    def start(self):
        self.register_buffer("queue", torch.zeros(8, 6), persistent=False)

    def factor(self, batch):
        self.queue = torch.cat([self.queue[1:], batch[0][:1]])
        return 1 + self.queue.square().mean()


class Plain(Construct):
    """a tensor attribute, in place"""

    def start(self):
        self.scale = torch.ones(1)

    def factor(self, batch):
        self.scale *= 0.999
        return self.scale.clone()


class InList(Construct):
    """tensors in a list, one in place and one rebound"""

    def start(self):
        self.scales = [torch.ones(1), torch.ones(1)]

    def factor(self, batch):
        self.scales[0].mul_(0.999)
        self.scales[1] = self.scales[1] * 0.999
        return (self.scales[0] * self.scales[1]).clone()


class InDict(Construct):
    """a memory bank in a dict of tensors"""

    def start(self):
        self.bank = {label: torch.zeros(6) for label in range(3)}

    def factor(self, batch):
        for x, y in zip(*batch, strict=True):
            self.bank[int(y)].lerp_(x, 0.1)
        return 1 + torch.stack(list(self.bank.values())).square().mean()


class DataRebound(Construct):
    """a tensor whose .data is rebound"""

    def start(self):
        self.scales = [torch.ones(1)]

    def factor(self, batch):
        self.scales[0].data = self.scales[0].data * 0.999
        return self.scales[0].clone()


class Freed(Construct):
    """a tensor whose memory is freed at every second step"""

    def start(self):
        self.mean = torch.zeros(6)

    def factor(self, batch):
        memory = self.mean.untyped_storage()
        if memory.nbytes():
            factor = 1 + self.mean.square().mean()
            memory.resize_(0)
            return factor
        memory.resize_(6 * 4)
        self.mean.copy_(batch[0].mean(0))
        return 1 - 0.1 * self.mean.square().mean()


class Views(Construct):
    """a tensor and a view of it"""

    def start(self):
        self.whole = torch.ones(4)
        self.part = self.whole[:2]

    def factor(self, batch):
        self.part.mul_(0.999)
        return self.whole.mean()

    def seen(self):
        return self.part.data_ptr() == self.whole.data_ptr()


class Hidden(Construct):
    """a recurrent state in a tuple"""

    def start(self):
        self.cell = nn.LSTMCell(6, 4)
        self.state = (torch.zeros(8, 4), torch.zeros(8, 4))

    def factor(self, batch):
        hidden, cell = self.cell(batch[0], self.state)
        self.state = (hidden.detach(), cell.detach())
        return 1 + hidden.square().mean()


class Sparse(Construct):
    """a sparse buffer"""

    def start(self):
        self.register_buffer("adjacency", torch.eye(6).to_sparse())

    def factor(self, batch):
        self.adjacency = (self.adjacency * 0.999).coalesce()
        return 1 + torch.sparse.mm(self.adjacency, batch[0].T).square().mean()


class Complex(Construct):
    """a complex buffer"""

    def start(self):
        self.register_buffer("phase", torch.ones(1, dtype=torch.complex64))

    def factor(self, batch):
        self.phase.mul_(torch.exp(torch.tensor(0.1j)))
        return 1 + 0.1 * self.phase.real.sum()


class HalfPrecision(Construct):
    """a bfloat16 buffer and an integer one"""

    def start(self):
        self.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
        self.register_buffer("seen_labels", torch.zeros(3, dtype=torch.long))

    def factor(self, batch):
        self.scale.mul_(0.99)
        self.seen_labels += torch.bincount(batch[1], minlength=3)
        return 1 + self.scale.float() / (1 + 0.001 * float(self.seen_labels[0]))


class SignOfZero(Construct):
    """a buffer whose zero changes its sign, and a NaN"""

    def start(self):
        self.register_buffer("zero", torch.tensor([0.0, float("nan")]))

    def factor(self, batch):
        self.zero.neg_()
        return 1 + 0.1 * float(torch.signbit(self.zero[0]))


class Tagged(torch.Tensor):
    pass


class Subclass(Construct):
    """a subclass of Tensor with an attribute"""

    attributes = False

    def start(self):
        self.tagged = torch.ones(2).as_subclass(Tagged)
        self.tagged.count = 0

    def factor(self, batch):
        self.tagged.mul_(0.999)
        self.tagged.count += 1
        return float(self.tagged.sum()) / (1 + 0.001 * self.tagged.count)

    def seen(self):
        return self.tagged.as_subclass(torch.Tensor).clone(), self.tagged.count


class OnParameter(Construct):
    """an attribute of a parameter"""

    def start(self):
        self.net[0].weight.scale = [1.0]

    def factor(self, batch):
        self.net[0].weight.scale[0] *= 0.999
        return self.net[0].weight.scale[0]

    def seen(self):
        return self.net[0].weight.scale[0]


class Flags(Construct):
    """requires_grad that is toggled"""

    warns = (r".*",)

    def start(self):
        self.gate = nn.Parameter(torch.ones(1))
        self.steps = 0

    def factor(self, batch):
        self.steps += 1
        self.gate.requires_grad_(self.steps % 2 == 0)
        return 1 + self.gate.sum()


class OwnBackward(Construct):
    """a backward of its own in training_step"""

    def start(self):
        self.probe = nn.Linear(3, 1)
        self.norms = []

    def factor(self, batch):
        with torch.enable_grad():
            self.probe(self.net(batch[0]).detach()).mean().backward()
        self.norms.append(float(self.probe.weight.grad.norm()))
        return 1 + 0.1 * self.norms[-1]


class History(Construct):
    """outputs with their graphs, kept through an epoch"""

    attributes = False

    def start(self):
        self.outputs = []

    def factor(self, batch):
        self.outputs.append(self.net(batch[0]))
        return 1 + torch.cat([o.detach() for o in self.outputs]).square().mean()

    def on_train_epoch_end(self):
        self.outputs.clear()

    def seen(self):
        return len(self.outputs)


class Normalised(Construct):
    """BatchNorm, InstanceNorm with statistics, Dropout, spectral_norm"""

    def start(self):
        self.net = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
            nn.Linear(8, 3),
        )


class HookStatistics(Construct):
    """statistics that a forward hook keeps in a closure"""

    attributes = False

    def start(self):
        means = [0.0]
        self.net[1].register_forward_hook(
            lambda module, args, output: means.append(
                0.9 * means[-1] + 0.1 * float(output.detach().mean())
            )
        )
        self.means = lambda: means

    def factor(self, batch):
        self.net(batch[0])
        return 1 + self.means()[-1]

    def seen(self):
        return self.means()
