"""A zoo of typical modules, to test that the callbacks do not change training.

The docstring of each module describes what is special about it; each :class:`Member` states which
scalars it cannot give, and why.
"""

from __future__ import annotations

import collections
import copy
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

FINITE = "finite_difference"


@dataclass(frozen=True)
class Member:
    """One module: how it is trained, and what cannot be measured.

    Attributes:
        missing: key -> regular expression of the warning that explains why it is missing (at some
            or all measurements).
        warns: regular expressions of further warnings of our callbacks.
        modes: the probe modes it is measured in.
        options: further arguments of all our callbacks.
        hessian: further arguments of the HessianMonitor.
    """

    name: str
    make: Callable[[], pl.LightningModule]
    data: Callable[[], Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[pl.Callback]] = tuple
    before_fit: Callable[[pl.Trainer, pl.LightningModule, Any], object] | None = None
    engine: str = "double_backward"
    missing: Mapping[str, str] = field(default_factory=dict)
    warns: Sequence[str] = ()
    modes: Sequence[str] = ("train",)
    options: Mapping[str, Any] = field(default_factory=dict)
    hessian: Mapping[str, Any] = field(default_factory=dict)


BOTH = ("train", "eval")
EDGES = ("hessian/edge", "hessian/edge_ratio", "hessian/batch_edge_ratio")
ADAPTIVE_EDGES = (*EDGES, "hessian/preconditioned_eigenvalue")


def no_edge(reason: str, keys: Sequence[str] = EDGES) -> dict[str, str]:
    """The optimizer's edge is not known, for ``reason``."""
    return dict.fromkeys(keys, f"no stability edge is logged: .*{reason}")


# -- data ------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(examples: int = 40, features: int = 6) -> TensorDataset:
    x = torch.randn(examples, features, generator=seeded())
    return TensorDataset(x, x[:, :3].argmax(1))


def vectors(batch_size: int = 8, **more: Any) -> DataLoader:
    return DataLoader(table(), batch_size=batch_size, shuffle=True, **more)


def images() -> DataLoader:
    x = torch.randn(40, 1, 8, 8, generator=seeded())
    return DataLoader(TensorDataset(x, x.mean((1, 2, 3)).gt(0).long()), batch_size=8, shuffle=True)


def tokens() -> DataLoader:
    return DataLoader(
        TensorDataset(torch.randint(1, 20, (40, 7), generator=seeded())), batch_size=8, shuffle=True
    )


def series() -> DataLoader:
    x = torch.randn(40, 6, 3, generator=seeded())
    return DataLoader(TensorDataset(x, x.sum((1, 2)).gt(0).long()), batch_size=8, shuffle=True)


def mlp(features: int = 6, hidden: int = 8, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, out))


# -- layers and how they are built -----------------------------------------------------------------


class Classifier(pl.LightningModule):
    """As in most tutorials: a network, a loss, Adam.  The base of other modules."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net if net is not None else mlp()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.criterion(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Sgd(Classifier):
    """The same with momentum SGD."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Dropout(Classifier):
    """Dropout, and all ways of ``self.log``."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log_dict({"a": loss * 2, "b": float(batch_idx)}, on_epoch=True, reduce_fx="max")
        self.log("hit", (logits.argmax(1) == y).float().mean(), batch_size=len(y), logger=False)
        return loss


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def group_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 2)
    )


class LayerNormGroups(pl.LightningModule):
    """AdamW without decay on norms and biases: one edge, shared by both groups to 1e-5."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.body(x), y, label_smoothing=0.1)

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3)


def parametrized_weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def hooked_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def parametrized_spectral_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)
    )


def hooked_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


class Tied(pl.LightningModule):
    """One matrix as embedding and output layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        hidden = torch.tanh(self.mix(self.embed(ids[:, :-1])))
        loss = F.cross_entropy(self.head(hidden).flatten(0, 1), ids[:, 1:].flatten())
        self.log("perplexity", loss.exp(), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class FrozenBackbone(pl.LightningModule):
    """A backbone that stays in eval mode although Lightning calls ``train()`` on the module."""

    def __init__(self):
        super().__init__()
        self.backbone = batch_norm_net()
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(3, 3)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            features = self.backbone(x)
        return F.cross_entropy(self.head(features), y)

    def configure_optimizers(self):
        trained = filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.SGD(trained, lr=0.1)


class Unused(Sgd):
    """A head that no loss uses, and a parameter that no optimizer holds."""

    def __init__(self):
        super().__init__()
        self.second_head = nn.Linear(8, 2)
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x) / self.temperature, y)

    def configure_optimizers(self):
        held = [*self.net.parameters(), *self.second_head.parameters()]
        return torch.optim.SGD(held, lr=0.1, momentum=0.9)


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of rank 2."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class Lora(Classifier):
    """Adapters alone are trained; B begins at zero, so that A has no gradient at first."""

    def __init__(self):
        net = mlp()
        net[0], net[2] = LowRank(net[0]), LowRank(net[2])
        super().__init__(net)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def pruned_net() -> nn.Module:
    """Half of the first layer is masked: a hook recomputes its weight."""
    net = mlp()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


class MadeLate(Classifier):
    """Built in configure_model, with a layer that takes its shape from the first batch."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.made = False

    def configure_model(self):
        if not self.made:
            self.made = True
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
            self.net(torch.zeros(1, 6))


