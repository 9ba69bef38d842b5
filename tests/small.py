"""Small modules whose loss surface has a closed form."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Quartic(pl.LightningModule):
    """L(w) = mean(x) w^4 / 4 for one weight: H = 3 mean(x) w^2 = 6 sqrt(mean(x) L).

    So the logged training loss determines the curvature at the same weights.
    """

    def __init__(self, lr: float = 0.05, optimizer=torch.optim.SGD):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5]))
        self.lr, self.optimizer = lr, optimizer

    def training_step(self, batch, batch_idx):
        loss = batch[0].mean() * self.w.pow(4).sum() / 4
        self.log("train_loss", loss, on_step=True)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class Linear(pl.LightningModule):
    """Linear regression with ``nn.MSELoss``: H = 2 X'X / N whatever the weights."""

    def __init__(self, lr: float = 0.01, reduction: str = "mean"):
        super().__init__()
        self.layer = nn.Linear(5, 1, bias=False)
        self.loss, self.lr = nn.MSELoss(reduction=reduction), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.layer(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Manual(Linear):
    """The same with manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.before_step(optimizer)
        optimizer.step()

    def before_step(self, optimizer):
        """For subclasses."""


class Growing(pl.LightningModule):
    """L = x (w_0^2 - w_1^2) / 2 with w_1 pushed out: curvature (x, -x); the loss falls for ever."""

    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return batch[0].mean() * (self.w[0] ** 2 - self.w[1] ** 2) / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def ones(examples: int = 40, batch_size: int = 4) -> DataLoader:
    """Batches of ones."""
    return DataLoader(TensorDataset(torch.ones(examples, 1)), batch_size=batch_size)


def regression(examples: int = 60, batch_size: int = 20) -> DataLoader:
    """Inputs of very unequal variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, generator=generator) * torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1])
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)
