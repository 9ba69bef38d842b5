"""What a ``training_step`` may change on its module, and how it is put back."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, collections.deque)
_Restore = Callable[[], None]


class ModuleState:
    """A copy of everything mutable that hangs on a module and its submodules.

    Two levels of putting back, because one measurement evaluates the loss many times:

    - :meth:`begin_evaluation` and :meth:`end_evaluation` around each one.  It works on fresh copies
      of buffers and tensor attributes (a graph that is kept may hold on to them), and afterwards
      every attribute, container and generator is what it was: a list grown by ``append``, a running
      average, a metric's counts, a rebound queue.  So each evaluation starts from the same state.
    - :meth:`restore` once in the end: the contents of parameters and buffers, gradients,
      ``requires_grad`` and train/eval flags.

    Covered: attributes of every submodule, lists, dicts, sets and deques in them (nested ones too),
    tensors in those, ``torch.Generator``, ``numpy.random.Generator`` and ``random.Random``.  Not
    covered: the inside of other objects, and anything outside the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._training = [m.training for m in self._modules]
        self._parameters = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
        self._gradients = [(p, p.grad) for p, _, _ in self._parameters]
        owned = {_storage(p) for p, _, _ in self._parameters}
        self._attributes = [(m, dict(m.__dict__)) for m in self._modules]

        # Tensors that a module names directly: replaced by copies for each evaluation.
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = []
        self._containers: list[_Restore] = []
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        seen: set[int] = set()
        for m, attributes in self._attributes:
            for key, value in attributes.items():
                if _is_plain_tensor(value) and _storage(value) not in owned:
                    self._slots.append((m.__dict__, key, value))
            for key, buffer in m._buffers.items():
                if buffer is not None and _is_plain_tensor(buffer):
                    self._slots.append((m._buffers, key, buffer))
            for container in _containers_in(attributes.values(), seen):
                self._containers.append(_restorer(container))
        for _, _, tensor in self._slots:
            self._originals.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        self._inner = self._tensors_in_containers(owned)
        for parameter, _ in self._gradients:
            # What a loss does to .grad then happens to others than the run's own.
            parameter.grad = None

    def _tensors_in_containers(self, owned: set[int]) -> list[tuple[Tensor, Tensor, int]]:
        found: dict[int, Tensor] = {}
        for _, attributes in self._attributes:
            for container in _containers_in(attributes.values(), set()):
                values = container.values() if isinstance(container, dict) else container
                for value in values:
                    if _is_plain_tensor(value) and _storage(value) not in owned:
                        found.setdefault(id(value), value)
        return [
            (tensor, tensor.detach().clone(), tensor._version)
            for key, tensor in found.items()
            if key not in self._originals
        ]

    def set_mode(self, training: bool | None) -> None:
        """Put all submodules in train or eval mode; ``None``: the modes they train in."""
        for (m, attributes), own in zip(self._attributes, self._training, strict=True):
            m.training = attributes["training"] = own if training is None else training

    def begin_evaluation(self) -> None:
        """Lend the module copies of its buffers and tensor attributes."""
        copies: dict[int, Tensor] = {}
        for holder, key, tensor in self._slots:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor)
            holder[key] = copies[id(tensor)]

    def end_evaluation(self) -> None:
        """Give it back its own attributes, and those their contents."""
        for m, attributes in self._attributes:
            for added in m.__dict__.keys() - attributes.keys():
                del m.__dict__[added]
            m.__dict__.update(attributes)
        for restore in self._containers:
            restore()
        for tensor, content, version in self._inner:
            if tensor._version != version:
                # Not through .data: a kept graph that saved this tensor must notice.
                _overwrite(tensor, content)

    def restore(self) -> None:
        """Put back what outlives an evaluation."""
        self.set_mode(None)
        self.end_evaluation()
        for parameter, content, requires_grad in self._parameters:
            _overwrite(parameter, content)
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for tensor, content in self._originals.values():
            _overwrite(tensor, content)


def _is_plain_tensor(value: object) -> bool:
    return type(value) is Tensor or type(value) is nn.Buffer


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_sparse else tensor.untyped_storage().data_ptr()


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if tensor.requires_grad and tensor.is_leaf else copy


def _overwrite(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        tensor.detach().copy_(content)


def _containers_in(values: Iterable[object], seen: set[int]) -> Iterator[Any]:
    """Containers and random generators among ``values``, with those inside them, each once."""
    for value in values:
        if id(value) in seen or isinstance(value, (str, bytes, Tensor, nn.Module)):
            continue
        if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
            seen.add(id(value))
            yield value
        elif isinstance(value, (*_CONTAINERS, tuple)):
            seen.add(id(value))
            inside = value.values() if isinstance(value, dict) else value
            if not isinstance(value, tuple):
                yield value
            yield from _containers_in(list(inside), seen)


def _restorer(value: Any) -> _Restore:
    """A function that puts ``value`` back to what it holds now."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        generator: torch.Generator = value

        def restore_generator() -> None:
            generator.set_state(state)

        return restore_generator
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, random.Random):
        words = value.getstate()
        return lambda: value.setstate(words)
    if isinstance(value, dict):
        items = dict(value)

        def restore_dict() -> None:
            if value or items:
                value.clear()
                value.update(items)

        return restore_dict
    if isinstance(value, set):
        members = set(value)

        def restore_set() -> None:
            value.clear()
            value.update(members)

        return restore_set
    elements = list(value)

    def restore_sequence() -> None:
        if len(value) != len(elements) or any(
            a is not b for a, b in zip(value, elements, strict=True)
        ):
            value.clear()
            value.extend(elements)

    return restore_sequence
