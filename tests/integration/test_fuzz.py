"""Random runs end bitwise as without callbacks; every missing value is explained."""

from __future__ import annotations

import math
import re
import tempfile
import warnings

import pytest
from hypothesis import given

from lightning_landscape import SharpnessEarlyStopping
from lightning_landscape.training.monitor import Monitor
from tests.fuzz import Network, Recipe, monitors, profile, recipes
from tests.runs import DataOrder, Outcome, differences, train

_OURS = re.compile(r"^(hessian|sharpness|landscape|generalization|interpolation)/[abc]: ")
# Warnings that callbacks may give in such runs: pattern -> tags that may be missing then.
_EDGES = (
    "edge", "edge_ratio", "batch_edge_ratio", "preconditioned_eigenvalue", "inactive_share",
)  # fmt: skip
_EXPLAINED: dict[str, tuple[str, ...]] = {
    r"no stability edge is logged": _EDGES,
    r"/edge is not logged": ("edge", "preconditioned_eigenvalue"),
    r"critical sharpness is NaN": ("critical",),
    r"critical sharpness: the loss crosses": (),
    r"is not settled, a longer search may find more": (),
    r"no critical sharpness at a step that did not move": ("critical",),
    r"update_curvature is not available here": ("update_curvature",),
    r"update_curvature is not logged at steps that leave": ("update_curvature",),
    r"critical is not available here": ("critical",),
    r"batch_edge_ratio is not available here": ("batch_edge_ratio",),
    r"the eigenvalue solver stopped at max_hvps": (),
    r"is small compared with the largest eigenvalue seen": (),
    r"Hessian-vector products are central differences": (),
    r"the path of the weights is a straight line so far": (),
    r"are parallel; [xy] is a random direction instead": (),
    r"is zero or not finite, and is replaced by a random direction": (),
    r"training ended earlier than the Trainer's limits": (),
    r"SharpnessEarlyStopping.*: it could not have stopped": (),
    r"nothing is measured: this fit has no validation loop": (),
}
_OWN_CLASSES = ("dataclass", "named tuple")
_NOT_KEPT = re.compile(
    r"^(training|validation)-examples-\d+-rank0.pt could not be written "
    r"\(ValueError: the probe's batches hold objects that cannot be loaded safely "
    r"\(Unsupported global: GLOBAL tests.fuzz.(Named|Record) [^.]*"
)
_ADAPTIVE = ("adam", "adamw", "rmsprop")


def run(recipe: Recipe, ours: list[Monitor]) -> tuple[Outcome, list[str]]:
    """The run, and the messages of all warnings."""
    order = [DataOrder()]
    callbacks = [*ours, *order] if recipe.callbacks_first else [*order, *ours]
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("always")
        outcome = train(
            lambda: Network(recipe), None, callbacks, root, seed=recipe.seed, **recipe.trainer
        )
    outcome.state["order"] = order[0].seen
    outcome.state.pop("callbacks")  # the one that keeps the order
    # Lightning's own deprecations come wherever a batch is moved.
    known = (DeprecationWarning, FutureWarning)
    return outcome, [str(w.message) for w in caught if not issubclass(w.category, known)]


def check(recipe: Recipe) -> None:
    """Compare runs with and without callbacks; check that missing values are explained."""
    plain, usual = run(recipe, [])
    ours = monitors(recipe)
    stopping = [SharpnessEarlyStopping(m.keys[0], threshold=1e30) for m in ours if m.keys]
    watched, messages = run(recipe, [*ours, *stopping])
    assert differences(plain.state, watched.state) == []

    warned = [m for m in messages if _OURS.match(m)]
    unique = {_without_numbers(message) for message in warned}
    assert len(unique) == len(warned), warned
    others = [m for m in messages if not _OURS.match(m)]
    if recipe.batch in _OWN_CLASSES:  # a warning: the probe cannot be saved
        others = [m for m in others if not _NOT_KEPT.search(m)]
    strange = {_without_numbers(m) for m in others} - {_without_numbers(m) for m in usual}
    assert not strange, strange
    for message in warned:
        assert any(re.search(pattern, message) for pattern in _EXPLAINED), message
    for monitor in ours:
        about = [m for m in warned if m.startswith(f"{monitor.prefix}: ")]
        assert monitor.failed == 0, about
        if any("nothing is measured" in message for message in about):
            assert monitor.measured == 0
            continue
        if watched.trainer.global_step and recipe.trainer["max_steps"] == -1:
            assert monitor.measured > 0, about
        for tag in monitor.tags:
            rows = _rows_about(tag, monitor)
            values = [row.get(monitor.key(tag), math.nan) for row in rows]
            if not _excused(tag, recipe, about):
                assert all(map(math.isfinite, values)), (tag, rows, about)


def _rows_about(tag: str, monitor: Monitor) -> list[dict]:
    """Critical sharpness is that of the previous step, in a row with or without other values."""
    tags = {"critical"} if tag == "critical" else set(monitor.tags) - {"critical"}
    return [row for row in monitor.history if any(monitor.key(t) in row for t in tags)]


def _excused(tag: str, recipe: Recipe, about: list[str]) -> bool:
    """Whether a message or the documentation explains a missing value."""
    if tag == "gap_stderr":  # probes of one batch have no spread
        return True
    if tag in ("preconditioned_eigenvalue", "inactive_share") and recipe.optimizer not in _ADAPTIVE:
        return True
    return any(
        tag in tags and any(re.search(pattern, message) for message in about)
        for pattern, tags in _EXPLAINED.items()
    )


def _without_numbers(message: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "#", message)


@given(recipes())
@profile(25)
@pytest.mark.slow
def test_random_trainings(recipe):
    check(recipe)
