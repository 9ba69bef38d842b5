"""Research code's ways to keep state: a run with callbacks ends as one without."""

from __future__ import annotations

import re
import warnings

import pytest

from lightning_landscape import HessianMonitor, SharpnessMonitor
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
    common = {"every_n_train_steps": 6, "max_overhead": None, "probe_samples": 24}
    return [HessianMonitor(max_hvps=8, **common), SharpnessMonitor(**common)]


@pytest.mark.parametrize("name", ROWS)
def test_a_run_with_callbacks_ends_as_one_without(name, tmp_path):
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


def test_the_table_is_as_long_as_promised():
    assert len(CONSTRUCTS) >= 120
    assert sum(not make.refused for make in CONSTRUCTS.values()) >= 100
    assert len(FIFTH) >= len(CONSTRUCTS) / 5
