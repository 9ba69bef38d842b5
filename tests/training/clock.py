"""A clock that only the test advances, and runs that use it."""

from __future__ import annotations

import re
from unittest.mock import Mock

from tests.small import Linear


class Clock(Mock):
    """Time that only the test advances; a Mock, because isolation does not restore mocks."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed:
    """Training steps take 1 s on the clock, measurements ``cost`` s.

    ``evaluation``: seconds for one evaluation of the loss on a batch while measuring.
    """

    def __init__(self, monkeypatch, clock, costs, evaluation=0.0):
        step = Linear.training_step

        def slow(module, batch, batch_idx):
            if getattr(module.log, "__name__", "") != "_log_nothing":
                clock.now += 1.0
            else:
                clock.now += evaluation
            return step(module, batch, batch_idx)

        monkeypatch.setattr(Linear, "training_step", slow)
        for kind, cost in costs.items():
            measure = kind.measure

            def slowly(monitor, this_round, measure=measure, cost=cost):
                clock.now += cost
                return measure(monitor, this_round)

            monkeypatch.setattr(kind, "measure", slowly)


def closing_line_of(caplog):
    start = "lightning_landscape: measured"
    return next(r.message for r in caplog.records if r.message.startswith(start))


def share_in_closing_line(caplog):
    return float(re.search(r"([\d.]+) % of the", closing_line_of(caplog))[1]) / 100
