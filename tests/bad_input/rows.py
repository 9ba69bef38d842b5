"""A row of the table of wrong uses: a call that is right but for one argument, and what is said."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_landscape.geometry.checks import shown

# A message says what to do instead with one of these.
ADVICE = re.compile(r"\b(expected|pass|give|use|leave|name|add|choose)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """Something public that can be called wrongly.

    Attributes:
        name: how a person writes it.
        function: what is called.
        right: makes arguments that are right, by name.
    """

    name: str
    function: Callable[..., Any]
    right: Callable[[], Mapping[str, Any]] = dict

    def __call__(self, **wrong: Any) -> Any:
        return self.function(**{**self.right(), **wrong})


@dataclass(frozen=True)
class Wrong:
    """An argument with values that are refused, all for the same reason.

    Attributes:
        calls: what is called; of several the first is named in the table.
        argument: its name.
        values: each is tried.
        error: the exception.
        says: a regular expression that the message matches: what to pass instead.
        beside: further arguments of that call.
        tells: what the message has to hold besides the argument's name; the value where empty.
    """

    calls: tuple[Call, ...]
    argument: str
    values: tuple[Any, ...]
    error: type[Exception]
    says: str
    beside: Mapping[str, Any] = field(default_factory=dict)
    tells: str = ""

    @property
    def done(self) -> str:
        """What was done, in a line."""
        beside = "".join(f", {name}={shown(value)}" for name, value in self.beside.items())
        values = " or ".join(_short(value) for value in self.values)
        done = f"{self.calls[0].name}({self.argument}={values}{beside})"
        return done if len(done) <= 110 else f"{done[:106]}...)"

    def problems(self, value: Any, message: str) -> list[str]:
        """What a person would miss in ``message``."""
        known = {
            f"the argument's name, {self.argument!r}": self.argument in message,
            f"what to do instead, {self.says!r}": re.search(self.says, message, re.DOTALL),
            "a word of advice": ADVICE.search(message),
            "the value or its type": any(
                word in message for word in (self.tells, *([] if self.tells else _names_of(value)))
            ),
        }
        return [part for part, there in known.items() if not there]


def wrong(
    calls: Call | tuple[Call, ...],
    argument: str,
    values: tuple[Any, ...],
    error: type[Exception],
    says: str,
    tells: str = "",
    **beside: Any,
) -> Wrong:
    """A row."""
    calls = (calls,) if isinstance(calls, Call) else calls
    return Wrong(calls, argument, values, error, says, beside, tells)


def _names_of(value: Any) -> list[str]:
    """What shows in a message that it is about ``value``."""
    name = value.name if isinstance(value, Path) else _short(value, 24).removesuffix("...")
    return [name, type(value).__name__]


def _short(value: Any, length: int = 36) -> str:
    text = value.__name__ if inspect.isroutine(value) else shown(value)
    text = f"Path({value.name!r})" if isinstance(value, Path) else text
    return text if len(text) <= length else f"{text[: length - 3]}..."


def table_row(done: str, exception: str, said: str) -> dict[str, str]:
    """A row of the table that is printed, without what varies from run to run."""

    def plain(text: str) -> str:
        words = " ".join(text.split())
        return re.sub(r" at 0x[0-9a-f]+|[^ '\"(]*wrong-uses-[^/'\") ]*/?", "", words)

    return {"what was done": plain(done), "exception": exception, "what is said": plain(said)}
