"""``python -m lightning_landscape.measure --module package.module:Class --data ...``."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from lightning_landscape.measure import measure
from lightning_landscape.training.lightning_packages import CALLBACKS, MISCONFIGURATIONS

_USER_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    *MISCONFIGURATIONS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0, or 2 if an argument is wrong or nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_landscape.measure",
        description="Measure the loss landscape of a saved model.",
    )
    path = "package.module:object"
    parser.add_argument("--module", required=True, metavar=path, help="a LightningModule class")
    parser.add_argument(
        "--data", metavar=path,
        help="a DataLoader, a LightningDataModule or its class, or a function returning one; "
        "default: the module's own train_dataloader",
    )  # fmt: skip
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the module as it is built")
    parser.add_argument(
        "--callbacks", metavar=path, action="append",
        help="a callback, its class, a list of callbacks, or a function returning one of these; "
        "may be given several times; default: landscape_callbacks(max_overhead=None)",
    )  # fmt: skip
    parser.add_argument(
        "--logdir", type=Path, default="landscape_logs", help="default: %(default)s"
    )
    parser.add_argument("--report", action="store_true", help="write report.html too")
    parser.add_argument(
        "--init", metavar="NAME=VALUE", action="append", default=[],
        help="an argument of the module's class, a Python value; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--trainer", metavar="NAME=VALUE", action="append", default=[],
        help="an argument of the Trainer, as in training, e.g. precision=bf16-mixed",
    )  # fmt: skip
    parser.add_argument("--loss-fn", metavar=path, help="loss_fn of the default callbacks")
    parser.add_argument("--probe-samples", type=int, default=512, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        found = measure(
            _import_object("--module", options.module),
            None if options.data is None else _import_object("--data", options.data),
            checkpoint=options.checkpoint,
            callbacks=None if options.callbacks is None else _callbacks(options.callbacks),
            logdir=options.logdir,
            probe_samples=options.probe_samples,
            loss_fn=None
            if options.loss_fn is None
            else _import_object("--loss-fn", options.loss_fn),
            init=dict(_assignment("--init", text) for text in options.init),
            report=options.report,
            **dict(_assignment("--trainer", text) for text in options.trainer),
        )
    except _USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in found.values.items():
        print(f"{key} {value:.6g}")
    print(f"Step {found.step}; wrote {found.report or found.log_dir}")
    return 0


def _import_object(option: str, text: str) -> Any:
    """The object at ``package.module:object``.

    Raises:
        ValueError: it cannot be imported.
    """
    name, _, place = text.partition(":")
    if not name or not place:
        raise ValueError(f"{option} {text!r}: expected package.module:object")
    try:
        return reduce(getattr, place.split("."), importlib.import_module(name))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {text!r}: it cannot be imported ({error})") from error


def _callbacks(paths: Sequence[str]) -> list[Any]:
    """The callbacks of all options, as one list."""
    found: list[Any] = []
    for text in paths:
        value = _import_object("--callbacks", text)
        if not isinstance(value, (*CALLBACKS, list, tuple)):
            if not callable(value):
                raise ValueError(f"--callbacks {text!r}: expected a callback, a list or a function")
            make: Callable[[], Any] = value
            value = make()
        found += [value] if isinstance(value, CALLBACKS) else value
    return found


def _assignment(option: str, text: str) -> tuple[str, Any]:
    """``name=value``; a value that is not a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{option} {text!r}: expected NAME=VALUE, e.g. width=64")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
