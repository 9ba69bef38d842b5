"""Four typical networks, to be trained by two processes with every supported strategy.

As a script (Lightning's ``ddp`` starts its processes by running one):
``python -m tests.integration.members FOLDER`` trains all, with and without our callbacks, and
leaves ``FOLDER/rank<n>.pt`` with what each run ended in.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor
from tests.runs import train

CLASSES = 3
_DEFAULTS = {"max_epochs": 2}


class Member(pl.LightningModule):
    """A classifier; ``noisy`` ones use random numbers or let the examples of a batch interact."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, noisy: bool = True, mp_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.net, self.noisy = self.build(noisy), noisy
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.mp_dtype = mp_dtype

    def build(self, noisy: bool) -> nn.Module:
        raise NotImplementedError

    def inputs(self, examples: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def configure_model(self) -> None:
        """Under ModelParallelStrategy: FSDP2, each child in its own group."""
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=self.mp_dtype)
        for child in self.net.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self.net(inputs).float()
        loss = F.cross_entropy(outputs, targets)
        self.accuracy(outputs, targets)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]).float(), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        inputs = self.inputs(count, generator)
        return inputs, torch.randint(CLASSES, (count,), generator=generator)

    def train_dataloader(self):
        data = TensorDataset(*self.examples(64))
        return DataLoader(data, batch_size=8, shuffle=self.noisy)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.examples(16)), batch_size=8)


class Mlp(Member):
    def build(self, noisy):
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 9), nn.GELU(),
                             nn.Linear(9, CLASSES))  # fmt: skip

    def inputs(self, examples, generator):
        return torch.randn(examples, 6, generator=generator)


class Conv(Member):
    """BatchNorm has different statistics on each process."""

    settings = {"accumulate_grad_batches": 2}  # noqa: RUF012

    def build(self, noisy):
        norm = nn.BatchNorm2d(6) if noisy else nn.GroupNorm(2, 6)
        return nn.Sequential(nn.Conv2d(1, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
                             nn.Flatten(), nn.Linear(64, CLASSES))  # fmt: skip

    def inputs(self, examples, generator):
        return torch.randn(examples, 1, 8, 8, generator=generator)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class _Tied(nn.Module):
    """A small transformer whose output layer shares the embedding's weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.embedding(tokens)).mean(1))[:, :CLASSES]


class Transformer(Member):
    settings = {"gradient_clip_val": 0.5}  # noqa: RUF012

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)  # with the shared weight in one group

    def build(self, noisy):
        return _Tied(0.2 if noisy else 0.0)

    def inputs(self, examples, generator):
        return torch.randint(11, (examples, 5), generator=generator)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class _Recurrent(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, 2, batch_first=True, dropout=dropout)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.gru(inputs)[0][:, -1])


class Recurrent(Member):
    def build(self, noisy):
        return _Recurrent(0.2 if noisy else 0.0)

    def inputs(self, examples, generator):
        return torch.randn(examples, 5, 4, generator=generator)

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


MEMBERS: tuple[type[Member], ...] = (Mlp, Conv, Transformer, Recurrent)


class Quartet(Member):
    """All four at once, for strategies that launch processes for each run."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.noisy = True
        self.members = nn.ModuleList(kind() for kind in MEMBERS)

    def configure_model(self):
        pass

    def setup(self, stage):
        torch.set_num_threads(1)

    def training_step(self, batch, batch_idx):
        pairs = zip(self.members, zip(batch[::2], batch[1::2], strict=True), strict=True)
        loss = sum(F.cross_entropy(member.net(x), y) for member, (x, y) in pairs)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    validation_step = None
    val_dataloader = None

    def examples(self, count):
        return tuple(tensor for member in self.members for tensor in member.examples(count))


def ours(**extra: Any) -> list[pl.Callback]:
    """All measurements, few points each, at every second step."""
    common: dict[str, Any] = {
        "every_n_train_steps": 2, "max_overhead": None, "probe_samples": 24, **extra,
    }  # fmt: skip
    return [
        HessianMonitor(
            **common, max_hvps=6, tol=0.05, update_curvature=True, batch_edge_ratio=True
        ),
        SharpnessMonitor(**common, critical=True),
        # At step 8, and not after the validation that follows, which FSDP leaves unsharded.
        LandscapeMonitor(**{**common, "every_n_train_steps": 8}, resolution=2, line_resolution=3),
    ]


def end_of(
    make: Callable[[], pl.LightningModule],
    callbacks: Sequence[pl.Callback],
    root: Path | str,
    *,
    may_fail: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train; return the final state of this process.  A failed measurement is an error."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    own = getattr(make, "settings", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome = train(make, None, callbacks, root, **{**_DEFAULTS, **own, **settings})
        finally:
            logger.setLevel(level)
    failed = {c.prefix: c.failed for c in callbacks if getattr(c, "failed", 0)}
    assert may_fail or not failed, f"measurements failed: {failed}"
    return plain(outcome.state)


def plain(value: Any) -> Any:
    """Replace shards by local tensors, which can be compared and pickled."""
    known = (int, float, str, bool, bytes, type(None), np.ndarray, np.integer)
    if isinstance(value, Tensor):
        value = value.detach()
        return value.to_local().clone() if hasattr(value, "to_local") else value.clone()
    if isinstance(value, dict):
        return {
            key if isinstance(key, known) else type(key).__name__: plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, known) else type(value).__name__


def fsdp2() -> ModelParallelStrategy:
    """For one Trainer; its module is to be sharded over both processes."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class Save(pl.Callback):
    """Saves the final state of each process to a file for the parent process."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        kept = {
            "state": pl_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "rng": torch.get_rng_state(),
        }
        torch.save(plain(kept), self.folder / f"rank{trainer.global_rank}.pt")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    ends = {
        (kind.__name__, name): end_of(kind, callbacks(), folder, strategy="ddp", devices=2)
        for kind in MEMBERS
        for name, callbacks in (("without", list), ("with", ours))
    }
    torch.save(ends, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
