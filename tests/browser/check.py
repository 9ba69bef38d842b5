"""Check the demo's logs in a browser: TensorBoard and the report, in Chromium.

python -m tests.browser.check runs/digits [SCREENSHOTS]

Opens TensorBoard's pages, finds our charts and pictures by tag and moves their sliders; then the
HTML report, with keyboard and mouse.  Ends with an error if something is missing or empty, if a
console reports a severe error, or if the report requests anything from the network.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from lightning_landscape.report import write_report
from tests.browser import chromium
from tests.check_demo import IMAGES, check, latest

# Fonts and statistics that TensorBoard would fetch from elsewhere.
_NO_NETWORK = re.compile(
    r"ERR_(INTERNET|NAME_NOT|NETWORK|CONNECTION|ADDRESS|BLOCKED|PROXY)|favicon"
)
# All elements that match a selector, inside shadow roots too.
_DEEP = """
const found = [];
const walk = (root) => {
  for (const element of root.querySelectorAll('*')) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
return found;
"""

# The content of a canvas as a data address; an empty string if it is blank.
_CANVAS = """
const [canvas] = arguments, { width, height } = canvas;
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
return new Set(new Uint32Array(data.buffer)).size < 20 ? "" : canvas.toDataURL();
"""


def wait(what: str, find: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first result of ``find()`` that is true; a failure after some time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := find():
                check(True, what)
                return found
        except WebDriverException:  # the page is being drawn again
            pass
        if time.monotonic() > deadline:
            check(False, what)
        time.sleep(0.25)


class Browser:
    """Headless Chromium, and the folder for screenshots."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def deep(self, selector: str) -> list[Any]:
        return self.driver.execute_script(_DEEP, selector)

    def texts(self) -> str:
        return self.driver.execute_script(
            "let all = '';"
            "const walk = (root) => { all += ' ' + root.textContent;"
            "for (const e of root.querySelectorAll('*')) if (e.shadowRoot) walk(e.shadowRoot); };"
            "walk(document.body); return all;"
        )

    def shot(self, name: str) -> None:
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))

    def console(self) -> list[str]:
        """Severe messages that are not about the network being absent."""
        logged = [m["message"] for m in self.driver.get_log("browser") if m["level"] == "SEVERE"]
        return [message for message in logged if not _NO_NETWORK.search(message)]

    def requests(self) -> list[str]:
        """Addresses requested since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [
            m["params"]["request"] for m in messages if m["method"].endswith("requestWillBeSent")
        ]
        return [request["url"] for request in sent]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = chromium.BINARY or ""
    for flag in (
        "headless=new", "no-sandbox", "enable-unsafe-swiftshader", "disable-dev-shm-usage",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "no-first-run", "window-size=1400,1000", "hide-scrollbars",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=chromium.DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver, folder)
    finally:
        driver.quit()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """The address of a server for these logs."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0",
         "--samples_per_plugin", "images=100"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr is not None
    try:
        output = ""
        while not (found := re.search(r"http://localhost:\d+", output)):
            line = server.stderr.readline()
            assert line, output
            output += line
        threading.Thread(target=server.stderr.read, daemon=True).start()  # or its pipe fills up
        yield found[0].replace("localhost", "127.0.0.1")
    finally:
        server.terminate()
        server.wait()


# -- TensorBoard ------------------------------------------------------------------------------


