"""Mistakes in custom callbacks: each is reported, and the fit continues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_landscape import Measured, Monitor
from lightning_landscape.training.interrupts import is_interrupt
from tests.runs import train
from tests.small import Linear, regression


class Mine(Monitor):
    kind, tags, forwards = "mine", ("norm",), 3

    def measure(self, this_round):
        return Measured({self.key("norm"): 1.0})


def run(measure, tmp_path):
    kind = type("Slip", (Mine,), {"measure": measure})
    monitor = kind(every_n_train_steps=3, max_overhead=None)
    outcome = train(Linear, regression, [monitor], tmp_path, max_epochs=3)
    assert outcome.trainer.global_step == 9
    return monitor


def fails(error):
    def measure(self, this_round):
        raise error

    return measure


class Odd(BaseException):
    """Not a subclass of Exception."""


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda self, _: {self.key("norm"): 1.0}, "measure returned {'mine/norm': 1.0}: exp"),
        (lambda self, _: None, "measure returned None: expected a Measured"),
        (lambda self, _: Measured({"norm": 1.0}), r"'norm': .*begins with 'mine/', as self.key"),
        (lambda self, _: Measured({self.key("norm"): "1"}), "mine/norm.*: expected a number"),
        (lambda self, _: Measured({self.key("norm"): None}), "mine/norm.*: expected a number"),
        (lambda self, _: Measured({self.key("norm"): torch.ones(2)}), "mine/norm.*expected a n"),
        (lambda self, _: Measured(pictures={"norm": print}), "'norm': .*begins with 'mine/'"),
        (lambda self, _: {}["misspelt"], "KeyError: 'misspelt'"),
        (lambda self, _: setattr(self, "skipped", 3), "'skipped' is an attribute of Monitor it"),
        (fails(Odd("odd")), "Odd: odd"),
        (fails(StopIteration("over")), "StopIteration: over"),
        (fails(GeneratorExit), None),
    ],
)  # fmt: skip
def test_mistake_in_measure(measure, message, tmp_path):
    if message is None:  # ends the run
        with pytest.raises(GeneratorExit):
            run(measure, tmp_path)
        return
    with pytest.warns(UserWarning, match=f"mine: a measurement failed .*{message}") as caught:
        monitor = run(measure, tmp_path)
    assert (monitor.measured, monitor.failed, monitor.disabled) == (0, 3, True)
    assert not any("fixed probe" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("value", [torch.ones(()), torch.ones(1), np.float32(1), np.ones(()), 1])
def test_values_of_any_number_type(value, tmp_path):
    monitor = run(lambda self, _: Measured({self.key("norm"): value}), tmp_path)
    assert [row["mine/norm"] for row in monitor.history] == [1.0] * 3
    assert all(type(row["mine/norm"]) is float for row in monitor.history)


@pytest.mark.parametrize("name", ["measured", "failed", "history", "loss", "prefix", "keys"])
def test_attribute_of_the_base_class_raises(name):
    class Own(Mine):
        def __init__(self):
            super().__init__()
            setattr(self, name, [])

    with pytest.raises(AttributeError, match=f"^Own: '{name}' is an attribute of Monitor itself; "):
        Own()
    with pytest.raises(TypeError, match=f"^class Other: '{name}' is an attribute of Monitor itsel"):
        type("Other", (Mine,), {name: []})


@pytest.mark.parametrize("name", ["measure", "key", "owns", "warn_once"])
def test_method_of_the_base_class_raises(name):
    with pytest.raises(AttributeError, match=f"'{name}' is an attribute of Monitor itself"):
        setattr(Mine(), name, "a word")


@pytest.mark.parametrize("name", ["schedule", "session", "trainer", "listeners", "last_seconds"])
def test_other_names_are_allowed(name, tmp_path):
    def measure(self, this_round):
        setattr(self, name, object())
        return Measured({self.key("norm"): 1.0})

    assert run(measure, tmp_path).measured == 3


@pytest.mark.parametrize(
    ("old", "new"), [("displaces", "moves_weights"), ("owes", "measures_at_end")]
)
def test_names_of_earlier_versions_raise(old, new):
    with pytest.raises(TypeError, match=f"^class Old: '{old}' is now called '{new}'; rename it"):
        type("Old", (Mine,), {old: False})
    with pytest.raises(AttributeError, match=f"^Mine: '{old}' is now called '{new}'; rename it"):
        setattr(Mine(), old, False)


def test_which_exceptions_are_interrupts():
    assert [is_interrupt(kind()) for kind in (KeyboardInterrupt, SystemExit)] == [True] * 2
    assert [is_interrupt(kind()) for kind in (ValueError, StopIteration, Odd)] == [False] * 3
