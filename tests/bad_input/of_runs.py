"""Runs that are set up wrongly, and the messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
)
from tests.runs import train
from tests.small import Linear, Manual, regression

ALWAYS = {"every_n_train_steps": 1, "max_overhead": None}
BATCH = next(iter(regression()))
OLD_ROW = {"step": 7, "monitor": "hessian", "hessian/top_eigenvalue": 3.0}
EDGE = "hessian/edge_ratio"


class Validated(Linear):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        pass


class Apart(Linear):
    """The optimizer holds a parameter that does not belong to the module."""

    def configure_optimizers(self):
        self.__dict__["loose"] = nn.Parameter(torch.ones(1))
        return torch.optim.SGD([self.__dict__["loose"]], lr=0.1)


class Adagrad(Linear):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters())


class Twin(HessianMonitor):
    """Another class with the same keys."""


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(zip(*BATCH, strict=True))


def _truncated(folder):
    path = folder / "torn.ckpt"
    torch.save({"state_dict": Linear().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:300])
    return path


def _exhausted():
    iterator = iter([tuple(BATCH)])
    next(iterator)
    return iterator


class Elsewhere(pl.Callback):
    """Gives ``monitor`` to another Trainer while this one runs."""

    def __init__(self, monitor, folder):
        self.monitor, self.folder = monitor, folder

    def on_train_start(self, trainer, pl_module):
        train(Linear, regression, [self.monitor], self.folder / "inner")


def _in_two(folder):
    monitor = HessianMonitor(**ALWAYS)
    return [monitor, Elsewhere(monitor, folder)]


class ByHand(pl.Callback):
    """Calls the hook of a callback that is in no Trainer."""

    def setup(self, trainer, pl_module, stage):
        HessianMonitor().setup(trainer, pl_module, stage)


@dataclass(frozen=True)
class Run:
    """A run that is set up wrongly.

    Attributes:
        use: the wrong use, for the table.
        callbacks: returns the callbacks, given a folder.
        messages: regular expressions; each must match the error or one of the warnings.
        error: the exception that ends the run before training; None: warnings only.
    """

    use: str
    callbacks: Callable[[Any], list[pl.Callback]]
    messages: tuple[str, ...]
    error: type[Exception] | None = None
    module: Callable[[], pl.LightningModule] = Linear
    settings: dict[str, Any] = field(default_factory=dict)
    resumes: Callable[[Any], Any] | None = None


REFUSED = [
    *(
        Run(
            f"callbacks=[{kind.__name__}]: the class",
            lambda _, kind=kind: [HessianMonitor(name="other"), kind],
            (rf"{kind.__name__} is a class: pass an instance, callbacks=\[{kind.__name__}\(",),
            AttributeError,
        )
        for kind in (HessianMonitor, SharpnessEarlyStopping)
    ),
    Run(
        "SharpnessEarlyStopping(monitor='hessian/edge_ration') beside a HessianMonitor",
        lambda _: [HessianMonitor(), SharpnessEarlyStopping("hessian/edge_ration", 1.0)],
        (r"monitor='hessian/edge_ration'\): no callback of this Trainer logs", "pass one of these"),
        MisconfigurationException,
    ),
    Run(
        "SharpnessEarlyStopping(monitor='train_loss'), which Lightning logs",
        lambda _: [HessianMonitor(), SharpnessEarlyStopping("train_loss", 1.0)],
        (r"monitor='train_loss'\): no callback of this Trainer logs", "available: .*edge_ratio"),
        MisconfigurationException,
    ),
    Run(
        "SharpnessEarlyStopping without a monitor",
        lambda _: [SharpnessEarlyStopping(EDGE, 1.0)],
        ("monitor='hessian/edge_ratio'", "add a HessianMonitor"),
        MisconfigurationException,
    ),
    Run(
        "two callbacks of different classes with the same keys",
        lambda _: [HessianMonitor(), Twin()],
        ("2 callbacks would log under 'hessian'", r"pass a different .*name=\.\.\."),
        MisconfigurationException,
    ),
    Run(
        "the same callback twice in the list",
        lambda _: [HessianMonitor()] * 2,
        ("more than one stateful callback of type `HessianMonitor`",),
        RuntimeError,
    ),
    *(
        Run(
            f"{kind.__name__}(loss_fn=None) with manual optimisation",
            lambda _, kind=kind: [kind()],
            ("Manual uses manual optimisation", rf"Pass {kind.__name__}\(loss_fn=lambda pl_module"),
            MisconfigurationException,
            Manual,
        )
        for kind in (HessianMonitor, LandscapeMonitor)
    ),
    Run(
        "HessianMonitor(parameters='lyer.*')",
        lambda _: [HessianMonitor(parameters="lyer.*")],
        (r"parameters=\['lyer\.\*'\]\): no parameter matches", r"expected glob .*'layer\.weight'"),
        ValueError,
    ),
    *(
        Run(
            f"{kind.__name__}(blocks={{'lyer.weight': 'first'}})",
            lambda _, kind=kind: [kind(blocks={"lyer.weight": "first"})],
            (r"blocks=\{'lyer\.weight'.*there is no parameter 'lyer", r"expected names among"),
            ValueError,
        )
        for kind in (HessianMonitor, InterpolationMonitor)
    ),
    Run(
        "HessianMonitor(probe=DataLoader([]))",
        lambda _: [HessianMonitor(probe=DataLoader([]))],
        ("probe=DataLoader: it holds no batch", "pass a DataLoader or a list with one batch"),
        ValueError,
    ),
    Run(
        "HessianMonitor(probe=an exhausted iterator)",
        lambda _: [HessianMonitor(probe=_exhausted())],
        ("probe=list_iterator: it holds no batch, or all .* have been used before", "pass a D"),
        ValueError,
    ),
    Run(
        "LandscapeMonitor(between=(a, b)) of another network",
        lambda _: [LandscapeMonitor(directions="between", between=({}, {}))],
        (r"between\[0\]=\.\.\.\): it has no parameter 'layer\.weight'", "expected the state"),
        ValueError,
    ),
    Run(
        "InterpolationMonitor(reference=state dict of another network)",
        lambda _: [InterpolationMonitor(reference={"a": torch.ones(2)})],
        ("reference=.* holds no parameter 'layer.weight'", "expected all that are measured"),
        ValueError,
    ),
    Run(
        "InterpolationMonitor(reference=a damaged file)",
        lambda folder: [InterpolationMonitor(reference=_truncated(folder))],
        (r"reference=.*torn\.ckpt.*cannot be read safely", "expected a checkpoint or "),
        ValueError,
    ),
    Run(
        "a callback given to another Trainer while it measures in one",
        _in_two,
        ("it is measuring in another Trainer", "pass each Trainer a callback of its own"),
        MisconfigurationException,
    ),
    Run(
        "a hook of a callback called by hand",
        lambda _: [ByHand()],
        ("not among the callbacks of this Trainer", r"pass it to Trainer\(callbacks=\[\.\.\.\]\)"),
        MisconfigurationException,
    ),
    Run(
        "Trainer.fit(ckpt_path=a damaged checkpoint)",
        lambda _: [HessianMonitor()],
        ("corrupted|failed finding central directory",),
        RuntimeError,
        resumes=_truncated,
    ),
]  # fmt: skip


def _loss(what, function, *messages):
    return Run(
        f"SharpnessMonitor(loss_fn=...) that returns {what}",
        lambda _: [SharpnessMonitor(loss_fn=function, **ALWAYS)],
        (r"sharpness: a measurement failed \(", *messages),
    )


def _outputs(module, batch):
    return module.layer(batch[0])


WARNED = [
    Run(
        "HessianMonitor(probe=a batch that does not fit the module)",
        lambda _: [HessianMonitor(probe=(torch.ones(4, 3), torch.ones(4, 1)), **ALWAYS)],
        (r"hessian: a measurement failed .*shapes", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(probe=[x, y]), one batch as a list",
        lambda _: [HessianMonitor(probe=list(BATCH), **ALWAYS)],
        ("probe is a list, so each of its items was used as a", r"pass probe=tuple\(batch\)"),
    ),
    Run(
        "HessianMonitor(probe=(text, text)), which hold no tensor",
        lambda _: [HessianMonitor(probe=("a", "b"), **ALWAYS)],
        ("a measurement failed .*must be Tensor, not str", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(probe=NumPy arrays)",
        lambda _: [HessianMonitor(probe=tuple(t.numpy() for t in BATCH), **ALWAYS)],
        ("must be Tensor, not numpy", r"pass a fixed probe=\.\.\. that"),
    ),
    Run(
        "HessianMonitor(k=10) of a module with 5 parameters",
        lambda _: [HessianMonitor(k=10, **ALWAYS)],
        ("k=10: expected an integer from 1 to the 5 parameters",),
    ),
    Run(
        "HessianMonitor(parameters=['layer.*', 'haed.*'])",
        lambda _: [HessianMonitor(parameters=["layer.*", "haed.*"], **ALWAYS)],
        (r"parameters=\['layer.*no parameter matches 'haed\.\*'", "expected glob patterns"),
    ),
    _loss("a dict", lambda module, batch: {"total": 1.0}, "returned dict: expected a scalar"),
    _loss("nothing", lambda module, batch: None, "returned NoneType: expected a scalar"),
    _loss("one loss an example", _outputs, r"of shape \(20, 1\): expected a scalar, e.g. loss"),
    _loss("a complex loss", lambda *a: _outputs(*a).sum() * 1j, "expected a real scalar"),
    _loss("a detached loss", lambda *a: _outputs(*a).sum().detach(), "expected one that loss"),
    _loss("an integer", lambda *a: _outputs(*a).sum().long(), "int64.*expected one that loss"),
    Run(
        "GeneralizationMonitor(metric_fn=...) that returns a number",
        lambda _: [
            GeneralizationMonitor(validation_probe=[BATCH], metric_fn=lambda *a: 3, **ALWAYS)
        ],
        ("metric_fn returned int: expected a mapping such as",),
    ),
    Run(
        "GeneralizationMonitor() in a fit without validation",
        lambda _: [GeneralizationMonitor(**ALWAYS)],
        ("this fit has no validation loop", r"pass validation_probe=\.\.\."),
    ),
    Run(
        "HessianMonitor with no trainable parameter in an optimizer",
        lambda _: [HessianMonitor(**ALWAYS)],
        ("none requires a gradient: expected at least one trainable",),
        module=Apart,
    ),
    Run(
        "SharpnessEarlyStopping(monitor='hessian/edge_ratio') of an optimizer without an edge",
        lambda _: [HessianMonitor(**ALWAYS), SharpnessEarlyStopping(EDGE, 1.0)],
        ("a measurement has no 'hessian/edge_ratio'", "no stability edge is logged: Adagrad"),
        module=Adagrad,
    ),
]  # fmt: skip
