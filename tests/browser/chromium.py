"""Where Chromium and its driver are, if they are there."""

from __future__ import annotations

import shutil

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium or no chromedriver; in Debian: apt-get install chromium chromium-driver"
