"""Every wrong call is refused at once, by the right exception, in words that help."""

from __future__ import annotations

import pytest

from tests.bad_input import of_callbacks, of_files, of_geometry, of_slices
from tests.bad_input.rows import table_row
from tests.conftest import TABLES

ROWS = [
    *of_callbacks.ROWS,
    *of_geometry.ROWS,
    *of_geometry.LATER,
    *of_slices.ROWS,
    *of_files.ROWS,
]
CALLS = {call.name: call for row in ROWS for call in row.calls}


@pytest.fixture
def table(request):
    """The rows that are printed at the end."""
    return request.config.stash[TABLES]["wrong uses"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.calls[0].name}-{row.argument}")
def test_a_wrong_call(row, table):
    told = []
    for call in row.calls:
        for value in row.values:
            with pytest.raises(row.error) as caught:
                call(**{row.argument: value}, **row.beside)
            assert type(caught.value) is row.error
            message = str(caught.value)
            assert row.problems(value, message) == [], f"{call.name}, {value!r}: {message}"
            told.append(message)
    table.append(table_row(row.done, row.error.__name__, told[0]))


@pytest.mark.parametrize("call", CALLS.values(), ids=[*CALLS])
def test_the_same_call_is_right_without_the_wrong_value(call):
    if not call.name.startswith(("Objective(loss)", "objective.")):  # which have none
        call()


@pytest.mark.parametrize(("call", "given"), of_callbacks.FINE, ids=range(len(of_callbacks.FINE)))
def test_what_looks_odd_and_is_right(call, given):
    call(**given)
