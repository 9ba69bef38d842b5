"""Modules, parameters and metrics that the module does not know as its own."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass

import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tests.constructs.base import Construct


class _Teacher(Construct):
    """(the base: an average of the network teaches it)"""

    attributes = False

    def start(self):
        teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        teacher.load_state_dict(self.net.state_dict())
        self.hide(teacher.requires_grad_(False))

    def hide(self, teacher):
        self.hidden = [teacher]

    def teacher(self):
        return self.hidden[0]

    def factor(self, batch):
        teacher = self.teacher()
        with torch.no_grad():
            for mine, own in zip(teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(own, 0.01)
            target = teacher(batch[0])
        return 1 + nn.functional.mse_loss(self.net(batch[0]), target)

    def seen(self):
        return [p.clone() for p in self.teacher().parameters()]


class InList(_Teacher):
    """a teacher in a list"""


class InTuple(_Teacher):
    """a teacher in a tuple"""

    def hide(self, teacher):
        self.hidden = (teacher, "teacher")


class InDict(_Teacher):
    """a teacher in a dict"""

    def hide(self, teacher):
        self.hidden = {0: teacher}


class Box:
    def __init__(self, content):
        self.content = content


class InObject(_Teacher):
    """a teacher in a plain object"""

    def hide(self, teacher):
        self.hidden = Box(teacher)

    def teacher(self):
        return self.hidden.content


class BySetattr(_Teacher):
    """a teacher set by object.__setattr__"""

    def hide(self, teacher):
        object.__setattr__(self, "hidden", teacher)

    def teacher(self):
        return self.hidden


class InClosure(_Teacher):
    """a teacher in a closure"""

    def hide(self, teacher):
        self.get = lambda: teacher

    def teacher(self):
        return self.get()


class InPartial(_Teacher):
    """a teacher in a partial"""

    def hide(self, teacher):
        self.get = functools.partial(lambda module: module, teacher)

    def teacher(self):
        return self.get()


@dataclass
class Pairs:
    teacher: nn.Module
    decay: float = 0.99


class InData(_Teacher):
    """a teacher in a dataclass"""

    def hide(self, teacher):
        self.pair = Pairs(teacher)

    def teacher(self):
        return self.pair.teacher


class Both(typing.NamedTuple):
    teacher: nn.Module


class InNamedTuple(_Teacher):
    """a teacher in a NamedTuple"""

    def hide(self, teacher):
        self.pair = Both(teacher)

    def teacher(self):
        return self.pair.teacher


class DataWrites(_Teacher):
    """a teacher that is written through .data"""

    def factor(self, batch):
        teacher = self.teacher()
        for mine, own in zip(teacher.parameters(), self.net.parameters(), strict=True):
            mine.data = 0.99 * mine.data + 0.01 * own.data
        return 1 + nn.functional.mse_loss(self.net(batch[0]), teacher(batch[0]))


class Shadow(Construct):
    """a list of averaged parameters"""

    attributes = False

    def start(self):
        self.shadow = [p.detach().clone() for p in self.net.parameters()]

    def factor(self, batch):
        distance = 0.0
        for mean, own in zip(self.shadow, self.net.parameters(), strict=True):
            mean.mul_(0.99).add_(own.detach(), alpha=0.01)
            distance = distance + (own - mean).square().sum()
        return 1 + 0.1 * distance

    def seen(self):
        return [mean.clone() for mean in self.shadow]


class Metric(Construct):
    """a torchmetrics object in a dict"""

    attributes = False

    def start(self):
        self.meters = {"train": MeanMetric()}
        self.means = []

    def factor(self, batch):
        self.meters["train"].update(batch[1].float())
        return 1.0

    def on_train_epoch_end(self):
        self.means.append(float(self.meters["train"].compute()))
        self.meters["train"].reset()

    def seen(self):
        return self.means


class Metrics(Construct):
    """a MetricCollection in a list, used in the loss"""

    attributes = False

    def start(self):
        self.hidden = [MetricCollection({"accuracy": MulticlassAccuracy(3), "mean": MeanMetric()})]

    def factor(self, batch):
        self.hidden[0]["accuracy"].update(self.net(batch[0]), batch[1])
        self.hidden[0]["mean"].update(batch[1].float())
        return 1 + float(self.hidden[0]["accuracy"].compute())

    def seen(self):
        return {k: float(v) for k, v in self.hidden[0].compute().items()}


class LossObject:
    def __init__(self):
        self.norm = nn.BatchNorm1d(3)

    def __call__(self, outputs):
        return 1 + self.norm(outputs).square().mean() + self.norm.running_var.mean()


class NormInLoss(Construct):
    """BatchNorm in a loss object"""

    attributes = False

    def start(self):
        self.criterion = LossObject()

    def factor(self, batch):
        return self.criterion(self.net(batch[0]))

    def seen(self):
        return self.criterion.norm.running_mean.clone(), int(
            self.criterion.norm.num_batches_tracked
        )


class OwnOptimizer(Construct):
    """an optimizer of its own that training_step steps"""

    attributes = False
    graph = False

    def start(self):
        self.critic = [nn.Linear(3, 1)]
        self.own = [torch.optim.Adam(self.critic[0].parameters(), lr=1e-2)]

    def factor(self, batch):
        critic, optimizer = self.critic[0], self.own[0]
        with torch.enable_grad():
            distance = (critic(self.net(batch[0]).detach()) - 1).square().mean()
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()
        outputs = self.net(batch[0])
        return 1 + 0.1 * critic(outputs if self.graph else outputs.detach()).square().mean()

    def seen(self):
        return [p.clone() for p in self.critic[0].parameters()], self.own[0].state_dict()


class Parameter(Construct):
    """a Parameter in a list, averaged"""

    attributes = False

    def start(self):
        self.hidden = [nn.Parameter(torch.ones(1), requires_grad=False)]

    def factor(self, batch):
        self.hidden[0].mul_(0.999)
        return self.hidden[0]

    def seen(self):
        return self.hidden[0].clone()


class Replaced(Construct):
    """a layer that is replaced by a copy"""

    attributes = False

    def start(self):
        self.extra = {"layer": nn.Linear(3, 3).requires_grad_(False)}

    def factor(self, batch):
        new = nn.Linear(3, 3).requires_grad_(False)
        new.load_state_dict({k: 0.99 * v for k, v in self.extra["layer"].state_dict().items()})
        self.extra["layer"] = new
        return 1 + new(self.net(batch[0])).square().mean()

    def seen(self):
        return self.extra["layer"].weight.clone()


class Scheduler(Construct):
    """a learning-rate scheduler as the weight of a loss"""

    attributes = False

    def start(self):
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.weight = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, 50)

    def factor(self, batch):
        self.weight.optimizer.step()
        self.weight.step()
        return 1 + self.weight.get_last_lr()[0]

    def seen(self):
        return self.weight.state_dict()


class LazyBranch(Construct):
    """a lazy branch that is used from the second epoch on"""

    attributes = False
    may_fail = 1

    def start(self):
        self.branch = nn.LazyLinear(3)

    def factor(self, batch):
        return 1 + self.branch(batch[0]).square().mean() if self.current_epoch else 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class LazyByStep(LazyBranch):
    """a lazy branch that the loss uses before training has"""

    def factor(self, batch):  # the first measurement is after step 3
        return 1 + self.branch(batch[0]).square().mean() if self.global_step >= 3 else 1.0


class AddedLayer(Construct):
    """a layer that is added during training"""

    attributes = False

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.extra = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": list(self.extra.parameters())})

    def factor(self, batch):
        return 1 + self.extra(self.net(batch[0])).square().mean() if self.current_epoch else 1.0
