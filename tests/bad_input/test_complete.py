"""Every parameter of everything public is passed wrongly somewhere, or it is said why not."""

from __future__ import annotations

import inspect

import pytest

import lightning_landscape
from lightning_landscape import figures, geometry
from lightning_landscape.compare import Comparison
from lightning_landscape.measure import Measurement
from tests.bad_input.test_calls import ROWS

RECORDS = "a record of what was found, made by the functions of this package"
# Whatever is not tried.
EXCEPTIONS = {
    "AverageSharpness": RECORDS,
    "Comparison": RECORDS,
    "CriticalSharpness": RECORDS,
    "EdgeRatio": RECORDS,
    "EigenResult": RECORDS,
    "Measured": "what a callback of one's own returns; its values go to the loggers as they are",
    "Monitor": "the base of the callbacks, whose arguments are tried with each of them",
    "Round": "made by this package, for each measurement",
    "Estimate": RECORDS,
    "Projection": RECORDS,
    "Sharpness": RECORDS,
    "SpectralDensity": RECORDS,
    "StabilityEdge": RECORDS,
    "TraceEstimate": RECORDS,
    "Measurement": RECORDS,
}

PUBLIC = {
    **{name: getattr(lightning_landscape, name) for name in lightning_landscape.__all__},
    **{name: getattr(geometry, name) for name in geometry.__all__},
    **{name: getattr(figures, name) for name in figures.__all__},
    "Comparison": Comparison,
    "Measurement": Measurement,
}
TRIED = {(call.name, row.argument) for row in ROWS for call in row.calls}


def parameters(name):
    """Those that a person can pass; ``**settings`` of ``measure`` are the Trainer's."""
    given = inspect.signature(PUBLIC[name]).parameters.values()
    return [p.name for p in given if p.kind is not inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_tried(name):
    if name in EXCEPTIONS:
        assert not any(called == name for called, _ in TRIED)
        return
    untried = [p for p in parameters(name) if (name, p) not in TRIED]
    assert [p for p in untried if f"{name}.{p}" not in EXCEPTIONS] == []


def test_the_exceptions_are_there():
    for entry in EXCEPTIONS:
        name, _, parameter = entry.partition(".")
        assert name in PUBLIC
        assert not parameter or parameter in parameters(name)


def test_the_table_is_long_enough():
    assert len(ROWS) >= 100
