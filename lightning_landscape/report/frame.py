"""The frame of all HTML pages: head, style, script, sections; nothing is loaded from outside."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_landscape.figures import figure_to_image
from lightning_landscape.geometry.checks import check_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def document(title: str, where: str, sections: Sequence[str], script: str = "") -> str:
    """A complete page; ``title`` and ``where`` are escaped here, sections are HTML."""
    style = asset("style.css")
    allowed = f"script-src {_hash(script)}; " if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; {allowed}"
        f"base-uri 'none'; form-action 'none'"
    )
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{style}</style></head>\n<body><main><h1>{title}</h1>"
        f'<p class="where">{escape(where)}</p>{"".join(sections)}</main>'
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def check_page(owner: str, argument: str, path: object) -> None:
    """Raise unless a page can be written to ``path``."""
    check_path(owner, argument, path, "a name for the page, or None")
    if Path(str(path)).is_dir():
        raise ValueError(
            f"{owner}({argument}={str(path)!r}): that is a directory; pass the name of a file in it"
        )


def write_page(page: str, path: Path) -> Path:
    """Write the page atomically; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def section(name: str, title: str, content: str) -> str:
    """A section with a heading; empty if there is no content."""
    if not content:
        return ""
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>\n'


def embedded(figure: Figure) -> str:
    """A figure as a ``data:`` URL."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(figure_to_image(figure)).save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def asset(name: str) -> str:
    """The text of a file in this package."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
