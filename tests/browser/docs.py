"""Look at the documentation as a reader does, in Chromium, light and dark and on a telephone.

python -m tests.browser.docs build/docs [SCREENSHOTS]

Ends with an error if a formula is not drawn, a picture is missing, code or a table is wider than
the page, a console reports an error, or anything is asked for from the network.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.browser import chromium
from tests.browser.check import Browser, browser, wait
from tests.check_demo import check

_MADE_BY_SPHINX = {"genindex", "search", "py-modindex"}
_DRAWN = """
return [...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container svg'))
"""
_WRONG = "return document.querySelectorAll('[data-mml-node=merror]').length"
_MISSING = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
# But for examples in docstrings, whose lines are as long as those of the code.
_WIDE = """
return [...document.querySelectorAll('article pre, article .table-wrapper')]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && !e.closest('dl.py'))
  .map(e => e.innerText.slice(0, 60))
"""


def look_at(page: Browser, path: Path, name: str) -> None:
    page.driver.get(path.as_uri())
    wait(f"{name}: formulas", lambda: page.driver.execute_script(_DRAWN))
    check(not page.driver.execute_script(_WRONG), f"{name}: no formula is wrong")
    missing = page.driver.execute_script(_MISSING)
    check(not missing, f"{name}: pictures are there {missing or ''}")
    wide = page.driver.execute_script(_WIDE)
    check(not wide, f"{name}: code and tables fit {wide or ''}")
    page.shot(f"docs-{name}")
    telephone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", telephone)
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    check(width <= 390, f"{name}: {width} pixels wide on a screen of 390")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    severe = page.console()
    check(not severe, f"{name}: no errors {severe or ''}")
    elsewhere = [url for url in page.requests() if not url.startswith(("file:", "data:"))]
    check(not elsewhere, f"{name}: nothing asked for from the network {elsewhere or ''}")


def main(docs: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = [p for p in sorted(docs.rglob("*.html")) if p.stem not in _MADE_BY_SPHINX]
    check(len(pages) > 15, f"{len(pages)} pages")
    for scheme in ("light", "dark"):
        with browser(folder) as page:
            page.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            for path in pages:
                parts = path.relative_to(docs).with_suffix("").parts
                look_at(page, path, "-".join((*parts, scheme)))


if __name__ == "__main__":
    if chromium.BINARY is None or chromium.DRIVER is None:
        sys.exit(chromium.MISSING)
    shots = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    main(Path(sys.argv[1]).resolve(), shots)
    print(f"Screenshots are in {shots}")
