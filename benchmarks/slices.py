"""A 2-D slice of 21 x 21 points: cost per point in plain forward passes, ours and the peers'.

The whole call is timed, as made by a user: two random filter-normalised directions, then the grid,
then restoring the weights.  The unit is one plain forward pass of the same
data under ``no_grad``.  On the CPU all run at once, each in a thread with a module of its own, and
hand over to the next every few forwards: one call after the other takes up to half a minute each,
in which the speed of the machine changes by more than the differences to be measured.

- loss-landscapes: ``random_plane(model, metric, distance=1, steps=21, normalization="filter")``, as
  in its README, with its own ``Loss`` metric; with several batches a ``Metric`` of the same kind
  that adds the batches' losses up and reads the sum once.  It leaves the model moved and its
  gradients switched off, so a run that continues needs ``deepcopy_model=True``; the copy is
  counted, just as restoring the weights is counted for ours.
- Landscaper: ``compute_loss_landscape(..., steps=21, dim=2)`` on its own random directions,
  normalised layer by layer, with a function that runs the same forward; its output goes nowhere.
- Ours: ``random_direction``, ``filter_normalize``, ``plane_slice``.  Several batches are put
  together at each point, as ``LandscapeMonitor`` does where that gives the same loss.  (A user of
  loss-landscapes who puts them together by hand has the column of 512 examples.)

That all compute the same function is checked on planes given to each of them, at equal points.
"""

from __future__ import annotations

import copy
import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import (
    Section,
    in_turns,
    quiet,
    rotated,
    seconds,
    settle,
    spread,
    table,
    verdict,
)
from benchmarks.networks import Problem, mlp, resnet20, transformer
from benchmarks.runs import Batch
from lightning_landscape.geometry import Objective, filter_normalize, plane_slice, random_direction
from lightning_landscape.training.data.batch import ProbeBatch, concat_batches

SIDE = 21
OURS, LOSS_LANDSCAPES, LANDSCAPER = "ours", "loss-landscapes", "Landscaper"
PLAIN = "plain forwards"


@dataclass(frozen=True)
class Case:
    """A trained network, and the batches its loss is taken over."""

    name: str
    problem: Problem
    batches: list[Batch]
    repeats: int

    def plain(self) -> float:
        """The loss by plain torch, in the module's mode."""
        module, loss = self.problem.module, self.problem.loss
        with torch.no_grad():
            sums = [loss(module(x), y) * len(x) for x, y in self.batches]
        return float(sum(sums)) / sum(len(x) for x, _ in self.batches)

    def objective(self) -> Objective:
        module, loss = self.problem.module, self.problem.loss
        held = [ProbeBatch(batch, i, len(batch[0])) for i, batch in enumerate(self.batches)]

        def joined() -> Tensor:
            inputs, targets = concat_batches(held).batch if len(held) > 1 else held[0].batch
            value: Tensor = loss(module(inputs), targets)
            return value

        return Objective(joined, self.problem.params, check_deterministic=False)

    def twin(self) -> Case:
        """The same on a module of its own."""
        return replace(
            self, problem=replace(self.problem, module=copy.deepcopy(self.problem.module))
        )


def cases(device: str) -> list[Case]:
    made = []
    for name, problem, size, repeats in (
        ("CNN (ResNet-20), 128 images", resnet20(device), 128, 5),
        ("MLP, 512 examples", mlp(device), 512, 7),
        ("MLP, 512 examples in batches of 32", mlp(device), 32, 7),
        ("MLP, 32 examples", mlp(device), 0, 7),
        ("transformer, 128 examples", transformer(device), 128, 9),
    ):
        for _ in problem.training(2):  # away from the start; leaves eval mode
            pass
        inputs, targets = problem.probe
        batches = list(zip(inputs.split(size or 32), targets.split(size or 32), strict=True))
        made.append(Case(name, problem, batches if size else batches[:1], repeats))
    return made


Draw = Callable[[Case, int], object]


