"""The clock of the package, for tests of small budgets."""

from __future__ import annotations

from tests.training.conftest import clock

__all__ = ["clock"]
