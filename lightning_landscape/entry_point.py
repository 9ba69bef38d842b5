"""Installed as ``lightning_landscape_entry_point``: what every Trainer calls for more callbacks.

A module outside of the package, so that nothing is imported while ``LIGHTNING_LANDSCAPE`` is unset.
"""

import os
from typing import Any


def callbacks() -> list[Any]:
    """None unless the variable is set."""
    value = os.environ.get("LIGHTNING_LANDSCAPE", "").strip()
    if value.lower() in ("", "0", "false", "off", "no"):
        return []
    from lightning_landscape import environment

    return environment.callbacks(value)
