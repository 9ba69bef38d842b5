"""Texts of the figures, from the metadata of slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_landscape.figures.canvas import shortened

if TYPE_CHECKING:
    from lightning_landscape.geometry.slices import Slice

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def number(value: float, digits: int = 3) -> str:
    """Returns a short number with a minus sign (not a hyphen), legible at small sizes.

    Example:
        >>> number(0.00012), number(-2.0), number(1234567.0), number(float("nan"))
        ('1.2e-4', '−2', '1.23e6', 'nan')
    """
    if value == 0 or not math.isfinite(value):
        text = "0" if value == 0 else str(abs(float(value)))
    else:
        mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
        if -4 < int(exponent) < 5:
            text = f"{float(mantissa) * 10 ** int(exponent):.{max(digits - 1 - int(exponent), 0)}f}"
        else:
            text = mantissa
        text = text.rstrip("0").rstrip(".") if "." in text else text
        text += "" if -4 < int(exponent) < 5 else f"e{int(exponent)}"
    return f"{MINUS}{text}" if value < 0 else text


def exactly(value: float) -> str:
    """Returns a short number with as many digits as a round one needs, at most 8.

    Example:
        >>> exactly(2.315), exactly(0.2)
        ('2.315', '0.2')
    """
    needed = (n for n in range(1, 8) if float(f"{value:.{n - 1}e}") == value)
    return number(value, next(needed, 8))


def step_and_loss(metadata: Mapping[str, Any], center_loss: float) -> str:
    """Returns 'step 120, loss 0.53', as far as known, and 'fewer points' for a coarse slice."""
    step, loss = metadata.get("step"), f"loss {number(center_loss)}"
    text = loss if step is None else f"step {step}, {loss}"
    return f"{text}, fewer points" if metadata.get("coarse") else text


def direction_names(metadata: Mapping[str, Any], count: int) -> list[str]:
    """Returns the names of the directions, 'direction 1' if unknown."""
    known = [str(name) for name in metadata.get("directions") or ()][:count]
    return known + [f"direction {index + 1}" for index in range(len(known), count)]


def direction_norms(metadata: Mapping[str, Any], count: int) -> list[float | None]:
    """Returns the norm of each direction in weight space, None if unknown or not positive."""
    norms = [None if norm is None else float(norm) for norm in metadata.get("norms") or ()][:count]
    norms += [None] * (count - len(norms))
    return [norm if norm is not None and 0 < norm < math.inf else None for norm in norms]


def norm_ranges(film: Sequence[Slice], count: int) -> list[tuple[float, float] | None]:
    """Returns the smallest and the largest norm of each direction in a film, None if unknown."""
    columns = zip(*(direction_norms(slice.metadata, count) for slice in film), strict=True)
    known = [[norm for norm in column if norm is not None] for column in columns]
    return [(min(norms), max(norms)) if len(norms) == len(film) else None for norms in known]


def axis_label(name: str, norms: tuple[float, float] | None) -> str:
    """Returns 'random (1 = norm 3.2)', or 'random (1 = norm 3.2 to 4)' for a film."""
    label = shortened(name, 28)
    if norms is None:
        return label
    shortest, longest = (number(norm, 2) for norm in norms)
    return f"{label} (1 = norm {shortest if shortest == longest else f'{shortest} to {longest}'})"


def directions_line(metadata: Mapping[str, Any], count: int) -> str:
    """Returns 'random (fixed) × gradient (taken anew)': which axes are the same over training."""
    if not metadata.get("directions"):
        return ""
    names = [shortened(name, 18) for name in direction_names(metadata, count)]
    states = ["fixed" if flag else "taken anew" for flag in metadata.get("fixed") or ()][:count]
    if len(states) == count and len(set(states)) > 1:
        names = [f"{name} ({state})" for name, state in zip(names, states, strict=True)]
    line = f" {TIMES} ".join([*(_without_end(name, names[-1]) for name in names[:-1]), names[-1]])
    return f"{line} ({states[0]})" if len(states) == count and len(set(states)) == 1 else line


def _without_end(name: str, last: str) -> str:
    """Returns the name without the words at its end that the last name has there too.

    Example:
        >>> _without_end("PCA 1 of the path", "PCA 2 of the path")
        'PCA 1'
    """
    words, others = name.split(), last.split()
    while words != others and min(len(words), len(others)) > 1 and words[-1] == others[-1]:
        words, others = words[:-1], others[:-1]
    return " ".join(words)


def normalization_text(metadata: Mapping[str, Any]) -> str:
    """Returns 'filter-normalised'; nothing for unit vectors, whose norm is beside their names."""
    kind = metadata.get("normalization", "unit")
    if kind == "unit":
        return ""
    return "not normalised" if kind in (None, "", "none") else f"{kind}-normalised"


def probe_text(metadata: Mapping[str, Any]) -> str:
    """Returns '512 examples in train mode'."""
    samples, mode = metadata.get("probe_samples"), metadata.get("probe_mode")
    parts = [] if samples is None else [f"{samples} example{'s' * (samples != 1)}"]
    if mode is not None:
        parts.append(f"in {mode} mode" if parts else f"{mode} mode")
    return " ".join(parts)


def comma_joined(*parts: str) -> str:
    """Returns the non-empty parts, separated by commas."""
    return ", ".join(filter(None, parts))


def common_metadata(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the metadata that all slices of a picture share.

    Example:
        >>> common_metadata([{"step": 1, "seed": 0}, {"step": 2, "seed": 0}])
        {'seed': 0}
    """
    first, *others = metadata
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def count_title(count: int, kind: str) -> str:
    """Returns 'Loss on 3 planes, one scale'."""
    return f"Loss on {count} {kind}s, one scale" if count != 1 else f"Loss on one {kind}"


def legend_name(name: str, length: int) -> str:
    """Returns a name for a legend; matplotlib would drop one that begins with '_'."""
    return shortened(f" {name}" if name.startswith("_") else name, length)
