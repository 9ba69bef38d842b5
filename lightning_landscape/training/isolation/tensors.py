"""Copies of tensors that an evaluation works with, and comparisons bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(value: Tensor) -> bool:
    """Whether the tensor has content that can be copied, compared and written.

    Not: lazy and meta tensors, inference tensors (validation may leave some), wrappers of others,
    and those whose memory is freed: FSDP2 does that with gathered parameters.
    """
    return _has_storage(value) and not is_freed(value)


def _has_storage(value: Tensor) -> bool:
    """Whether the tensor has a storage that may be read and written, or a sparse layout."""
    return not (
        is_lazy(value)
        or value.is_meta
        or value.is_inference()
        or is_traceable_wrapper_subclass(value)
        or value.is_nested
    )


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage is too small for the tensor: torch does not check that when it reads."""
    if not _has_storage(tensor) or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() < _extent(tensor)


def _extent(tensor: Tensor) -> int:
    """The bytes of its storage that the tensor needs."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """The address of its storage; 0 of a tensor that is not strided."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any dtype agree bit for bit, NaN and signs of zeros included."""
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return False  # not compared: counts as changed
    if is_freed(one) or is_freed(other):
        return False
    one, other = one.detach(), other.detach()
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    integer = _INTEGERS.get(one.element_size()) if one.is_floating_point() else None
    if integer is not None:
        one, other = one.view(integer), other.view(integer)
    return torch.equal(one, other)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def overwrite(tensor: Tensor, content: Tensor) -> None:
    """Write ``content`` into ``tensor``, whose version counter is incremented."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        target = tensor.detach()
        if target.layout == torch.strided and target.shape != content.shape:
            target = tensor.data.resize_(content.shape)
        if is_freed(target):
            memory: Any = target.untyped_storage()
            memory.resize_(_extent(target))
        target.copy_(content)


def copies_of(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies by the ids of the originals; those that share memory have copies that share it."""
    copies: dict[int, Tensor] = {}
    by_storage: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault((storage_of(tensor), tensor.dtype), []).append(tensor)
    for (storage, _), group in by_storage.items():
        if len(group) == 1 or not storage:
            copies.update((id(tensor), _copy(tensor)) for tensor in group)
            continue
        memory: Any = group[0].untyped_storage()
        memory = memory.clone()
        for tensor in group:
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                memory, tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            copies[id(tensor)] = _like(tensor, view)
    return copies


def _copy(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return _like(tensor, tensor.detach().clone())


def _like(tensor: Tensor, copy: Any) -> Tensor:
    """``copy`` with the class, the attributes and the ``requires_grad`` of ``tensor``."""
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=False)
    elif type(tensor) not in (Tensor, nn.Buffer):
        with torch._C.DisableTorchFunctionSubclass():
            copy = copy.as_subclass(type(tensor))
    if tensor.__dict__:
        copy.__dict__.update(tensor.__dict__)
    if tensor.is_leaf and tensor.requires_grad:
        copy.requires_grad_()
    result: Tensor = copy
    return result
