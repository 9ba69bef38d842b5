"""Each member of the zoo trains bitwise as without callbacks, and gives all expected values."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessMonitor,
)
from lightning_landscape.training.monitor import Monitor
from tests.conftest import TABLES
from tests.runs import DataOrder, Outcome, differences, train
from tests.zoo import Member, members

MEMBERS = members()
# One of each kind, in its first mode, for `make test`; the others are slow tests.
REPRESENTATIVES = {
    *("dropout", "BatchNorm", "weight norm, old hook", "spectral norm", "tied weights"),
    *("frozen backbone", "configure_model, lazy", "EMA teacher in training_step", "MoCo queue"),
    *("SDPA", "LSTM, stateful", "EmbeddingBag", "sparse embeddings, SparseAdam"),
    *("residual network", "graph, dataclass batch", "batch edited in place", "CombinedLoader"),
    *("persistent worker", "data module, reloaded, validated", "dataloader_iter", "torchmetrics"),
    *("None on some batches", "plain helper objects", "deep containers", "noise from everywhere"),
    *("gradient penalty", "nested LightningModules", "once_differentiable", "logs by hand"),
    *("Fourier layer, complex weights", "GAN, manual", "accumulation, clipped norm", "two rates"),
    *("LBFGS", "EMAWeightAveraging", "BatchSizeFinder", "bf16-mixed", "compiled, aot_eager"),
    "checkpointing, reentrant",
}
# Pictures are made of what is measured, whatever was trained: of some runs they are drawn.
_DRAWN_EVERY = 8


def _cases() -> list[Any]:
    every = [(member, mode) for member in MEMBERS for mode in member.modes]
    cases = []
    for position, (member, mode) in enumerate(every):
        quick = member.name in REPRESENTATIVES and mode == member.modes[0]
        marks = [] if quick else [pytest.mark.slow]
        marks += [pytest.mark.pictures] if position % _DRAWN_EVERY == 0 else []
        cases.append(pytest.param(member, mode, marks=marks, id=f"{member.name}-{mode}"))
    return cases


_OURS = re.compile(r"^(hessian|sharpness|landscape|generalization|interpolation)(/\w+)?: ")
# Few products on purpose: these runs check which values exist, not their accuracy.
_EXPECTED = (
    "the eigenvalue solver stopped at max_hvps",
    "is small compared with the largest eigenvalue",
    "is not settled, a longer search may find more",
)
_ADAPTIVE = (torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam)


def monitors(member: Member, mode: str) -> list[Monitor]:
    """All callbacks with all quantities."""
    common = {"max_overhead": None, "probe_samples": 8, "probe_mode": mode, **member.options}
    scalars = {"every_n_train_steps": 3, **common}
    pictures = {"every_n_train_steps": 12, "line_resolution": 2, **common}
    return [
        HessianMonitor(
            k=2,
            max_hvps=4,
            min_eigenvalue=True,
            trace_samples=2,
            blocks=True,
            batch_edge_ratio=True,
            update_curvature=True,
            **scalars,
            **member.hessian,
        ),
        SharpnessMonitor(
            worst_case=True,
            worst_case_steps=2,
            average=True,
            samples=2,
            keskar=True,
            critical=True,
            **scalars,
        ),
        LandscapeMonitor(resolution=2, **pictures),
        LandscapeMonitor(name="top", directions="eigenvectors", resolution=0, **pictures),
        GeneralizationMonitor(
            validation_probe=first_batches(member), **{**scalars, "probe_samples": 16}
        ),
        InterpolationMonitor(resolution=2, **scalars),
    ]


class Numbered(Probe):
    """Batches numbered from 1: one member gives no loss for the first of an epoch."""

    def load(self, prepare: Callable[[Any], Any]) -> None:
        super().load(prepare)
        self.batches = [dataclasses.replace(b, index=b.index + 1) for b in self.batches]


def first_batches(member: Member) -> Probe:
    """Of its own loader, in the place of validation examples."""
    feed = member.data() if member.data else member.make()
    if isinstance(feed, (pl.LightningModule, pl.LightningDataModule)):
        feed.prepare_data()
        feed.setup("fit")
        feed = feed.train_dataloader()
    loader = feed if isinstance(feed, CombinedLoader) else CombinedLoader(feed, "max_size_cycle")
    return Numbered([batch for batch, _, _ in itertools.islice(iter(loader), 2)])


def run(member: Member, ours: list[Monitor], root) -> tuple[Outcome, list[str]]:
    """The run, and the messages that our callbacks gave."""
    order = DataOrder()
    callbacks: list[pl.Callback] = [order, *member.callbacks(), *ours]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = train(
            member.make,
            member.data,
            callbacks,
            root,
            before_fit=member.before_fit,
            **member.settings,
        )
    assert order.seen
    return outcome, [str(w.message) for w in caught if _OURS.match(str(w.message))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without our callbacks, once per member."""
    known: dict[str, dict] = {}

    def state(member: Member) -> dict:
        if member.name not in known:
            known.clear()  # modes of a member follow one another
            known[member.name] = run(member, [], tmp_path_factory.mktemp("plain"))[0].state
        return known[member.name]

    return state


