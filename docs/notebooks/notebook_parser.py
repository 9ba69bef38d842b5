"""Notebooks as pages for Sphinx, with their stored outputs; nothing is executed."""

from __future__ import annotations

import json
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser


class NotebookParser(MystParser):
    """Parses a notebook as the Markdown that :func:`as_markdown` returns."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        name = document.settings.env.docname.rsplit("/", 1)[-1]
        super().parse(as_markdown(inputstring, f"{name}.ipynb"), document)


def as_markdown(notebook: str, file: str) -> str:
    """Returns cells and outputs as MyST Markdown, with a link to ``file``.

    Pictures are data URIs.  Their alternative text is the cell's ``metadata.alt``.
    """
    blocks = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(_fenced("code-block", "python", source))
        alt = cell["metadata"].get("alt", "")
        blocks += [_output(output, alt) for output in cell["outputs"]]
    # Below the title.
    blocks[0] += f"\n\nThis page is a notebook: {{download}}`{file} <{file}>`."
    return "\n\n".join(blocks) + "\n"


def _output(output: dict[str, Any], alt: str) -> str:
    """Returns one output: a picture if there is one, else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join("".join(data["image/png"]).split())
        options = f":alt: {alt}\n:width: 400px\n:class: no-scaled-link"
        return _fenced("image", f"data:image/png;base64,{png}", options)
    text = "".join(output.get("text") or data["text/plain"]).rstrip()
    return _fenced("code-block", "text", f":class: output\n\n{text}")


def _fenced(directive: str, argument: str, content: str) -> str:
    return f"`````{{{directive}}} {argument}\n{content}\n`````"
