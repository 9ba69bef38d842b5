"""Wrong command lines: exit status 2, one line that helps, nothing written."""

from __future__ import annotations

import re

import pytest

from lightning_landscape.compare.__main__ import main as compare
from lightning_landscape.measure.__main__ import main as measure
from lightning_landscape.report.__main__ import main as report
from tests.bad_input.of_files import COMMANDS
from tests.bad_input.rows import table_row
from tests.conftest import TABLES

MAINS = {"compare": compare, "measure": measure, "report": report}


@pytest.mark.parametrize(("tool", "arguments", "says"), COMMANDS, ids=range(len(COMMANDS)))
def test_a_wrong_command_line(tool, arguments, says, capsys, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = MAINS[tool](arguments)
    except SystemExit as left:  # argparse
        status = left.code
    told = capsys.readouterr()
    assert status == 2
    assert re.search(says, told.err), told.err
    assert told.err.count("error: ") == 1
    assert "Traceback" not in told.err
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []
    done = " ".join([tool, *(word or "''" for word in arguments)])
    said = told.err.partition("error: ")[2]
    request.config.stash[TABLES]["wrong uses"].append(table_row(done, "exit 2", said))