def slices(points: int | None = None, on: str = "cpu") -> Section:
    """All networks with all installed packages; once and small if ``points`` is small."""
    made, side = cases(on), 5 if points else SIDE
    methods: dict[str, Draw] = {OURS: _ours}
    missing = []
    for name, module, draw in (
        (LOSS_LANDSCAPES, "loss_landscapes", _loss_landscapes),
        (LANDSCAPER, "landscaper.compute", _landscaper),
    ):
        if on != "cpu" and name == LOSS_LANDSCAPES:
            missing.append(f"{name} is left out: its random directions are on the CPU.")
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{name} is left out: {error}.")
        else:
            methods[name] = draw
    rows, lines, columns = [], [], {}
    settle()
    for case in made:
        per_point: dict[str, list[float]] = {name: [] for name in methods}
        seconds_of: dict[str, list[float]] = {name: [] for name in methods}
        draws = {**methods, PLAIN: _plain}
        for turn in range(1 if points else case.repeats):
            calls = {name: draws[name] for name in rotated(draws, turn)}
            with quiet():
                took = _seconds(calls, case, side)
            for name in methods:
                seconds_of[name].append(took[name])
                per_point[name].append(took[name] / took[PLAIN])
        medians = {name: statistics.median(found) for name, found in per_point.items()}
        columns[case.name] = {name: f"{found:.2f}" for name, found in medians.items()}
        for name in methods:
            row = [case.name, name, spread(per_point[name], ".2f")]
            ratios = [
                theirs / ours
                for theirs, ours in zip(seconds_of[name], seconds_of[OURS], strict=True)
            ]
            row.append("1" if name == OURS else spread(ratios, ".2f"))
            gap = {OURS: _gap_of_ours, LOSS_LANDSCAPES: _gap_of_theirs, LANDSCAPER: _gap_of_grid}
            row.append(f"{gap[name](case):.0e}")
            rows.append(row)
            if name == LOSS_LANDSCAPES:
                bar = 1.3 if "batches of 32" in case.name else 1.0
                claim = f"{case.name}: {name} over ours, in time"
                lines.append(verdict(claim, statistics.median(ratios), bar))
        if case.name.startswith("CNN"):
            claim = f"{case.name}: forwards a point"
            lines.append(verdict(claim, medians[OURS], 1.1, at_most=True))
    text = table(
        f"A plane of {side} x {side} points",
        ["network", "by", "forwards a point", "times ours", "largest relative gap in loss"],
        rows,
    )
    notes = ["Directions included. Gap: to plain torch, or to ours, at equal points.", *missing]
    text = f"{text}\n{' '.join(notes)}\n\n" + "\n".join(lines) + "\n"
    return Section(text, f"A plane of {side} x {side}: forward passes a point", columns)


def _seconds(calls: dict[str, Draw], case: Case, side: int) -> dict[str, float]:
    """The time of each call; on a GPU, which has one queue, one after the other."""
    device = case.problem.device
    if device.type != "cpu":
        return {name: seconds(partial(call, case, side), device) for name, call in calls.items()}

    def taking_turns(call: Draw) -> Callable[[Callable[[], None]], object]:
        twin = case.twin()

        def run(hand_over: Callable[[], None]) -> object:
            twin.problem.module.register_forward_pre_hook(lambda *_: hand_over())
            return call(twin, side)

        return run

    return in_turns({name: taking_turns(call) for name, call in calls.items()})


# -- the three of them ----------------------------------------------------------------------------


def _directions(case: Case) -> list[dict[str, Tensor]]:
    params = case.problem.params
    seeds = torch.Generator().manual_seed(0)
    drawn = [random_direction(params, generator=seeds) for _ in range(2)]
    return [filter_normalize(direction, params) for direction in drawn]


def _plain(case: Case, side: int) -> None:
    for _ in range(side**2):
        case.plain()


def _ours(case: Case, side: int) -> object:
    return plane_slice(case.objective(), *_directions(case), resolution=side)


