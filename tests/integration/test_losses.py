"""Typical losses: the logged eigenvalue is that of the loss by its definition."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_landscape import HessianMonitor, SharpnessMonitor
from lightning_landscape.geometry import batches
from tests.oracles import arguments, dense_hessian, generator
from tests.runs import train

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (8, 8, 8, 5, 8)  # the batches of an epoch; the probe holds the first four
HELD = sum(SIZES[:4])
FROZEN = 4  # steps at a learning rate of zero, so that captured probes see the initial weights
Batch = Mapping[str, Any]
LossFn = Callable[[Any, Batch, int], Tensor]  # of the module, a batch and global_step


def made(number: int, n: int) -> dict[str, Tensor]:
    """A batch for all losses; batches differ in how many labels and tokens are valid."""
    g = generator(number)
    x, sequence = torch.randn(n, 4, generator=g), torch.randn(n, 6, 4, generator=g)
    mask = torch.arange(6) < torch.randint(2, 4 + number, (n, 1), generator=g)
    y = (x[:, :3] + 0.7 * torch.randn(n, 3, generator=g)).argmax(1)
    return {
        "x": x,
        "y": y,
        "some": y.where(torch.arange(n) > number, -100),
        "view": x[:, :3] + 0.3 * torch.randn(n, 3, generator=g),
        "sequence": sequence,
        "mask": mask,
        "tokens": torch.randint(0, 6, (n, 6), generator=g).where(mask, -100),
        "labels": torch.randint(1, 3, (n, 2), generator=g),
        "lengths": torch.randint(1, 3, (n,), generator=g),
    }


FEED = [made(number, n) for number, n in enumerate(SIZES)]
WHOLE = {key: torch.cat([batch[key] for batch in FEED[:4]]) for key in FEED[0]}


# -- the losses -----------------------------------------------------------------------------------


def entropy(labels: str = "y", weights: list[float] | None = None, **options: Any) -> LossFn:
    def of(m: Any, batch: Batch, _: int) -> Tensor:
        logits = m.net(batch["x"])
        weight = None if weights is None else logits.new_tensor(weights)
        return F.cross_entropy(logits, batch[labels], weight, **options)

    return of


def masked_mean(m: Any, batch: Batch, _: int) -> Tensor:
    errors = (m.net(batch["sequence"]) - batch["sequence"][..., 1:] ** 2).square().mean(-1)
    return (errors * batch["mask"]).sum() / batch["mask"].sum()


def token_mean(m: Any, batch: Batch, _: int) -> Tensor:
    logits = m.net(batch["tokens"][:, :-1].clamp(min=0))
    return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def info_nce(m: Any, batch: Batch, _: int) -> Tensor:
    scores = m.net(batch["x"]) @ batch["view"].T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def tilted_mean(m: Any, batch: Batch, step: int) -> Tensor:
    return (2 * entropy(reduction="none")(m, batch, step)).exp().mean().log() / 2


def ctc(m: Any, batch: Batch, _: int) -> Tensor:
    log_p = m.net(batch["sequence"][:, :4]).log_softmax(-1).transpose(0, 1)
    steps = torch.full_like(batch["lengths"], len(log_p))
    return F.ctc_loss(log_p, batch["labels"], steps, batch["lengths"])


def ctc_written_out(m: Any, batch: Batch, _: int) -> Tensor:
    """The recursion of Graves et al. 2006 for one or two labels; torch's has one derivative."""
    log_p = m.net(batch["sequence"][:, :4]).log_softmax(-1)
    one, two = batch["labels"].T
    path = torch.stack([0 * one, one, 0 * one, two, 0 * one], 1)
    shown = log_p.gather(2, path[:, None].expand(-1, log_p.shape[1], -1))
    never = torch.full_like(shown[:, 0], -1e5)
    skips = (torch.arange(5) == 3) & (one != two)[:, None]
    reached = torch.cat([shown[:, 0, :2], never[:, 2:]], 1)
    for now in shown[:, 1:].unbind(1):
        by_one = torch.cat([never[:, :1], reached[:, :-1]], 1)
        by_two = torch.cat([never[:, :2], reached[:, :-2]], 1).where(skips, never)
        reached = torch.stack([reached, by_one, by_two]).logsumexp(0) + now
    ends = 2 * batch["lengths"][:, None] - torch.arange(2)
    return (-reached.gather(1, ends).logsumexp(1) / batch["lengths"]).mean()


