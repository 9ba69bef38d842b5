"""Argument checks of the figures; slices are checked in ``data``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_landscape.geometry.checks import check_mapping, quoted, shown


def check_limits(call: str, limits: object) -> None:
    """Raises unless ``limits`` is a LossLimits or None."""
    if limits is not None and not all(hasattr(limits, name) for name in ("low", "high", "excess")):
        raise TypeError(f"{quoted(call, 'limits', limits)}: expected a LossLimits, or None")


def check_axes(call: str, ax: object) -> None:
    """Raises unless ``ax`` is a matplotlib Axes or None."""
    if ax is not None and not all(hasattr(ax, name) for name in ("plot", "get_figure", "patch")):
        raise TypeError(f"{quoted(call, 'ax', ax)}: expected a matplotlib Axes, or None")


def check_names(call: str, names: object) -> None:
    """Raises unless ``names`` is a sequence of strings."""
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):  # type: ignore[attr-defined]
        raise TypeError(f"{quoted(call, 'names', names)}: expected a list of strings")


def check_text(call: str, **texts: object) -> None:
    """Raises unless all are strings."""
    for argument, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{quoted(call, argument, text)}: expected a string")


def check_groups(call: str, groups: object, runs: Iterable[str]) -> None:
    """Raises unless ``groups`` is a mapping with every run, or None."""
    if groups is None:
        return
    check_mapping(call, "groups", groups, "a mapping from run to group, or None")
    for name in runs:
        if name not in groups:  # type: ignore[operator]
            raise ValueError(
                f"{quoted(call, 'groups', groups)}: it lacks the run {name!r}; name the group of "
                f"every run"
            )


def check_numbers(call: str, rows: Iterable[Mapping[str, Any]], *keys: str) -> None:
    """Raises unless the values that the figure needs are numbers."""
    for row in rows:
        for key, value in row.items():
            if value is not None and (key in ("step", *keys) or key.startswith("hessian/")):
                try:
                    if isinstance(value, str):
                        raise TypeError
                    float(value)
                except (TypeError, ValueError) as error:
                    message = f"{call}: got {shown(value)} for {key!r}; expected numbers"
                    raise TypeError(message) from error


def check_density(call: str, density: object) -> None:
    """Raises unless ``density`` is a SpectralDensity."""
    if not all(hasattr(density, name) for name in ("grid", "density", "stderr", "sigma")):
        raise TypeError(
            f"{call}: got {shown(density)}; expected a SpectralDensity, as spectral_density returns"
        )
