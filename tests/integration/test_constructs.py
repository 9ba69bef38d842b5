"""For every way to keep state, a run with callbacks ends in the state of one without."""

from __future__ import annotations

import functools
import re
import warnings

import pytest

from lightning_landscape import HessianMonitor, SharpnessMonitor
from lightning_landscape.training.isolation.stand_ins import UncachedCalls
from tests.constructs import CONSTRUCTS
from tests.constructs.base import loader
from tests.runs import differences, train

FIFTH = sorted(CONSTRUCTS)[::5]
ROWS = [
    pytest.param(name, marks=() if name in FIFTH else (pytest.mark.slow,)) for name in CONSTRUCTS
]


def run(make, callbacks, root):
    """The state after a run, the callbacks, and their messages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = callbacks()
        outcome = train(make, loader, [*make.callbacks(), *ours], root, max_epochs=3)
    state = dict(outcome.state)
    module = outcome.trainer.lightning_module
    if not make.attributes:
        del state["attributes"]
    if make.callbacks is not CONSTRUCTS_BASE.callbacks:
        state["callbacks"] = [vars(c) for c in outcome.trainer.callbacks[: len(make.callbacks())]]
    state["seen"] = module.seen()
    return state, ours, [str(w.message) for w in caught]


CONSTRUCTS_BASE = next(iter(CONSTRUCTS.values())).__mro__[1]


def monitors():
    common = {"every_n_train_steps": 5, "max_overhead": None, "probe_samples": 24}
    return [HessianMonitor(max_hvps=8, **common), SharpnessMonitor(**common)]


@pytest.mark.parametrize("name", ROWS)
def test_callbacks_do_not_change_the_run(name, tmp_path):
    make = CONSTRUCTS[name]
    without, _, _ = run(make, list, tmp_path / "without")
    again, _, _ = run(make, list, tmp_path / "again")
    assert differences(without, again) == [], "two runs without callbacks differ"
    state, callbacks, messages = run(make, monitors, tmp_path / "with")
    assert differences(without, state) == []
    ours = [m for m in messages if m.startswith(("hessian:", "sharpness:"))]
    if make.refused:
        assert [c.measured for c in callbacks] == [0, 0]
        assert [c.failed for c in callbacks] == [1, 1]
        assert all(re.search(make.refused, message) for message in ours), ours
    else:
        assert all(c.measured >= 2 for c in callbacks), ours
        assert max(c.failed for c in callbacks) <= make.may_fail, ours
        noisy = [m for m in ours if "two evaluations" in m]
        assert noisy == []


def test_parameter_frozen_by_the_loss_is_constant(tmp_path):
    """At odd steps the gate is frozen already; at even ones the evaluation freezes it."""
    common = {"every_n_train_steps": 5, "max_overhead": None, "probe_samples": 24}
    common |= {"tol": 1e-4, "rtol": 0.0, "max_hvps": 100}
    callbacks = [HessianMonitor(**common), HessianMonitor(name="net", parameters="net.*", **common)]
    train(CONSTRUCTS["tensors: requires_grad that is toggled"], loader, callbacks, tmp_path)
    rows, of_net = (callback.history for callback in callbacks)
    assert [row["step"] for row in rows] == [3, 5, 10, 15]
    for row, other in zip(rows, of_net, strict=True):
        eigenvalue = other["hessian/net/top_eigenvalue"]
        assert row["hessian/top_eigenvalue"] == pytest.approx(eigenvalue, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"maxsize": 4}, {"maxsize": None}, {"maxsize": 4, "typed": True}]
)
def test_cache_hits_do_not_change_the_cache(options):
    """For any arguments; also the order of eviction is unchanged."""
    made = []

    @functools.lru_cache(**options)
    def cached(*args, **names):
        made.append((args, names))
        return {}

    calls = [((), {}), ((1,), {}), ((1.5, "a"), {}), ((2,), {"b": 3})]
    known = [cached(*args, **names) for args, names in calls]
    before = cached.cache_info()
    stand_in = UncachedCalls(cached, lambda: "self.cached").make(0)
    for (args, names), result in zip(calls[::-1], known[::-1], strict=True):
        assert stand_in(*args, **names) is result
    assert len(made) == 4
    assert stand_in("new") is stand_in("new")
    assert cached.cache_info() == before
    for number in range(3):
        cached("another", number)
    assert cached(2, b=3) is known[3]


def test_number_of_constructs():
    assert len(CONSTRUCTS) >= 120
    assert sum(not make.refused for make in CONSTRUCTS.values()) >= 100
    assert len(FIFTH) >= len(CONSTRUCTS) / 5