def two_tasks(share: Callable[[Any, int], Any]) -> LossFn:
    """Batches evaluated as one give another value of the second task, not of the first."""
    first, second = entropy(), entropy("some", label_smoothing=0.1)
    return lambda m, batch, step: first(m, batch, step) + share(m, step) * second(m, batch, step)


@dataclass(frozen=True)
class Loss:
    """``joined``: all batches as one have the same loss; ``exact``: another form of ``of``."""

    of: LossFn
    joined: bool = False
    layer: type[nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    exact: LossFn | None = None
    precision: str = "32-true"

    @property
    def summed(self) -> bool:
        return "loss_reduction" in self.options


LOSSES = {
    "mean": Loss(entropy(), joined=True),
    "sum": Loss(entropy(reduction="sum"), joined=True, options={"loss_reduction": "sum"}),
    "ignore_index": Loss(entropy("some")),
    "class weights": Loss(entropy(weights=[1.0, 3.0, 9.0])),
    "label smoothing": Loss(entropy(label_smoothing=0.2), joined=True),
    "masked mean": Loss(masked_mean),
    "token mean": Loss(token_mean, layer=nn.Embedding),
    "InfoNCE": Loss(info_nce),
    # In float32 differences of gradients do not reach tol.
    "CTC": Loss(ctc, joined=True, exact=ctc_written_out, precision="64-true"),
    "tasks by global_step": Loss(two_tasks(lambda m, step: step / 100)),
    "tasks by a buffer": Loss(two_tasks(lambda m, _: (m.seen - 50).clamp(min=0) / 100)),
    "tasks by an attribute": Loss(two_tasks(lambda m, _: m.share)),
    "tasks by a count": Loss(two_tasks(lambda m, _: m.calls % 7 / 3)),
    "BatchNorm, train": Loss(entropy(), layer=nn.BatchNorm1d),
    "BatchNorm, eval": Loss(
        entropy(), joined=True, layer=nn.BatchNorm1d, options={"probe_mode": "eval"}
    ),
}


class Module(pl.LightningModule):
    """Trains with one of the losses; with a zero head all examples start with the same loss."""

    evaluated = Mock()  # examples of each evaluation; isolation restores all other state

    def __init__(self, loss: Loss, head: str):
        super().__init__()
        tokens = loss.layer is nn.Embedding
        body = [nn.Embedding(6, 5) if tokens else nn.Linear(4, 5)]
        body += [nn.BatchNorm1d(5)] if loss.layer is nn.BatchNorm1d else []
        self.net = nn.Sequential(*body, nn.Tanh(), nn.Linear(5, 6 if tokens else 3))
        if head == "zero":
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)
        self.loss, self.share, self.calls = loss, 0.0, 0
        self.register_buffer("seen", torch.tensor(0.0))

    def on_train_batch_start(self, batch, batch_idx):
        self.share = float(self.global_step >= 10) * (1 + self.global_step % 3)

    def training_step(self, batch, batch_idx):
        if getattr(self.log, "__name__", "") == "_log_nothing":
            Module.evaluated(len(batch["x"]))
        loss = self.loss.of(self, batch, self.global_step)
        self.seen += 1
        self.calls += 1
        return loss

    def on_save_checkpoint(self, checkpoint):
        checkpoint["calls"] = self.calls

    def on_load_checkpoint(self, checkpoint):
        self.calls = checkpoint["calls"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02 if self.loss.summed else 0.2)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= FROZEN))
        return [optimizer], [{"scheduler": warm, "interval": "step"}]


# -- the truth ------------------------------------------------------------------------------------


class PlainNorm(nn.Module):
    """BatchNorm in train mode; under torch.func the second derivative of torch's own is wrong."""

    def __init__(self, norm: nn.BatchNorm1d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + self.eps).sqrt() * self.weight + self.bias