def look_at_tensorboard(page: Browser, address: str) -> None:
    go = page.driver.get
    go(f"{address}/#scalars&tagFilter=hessian&_smoothingWeight=0")
    for tag in ("hessian/top_eigenvalue", "hessian/edge_ratio"):
        wait(f"scalars: {tag}", lambda tag=tag: tag in page.texts())
    wait("scalars: a chart with size", lambda: _drawn(page.deep("vz-line-chart2, vz-line-chart")))
    time.sleep(1)
    page.shot("tensorboard-scalars")

    go("about:blank")
    go(f"{address}/#custom_scalars")
    wait("custom scalars: the eigenvalue's chart", lambda: "optimizer's edge" in page.texts())
    time.sleep(2)
    page.shot("tensorboard-custom-scalars")

    for tag in IMAGES:
        go("about:blank")
        go(f"{address}/#images&tagFilter=^{tag}$")
        loader = wait(f"images: {tag}", lambda tag=tag: _loader(page, tag))
        before = wait(f"images: {tag} has pixels", lambda loader=loader: _pixels(page, loader))
        slider = page.driver.execute_script(
            "return arguments[0].shadowRoot.querySelector('paper-slider')", loader
        )
        step = _slider(page, slider)
        slider.send_keys(Keys.HOME if step > 0 else Keys.END)
        wait(f"images: {tag}, the slider moved", lambda s=slider, n=step: _slider(page, s) != n)
        wait(
            f"images: {tag}, the picture changed",
            lambda loader=loader, old=before: (p := _pixels(page, loader)) and p != old and p,
        )
        page.shot(f"tensorboard-{tag.replace('/', '-')}")

    go("about:blank")
    go(f"{address}/#text")
    wait("text: hessian/engine", lambda: "hessian/engine" in page.texts())
    wait("text: the engine", lambda: "exact, by double backward" in page.texts())
    page.shot("tensorboard-text")
    severe = page.console()
    check(not severe, f"TensorBoard's console is clean {severe}")


def _drawn(elements: list[Any]) -> bool:
    return any(e.size["width"] > 100 and e.size["height"] > 50 for e in elements)


def _loader(page: Browser, tag: str) -> Any:
    """The element that shows this tag; below what a filter finds stand all others."""
    loaders = page.deep("tf-image-loader")
    named = [page.driver.execute_script("return arguments[0].tag", one) for one in loaders]
    return loaders[named.index(tag)] if tag in named else None


def _slider(page: Browser, slider: Any) -> int:
    return int(page.driver.execute_script("return arguments[0].immediateValue", slider))


def _pixels(page: Browser, loader: Any) -> str:
    """The loaded picture as a data address; an empty string if it is missing or blank."""
    return page.driver.execute_script(
        "const img = arguments[0].shadowRoot.querySelector('img');"
        "if (!img || !img.complete || img.naturalWidth < 100) return '';"
        "const canvas = document.createElement('canvas');"
        "canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;"
        "const context = canvas.getContext('2d'); context.drawImage(img, 0, 0);"
        "const data = context.getImageData(0, 0, canvas.width, canvas.height).data;"
        "const colours = new Set(new Uint32Array(data.buffer));"
        "return colours.size < 20 ? '' : canvas.toDataURL();",
        loader,
    )


# -- the report -------------------------------------------------------------------------------


def look_at_report(page: Browser, path: Path) -> None:
    page.driver.get("about:blank")
    page.console(), page.requests()  # what was before
    page.driver.get(path.resolve().as_uri())
    one = page.driver.find_element
    for section in ("summary", "charts", "pictures", "settings"):
        check(one(By.ID, section).size["height"] > 100, f"report: the section {section}")
    charts = page.driver.find_elements(By.CSS_SELECTOR, "#charts svg")
    check(len(charts) >= 8 and _drawn(charts), f"report: {len(charts)} charts")
    broken = page.driver.execute_script(
        "return [...document.images].filter(i => !i.complete || i.naturalWidth < 100).length"
    )
    check(broken == 0, "report: every picture loads")
    page.shot("report-summary")
    films = page.driver.find_elements(By.CSS_SELECTOR, ".film")
    names = {film.get_attribute("data-kind") for film in films}
    check(names == {tag.replace("/", "-") for tag in IMAGES}, f"report: films {sorted(names)}")
    for film in films:
        _move(page, film, film.get_attribute("data-kind"))
        if film.get_attribute("data-kind").endswith("plane"):
            look_at_surface(page, film)
    for name in ("charts", "pictures", "settings"):
        page.driver.execute_script("arguments[0].scrollIntoView()", one(By.ID, name))
        time.sleep(0.3)
        page.shot(f"report-{name}")
    wide = page.driver.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    check(wide <= 0, "report: nothing sticks out at the side")
    for media, name in (("dark", "report-dark"),):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": media}]},
        )
        for section in ("summary", "charts", "pictures"):
            page.driver.execute_script("arguments[0].scrollIntoView()", one(By.ID, section))
            time.sleep(0.3)
            page.shot(f"{name}-{section}")
    _narrow(page)
    asked = [u for u in page.requests() if not u.startswith(("file:", "data:", "about:"))]
    check(not asked, f"report: nothing is requested from the network {asked}")
    severe = page.console()
    check(not severe, f"report: the console is clean {severe}")


