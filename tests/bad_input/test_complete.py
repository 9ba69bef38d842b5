"""Every parameter of the public API has a row with wrong values, or a reason why it has none."""

from __future__ import annotations

import inspect

import pytest

import lightning_landscape
from lightning_landscape import figures, geometry
from lightning_landscape.compare import Comparison
from lightning_landscape.measure import Measurement
from tests.bad_input.test_calls import ROWS

RECORDS = "a result, returned by functions of this package"
# Names without rows, and why.
EXCEPTIONS = {
    "AverageSharpness": RECORDS,
    "Comparison": RECORDS,
    "CriticalSharpness": RECORDS,
    "EdgeRatio": RECORDS,
    "EigenResult": RECORDS,
    "Measured": "returned by custom callbacks; its values are logged unchanged",
    "Monitor": "the base class; its arguments are tested with each callback",
    "Round": "created by this package for each measurement",
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
TESTED = {(call.name, row.argument) for row in ROWS for call in row.calls}


def parameters(name):
    """Names of the parameters; ``**settings`` of ``measure`` are those of the Trainer."""
    given = inspect.signature(PUBLIC[name]).parameters.values()
    return [p.name for p in given if p.kind is not inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_has_a_row(name):
    if name in EXCEPTIONS:
        assert not any(called == name for called, _ in TESTED)
        return
    untested = [p for p in parameters(name) if (name, p) not in TESTED]
    assert [p for p in untested if f"{name}.{p}" not in EXCEPTIONS] == []


def test_exceptions_name_public_parameters():
    for entry in EXCEPTIONS:
        name, _, parameter = entry.partition(".")
        assert name in PUBLIC
        assert not parameter or parameter in parameters(name)


def test_number_of_rows():
    assert len(ROWS) >= 100
