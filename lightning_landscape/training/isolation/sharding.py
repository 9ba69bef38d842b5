"""FSDP2: a module sharded by ``fully_shard`` is unsharded while it is measured.

On every process, plain full copies of the parameters replace the shards.  Everything else then
works as under DDP: full vectors on all processes, and one part of the probe on each.  The shards,
which the optimizer steps, are not modified.  FSDP's hooks are removed in the meantime, so that an
error in the middle of an evaluation cannot leave FSDP in an inconsistent state.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_landscape.training.lightning_packages import misconfiguration

_Sync = Callable[[], None]  # raises unless all processes are ready to communicate


class UnshardedParameters:
    """Maps the full parameters that are measured to the shards that the optimizers step.

    Without FSDP the two are the same, and nothing is copied.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter] | None = None,
        shards: Mapping[int, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        sync: _Sync = lambda: None,
    ) -> None:
        self._parameters = dict(parameters or {})  # id of a shard -> the full parameter
        self._shards = dict(shards or {})  # id of a full parameter -> the shard
        self._dtype = dtype
        self._sync = sync

    def shard_of(self, parameter: Tensor) -> Tensor:
        """The shard of ``parameter``, which an optimizer steps; without FSDP ``parameter``."""
        return self._shards.get(id(parameter), parameter)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Full tensors from shards; other tensors unchanged.  A collective call."""
        return _gather(tensors, self._sync)

    def view_optimizers(self, optimizers: Sequence[Any]) -> list[Any]:
        """Read-only views of the optimizers, with full parameters and state."""
        return (
            [self._view(optimizer) for optimizer in optimizers] if self._shards else [*optimizers]
        )

    def _view(self, optimizer: Any) -> Any:
        # copy.copy would call __setstate__, which writes into the optimizer's own groups.
        view = object.__new__(type(optimizer))
        for key, value in vars(optimizer).items():
            view.__dict__[key] = self._view(value) if isinstance(value, Optimizer) else value
        full = self._parameters
        view.param_groups = [
            {**group, "params": [full.get(id(p), p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        view.state = defaultdict(dict)
        for p, state in optimizer.state.items():
            view.state[full.get(id(p), p)] = _GatheredState(state, self)
        return view

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context that applies FSDP's mixed precision to an evaluation, as autocast.

        The copies keep the dtype of the shards: small displacements would be rounded away in bf16.
        """
        if self._dtype is None:
            return contextlib.nullcontext()
        device = next(iter(self._parameters.values())).device.type
        return torch.autocast(device, dtype=self._dtype, cache_enabled=False)


class _GatheredState(Mapping[str, Any]):
    """One parameter's optimizer state; a tensor is gathered when it is read."""

    def __init__(self, state: Mapping[str, Any], unsharded: UnshardedParameters) -> None:
        self._state, self._unsharded = state, unsharded

    def __getitem__(self, key: str) -> Any:
        value = self._state[key]
        return self._unsharded.gather([value])[0] if isinstance(value, Tensor) else value

    def __contains__(self, key: object) -> bool:
        return key in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@contextlib.contextmanager
def unsharded(pl_module: nn.Module, sync: _Sync = lambda: None) -> Iterator[UnshardedParameters]:
    """Replace FSDP2's shards by plain full parameters.

    Args:
        pl_module: the module.
        sync: called before processes communicate; raises unless all of them are ready.
    """
    sharded = _fsdp_modules(pl_module)
    if not sharded:
        yield UnshardedParameters()
        return
    for module in sharded:
        module.reshard()  # after an evaluation FSDP leaves some unsharded
    places = [
        (module, name, shard)
        for module in pl_module.modules()
        for name, shard in module._parameters.items()
        if _is_sharded(shard)
    ]
    shards: dict[int, Any] = {id(shard): shard for _, _, shard in places}
    copies = _gather([shard.detach() for shard in shards.values()], sync)
    parameters = {
        key: nn.Parameter(copy, requires_grad=shard.requires_grad)
        for (key, shard), copy in zip(shards.items(), copies, strict=True)
    }
    shard_of_copy = {id(parameters[key]): shard for key, shard in shards.items()}
    with _without_fsdp(pl_module, sharded) as dtype:
        try:
            # With setattr, as in FSDP: recurrent layers keep lists of their parameters.
            for module, name, shard in places:
                setattr(module, name, parameters[id(shard)])
            yield UnshardedParameters(parameters, shard_of_copy, dtype, sync)
        finally:
            for module, name, shard in places:
                setattr(module, name, shard)


def is_sharded(pl_module: nn.Module) -> bool:
    """Whether FSDP2 keeps the module's parameters in shards."""
    return bool(_fsdp_modules(pl_module))