def _move(page: Browser, film: Any, name: str) -> None:
    large, slider = (film.find_element(By.CSS_SELECTOR, s) for s in (".large", "input"))
    output = film.find_element(By.TAG_NAME, "output")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    seen = [(output.text, large.get_attribute("src"))]

    def changed(how: str) -> None:
        now = (output.text, large.get_attribute("src"))
        fresh = all(now[0] != step and now[1] != source for step, source in seen)
        check(fresh, f"report: {name}, another picture by {how}")
        value = slider.get_attribute("aria-valuetext")
        alt = large.get_attribute("alt")
        check(value == f"step {now[0]}" and now[0] in alt, f"report: {name}, slider: {value}")
        seen.append(now)

    slider.send_keys(Keys.ARROW_LEFT)
    changed("keyboard")
    ActionChains(page.driver).move_to_element_with_offset(
        slider, -slider.size["width"] // 2 + 8, 0
    ).click().perform()
    changed("mouse")
    film.find_elements(By.CSS_SELECTOR, ".strip button")[1].click()
    changed("filmstrip")


def look_at_surface(page: Browser, film: Any) -> None:
    """The surface of a plane: turned with keys and mouse, and of another step."""
    canvas = film.find_element(By.CSS_SELECTOR, ".surface canvas")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    seen = [page.driver.execute_script(_CANVAS, canvas)]
    check(seen[0] != "", "report: the surface has colours")

    def changed(how: str) -> None:
        now = page.driver.execute_script(_CANVAS, canvas)
        check(now not in ("", *seen), f"report: another view of the surface by {how}")
        seen.append(now)

    for key in (Keys.ARROW_RIGHT, Keys.ARROW_UP):
        canvas.send_keys(key)
        changed("keyboard")
    ActionChains(page.driver).drag_and_drop_by_offset(canvas, 40, 0).perform()
    changed("mouse")
    label = canvas.get_attribute("aria-label")
    buttons = film.find_elements(By.CSS_SELECTOR, ".strip button")
    buttons[0 if buttons[0].get_attribute("aria-pressed") == "false" else -1].click()
    changed("the step")
    check(
        canvas.get_attribute("aria-label") != label,
        "report: the label names the step of the surface",
    )


def _narrow(page: Browser) -> None:
    """Check the width of the page on the screen of a phone."""
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    page.driver.execute_script("window.scrollTo(0, 0)")
    time.sleep(0.3)
    wide = page.driver.execute_script("return document.documentElement.scrollWidth")
    check(wide <= 390, f"report: {wide} pixels wide on a screen of 390")
    page.shot("report-narrow")


def main(logdir: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, browser(folder) as page:
        with tensorboard(logdir) as address:
            look_at_tensorboard(page, address)
        look_at_report(page, write_report(latest(logdir, "watch"), Path(place) / "report.html"))
    print(f"Screenshots are in {folder}")


if __name__ == "__main__":
    if chromium.BINARY is None or chromium.DRIVER is None:
        sys.exit(chromium.MISSING)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/screenshots"))
