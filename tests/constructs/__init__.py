"""State of research code, in all places where Python and torch allow it.

Each construct is a small module whose loss depends on that state, which ``training_step`` changes.
A measurement that is not isolated from it changes the final weights or ``seen()``.
"""

from tests.constructs import (  # noqa: F401
    iterators,
    objects,
    outside,
    random_sources,
    scripted,
    tensors,
    trainers,
    unregistered,
)
from tests.constructs.base import CONSTRUCTS

__all__ = ["CONSTRUCTS"]