class FineTuned(Classifier):
    """A backbone that a callback unfreezes in the second epoch, in a parameter group of its own."""

    def __init__(self):
        super().__init__(nn.Linear(8, 3))
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


class EmaCopy(Classifier):
    """An averaged copy of the network inside the module, moved in on_train_batch_end."""

    def __init__(self):
        super().__init__()
        self.averaged = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.averaged.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


class MeanTeacher(pl.LightningModule):
    """A teacher whose weights training_step itself moves, through ``.data``, before using them."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = mlp(), mlp()
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.momentum = 0.8

    def training_step(self, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data.mul_(self.momentum).add_(fast.data, alpha=1 - self.momentum)
        x, y = batch
        noisy = self.student(x + 0.1 * torch.randn_like(x))
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        return F.cross_entropy(noisy, y) + F.cross_entropy(noisy, target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


class Prototypes(pl.LightningModule):
    """Prototypes are normalized at the start of each training_step, as in SwAV."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.prototypes = nn.Linear(4, 3, bias=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            unit = F.normalize(self.prototypes.weight.data.clone(), dim=1)
            self.prototypes.weight.copy_(unit)
        x, y = batch
        return F.cross_entropy(self.prototypes(F.normalize(self.encoder(x))) / 0.2, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Queue(pl.LightningModule):
    """MoCo: keys from a momentum encoder, negatives from a queue, one rebound, one in place."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 4), nn.Linear(6, 4)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, 4), dim=1))
        self.register_buffer("ring", F.normalize(torch.randn(4, 16), dim=0), persistent=False)
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys):
        self.queue = torch.cat([keys, self.queue])[:16]
        place = int(self.pointer)
        self.ring[:, place : place + len(keys)] = keys.T
        self.pointer[0] = (place + len(keys)) % 16

    def training_step(self, batch, batch_idx):
        x, _ = batch
        one, two = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        q = F.normalize(self.query(one), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            k = F.normalize(self.key(two), dim=1)
        negatives = torch.cat([q @ self.queue.clone().T, q @ self.ring.clone()], 1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / 0.5
        self.enqueue(k)
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long, device=x.device))

    def configure_optimizers(self):
        return torch.optim.SGD(self.query.parameters(), lr=0.1, momentum=0.9)


class Attention(nn.Module):
    """Causal self-attention through the fused function, with dropout."""

    def __init__(self, dim: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        parts = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        p = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True, dropout_p=p)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class Sdpa(pl.LightningModule):
    """A small language model on F.scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Embedding(20, 8), Attention()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20)

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        x = self.embed(ids)
        x = self.norm(x + self.attend(x))
        logits = self.head(x[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Encoder(pl.LightningModule):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        ids = batch[0].clone()
        ids[::2, 5:] = 0
        mask = ids == 0
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask)
        pooled = hidden.masked_fill(mask[..., None], 0).sum(1) / (~mask).sum(1, keepdim=True)
        return F.cross_entropy(self.head(pooled), ids[:, 0] % 2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class MultiheadInEval(pl.LightningModule):
    """A pretrained nn.MultiheadAttention kept in eval mode, where a fast path exists."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
        self.lift, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def on_train_epoch_start(self):
        self.attention.eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.lift(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return F.cross_entropy(self.head(mixed.mean(1)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Gpt(pl.LightningModule):
    """GPT-2 from transformers, with random weights."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        output = self.model(input_ids=ids, labels=ids)
        self.log("train/loss", output.loss, prog_bar=True)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


class Lstm(pl.LightningModule):
    """An LSTM that carries its detached state from batch to batch."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, 2)
        self.state = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        out, state = self.rnn(x, self.state)
        self.state = tuple(s.detach() for s in state)
        return F.cross_entropy(self.head(out[:, -1]), y)

    def on_train_epoch_end(self):
        self.state = None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Ragged(Dataset):
    """Sequences of different lengths."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        length = 2 + index % 5
        sequence = torch.randn(length, 3, generator=seeded(index))
        return {"sequence": sequence, "label": int(sequence.sum() > 0)}


def collate_ragged(rows):
    return {
        "x": pad_sequence([r["sequence"] for r in rows], batch_first=True),
        "lengths": [len(r["sequence"]) for r in rows],
        "y": torch.tensor([r["label"] for r in rows]),
    }


def ragged() -> DataLoader:
    return DataLoader(Ragged(), batch_size=8, shuffle=True, collate_fn=collate_ragged)


class PackedGru(pl.LightningModule):
    """A GRU on packed sequences of variable length, from a custom collate function."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def training_step(self, batch, batch_idx):
        packed = pack_padded_sequence(
            batch["x"], batch["lengths"], batch_first=True, enforce_sorted=False
        )
        _, last = self.rnn(packed)
        return F.cross_entropy(self.head(torch.cat([*last], 1)), batch["y"])

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


class Fourier(Classifier):
    """A Fourier layer as neural operators have it: complex weights, one for each frequency."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        moved = torch.fft.irfft(torch.fft.rfft(x) * self.waves, n=x.shape[-1])
        return self.net(x + F.gelu(moved))


class Bag(pl.LightningModule):
    """An embedding bag."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 6, mode="mean"), nn.Linear(6, 2)

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        return F.cross_entropy(self.head(self.bag(ids)), ids[:, 0] % 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Factorization(pl.LightningModule):
    """Matrix factorisation on sparse embeddings."""

    def __init__(self, optimizer: str):
        super().__init__()
        self.users, self.items = (nn.Embedding(20, 4, sparse=True) for _ in range(2))
        self.kind = optimizer

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        score = (self.users(ids[:, 0]) * self.items(ids[:, 1])).sum(1)
        return F.mse_loss(score, (ids[:, 0] == ids[:, 1]).float())

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.SparseAdam(list(self.parameters()), lr=1e-2)


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


class ConvNet(Sgd):
    """A small residual network, momentum SGD with Nesterov and weight decay."""

    def __init__(self):
        super().__init__(resnet())

    def configure_optimizers(self):
        return torch.optim.SGD(
            self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )


# -- batches and loaders ---------------------------------------------------------------------------


class Graphs(Dataset):
    """Small random graphs."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        nodes = 3 + index % 3
        x = torch.randn(nodes, 4, generator=seeded(index))
        edges = torch.randint(0, nodes, (2, 2 * nodes), generator=seeded(index))
        return x, edges, x.sum().gt(0).long()


def as_dict(rows):
    sizes = [len(x) for x, _, _ in rows]
    offsets = np.cumsum([0, *sizes[:-1]])
    return {
        "y": torch.stack([y for _, _, y in rows]),
        "graph": {
            "x": torch.cat([x for x, _, _ in rows]),
            "edge_index": torch.cat([e + int(o) for (_, e, _), o in zip(rows, offsets)], 1),  # noqa: B905
            "batch": torch.repeat_interleave(torch.tensor(sizes)),
        },
        "sizes": sizes,
    }


@dataclass
class GraphBatch:
    """A batch as graph libraries return it."""

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    y: Tensor
    num_graphs: int


def as_dataclass(rows):
    made = as_dict(rows)
    return GraphBatch(**made["graph"], y=made["y"], num_graphs=len(rows))


def graphs(collate: Callable) -> Callable[[], DataLoader]:
    return lambda: DataLoader(Graphs(), batch_size=8, shuffle=True, collate_fn=collate)


class GraphNet(pl.LightningModule):
    """Message passing by index_add on a batch of graphs, in a dict or a dataclass."""

    def __init__(self):
        super().__init__()
        self.message, self.update, self.head = nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        g = batch["graph"] if isinstance(batch, dict) else vars(batch)
        y = batch["y"] if isinstance(batch, dict) else batch.y
        source, target = g["edge_index"]
        gathered = torch.zeros_like(g["x"]).index_add(0, target, self.message(g["x"])[source])
        hidden = torch.tanh(self.update(torch.cat([g["x"], gathered], 1)))
        pooled = hidden.new_zeros(len(y), 4).index_add(0, g["batch"], hidden)
        loss = F.cross_entropy(self.head(pooled), y)
        self.log("loss", loss, batch_size=len(y))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Pair(NamedTuple):
    """A batch with names."""

    inputs: Tensor
    targets: Tensor


def named_tuples() -> DataLoader:
    rows = [Pair(x, y) for x, y in table()]
    return DataLoader(rows, batch_size=8, shuffle=True)


class NamedBatch(Sgd):
    """NamedTuple batches."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.inputs), batch.targets)


def nested_lists() -> DataLoader:
    rows = [[[x[:3], [x[3:]]], (y, f"row {i}")] for i, (x, y) in enumerate(table())]
    return DataLoader(rows, batch_size=8, shuffle=True)


class NestedBatch(Sgd):
    """Lists in lists, and strings beside the tensors."""

    def training_step(self, batch, batch_idx):
        (first, (second,)), (y, names) = batch
        assert all(name.startswith("row") for name in names)
        return F.cross_entropy(self(torch.cat([first, second], 1)), y)


class EditsBatch(Sgd):
    """Augments and normalises its batch in place, and pops from it."""

    def training_step(self, batch, batch_idx):
        y = batch.pop()
        x = batch[0]
        x += 0.1 * torch.randn_like(x)
        x.sub_(x.mean(0))
        batch.append(x)
        return F.cross_entropy(self(batch[-1]), y)


class Stream(IterableDataset):
    """Rows without a length, shuffled by its own generator."""

    def __init__(self):
        self.rng = random.Random(5)

    def __iter__(self):
        rows = list(table())
        self.rng.shuffle(rows)
        yield from rows


def combined() -> CombinedLoader:
    return CombinedLoader({"labelled": vectors(4), "unlabelled": vectors(8)}, mode="max_size_cycle")


class SemiSupervised(Sgd):
    """Two loaders in one, with a consistency loss on the unlabelled half."""

    def training_step(self, batch, batch_idx):
        x, y = batch["labelled"]
        free, _ = batch["unlabelled"]
        supervised = F.cross_entropy(self(x), y)
        consistency = F.mse_loss(self(free + 0.1 * torch.randn_like(free)), self(free).detach())
        return supervised + min(1.0, self.current_epoch / 2) * consistency


class Reloading(pl.LightningDataModule):
    """New training data in every epoch."""

    def setup(self, stage):
        self.made = 0

    def train_dataloader(self):
        self.made += 1
        return DataLoader(table(24 + 8 * self.made), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(table(16), batch_size=8)


class WithValidation(Classifier):
    """Validation several times an epoch, ReduceLROnPlateau on its loss."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
        }


class NoBatchIndex(Sgd):
    """A training_step that takes only the batch."""

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class TakesIterator(Sgd):
    """A training_step that takes the iterator and fetches for itself."""

    def training_step(self, dataloader_iter):
        (x, y), batch_idx, _ = next(dataloader_iter)
        x, y = x.to(self.device), y.to(self.device)
        self.log("seen", float(batch_idx), batch_size=len(x))
        return F.cross_entropy(self(x), y)


class Augments(Sgd):
    """Random augmentation in on_after_batch_transfer."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x + 0.1 * torch.randn_like(x) * random.random(), y


class Bundle:
    """A batch of a class of its own, moved by its ``to``."""

    def __init__(self, rows):
        self.inputs = torch.stack([x for x, _ in rows])
        self.targets = torch.stack([y for _, y in rows])

    def to(self, device, non_blocking=False):
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        return self


class OwnBatch(Sgd):
    """Takes a batch of a class of its own and edits it."""

    def training_step(self, batch, batch_idx):
        batch.inputs.mul_(1 + 0.1 * torch.rand(()))
        return F.cross_entropy(self(batch.inputs), batch.targets)


class KeepsValidation(WithValidation):
    """Keeps tensors of validation's inference mode: predictions, and a metric that is not reset."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.predictions, self.last = [], None
        self.register_buffer("centre", torch.zeros(3))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.last = self(batch[0])
        self.predictions.append(self.last.argmax(1))
        self.accuracy.update(self.last, batch[1])
        self.centre = self.last.mean(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("kept", float(len(self.predictions)))
        return F.cross_entropy(self(x) - 0.1 * self.centre.clone(), y)


# -- what training_step does -----------------------------------------------------------------------


class Vae(pl.LightningModule):
    """Samples inside training_step; the KL weight follows the trainer's step; returns a dict."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 8), mlp(4, 8, 6)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        mean, logvar = self.encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        reconstruction = F.mse_loss(self.decode(z), x)
        kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1).mean()
        beta = min(1.0, self.trainer.global_step / 10)
        self.log_dict({"reconstruction": reconstruction, "kl": kl, "beta": beta})
        return {"loss": reconstruction + beta * kl, "z": z.detach()}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Quantized(pl.LightningModule):
    """VQ-VAE: straight-through codes; the codebook is a buffer averaged in training_step."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 3), nn.Linear(3, 6)
        self.register_buffer("codes", torch.randn(5, 3))
        self.register_buffer("counts", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def training_step(self, batch, batch_idx):
        x, _ = batch
        z = self.encode(x)
        chosen = torch.cdist(z.detach(), self.codes).argmin(1)
        picked = self.codes[chosen]
        if self.training:
            hot = F.one_hot(chosen, 5).float()
            self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.sums.mul_(0.9).add_(hot.T @ z.detach(), alpha=0.1)
            self.codes.copy_(self.sums / self.counts[:, None])
        straight = z + (picked - z).detach()
        return F.mse_loss(self.decode(straight), x) + 0.25 * F.mse_loss(z, picked)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Metrics(Classifier):
    """torchmetrics of all kinds, logged as objects and as values."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.mean_loss = MeanMetric()
        self.scores = MetricCollection(
            {"f1": MulticlassF1Score(3), "top2": MulticlassAccuracy(3, top_k=2)}, prefix="train_"
        )
        self.area = MulticlassAUROC(3)
        self.per_class = nn.ModuleList(MeanMetric() for _ in range(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.mean_loss.update(loss.detach())
        self.log_dict(self.scores(logits, y))
        self.area.update(logits.detach().softmax(1), y)
        for label, metric in enumerate(self.per_class):
            metric.update((y == label).float())
        return loss

    def on_train_epoch_end(self):
        self.log("mean_loss", self.mean_loss.compute())
        self.log("area", self.area.compute())
        self.mean_loss.reset()
        self.area.reset()
        self.scores.reset()


class Collects(Sgd):
    """Lists of outputs, with their graph, cleared at the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.training_step_outputs, self.by_class = [], collections.defaultdict(list)
        self.last_logits = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.last_logits = self(x)
        loss = F.cross_entropy(self.last_logits, y)
        self.training_step_outputs.append({"loss": loss, "logits": self.last_logits})
        for label in y.tolist():
            self.by_class[label].append(batch_idx)
        return loss

    def on_train_epoch_end(self):
        losses = [o["loss"] for o in self.training_step_outputs]
        self.log("epoch_mean", torch.stack(losses).mean())
        self.training_step_outputs.clear()
        self.by_class.clear()


class SkipsSome(Sgd):
    """Returns None for some batches."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx in (0, 3):
            return None
        return F.cross_entropy(self(x), y)


class AverageMeter:
    """A running mean, as in many training scripts."""

    def __init__(self, name: str):
        self.name = name
        self.history: list[float] = []
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1):
        self.total += value * n
        self.count += n
        self.history.append(value)

    @property
    def mean(self):
        return self.total / max(self.count, 1)


class Shadow:
    """Averages of weights in a plain object; one that training_step moves."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.values = [p.detach().clone() for p in parameters]
        self.moves = 0

    def move(self, parameters: Iterable[Tensor]):
        self.moves += 1
        for slow, fast in zip(self.values, parameters, strict=True):
            slow.mul_(0.9).add_(fast.detach().to(slow.device), alpha=0.1)


class PlainObjects(Sgd):
    """State in plain helper objects: meters, a shadow of the weights, a loss with a memory."""

    def __init__(self):
        super().__init__()
        self.meters = {"loss": AverageMeter("loss"), "hits": AverageMeter("hits")}
        self.shadow = Shadow(self.net.parameters())

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.shadow.move(self.net.parameters())
        self.meters["loss"].update(float(loss.detach()), len(y))
        self.meters["hits"].update(float((logits.argmax(1) == y).float().mean()), len(y))
        pairs = zip(self.net.parameters(), self.shadow.values, strict=True)
        pull = sum((p - s.to(p.device)).square().sum() for p, s in pairs)
        return loss / (1 + self.meters["loss"].mean) + 0.01 * pull

    def on_train_epoch_end(self):
        for meter in self.meters.values():
            meter.reset()


class DeepContainers(Sgd):
    """State deep inside nested containers."""

    def __init__(self):
        super().__init__()
        self.stats = {
            "epochs": [
                {"per_layer": collections.OrderedDict(first=[], second=collections.deque())}
            ],
            "seen": {"indices": set(), "pair": ([], {"sum": torch.zeros(3)})},
            "histogram": np.zeros(3),
        }

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        layers = self.stats["epochs"][-1]["per_layer"]
        layers["first"].append(float(self.net[0].weight.norm()))
        layers["second"].appendleft(batch_idx)
        layers.setdefault(f"batch {batch_idx}", []).append(logits.detach())
        self.stats["seen"]["indices"].add((self.current_epoch, batch_idx))
        numbers, sums = self.stats["seen"]["pair"]
        numbers.append(len(y))
        sums["sum"] += logits.detach().mean(0).cpu()
        np.add.at(self.stats["histogram"], y.cpu().numpy(), 1)
        return F.cross_entropy(logits + 0.1 * sums["sum"].clone().to(logits.device), y)


class Noise(Sgd):
    """Noise from everywhere: Python, NumPy, torch, and generators of its own."""

    def __init__(self):
        super().__init__()
        self.rng, self.np_rng = random.Random(1), np.random.default_rng(2)
        self.torch_rng = seeded(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        share = np.random.beta(1.0, 1.0)  # noqa: NPY002
        mixed = share * x + (1 - share) * x[torch.randperm(len(x))]
        mixed = mixed + 0.1 * torch.randn(x.shape, generator=self.torch_rng).to(x.device)
        mixed = mixed * (1 + 0.1 * random.random()) + 0.1 * self.rng.gauss(0, 1)
        mixed = mixed + float(self.np_rng.normal()) * 0.1
        return F.cross_entropy(self(mixed), y)


class GradientPenalty(Sgd):
    """A penalty on the gradient by the inputs, inside the loss, through a layer norm."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * slope.square().sum(1).mean()


class Physics(pl.LightningModule):
    """u'' = -u by its residual: two derivatives by the inputs, three by HVPs."""

    def __init__(self):
        super().__init__()
        self.u = mlp(6, 8, 1)

    def training_step(self, batch, batch_idx):
        t = batch[0].detach().requires_grad_(True)
        u = self.u(t)
        (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), t, create_graph=True)
        return (second[:, 0] + u[:, 0]).square().mean() + (u[:, 0] - t[:, 0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Maml(pl.LightningModule):
    """Meta-learning: a gradient step inside the loss, through functional_call."""

    def __init__(self):
        super().__init__()
        self.net = mlp(6, 6, 3)
        self.inner_rate = nn.Parameter(torch.tensor(0.1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        half = len(x) // 2
        weights = dict(self.net.named_parameters())
        loss = F.cross_entropy(torch.func.functional_call(self.net, weights, x[:half]), y[:half])
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        adapted = {
            n: w - self.inner_rate * g for (n, w), g in zip(weights.items(), slopes, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(self.net, adapted, x[half:]), y[half:])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Part(pl.LightningModule):
    """A LightningModule used as a layer, which logs for itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.layer(x))


class Nested(pl.LightningModule):
    """LightningModules inside a LightningModule, and a loss object that holds ``self.log``."""

    class Loss:
        def __init__(self, log):
            self.log, self.calls = log, 0

        def __call__(self, logits, y):
            self.calls += 1
            loss = F.cross_entropy(logits, y)
            self.log("from_the_loss", loss, on_step=True, on_epoch=True)
            return loss

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"body": Part(), "head": Sgd(nn.Linear(8, 3))})
        self.loss = Nested.Loss(self.log)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.parts["head"](self.parts["body"](x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Cubed(torch.autograd.Function):
    """A hand-written backward that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceDifferentiable(Sgd):
    """Products must come from finite differences here."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net[2](Cubed.apply(torch.tanh(self.net[0](x)))), y)


class Clip(pl.LightningModule):
    """A contrastive loss with a learned temperature, projected back after each step."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        a, b = F.normalize(self.left(x[:, :3])), F.normalize(self.right(x[:, 3:]))
        logits = self.logit_scale.exp() * a @ b.T
        labels = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logit_scale.data.clamp_(max=math.log(100.0))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.98))


class Distills(Sgd):
    """Features of a frozen teacher, caught by forward hooks into a dict."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp().eval().requires_grad_(False)
        self.features = {}
        for name, net in (("student", self.net), ("teacher", self.teacher)):
            net[1].register_forward_hook(self.catch(name))

    def catch(self, name):
        def hook(module, inputs, output):
            self.features[name] = output

        return hook

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            self.teacher(x)
        loss = F.cross_entropy(self(x), y)
        return loss + F.mse_loss(self.features["student"], self.features["teacher"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class LogsByHand(Sgd):
    """Writes to the logger itself and reads the optimizer's learning rate."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rate = self.optimizers().param_groups[0]["lr"]
        self.log("lr", rate, rank_zero_only=True)
        self.logger.log_metrics({"by_hand": float(loss.detach())}, step=self.global_step)
        return loss


# -- optimisation ----------------------------------------------------------------------------------


class Gan(pl.LightningModule):
    """Manual optimisation, two optimizers, toggled."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(4, 8, 6), mlp(6, 8, 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        g, d = self.optimizers()
        z = torch.randn(len(x), 4, device=x.device)
        self.toggle_optimizer(g)
        g_loss = F.softplus(-self.discriminator(self.generator(z))).mean()
        g.zero_grad()
        self.manual_backward(g_loss)
        g.step()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        d_loss = discriminate(self, x, self.generator(z).detach())
        d.zero_grad()
        self.manual_backward(d_loss)
        d.step()
        self.untoggle_optimizer(d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        ]


def discriminate(module: Gan, real: Tensor, fake: Tensor) -> Tensor:
    d = module.discriminator
    return F.softplus(-d(real)).mean() + F.softplus(d(fake)).mean()


def gan_loss(module: Gan, batch: Any) -> Tensor:
    """The discriminator's loss: a GAN has no single one."""
    real = batch[0]
    fake = module.generator(torch.randn(len(real), 4, device=real.device))
    return discriminate(module, real, fake)


class ManualSam(Sgd):
    """SAM written out with manual optimisation, clipping and a scheduler stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        moves = []
        with torch.no_grad():
            length = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            for parameter in self.parameters():
                moves.append(0.05 * parameter.grad / length)
                parameter.add_(moves[-1])
        optimizer.zero_grad()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss)
        with torch.no_grad():
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.sub_(move)
        self.clip_gradients(optimizer, gradient_clip_val=10.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()
        self.log("loss", loss)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


def plain_loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


class OwnClipping(Sgd):
    """Clips with a rule of its own."""

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.log("grad_norm", torch.stack(norms).norm())
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")


class OneCycle(Classifier):
    """Rate and momentum change at every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


class TwoRates(Classifier):
    """Body and head at different rates, with a warm-up: a ratio to the edge, but no single edge."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.01},
            {"params": self.net[2].parameters(), "lr": 0.1},
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


class Lion(torch.optim.Optimizer):
    """The sign of a momentum: no stability edge is known for it."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_((0.9 * mean + 0.1 * p.grad).sign(), alpha=group["lr"])
                mean.lerp_(p.grad, 0.01)
        return loss


class With(Classifier):
    """Any optimizer."""

    def __init__(self, optimizer: Callable, **arguments: Any):
        super().__init__()
        self.choice, self.arguments = optimizer, arguments

    def configure_optimizers(self):
        return self.choice(self.parameters(), **self.arguments)


# -- compiled, checkpointed ------------------------------------------------------------------------


def compiled(backend: str) -> Callable[[], pl.LightningModule]:
    """The whole module compiled, without ``self.log``, which dynamo does not take."""

    def make():
        torch._dynamo.reset()
        return torch.compile(Silent(), backend=backend)

    return make


class Silent(Sgd):
    """Logs nothing."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class CompiledPart(Sgd):
    """Only the network is compiled."""

    def __init__(self):
        torch._dynamo.reset()
        super().__init__(torch.compile(batch_norm_net(), backend="aot_eager"))


class CompiledInPlace(Sgd):
    """``net.compile()``: the same module, another call."""

    def __init__(self):
        torch._dynamo.reset()
        super().__init__()
        self.net.compile(backend="eager")


class Checkpointed(Sgd):
    """Activations recomputed in the backward pass, dropout among them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh()) for _ in range(2)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.net(x), y)


class Reentrant(Sgd):
    """The older checkpointing, whose blocks need inputs that require gradients."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = checkpoint_sequential(self.blocks, 2, self.first(x), use_reentrant=True)
        return F.cross_entropy(self.net(x), y)


# -- beside other callbacks ------------------------------------------------------------------------


class Tunable(Classifier):
    """Has the attributes that the finders change."""

    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 1e-2, 4

    def train_dataloader(self):
        return vectors(self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def find_rate(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    Tuner(trainer).lr_find(module, num_training=20)


def scale_batches(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)


def members() -> list[Member]:
    """All of them."""
    unknown = no_edge("has no known stability edge")
    clipping = no_edge("gradient clipping .*is active")
    several_rates = "hessian/edge is not logged: .*no single edge, only the ratio"
    # The last step, made on another batch, took the probe's loss up, or led nowhere.
    uphill = {"sharpness/critical": "critical sharpness is NaN: the loss falls nowhere"}
    bounded = {"sharpness/critical": "critical sharpness is NaN: the loss does not rise"}
    M = Member
    return [
        M("dropout", Dropout, vectors, modes=BOTH, hessian={"density_samples": 2}),
        M("BatchNorm", lambda: Sgd(batch_norm_net()), vectors, modes=BOTH),
        M("GroupNorm", lambda: Sgd(group_norm_net()), images),
        M("LayerNorm, AdamW groups", LayerNormGroups, vectors),
        M("weight norm", lambda: Sgd(parametrized_weight_norm()), vectors),
        M("weight norm, old hook", lambda: Sgd(hooked_weight_norm()), vectors),
        M("spectral norm", lambda: Sgd(parametrized_spectral_norm()), vectors, modes=BOTH),
        M("spectral norm, old hook", lambda: Sgd(hooked_spectral_norm()), vectors, modes=BOTH),
        M("tied weights", Tied, tokens),
        M("frozen backbone", FrozenBackbone, vectors, modes=BOTH, missing=uphill),
        M("unused parameters", Unused, vectors),
        M("LoRA", Lora, vectors),
        M("pruned", lambda: Sgd(pruned_net()), vectors),
        M("configure_model, lazy", MadeLate, vectors),
        M(
            "BackboneFinetuning",
            FineTuned,
            vectors,
            callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            missing={"hessian/edge": several_rates},
        ),
        M("EMA in on_train_batch_end", EmaCopy, vectors),
        M("EMA teacher in training_step", MeanTeacher, vectors),
        M(
            "prototypes normalised in place",
            Prototypes,
            vectors,
            missing={**bounded, **no_edge("the gradient .*differ")},
        ),
        # The keys' encoder follows the weights, without a gradient.
        M(
            "MoCo queue",
            Queue,
            vectors,
            modes=BOTH,
            missing={**uphill, **no_edge("the gradient .*differ")},
            warns=["the loss does not rise"],
        ),
        M("SDPA", Sdpa, tokens, modes=BOTH),
        M("TransformerEncoder, padded", Encoder, tokens, modes=BOTH),
        M("MultiheadAttention in eval", MultiheadInEval, series, modes=BOTH, missing=uphill),
        M("GPT-2", Gpt, tokens, modes=BOTH),
        M("LSTM, stateful", Lstm, series, modes=BOTH, missing=uphill),
        M("GRU, packed", PackedGru, ragged, modes=BOTH, missing=uphill),
        M(
            "EmbeddingBag",
            Bag,
            tokens,
            engine=FINITE,
            missing=uphill,
            warns=["central differences of gradients .*_embedding_bag_backward"],
        ),
        M("sparse embeddings, SGD", lambda: Factorization("sgd"), tokens),
        M(
            "sparse embeddings, SparseAdam",
            lambda: Factorization("sparse"),
            tokens,
            missing=unknown,
        ),
        M("residual network", ConvNet, images, modes=BOTH, hessian={"density_samples": 2}),
        M("graph, dict batch", GraphNet, graphs(as_dict), missing=uphill),
        M("graph, dataclass batch", GraphNet, graphs(as_dataclass), missing=uphill),
        M("batch of its own class", OwnBatch, lambda: vectors(collate_fn=Bundle)),
        M("augments after transfer", Augments, vectors),
        M(
            "validated before in inference mode",
            KeepsValidation,
            Reloading,
            {"num_sanity_val_steps": 0},
            before_fit=lambda trainer, module, data: trainer.validate(module, data, verbose=False),
        ),
        M("NamedTuple batch", NamedBatch, named_tuples),
        M("nested lists and strings", NestedBatch, nested_lists),
        M("batch edited in place", EditsBatch, vectors),
        M("iterable dataset", Sgd, lambda: DataLoader(Stream(), batch_size=8)),
        M("CombinedLoader", SemiSupervised, combined, warns=["have lengths of .4, 8.*counts as 4"]),
        M(
            "persistent worker",
            Sgd,
            lambda: vectors(num_workers=1, persistent_workers=True, generator=seeded(7)),
        ),
        M(
            "data module, reloaded, validated",
            WithValidation,
            Reloading,
            {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 0.5},
        ),
        M("no batch_idx", NoBatchIndex, vectors),
        M("dataloader_iter", TakesIterator, vectors),
        M("VAE", Vae, vectors, modes=BOTH),
        M(
            "VQ-VAE",
            Quantized,
            vectors,
            modes=BOTH,
            missing=no_edge("the gradient .*differ"),
        ),
        M("torchmetrics", Metrics, vectors, modes=BOTH),
        M("lists with graphs", Collects, vectors),
        # Measured at steps that move the weights.
        M("None on some batches", SkipsSome, vectors, options={"every_n_train_steps": 5}),
        # Its loss is divided by its own value, which is detached.
        M("plain helper objects", PlainObjects, vectors, missing=no_edge("the gradient .*differ")),
        M("deep containers", DeepContainers, vectors),
        M("noise from everywhere", Noise, vectors, modes=BOTH, missing=uphill),
        M("gradient penalty", GradientPenalty, vectors),
        M("physics-informed", Physics, vectors),
        M("MAML", Maml, vectors, missing=bounded, warns=["the loss falls nowhere"]),
        M("nested LightningModules", Nested, vectors, missing=uphill),
        M(
            "once_differentiable",
            OnceDifferentiable,
            vectors,
            engine=FINITE,
            warns=["central differences of gradients .*once_differentiable"],
        ),
        M("Fourier layer, complex weights", Fourier, vectors),
        M("CLIP loss", Clip, vectors, missing=bounded),
        M("distillation by hooks", Distills, vectors),
        M("logs by hand", LogsByHand, vectors),
        M("GAN, manual", Gan, vectors, options={"loss_fn": gan_loss}, missing=uphill),
        M("SAM, manual", ManualSam, vectors, options={"loss_fn": plain_loss}, missing=uphill),
        M(
            "accumulation, clipped norm",
            Sgd,
            vectors,
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
            missing=clipping,
        ),
        M(
            "clipped values",
            Sgd,
            vectors,
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            missing=clipping,
        ),
        M("own clipping", OwnClipping, vectors),
        M("OneCycle", OneCycle, vectors),
        M("two rates", TwoRates, vectors, missing={"hessian/edge": several_rates}),
        M("Adagrad", lambda: With(torch.optim.Adagrad, lr=0.05), vectors, missing=unknown),
        M("Lion", lambda: With(Lion), vectors, missing=unknown),
        M("NAdam", lambda: With(torch.optim.NAdam, lr=1e-2), vectors),
        M("RMSprop", lambda: With(torch.optim.RMSprop, lr=1e-3, centered=True), vectors),
        M("LBFGS", lambda: With(torch.optim.LBFGS, lr=0.1, max_iter=3), vectors, missing=unknown),
        M(
            "SWA",
            Sgd,
            vectors,
            {"max_epochs": 3},
            callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
        ),
        M("EMAWeightAveraging", Sgd, vectors, callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
        M(
            "LearningRateFinder",
            Tunable,
            callbacks=lambda: [LearningRateFinder(num_training_steps=20)],
            missing=uphill,
        ),
        M(
            "BatchSizeFinder",
            Tunable,
            callbacks=lambda: [BatchSizeFinder(max_trials=2, steps_per_trial=2)],
            missing=uphill,
        ),
        M("Tuner.lr_find", Tunable, before_fit=find_rate, missing=uphill),
        M("Tuner.scale_batch_size", Tunable, before_fit=scale_batches, missing=uphill),
        M("64-true", Dropout, vectors, {"precision": "64-true"}),
        M("bf16-mixed", lambda: Sgd(batch_norm_net()), vectors, {"precision": "bf16-mixed"}),
        M("bf16-true", Sgd, vectors, {"precision": "bf16-true"}),
        M("compiled, eager", compiled("eager"), vectors),
        M("compiled, aot_eager", compiled("aot_eager"), vectors),
        M("compiled submodule", CompiledPart, vectors),
        M("compiled in place", CompiledInPlace, vectors),
        M("checkpointing", Checkpointed, vectors),
        M("checkpointing, reentrant", Reentrant, vectors),
    ]