def obtained(ours: list[Monitor], trainer: pl.Trainer) -> dict[str, bool]:
    """For each requested scalar, whether every measurement gave a finite value."""
    found = {}
    for monitor in ours:
        blocks = {key for row in monitor.history for key in row if "/block" in key}
        for key in (*monitor.keys, *sorted(blocks)):
            values = [row[key] for row in monitor.history if key in row]
            asked = monitor.measured
            if key in blocks:  # one that is unfrozen later is there from then on
                first = next(i for i, row in enumerate(monitor.history) if key in row)
                asked = len(monitor.history) - first
            found[key] = 0 < asked == len(values) and all(map(math.isfinite, values))
    if not any(isinstance(optimizer, _ADAPTIVE) for optimizer in trainer.optimizers):
        # Only with preconditioners is there such a thing.
        found.pop("hessian/preconditioned_eigenvalue")
        found.pop("hessian/inactive_share")
    return found


@pytest.mark.parametrize(("member", "mode"), _cases())
def test_zoo(member, mode, plain, tmp_path, request):
    expected = plain(member)
    ours = monitors(member, mode)
    outcome, messages = run(member, ours, tmp_path)
    different = differences(expected, outcome.state)
    found = obtained(ours, outcome.trainer)
    missing = {key for key, there in found.items() if not there}
    # Random numbers of a GPU are others, and the last step may then have led elsewhere.
    on_cpu = request.config.getoption("--device") == "cpu"
    luck = set() if on_cpu else {"sharpness/critical"}
    engines = {row["engine"] for row in ours[0].history}
    reasons = [m.split(": ", 1)[1] for m in messages if not any(e in m for e in _EXPECTED)]
    request.config.stash[TABLES]["zoo"].append(
        {
            "member": member.name,
            "mode": mode,
            "bitwise equal": "no" if different else "yes",
            "engine": " and ".join(sorted(engines)) or "none",
            "quantities": f"{sum(found.values())} of {len(found)}",
            "missing, and why": "; ".join([", ".join(sorted(missing)), *dict.fromkeys(reasons)])
            if missing or reasons
            else "",
        }
    )

    assert different == []
    assert [m.failed for m in ours] == [0] * 6, messages
    assert all(m.measured >= 2 for m in ours)
    assert missing - luck == set(member.missing) - luck, messages
    assert engines == {member.engine}
    certain = {key: pattern for key, pattern in member.missing.items() if key not in luck}
    for pattern in {*certain.values(), *member.warns}:
        assert any(re.search(pattern, message) for message in messages), (pattern, messages)
    # No other warnings, and none twice with other numbers.
    unique = {re.sub(r"\d[\d.e+-]*", "#", message) for message in messages}
    assert len(unique) == len(messages)
    for message in messages:
        patterns = (*_EXPECTED, *member.missing.values(), *member.warns)
        if not (luck and "critical sharpness is NaN" in message):
            assert any(re.search(p, message) for p in patterns), message


def test_zoo_is_large_enough():
    assert len(MEMBERS) >= 40
    names = {member.name for member in MEMBERS}
    assert len(names) == len(MEMBERS)
    assert names > REPRESENTATIVES
