"""Hooks on parameters: they change the gradient of training, and no derivative of the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def without_parameter_hooks(module: nn.Module) -> Iterator[list[str]]:
    """No hook of ``parameter.register_hook`` is called inside; gives the names that have some.

    ``autograd.grad`` calls them too, and a second derivative would contain what they do twice.
    """
    hooked = {
        name: (parameter, parameter._backward_hooks)
        for name, parameter in module.named_parameters()
        if parameter._backward_hooks
    }
    for parameter, _ in hooked.values():
        parameter._backward_hooks = None
    try:
        yield list(hooked)
    finally:
        for parameter, hooks in hooked.values():
            parameter._backward_hooks = hooks
