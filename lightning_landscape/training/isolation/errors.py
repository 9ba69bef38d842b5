"""Why an evaluation was ended, or measuring as a whole, so that training does not change."""

from __future__ import annotations


class TouchedError(RuntimeError):
    """An evaluation used something that only training may use; training was not changed."""


class NotYetError(RuntimeError):
    """Training has not yet drawn or made what an evaluation needs; a later measurement has it."""


class TrainingChangedError(RuntimeError):
    """An evaluation changed something that could not be restored."""
