"""Every wrong call raises the right exception at once, with a message that says what to pass."""

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
    """The rows of the table that is printed at the end."""
    return request.config.stash[TABLES]["wrong uses"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.calls[0].name}-{row.argument}")
def test_wrong_call_raises(row, table):
    messages = []
    for call in row.calls:
        for value in row.values:
            with pytest.raises(row.error) as caught:
                call(**{row.argument: value}, **row.beside)
            assert type(caught.value) is row.error
            message = str(caught.value)
            assert row.problems(value, message) == [], f"{call.name}, {value!r}: {message}"
            messages.append(message)
    table.append(table_row(row.use, row.error.__name__, messages[0]))


@pytest.mark.parametrize("call", CALLS.values(), ids=[*CALLS])
def test_call_without_the_wrong_value(call):
    if not call.name.startswith(("Objective(loss)", "objective.")):  # they have no valid call
        call()


@pytest.mark.parametrize(("call", "given"), of_callbacks.FINE, ids=range(len(of_callbacks.FINE)))
def test_unusual_but_valid_arguments(call, given):
    call(**given)
