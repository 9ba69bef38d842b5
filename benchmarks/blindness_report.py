"""The report of the blindness benchmark: tables, the worst points, verdicts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.blindness_modules import KINDS
from benchmarks.common import table, verdict

EIGENVALUE, RATIO = "hessian/top_eigenvalue", "hessian/edge_ratio"
OFF, FAR = 0.05, 0.2


@dataclass(frozen=True)
class Task:
    """One run, and the safeguards that are off in it."""

    kind: str
    seed: int
    optimizer: str
    full_batch: bool
    without: tuple[str, ...] = ()

    @property
    def setting(self) -> str:
        return f"{self.optimizer}, {'full batch' if self.full_batch else 'minibatch'}"


@dataclass(frozen=True)
class Point:
    """A value of a measurement and the dense value; ``key`` is the logged key."""

    task: Task
    key: str
    step: int
    value: float
    dense: float
    converged: bool
    after_change: bool
    products: float  # for one eigenvalue problem

    @property
    def error(self) -> float:
        return abs(self.value / self.dense - 1)

    def is_off(self, share: float) -> bool:
        return self.converged and not self.error <= share  # NaN is off


@dataclass(frozen=True)
class Summary:
    """Statistics of a group of points; ``off`` and ``far`` are shares of the converged ones."""

    points: int
    converged: float
    off: float
    far: float
    blindness: int
    median: float
    high: float
    products: float


HEAD = ["points", "converged", "> 5 % off", "> 20 % off", "longest blindness"]
HEAD += ["median error", "95th percentile", "products"]


def summary(points: Sequence[Point]) -> Summary:
    settled = [point for point in points if point.converged]
    errors = sorted(point.error for point in settled)
    count = max(len(settled), 1)
    return Summary(
        points=len(points),
        converged=len(settled) / len(points),
        off=sum(point.is_off(OFF) for point in settled) / count,
        far=sum(point.is_off(FAR) for point in settled) / count,
        blindness=max(
            len(list(run))
            for _, points_of_run in itertools.groupby(points, lambda point: point.task)
            for run in _blind(points_of_run)
        ),
        median=statistics.median(errors) if errors else float("nan"),
        high=errors[int(0.95 * (len(errors) - 1))] if errors else float("nan"),
        products=statistics.median(point.products for point in points),
    )


def _blind(points: Iterator[Point]) -> Iterator[list[Point]]:
    yield []
    for is_off, run in itertools.groupby(points, lambda point: point.is_off(OFF)):
        if is_off:
            yield list(run)


def _row(name: str, points: Sequence[Point]) -> list[str]:
    found = summary(points)
    return [
        name,
        f"{found.points}",
        f"{found.converged:.1%}",
        f"{found.off:.2%}",
        f"{found.far:.2%}",
        f"{found.blindness}",
        f"{found.median:.1e}",
        f"{found.high:.1e}",
        f"{found.products:.3g}",
    ]


def _grouped(title: str, points: Sequence[Point]) -> str:
    """One row for each kind, for the decoupled and the coupled ones, for each setting."""
    kinds = dict.fromkeys(point.task.kind for point in points)
    settings = dict.fromkeys(point.task.setting for point in points)
    groups = {kind: [p for p in points if p.task.kind == kind] for kind in kinds}
    groups |= {f"**{name}**": _coupled(points, flag) for name, flag in CLASSES.items()}
    for setting in settings:
        of_setting = [point for point in points if point.task.setting == setting]
        groups[f"decoupled, {setting}"] = _coupled(of_setting, False)
    rows = [_row(name, group) for name, group in groups.items() if group]
    return table(title, ["kind", *HEAD], rows)


CLASSES = {"decoupled": False, "coupled": True}


def _coupled(points: Sequence[Point], coupled: bool) -> list[Point]:
    return [point for point in points if KINDS[point.task.kind].coupled == coupled]


def _far(points: Sequence[Point]) -> str:
    rows = [
        [
            point.task.kind,
            f"{point.task.seed}",
            point.task.setting,
            f"{point.step}",
            f"{point.value:.4g}",
            f"{point.dense:.4g}",
            f"{point.error:.0%}",
            "yes" if point.after_change else "no",
        ]
        for point in points
        if point.is_off(FAR)
    ]
    head = ["kind", "seed", "setting", "step", "value", "dense", "error", "first after a change"]
    return table("More than 20 % off", head, rows)


def _verdicts(points: Sequence[Point]) -> str:
    kinds = {kind: [p for p in points if p.task.kind == kind] for kind in KINDS}
    each = {kind: summary(of_kind) for kind, of_kind in kinds.items() if of_kind}
    slowest = min(each, key=lambda kind: each[kind].converged)
    worst = max(each, key=lambda kind: each[kind].off)
    judged = _coupled(points, False) or points
    whole = summary(judged)
    late = sum(point.is_off(FAR) and not point.after_change for point in judged)
    bars: list[tuple[str, float, float]] = [
        (f"% > 5 % off, worst kind ({worst})", 100 * each[worst].off, 4.0),
        ("% > 20 % off", 100 * whole.far, 0.2),
        ("points > 20 % off, not the first after a change", late, 0),
        ("longest blindness, in measurements", whole.blindness, 3),
    ]
    if decoupled := _coupled(points, False):
        share = 100 * summary(decoupled).off
        bars.insert(0, ("% > 5 % off, decoupled kinds together", share, 1.5))
        bars.insert(1, ("the same: the aim", share, 0.5))
    if coupled := _coupled(points, True):
        controls = summary(coupled)
        bars += [("median error, coupled", controls.median, 1e-3)]
        bars += [("95th percentile of the error, coupled", controls.high, 0.01)]
    share = 100 * each[slowest].converged
    lines = [verdict(f"% converged, lowest kind ({slowest})", share, 95.0)]
    lines += [verdict(*bar, at_most=True) for bar in bars]
    if coupled:
        count = f"{controls.products:g}"
        lines.append(f"- products an eigenvalue problem at the median, coupled: {count}")
    return "\n".join(lines)


def report(points: Sequence[Point], without: Sequence[str]) -> str:
    off = f", without {', '.join(without)}" if without else ""
    tops = [point for point in points if point.key == EIGENVALUE]
    ratios = [point for point in points if point.key == RATIO]
    texts = [_grouped(f"Top eigenvalue against dense Hessians{off}", tops), _far(tops)]
    texts += [f"{_verdicts(tops)}\n"]
    if ratios:
        texts += [_grouped(f"Ratio to the edge, of its own matrix{off}", ratios), _far(ratios)]
        texts += [f"{_verdicts(ratios)}\n"]
    return "\n".join(texts)
