"""The order of the scalars, and which of them share a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RATIO, TOP, PRECONDITIONED, SAM = "edge_ratio", "top_eigenvalue", "preconditioned_eigenvalue", "sam"
_FIRST = (RATIO, PRECONDITIONED, TOP, SAM)
_LOSSES = ("train_loss", "loss", "center_loss")


def name_of(key: str) -> str:
    """The last part of a key."""
    return key.rpartition("/")[2]


def rank(key: str) -> tuple[int, str]:
    """Sort key of the scalars: the most informative first, then by name."""
    name = name_of(key)
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST)), key


def first_of(keys: Iterable[str], name: str) -> str | None:
    """The first key with this last part, ``None`` if there is none."""
    return min((key for key in keys if name_of(key) == name), key=rank, default=None)


def loss_key(keys: Sequence[str]) -> str | None:
    """The key of the training loss: on a probe, or at the centre of the pictures."""
    found = (first_of(keys, name) for name in _LOSSES)
    return next((key for key in found if key is not None), None)


def second_curve(key: str, keys: Iterable[str]) -> str | None:
    """The key that is drawn in the chart of ``key``: its edge, or the validation loss.

    The edge is a bound of the preconditioned eigenvalue, if there is one.

    Example:
        >>> second_curve("hessian/top_eigenvalue", ["hessian/edge"])
        'hessian/edge'
    """
    prefix, _, name = key.rpartition("/")
    keys = set(keys)
    bounded = PRECONDITIONED if f"{prefix}/{PRECONDITIONED}" in keys else TOP
    second = {bounded: f"{prefix}/edge", "train_loss": f"{prefix}/val_loss"}.get(name)
    return second if second in keys else None


def chart_keys(keys: Sequence[str]) -> list[str]:
    """A key for each chart, in the order of the page: the loss is beside the first one."""
    seconds = {second_curve(key, keys) for key in keys}
    ordered = sorted((key for key in keys if key not in seconds), key=rank)
    loss = loss_key(ordered)
    if loss is None:
        return ordered
    others = [key for key in ordered if key != loss]
    return [*others[:1], loss, *others[1:]]