def _metric(case: Case) -> Any:
    metrics: Any = importlib.import_module("loss_landscapes.metrics")
    if len(case.batches) == 1:
        return metrics.Loss(case.problem.loss, *case.batches[0])

    class BatchedLoss(metrics.Metric):  # type: ignore[misc, name-defined]
        def __call__(self, model: Any) -> float:
            sums = [case.problem.loss(model.forward(x), y) * len(x) for x, y in case.batches]
            total: Tensor = sum(sums[1:], sums[0])
            return total.item() / sum(len(x) for x, _ in case.batches)

    return BatchedLoss()


def _loss_landscapes(case: Case, side: int) -> object:
    peer: Any = importlib.import_module("loss_landscapes")
    return peer.random_plane(
        case.problem.module,
        _metric(case),
        distance=1,
        steps=side,
        normalization="filter",
        deepcopy_model=True,
    )


def _grid(case: Case, directions: list[list[Tensor]], steps: int) -> np.ndarray:
    compute: Any = importlib.import_module("landscaper.compute")

    def scalar(module: nn.Module, batches: list[Batch]) -> float:
        total = sum(case.problem.loss(module(x), y) * len(x) for x, y in batches)
        return float(total) / sum(len(x) for x, _ in batches)

    device = case.problem.device.type
    losses, _ = compute.compute_loss_landscape(
        case.problem.module, case.batches, directions, scalar, steps, 0.5, 2, device
    )
    found: np.ndarray = losses
    return found


def _landscaper(case: Case, side: int) -> object:
    helpers: Any = importlib.import_module("landscaper.utils")
    return _grid(case, helpers.generate_random_orthogonal_directions(case.problem.module, 2), side)


# -- the same function? ---------------------------------------------------------------------------


def _gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(theirs / ours - 1).max())


def _gap_of_ours(case: Case) -> float:
    """Against plain torch on a copy of the module whose weights are set one by one."""
    directions, twin = _directions(case), case.twin()
    found = plane_slice(case.objective(), *directions, resolution=3).losses
    plain = np.empty_like(found)
    for row, b in enumerate((-1.0, 0.0, 1.0)):
        for column, a in enumerate((-1.0, 0.0, 1.0)):
            with torch.no_grad():
                for name, p in twin.problem.module.named_parameters():
                    start = case.problem.params[name]
                    p.copy_(start + a * directions[0][name] + b * directions[1][name])
            plain[row, column] = twin.plain()
    return _gap(plain, found)


def _gap_of_theirs(case: Case) -> float:
    """``planar_interpolation`` to two given ends; every other of its rows lies one step off."""
    peer: Any = importlib.import_module("loss_landscapes")
    directions, module, steps = _directions(case), case.problem.module, 4
    ends = []
    for direction in directions:
        end = copy.deepcopy(module)
        with torch.no_grad():
            for name, p in end.named_parameters():
                p.add_(direction[name])
        ends.append(end)
    theirs = peer.planar_interpolation(
        module, *ends, _metric(case), steps=steps, deepcopy_model=True
    )
    points = [(i / steps, (j + 1 - i % 2) / steps) for i in range(steps) for j in range(steps)]
    ours = case.objective().losses_at(directions, points).view(steps, steps)
    return _gap(ours.cpu().numpy(), theirs)


def _gap_of_grid(case: Case) -> float:
    """Its grid on given directions; its largest loss has noise added to it, and is left out."""
    steps, reach = 5, 0.5
    given = _directions(case)
    weights = list(case.problem.params.values())
    size = float(torch.cat([w.detach().reshape(-1) for w in weights]).norm())
    scaled = []
    for direction in given:
        layers = {n: d * d.numel() ** 0.5 / (d.norm() + 1e-10) for n, d in direction.items()}
        length = float(torch.cat([d.reshape(-1) for d in layers.values()]).norm())
        scaled.append({n: d * size * reach / (steps / 2) / length for n, d in layers.items()})
    with quiet():
        theirs = _grid(case, [[d.clone() for d in one.values()] for one in given], steps)
    points = [(float(i), float(j)) for i in range(-2, 3) for j in range(-2, 3)]
    ours = case.objective().losses_at(scaled, points).view(steps, steps).cpu().numpy()
    kept = ours < ours.max()
    return _gap(ours[kept], theirs[kept])