def refuse_tensor_parallel(trainer: object, pl_module: nn.Module) -> None:
    """Raise if parameters are still distributed when FSDP has unsharded its own.

    Raises:
        MisconfigurationException: tensor parallelism.
    """
    if not any(_is_sharded(parameter) for parameter in pl_module.parameters()):
        return
    sharded = _fsdp_modules(pl_module)
    try:
        for module in sharded:
            module.unshard()
        split = [name for name, p in pl_module.named_parameters() if _is_sharded(p)]
    finally:
        for module in sharded:
            module.reshard()
    if split:
        raise misconfiguration(
            trainer,
            f"parameters such as {split[0]!r} are split by tensor parallelism, which "
            f"lightning_landscape does not measure: use DDPStrategy, or ModelParallelStrategy with "
            f"fully_shard alone (data_parallel_size=the number of devices, tensor_parallel_size=1)",
        )


def _fsdp_modules(pl_module: nn.Module) -> list[Any]:
    # Nothing is sharded unless this module is imported already; importing it is slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in pl_module.modules() if isinstance(m, kind)]


def _is_sharded(value: object) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def _gather(tensors: Sequence[Tensor], sync: _Sync) -> list[Tensor]:
    """Full copies of shards, other tensors unchanged."""
    # Allocate first: a process without enough memory fails before the processes communicate.
    outputs: list[Any] = [
        torch.empty(t.shape, dtype=t.dtype, device=_mesh_device(t)) if _is_sharded(t) else None
        for t in tensors
    ]
    if all(output is None for output in outputs):
        return list(tensors)
    sync()
    with torch.no_grad():
        for output, tensor in zip(outputs, tensors, strict=True):
            if output is not None:
                shard: Any = tensor.detach()
                output.copy_(shard.to(output.device).full_tensor())
    return [
        tensor if output is None else output
        for output, tensor in zip(outputs, tensors, strict=True)
    ]


def _mesh_device(tensor: Any) -> torch.device:
    """The device on which shards are gathered; with CPU offload they are stored on the CPU."""
    kind = tensor.device_mesh.device_type
    return tensor.device if tensor.device.type == kind else torch.device(kind)


@contextlib.contextmanager
def _without_fsdp(pl_module: nn.Module, sharded: Sequence[Any]) -> Iterator[torch.dtype | None]:
    """Remove FSDP's hooks from the modules; yields the dtype in which FSDP would compute.

    The hooks would gather the shards again and overwrite the copies.
    """
    states = {id(state): state for state in (module._get_fsdp_state() for module in sharded)}
    dtypes = [getattr(getattr(s, "_mp_policy", None), "param_dtype", None) for s in states.values()]
    removed: list[tuple[Any, dict[int, Any]]] = []
    found: set[tuple[str, int]] = set()
    try:
        for module in pl_module.modules():
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, kind)
                owners = {key: _owner(hook, states) for key, hook in hooks.items()}
                if any(owner is not None for owner in owners.values()):
                    removed.append((hooks, dict(hooks)))
                    found |= {(kind, owner) for owner in owners.values() if owner is not None}
                    for key in [key for key, owner in owners.items() if owner is not None]:
                        del hooks[key]
        if len(found) < 2 * len(states):
            raise RuntimeError(
                "FSDP's forward hooks were not found in this version of torch, so that a module "
                "sharded by it cannot be measured; use DDPStrategy, or another version of torch"
            )
        for state in states.values():  # for methods registered by register_fsdp_forward_method
            state._pre_forward = lambda module, args, kwargs: (args, kwargs)
            state._post_forward = lambda module, args, output: output
        for module in sharded:  # models may call these to prefetch parameters
            module.__dict__.update(unshard=_no_op, reshard=_no_op)
        yield next((dtype for dtype in dtypes if dtype is not None), None)
    finally:
        for module in sharded:
            for name in ("unshard", "reshard"):
                module.__dict__.pop(name, None)
        for state in states.values():
            for name in ("_pre_forward", "_post_forward"):
                vars(state).pop(name, None)
        for hooks, before in removed:
            hooks.clear()  # to keep their order
            hooks.update(before)


def _owner(hook: Any, states: Mapping[int, Any]) -> int | None:
    """The FSDP state whose method this hook is, also inside wrappers."""
    while hook is not None:
        owner = id(getattr(hook, "__self__", None))
        if owner in states:
            return owner
        hook = getattr(hook, "__wrapped__", None)
    return None


class _CompletedHandle:
    """The return value of ``unshard(async_op=True)``; waiting returns at once."""

    def wait(self) -> None:
        pass


def _no_op(*args: Any, **kwargs: Any) -> _CompletedHandle:
    return _CompletedHandle()