class Truth(pl.Callback):
    """Keeps copies of the module where monitors measure: first, and at multiples of ``every``."""

    def __init__(self, loss: Loss, held: list[Batch], every: int) -> None:
        self.loss, self.every = loss, every
        self.held = [
            {k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in held
        ]
        self.kept: dict[int, Module] = {}
        self.known: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step in (1, FROZEN) or trainer.global_step % self.every == 0:
            self.kept[trainer.global_step] = copy.deepcopy(pl_module)

    def at(self, step: int) -> float:
        """Of the mean over batches, weighted by their numbers of examples, or of the sum."""
        if step not in self.known:
            module = self.kept[step].double()
            module.train(self.loss.options.get("probe_mode") != "eval")
            if module.training:
                layers = [PlainNorm(m) if isinstance(m, nn.BatchNorm1d) else m for m in module.net]
                module.net = nn.Sequential(*layers)
            of = self.loss.exact or self.loss.of
            parts = [(1.0 if self.loss.summed else len(b["x"]) / HELD, b) for b in self.held]
            H = dense_hessian(module, lambda m: sum(w * of(m, b, step) for w, b in parts))
            self.known[step] = float(torch.linalg.eigvalsh(H)[-1])
        return self.known[step]

    def check(self, monitor: HessianMonitor, rows: list[dict[str, Any]]) -> None:
        """The eigenvalue in each of ``rows``."""
        key = monitor.key("top_eigenvalue")
        errors = {row["step"]: row[key] / self.at(row["step"]) - 1 for row in rows}
        assert {step: f"{e:+.2%}" for step, e in errors.items() if not abs(e) <= 1e-3} == {}


def hessian(every: int, loss: Loss, **more: Any) -> HessianMonitor:
    settings = {"every_n_train_steps": every, "max_overhead": None, "probe_samples": HELD}
    settings |= {"tol": 1e-4, "rtol": 0.0, "max_hvps": 200}
    return HessianMonitor(**settings, **loss.options, **more)


def fit(loss: Loss, head: str, monitors: list[Any], root: Any, held=FEED[:4], **more: Any) -> Any:
    truth = Truth(loss, held, monitors[0].every_n_train_steps)
    feed = DataLoader(FEED, batch_size=None, collate_fn=lambda batch: batch)
    settings = {"max_epochs": -1, "precision": loss.precision, **more}
    callbacks = [truth, *monitors]
    # Lightning reads a checkpoint before it converts the module, and would round it to float32.
    dtype = torch.float64 if loss.precision == "64-true" else torch.float32
    outcome = train(lambda: Module(loss, head).to(dtype), feed, callbacks, root, **settings)
    return truth, outcome.trainer


# -- each loss, however it is evaluated -----------------------------------------------------------

COLUMNS = ("as chosen", "apart", "by hand")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``runs(name, head)``: one of 12 and one of 202 steps; those of the last call are kept."""
    known: dict[Any, Any] = {}

    def run(loss: Loss, head: str, every: int, steps: int) -> Any:
        # A number that is not the same in all batches keeps them apart.
        given = [{**batch, "number": number} for number, batch in enumerate(FEED[:4])]
        by_hand = {"loss_fn": lambda m, batch: loss.of(m, batch, m.global_step)}
        monitors = [
            hessian(every, loss),
            hessian(every, loss, name="apart", probe=given),
            hessian(every, loss, name="hand", **by_hand),
        ]
        truth, _ = fit(loss, head, monitors, tmp_path_factory.mktemp("run"), max_steps=steps)
        return truth, dict(zip(COLUMNS, monitors, strict=True))

    def both(name: str, head: str) -> Any:
        if (name, head) not in known:
            known.clear()
            known[name, head] = [run(LOSSES[name], head, *of) for of in ((6, 12), (101, 202))]
        return known[name, head]

    return both


# A head of zeros is the harder start: most of the others are slow tests.
SLOW_CASES = {(name, "random") for name in LOSSES if name != "mean"}
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW_CASES else [])
    for case in itertools.product(LOSSES, ("zero", "random"))
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(("name", "head"), CASES)
def test_eigenvalue_is_that_of_the_loss(name, head, column, runs):
    """At the initial weights, after 12 steps, and after about 200."""
    steps = []
    for truth, monitors in runs(name, head):
        monitor = monitors[column]
        rows = [monitor.history[0], monitor.history[-1]]
        steps += [row["step"] for row in rows]
        truth.check(monitor, rows)
    assert steps == ([1, 12, 1, 202] if column == "apart" else [4, 12, 4, 202])
    assert monitor.state_dict()["concat"] is (LOSSES[name].joined and column != "apart")


# -- losses that change ---------------------------------------------------------------------------


def wrong(reason: str, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


LATE, SLOWLY = (two_tasks(f) for f in (lambda m, t: float(t >= 80), lambda m, t: t / 3000))


@pytest.mark.parametrize(
    ("of", "head", "steps"),
    [
        (LATE, "random", 144),
        wrong("steps 81 to 126: up to 5.3 % off, not compared again", LATE, "random", 126),
        (SLOWLY, "random", 162),
        (tilted_mean, "zero", 9),
        (tilted_mean, "zero", 4),
    ],
    ids=["late", "late, ends before", "slowly", "tilted", "tilted, measured once"],
)
def test_rows_that_are_not_superseded(of, head, steps, tmp_path):
    """Batches are evaluated as one only as long as that is the same loss."""
    loss = Loss(of)
    monitor = hessian(9, loss)
    truth, _ = fit(loss, head, [monitor], tmp_path, max_steps=steps)
    truth.check(monitor, [row for row in monitor.history if "superseded" not in row])


@pytest.mark.parametrize(
    "name",
    [
        "mean",
        "masked mean",
        "ignore_index",
        "class weights",
        "token mean",
        wrong(
            "up to 3.1 % off: a task that begins later, not compared again", "tasks by an attribute"
        ),
    ],
)
def test_one_large_batch_with_little_memory(name, tmp_path, monkeypatch):
    """Evaluated in pieces if these have the same loss; the head starts at zero."""
    monkeypatch.setattr(batches, "free_memory", lambda device: 10)
    loss = LOSSES[name]
    monitor = hessian(9, loss, probe=[WHOLE])
    with pytest.warns(match="does not fit into memory"):
        truth, _ = fit(loss, "zero", [monitor], tmp_path, [WHOLE], max_steps=36)
    truth.check(monitor, monitor.history)


# -- resumed --------------------------------------------------------------------------------------


# Batches may be evaluated as one until the second task begins, at step 10 or at step 50.
ONE_TASK_AT_FIRST = {"tasks by an attribute", "tasks by a buffer"}
QUICK = {"mean": "random", "ignore_index": "zero"}
RESUMED = [
    pytest.param(name, QUICK.get(name, "zero"), marks=[] if name in QUICK else [pytest.mark.slow])
    for name in LOSSES
]


@pytest.mark.parametrize(("name", "head"), RESUMED)
def test_run_resumed_at_step_10(name, head, tmp_path):
    """Bitwise equal except for the eigenvalue, whose solver starts cold."""
    loss = LOSSES[name]
    common = {"every_n_train_steps": 3, "max_overhead": None, "probe_samples": HELD}
    whole, begun, resumed = ([hessian(3, loss), SharpnessMonitor(**common)] for _ in range(3))
    truth, _ = fit(loss, head, whole, tmp_path / "whole", max_epochs=4)
    _, trainer = fit(loss, head, begun, tmp_path / "begun", max_epochs=2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    Module.evaluated.reset_mock()
    more = {"max_epochs": 4, "ckpt_path": tmp_path / "saved.ckpt"}
    fit(loss, head, resumed, tmp_path / "resumed", **more)
    # A decision would begin with the batches one by one, and then take them as one.
    joined = loss.joined or name in ONE_TASK_AT_FIRST
    evaluated = arguments(Module.evaluated)
    assert evaluated[0] == HELD if joined else HELD not in evaluated
    assert [row["step"] for row in resumed[0].history] == [12, 15, 18]
    truth.check(resumed[0], resumed[0].history)
    for row, before in zip(resumed[0].history, whole[0].history[3:], strict=True):
        value, expected = (of["hessian/top_eigenvalue"] for of in (row, before))
        assert value == pytest.approx(expected, rel=1e-6)
    assert resumed[1].history == whole[1].history[3:]
