"""Look at the documentation as a reader does, in Chromium, light and dark and on a telephone.

python -m tests.browser.docs build/docs [SCREENSHOTS]

Ends with an error if a formula is not drawn, a picture is missing, code or a table is wider than
the page, the search does not find the answer to a newcomer's question, a console reports an error,
or anything is asked for from the network.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from selenium.webdriver.common.keys import Keys

from tests.browser import chromium
from tests.browser.check import Browser, browser, wait
from tests.check_demo import check

_MADE_BY_SPHINX = {"genindex", "search", "py-modindex"}
# What a newcomer types, and the page that answers it.
ANSWERS = {
    "gpu": "troubleshooting",
    "ddp": "troubleshooting",
    "overhead": "troubleshooting",
    "one point": "troubleshooting",
    "Adam": "which_ratio",
    "nan": "troubleshooting",
    "out of memory": "troubleshooting",
    "checkpoint": "troubleshooting",
    "yaml": "yaml",
    "huggingface": "troubleshooting",
}
_BEST = 3  # the page is among so many results
# Sphinx writes the summary when the search is over; the links of the results, best first.
_RESULTS = """
const done = /found|did not match/.test(document.querySelector('#search-results')?.innerText ?? '');
return done && [...document.querySelectorAll('#search-results ul.search > li > a')].map(a => a.href)
"""
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


@contextmanager
def served(docs: Path) -> Iterator[str]:
    """The address of the pages on this machine: the search reads them, which files do not allow."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(docs)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def look_for(page: Browser, address: str, query: str, answer: str) -> None:
    """Type ``query`` into the search field of the first page, as a reader does."""
    page.driver.get(f"{address}/index.html")
    page.driver.find_element("css selector", "input.sidebar-search").send_keys(query, Keys.ENTER)
    found = wait(f"search: {query}", lambda: page.driver.execute_script(_RESULTS))
    best = [link.removeprefix(f"{address}/") for link in found[:_BEST]]
    pages = [link.partition("#")[0].partition("?")[0].removesuffix(".html") for link in best]
    check(answer in pages, f"search: {query}: {answer} is among {best}")
    page.shot(f"docs-search-{query.replace(' ', '-')}")
    severe = page.console()
    check(not severe, f"search: {query}: no errors {severe or ''}")
    elsewhere = [url for url in page.requests() if not url.startswith((address, "data:"))]
    check(not elsewhere, f"search: {query}: nothing from the network {elsewhere or ''}")


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
    with served(docs) as address, browser(folder) as page:
        for query, answer in ANSWERS.items():
            look_for(page, address, query, answer)


if __name__ == "__main__":
    if chromium.BINARY is None or chromium.DRIVER is None:
        sys.exit(chromium.MISSING)
    shots = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    main(Path(sys.argv[1]).resolve(), shots)
    print(f"Screenshots are in {shots}")
