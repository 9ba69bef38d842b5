"""Everything that a ``training_step`` may change on its module, and how it is restored."""

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
# Objects that are not restored, and neither is their content.
_EXCLUDED = (type, types.FunctionType, types.ModuleType, Dataset, DataLoader, *DATA_MODULES)
_FOREIGN_PACKAGES = sys.stdlib_module_names | {
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "lightning_landscape",
}
_THREADING_MODULES = ("_thread", "threading", "queue", "_queue", "multiprocessing.queues")
_Restore = Callable[[], None]


class ModuleState:
    """A copy of the mutable state of a module and its submodules.

    It is restored at two levels, because one measurement evaluates the loss many times:

    - :meth:`begin_evaluation` and :meth:`end_evaluation` enclose one evaluation.  It works on fresh
      copies of buffers and tensor attributes, because a retained graph may refer to them.  At its
      end every attribute, container and generator is restored: a list extended by ``append``, a
      running average, the counts of a metric, a rebound queue.  So all evaluations start from the
      same state.  Parameters that no optimizer trains are restored too, such as those of a teacher
      that is an average of the student.
    - :meth:`restore` is called once at the end: the values of parameters and buffers, gradients,
      ``requires_grad`` and train/eval flags.

    Restored: attributes of all submodules; lists, dicts, sets and deques in them, also nested ones;
    attributes of plain objects (a meter, a stateful loss); tensors in all of these; NumPy arrays;
    ``torch.Generator``, ``numpy.random.Generator`` and ``random.Random``.  Not restored:
    ``__slots__``, objects that hold a lock or a thread, data sets, and anything outside the module.
    """

    def __init__(self, module: nn.Module, trained: Collection[int] = ()) -> None:
        """``trained``: ids of the parameters that a measurement may change between evaluations."""
        self._modules = list(module.modules())
        self._training = [m.training for m in self._modules]
        self._parameters = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
        self._untrained = [
            (p, content) for p, content, _ in self._parameters if id(p) not in trained
        ]
        # Those of them that the loss changes; unknown until the first evaluation has ended.
        self._changed: list[tuple[Tensor, Tensor]] | None = None
        self._gradients = [(p, p.grad) for p, _, _ in self._parameters]
        owned = {_storage(p) for p, _, _ in self._parameters}
        self._attributes = [(m, dict(m.__dict__)) for m in self._modules]

        # Tensors that are attributes of a module: replaced by copies for each evaluation.
        self._named_tensors: list[tuple[dict[str, Any], str, Tensor]] = []
        for m, attributes in self._attributes:
            buffers: dict[str, Any] = m._buffers
            for holder, items in ((m.__dict__, attributes), (buffers, dict(buffers))):
                for key, value in items.items():
                    if _is_own_tensor(value, owned):
                        self._named_tensors.append((holder, key, value))
        named = {id(tensor): tensor for _, _, tensor in self._named_tensors}
        self._tensor_contents = [(tensor, tensor.detach().clone()) for tensor in named.values()]

        # Containers and generators, and the values of tensors in containers.
        seen: set[int] = set()
        containers: list[Any] = []
        for _, attributes in self._attributes:
            containers += _containers_in(attributes.values(), seen)
        self._containers = [_restorer(container) for container in containers]
        nested = {
            id(value): value
            for container in containers
            for value in _elements(container)
            if _is_own_tensor(value, owned) and id(value) not in named
        }
        self._nested_tensors = [(t, t.detach().clone(), t._version) for t in nested.values()]

        for parameter, _ in self._gradients:
            # A loss that writes to .grad does not change the gradients of the run.
            parameter.grad = None

    def set_mode(self, training: bool | None) -> None:
        """Set all submodules to train or eval mode; ``None``: their modes in training."""
        for (m, attributes), own in zip(self._attributes, self._training, strict=True):
            m.training = own if training is None else training
            if "training" in attributes:  # a property of compiled modules
                attributes["training"] = m.training

    def begin_evaluation(self) -> None:
        """Replace the module's buffers and tensor attributes by copies."""
        copies: dict[int, Tensor] = {}
        for holder, key, tensor in self._named_tensors:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor)
            holder[key] = copies[id(tensor)]

    def end_evaluation(self) -> None:
        """Restore the module's attributes and their contents."""
        for m, attributes in self._attributes:
            for added in m.__dict__.keys() - attributes.keys():
                del m.__dict__[added]
            m.__dict__.update(attributes)
        for restore in self._containers:
            restore()
        if self._changed is None:
            # By value: a write through .data does not change the version counter.
            self._changed = [(p, old) for p, old in self._untrained if not torch.equal(p, old)]
        for parameter, content in self._changed:
            _overwrite(parameter, content)
        for tensor, content, version in self._nested_tensors:
            if tensor._version != version:
                # With a new version counter: a graph that saved this tensor must be invalidated.
                _overwrite(tensor, content)

    def restore(self) -> None:
        """Restore everything that is not restored after each evaluation."""
        try:
            self._restore()
        except BaseException:  # e.g. Ctrl-C in the middle: restoring twice does no harm
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
        for tensor, content in self._tensor_contents:
            # Only if it was changed in spite of the copies: writing to a tensor invalidates a graph
            # that the user retains (e.g. of a recurrent state).
            if tensor.is_sparse or not torch.equal(tensor, content):
                _overwrite(tensor, content)


def _is_own_tensor(value: object, owned: set[int]) -> bool:
    """Whether to copy this tensor: it shares no storage with a parameter.

    Inference tensors, which validation may leave, are excluded too: they cannot be written to.
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
    """Containers and generators among ``values`` and inside them, each once."""
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
    """Whether ``value`` is an object of the user's code whose attributes can be restored."""
    if isinstance(value, _EXCLUDED) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    package = type(value).__module__.partition(".")[0]
    if package in _FOREIGN_PACKAGES:
        return False
    # Another thread may use it, as in a logger.
    return not any(type(v).__module__ in _THREADING_MODULES for v in vars(value).values())


def _elements(container: object) -> list[Any]:
    if isinstance(container, dict):
        return list(container.values())
    if isinstance(container, (*_CONTAINERS, tuple)):
        return list(container)
    return list(vars(container).values()) if _is_plain_object(container) else []


def _restorer(value: Any) -> _Restore:
    """A function that restores the present content of ``value``."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        generator: torch.Generator = value

        def restore_generator() -> None:
            generator.set_state(state)

        return restore_generator
    if isinstance(value, np.random.Generator):
        bit_state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bit_state)
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    if isinstance(value, np.ndarray):
        entries = value.copy()

        def restore_array() -> None:
            value[...] = entries

        return restore_array
    if isinstance(value, dict):
        items = dict(value)

        def restore_dict() -> None:
            # As with lists: do not write to one that was not changed (e.g. a vocabulary).
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
