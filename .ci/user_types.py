"""A user's module as a type checker sees it: ``make lint`` runs mypy on this file, from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import assert_type

import lightning_landscape as ll
from lightning_landscape import geometry
from lightning_landscape.measure import Measurement, measure


class TopShare(ll.Monitor):
    kind = "mine"
    tags = ("share",)
    forwards = 60

    def measure(self, this_round: ll.Round) -> ll.Measured:
        loss = this_round.objective(self)
        assert_type(loss.gradient(), dict[str, Tensor])
        found = this_round.top_eigenvalues(self, 1)
        assert_type(found.eigenvalues, Tensor)
        return ll.Measured({self.key("share"): float(found.eigenvalues[0])})


monitor = ll.HessianMonitor(k=2, method="lanczos", blocks={"fc.weight": "fc"})
assert_type(monitor.history, list[dict[str, Any]])
assert_type(ll.landscape_callbacks(), list[Any])  # for the Trainers of both packages
pl.Trainer(callbacks=ll.landscape_callbacks())
ll.SharpnessEarlyStopping("hessian/edge_ratio", 2.0, stop_when="above")
ll.HessianMonitor(method="arpack")  # type: ignore[arg-type]
ll.HessianMonitor(every_n_steps=10)  # type: ignore[call-arg]
ll.LandscapeMonitor(directions="sideways")  # type: ignore[arg-type]

net = torch.nn.Linear(2, 1)
objective = geometry.Objective(lambda: net(torch.ones(1, 2)).sum(), dict(net.named_parameters()))
assert_type(geometry.top_eigenvalues(objective), geometry.EigenResult)
assert_type(geometry.hessian_trace(objective).stderr, float)
direction = geometry.filter_normalize(geometry.random_direction(objective.params), objective.params)
assert_type(geometry.line_slice(objective, direction), ll.Slice)
assert_type(geometry.sam_sharpness(objective).value, float)
assert_type(ll.compare({"a": "logs/a"}).runs, dict[str, Path])


def finished(module: pl.LightningModule) -> None:
    assert_type(measure(module, checkpoint="last.ckpt"), Measurement)
