"""Rows of the table of wrong uses: calls with one wrong argument, and the message of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_landscape.geometry.checks import shown

# One of these verbs introduces the advice in a message.
ADVICE = re.compile(r"\b(expected|pass|give|use|leave|name|add|choose)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """A public function or class that can be called wrongly.

    Attributes:
        name: the call as users write it.
        function: what is called.
        right: returns valid arguments by name.
    """

    name: str
    function: Callable[..., Any]
    right: Callable[[], Mapping[str, Any]] = dict

    def __call__(self, **wrong: Any) -> Any:
        return self.function(**{**self.right(), **wrong})


@dataclass(frozen=True)
class Wrong:
    """An argument with values that are rejected, all for the same reason.

    Attributes:
        calls: the calls; the table shows the first.
        argument: the name of the argument.
        values: each is tried.
        error: the type of the exception.
        message: a regular expression that the message must match: what to pass instead.
        beside: further arguments of the call.
        names: a string that the message must contain besides the argument's name; if empty, the
            value or its type.
    """

    calls: tuple[Call, ...]
    argument: str
    values: tuple[Any, ...]
    error: type[Exception]
    message: str
    beside: Mapping[str, Any] = field(default_factory=dict)
    names: str = ""

    @property
    def use(self) -> str:
        """The wrong use, in one line."""
        beside = "".join(f", {name}={shown(value)}" for name, value in self.beside.items())
        values = " or ".join(_short(value) for value in self.values)
        use = f"{self.calls[0].name}({self.argument}={values}{beside})"
        return use if len(use) <= 110 else f"{use[:106]}...)"

    def problems(self, value: Any, message: str) -> list[str]:
        """What ``message`` lacks."""
        required = {
            f"the argument's name, {self.argument!r}": self.argument in message,
            f"what to do instead, {self.message!r}": re.search(self.message, message, re.DOTALL),
            "a word of advice": ADVICE.search(message),
            "the value or its type": any(
                word in message for word in (self.names, *([] if self.names else _names_of(value)))
            ),
        }
        return [part for part, found in required.items() if not found]


def wrong(
    calls: Call | tuple[Call, ...],
    argument: str,
    values: tuple[Any, ...],
    error: type[Exception],
    message: str,
    names: str = "",
    **beside: Any,
) -> Wrong:
    """A row."""
    calls = (calls,) if isinstance(calls, Call) else calls
    return Wrong(calls, argument, values, error, message, beside, names)


def _names_of(value: Any) -> list[str]:
    """Strings of which one must be in a message about ``value``."""
    name = value.name if isinstance(value, Path) else _short(value, 24).removesuffix("...")
    return [name, type(value).__name__]


def _short(value: Any, length: int = 36) -> str:
    text = value.__name__ if inspect.isroutine(value) else shown(value)
    text = f"Path({value.name!r})" if isinstance(value, Path) else text
    return text if len(text) <= length else f"{text[: length - 3]}..."


def table_row(use: str, exception: str, message: str) -> dict[str, str]:
    """A row of the printed table, without what varies from run to run."""

    def plain(text: str) -> str:
        line = " ".join(text.split())
        return re.sub(r" at 0x[0-9a-f]+|[^ '\"(]*wrong-uses-[^/'\") ]*/?", "", line)

    return {"use": plain(use), "exception": exception, "message": plain(message)}
