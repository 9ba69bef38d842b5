"""What a ``training_step`` may change on its module, and how it is put back."""

from __future__ import annotations

import collections
import random
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_landscape.training.lightning_packages import DATA_MODULES

_CONTAINERS = (list, dict, set, collections.deque)
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)
# Objects that are looked at neither by themselves nor for what they hold.
_MACHINERY = (type, types.FunctionType, types.ModuleType, Dataset, DataLoader, *DATA_MODULES)
_FOREIGN_PACKAGES = sys.stdlib_module_names | {
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "lightning_landscape",
}
_LIVE_MODULES = ("_thread", "threading", "queue", "_queue", "multiprocessing.queues")
_Restore = Callable[[], None]


class ModuleState:
    """A copy of everything mutable that hangs on a module and its submodules.

    Two levels of putting back, because one measurement evaluates the loss many times:

    - :meth:`begin_evaluation` and :meth:`end_evaluation` around each one.  It works on fresh copies
      of buffers and tensor attributes (a graph that is kept may hold on to them), and afterwards
      every attribute, container and generator is what it was: a list grown by ``append``, a running
      average, a metric's counts, a rebound queue.  So each evaluation starts from the same state.
      Parameters too, of those that no optimizer moves: a teacher that follows the student.
    - :meth:`restore` once in the end: the contents of parameters and buffers, gradients,
      ``requires_grad`` and train/eval flags.

    Covered: attributes of every submodule, lists, dicts, sets and deques in them (nested ones too),
    attributes of plain objects (a meter, a loss with a memory), tensors in all those,
    NumPy arrays, ``torch.Generator``, ``numpy.random.Generator`` and ``random.Random``.  Not
    covered: slots, objects that hold a lock or a thread, data sets, and anything outside the
    module.
    """

    def __init__(self, module: nn.Module, trained: Collection[int] = ()) -> None:
        """``trained``: ids of the parameters that may be moved between evaluations."""
        self._modules = list(module.modules())
        self._training = [m.training for m in self._modules]
        self._parameters = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
        self._still = [(p, content) for p, content, _ in self._parameters if id(p) not in trained]
        # Those of them that the loss moves: not known before the first evaluation has ended.
        self._moved: list[tuple[Tensor, Tensor]] | None = None
        self._gradients = [(p, p.grad) for p, _, _ in self._parameters]
        owned = {_storage(p) for p, _, _ in self._parameters}
        self._attributes = [(m, dict(m.__dict__)) for m in self._modules]

        # Tensors that a module names directly: replaced by copies for each evaluation.
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = []
        for m, attributes in self._attributes:
            buffers: dict[str, Any] = m._buffers
            for holder, items in ((m.__dict__, attributes), (buffers, dict(buffers))):
                for key, value in items.items():
                    if _is_own_tensor(value, owned):
                        self._slots.append((holder, key, value))
        direct = {id(tensor): tensor for _, _, tensor in self._slots}
        self._originals = [(tensor, tensor.detach().clone()) for tensor in direct.values()]

        # Containers and generators are put back; tensors in containers get their contents back.
        seen: set[int] = set()
        held: list[Any] = []
        for _, attributes in self._attributes:
            held += _containers_in(attributes.values(), seen)
        self._containers = [_restorer(container) for container in held]
        inner = {
            id(value): value
            for container in held
            for value in _elements(container)
            if _is_own_tensor(value, owned) and id(value) not in direct
        }
        self._inner = [(t, t.detach().clone(), t._version) for t in inner.values()]

        for parameter, _ in self._gradients:
            # What a loss does to .grad then happens to others than the run's own.
            parameter.grad = None

    def set_mode(self, training: bool | None) -> None:
        """Put all submodules in train or eval mode; ``None``: the modes they train in."""
        for (m, attributes), own in zip(self._attributes, self._training, strict=True):
            m.training = own if training is None else training
            if "training" in attributes:  # a compiled module has it as a property
                attributes["training"] = m.training

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
        if self._moved is None:
            # By their values: what is written through .data leaves the version as it was.
            self._moved = [(p, old) for p, old in self._still if not torch.equal(p, old)]
        for parameter, content in self._moved:
            _overwrite(parameter, content)
        for tensor, content, version in self._inner:
            if tensor._version != version:
                # Not through .data: a kept graph that saved this tensor must notice.
                _overwrite(tensor, content)

    def restore(self) -> None:
        """Put back what outlives an evaluation."""
        try:
            self._restore()
        except BaseException:  # Ctrl-C half way, say: all of it can be done again
            self._restore()
            raise

    def _restore(self) -> None:
        self.set_mode(None)
        self.end_evaluation()
        for parameter, content, requires_grad in self._parameters:
            _overwrite(parameter, content)
            parameter.requires_grad_(requires_grad)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for tensor, content in self._originals:
            # Only where something reached it, past the copies: a graph that the user keeps (a
            # recurrent state, say) breaks when a tensor in it is written to.
            if tensor.is_sparse or not torch.equal(tensor, content):
                _overwrite(tensor, content)


