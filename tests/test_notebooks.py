"""The notebooks in docs/ as stored; ``make notebooks`` executes them."""

from __future__ import annotations

import ast
import base64
import getpass
import importlib.util
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def texts(cell: dict[str, Any]) -> str:
    """All text outputs of a cell."""
    found = []
    for output in cell["outputs"]:
        found += [*output.get("text", []), *output.get("data", {}).get("text/plain", [])]
    return "".join(found)


def test_outputs_are_stored(path):
    """``make notebooks-write`` executed every cell, once and in order, without an error."""
    assert path.stat().st_size < LARGEST
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(out["output_type"] != "error" for cell in cells for out in cell["outputs"])
    for cell in cells:
        printed = "print(" in "".join(cell["source"])
        assert not printed or texts(cell).strip() or "def " in "".join(cell["source"])


def test_pictures_have_a_description(path):
    pictures = 0
    for cell in code_cells(path):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                pictures += 1
                assert cell["metadata"]["alt"]
    assert pictures >= 3


def test_outputs_name_no_machine(path):
    output = "\n".join(texts(cell) for cell in code_cells(path))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|usr|var|work)\b|site-packages", output)
    assert socket.gethostname() not in output.split()
    assert getpass.getuser() not in output.split()
    assert "Traceback" not in output
    assert "Warning" not in output


def test_every_notebook_checks_its_claims(path):
    source = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    tree = ast.parse(source.replace("%matplotlib inline", ""))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 5


def test_page_of(path):
    """Code, text and pictures are in the Markdown of the page as they are in the notebook."""
    pytest.importorskip("myst_parser", reason="needs '.[docs]'")
    spec = importlib.util.spec_from_file_location("notebook_parser", FOLDER / "notebook_parser.py")
    parser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parser)
    page = parser.as_markdown(path.read_text("utf-8"), path.name)
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        assert "".join(cell["source"]) in page
        for output in cell.get("outputs", []):
            assert "".join(output.get("text", [])).rstrip() in page
    encoded = re.findall(r"data:image/png;base64,(\S+)", page)
    assert len(encoded) == path.read_text("utf-8").count('"image/png"')
    assert all(base64.b64decode(png).startswith(b"\x89PNG") for png in encoded)
    title, *_ = page.split("\n")
    assert title.startswith("# ")
    assert page.count(f"{{download}}`{path.name}") == 1
