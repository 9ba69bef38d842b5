"""The base of all constructs: a small classifier whose loss is multiplied by ``factor``."""

from __future__ import annotations

from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONSTRUCTS: dict[str, type[Construct]] = {}


class Construct(pl.LightningModule):
    """Subclasses set their state in ``start``, and change and use it in ``factor``.

    Attributes:
        refused: a regular expression of the message, if nothing can be measured.
        warns: regular expressions of messages beside values.
        may_fail: measurements that may be missing, with a message, before a later one has numbers.
        attributes: whether all attributes of the module are compared; else what ``seen`` returns.
        callbacks: further callbacks of the Trainer.
    """

    refused: ClassVar[str] = ""
    warns: ClassVar[tuple[str, ...]] = ()
    may_fail: ClassVar[int] = 0
    attributes: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__name__.startswith("_"):
            CONSTRUCTS[f"{cls.__module__.rpartition('.')[2]}: {cls.__doc__}"] = cls

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.start()

    def start(self) -> None:
        """Set the state."""

    def factor(self, batch: Any) -> Any:
        """Change the state; returns what the loss is multiplied by."""
        return 1.0

    def seen(self) -> Any:
        """What is compared at the end, beside weights and attributes."""
        return None

    @staticmethod
    def callbacks() -> list[pl.Callback]:
        return []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1]) * self.factor(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def dataset(examples: int = 64) -> TensorDataset:
    """Random inputs of six features and labels of three classes, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (examples,), generator=generator))


def loader(examples: int = 64, **options: Any) -> DataLoader:
    """Batches of eight, shuffled."""
    return DataLoader(dataset(examples), **{"batch_size": 8, "shuffle": True, **options})