def _is_own_tensor(value: object, owned: set[int]) -> bool:
    """A tensor to copy: not a parameter, nor a view of one, which must go on moving with it.

    Nor one that validation left from inference mode: nothing can write to it any more.
    """
    if type(value) not in (Tensor, nn.Buffer):
        return False
    tensor = cast(Tensor, value)
    return not tensor.is_inference() and _storage(tensor) not in owned


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_sparse else tensor.untyped_storage().data_ptr()


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if tensor.requires_grad and tensor.is_leaf else copy


def _overwrite(tensor: Tensor, content: Tensor) -> None:
    with torch.no_grad():
        tensor.detach().copy_(content)


def _containers_in(values: Iterable[object], seen: set[int]) -> Iterator[Any]:
    """What can be put back among ``values``, with that inside it, each once."""
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (str, bytes, Tensor, nn.Module)):
            continue
        if isinstance(value, _GENERATORS) or (
            isinstance(value, np.ndarray) and value.flags.writeable
        ):
            seen.add(id(value))
            yield value
        elif isinstance(value, (*_CONTAINERS, tuple)) or _is_plain_object(value):
            seen.add(id(value))
            yield value
            pending += _elements(value)


def _is_plain_object(value: object) -> bool:
    """An object of the user's, whose attributes are nobody else's business while we measure."""
    if isinstance(value, _MACHINERY) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    package = type(value).__module__.partition(".")[0]
    if package in _FOREIGN_PACKAGES:
        return False
    # Another thread may be at work in it, as in a logger.
    return not any(type(held).__module__ in _LIVE_MODULES for held in vars(value).values())


def _elements(container: object) -> list[Any]:
    if isinstance(container, dict):
        return list(container.values())
    if isinstance(container, (*_CONTAINERS, tuple)):
        return list(container)
    return list(vars(container).values()) if _is_plain_object(container) else []


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
    if isinstance(value, np.ndarray):
        entries = value.copy()

        def restore_array() -> None:
            value[...] = entries

        return restore_array
    if isinstance(value, dict):
        items = dict(value)

        def restore_dict() -> None:
            # As with lists: one that nothing changed (a vocabulary, say) is not written to.
            if len(value) != len(items) or any(
                k is not key or v is not item
                for (k, v), (key, item) in zip(value.items(), items.items(), strict=True)
            ):
                value.clear()
                value.update(items)

        return restore_dict
    if isinstance(value, set):
        members = set(value)

        def restore_set() -> None:
            value.clear()
            value.update(members)

        return restore_set
    if isinstance(value, tuple):
        return lambda: None
    holder: Any = value
    if not isinstance(value, _CONTAINERS):
        attributes = dict(vars(value))

        def restore_object() -> None:
            own = vars(holder)
            if own.keys() != attributes.keys() or any(own[k] is not attributes[k] for k in own):
                own.clear()
                own.update(attributes)

        return restore_object
    elements = list(value)

    def restore_sequence() -> None:
        if len(value) != len(elements) or any(
            a is not b for a, b in zip(value, elements, strict=True)
        ):
            holder.clear()
            holder.extend(elements)

    return restore_sequence
