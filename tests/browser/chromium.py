"""Paths of Chromium and its driver; as a script, an error if they are missing."""

from __future__ import annotations

import shutil
import sys

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium or no chromedriver; in Debian: apt-get install chromium chromium-driver"

if __name__ == "__main__":
    sys.exit(None if BINARY and DRIVER else MISSING)
