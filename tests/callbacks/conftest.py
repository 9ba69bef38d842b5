"""The clock of the package, for tests of what callbacks do with little time."""

from __future__ import annotations

from tests.training.conftest import clock

__all__ = ["clock"]
