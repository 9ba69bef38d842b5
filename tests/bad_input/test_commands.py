"""Wrong command lines: exit status 2, a one-line error message, nothing written."""

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


@pytest.mark.parametrize(("tool", "arguments", "message"), COMMANDS, ids=range(len(COMMANDS)))
def test_wrong_command_line(tool, arguments, message, capsys, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = MAINS[tool](arguments)
    except SystemExit as error:  # argparse
        status = error.code
    output = capsys.readouterr()
    assert status == 2
    assert re.search(message, output.err), output.err
    assert output.err.count("error: ") == 1
    assert "Traceback" not in output.err
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []
    use = " ".join([tool, *(argument or "''" for argument in arguments)])
    printed = output.err.partition("error: ")[2]
    request.config.stash[TABLES]["wrong uses"].append(table_row(use, "exit 2", printed))
