"""FSDP2: a module sharded by ``fully_shard`` is made whole while it is measured.

Every process gets plain, full copies of the parameters in the place of its shards, so that the
rest works as under DDP: whole vectors everywhere, each process its own share of the probe.  The
shards, which the optimizer steps, stay aside untouched, and so does FSDP itself: its hooks are
taken off for the time, so that no fault in the middle of an evaluation can confuse it.
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

_Agree = Callable[[], None]  # raises unless all processes are ready for an exchange


class Whole:
    """A module's parameters as measuring sees them, beside those that the optimizers step.

    Without FSDP the two are the same, and nothing is copied.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter] | None = None,
        shards: Mapping[int, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        agree: _Agree = lambda: None,
    ) -> None:
        self._parameters = dict(parameters or {})  # id of a shard -> the whole parameter
        self._shards = dict(shards or {})  # id of a whole parameter -> the shard
        self._dtype = dtype
        self._agree = agree

    def trained(self, parameter: Tensor) -> Tensor:
        """What an optimizer holds where the module, as it is now, holds ``parameter``."""
        return self._shards.get(id(parameter), parameter)

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Shards made whole; other tensors as they are.  Called by all processes alike."""
        return _gathered(tensors, self._agree)

    def optimizers(self, optimizers: Sequence[Any]) -> list[Any]:
        """The optimizers with whole parameters and state; to be looked at, not to be stepped."""
        return (
            [self._view(optimizer) for optimizer in optimizers] if self._shards else [*optimizers]
        )

    def _view(self, optimizer: Any) -> Any:
        # Not by copy.copy: an optimizer's __setstate__ writes into the groups it is given.
        view = object.__new__(type(optimizer))
        for key, value in vars(optimizer).items():
            view.__dict__[key] = self._view(value) if isinstance(value, Optimizer) else value
        own = self._parameters
        view.param_groups = [
            {**group, "params": [own.get(id(p), p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        view.state = defaultdict(dict)
        for p, state in optimizer.state.items():
            view.state[own.get(id(p), p)] = _GatheredState(state, self)
        return view

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around an evaluation: FSDP's mixed precision, as autocast.

        The copies keep the precision of the shards; in bf16 they could hardly be moved a little.
        """
        if self._dtype is None:
            return contextlib.nullcontext()
        device = next(iter(self._parameters.values())).device.type
        return torch.autocast(device, dtype=self._dtype, cache_enabled=False)


class _GatheredState(Mapping[str, Any]):
    """One parameter's optimizer state; a tensor is gathered when it is asked for."""

    def __init__(self, state: Mapping[str, Any], whole: Whole) -> None:
        self._state, self._whole = state, whole

    def __getitem__(self, key: str) -> Any:
        value = self._state[key]
        return self._whole.gathered([value])[0] if isinstance(value, Tensor) else value

    def __contains__(self, key: object) -> bool:
        return key in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@contextlib.contextmanager
def unsharded(pl_module: nn.Module, agree: _Agree = lambda: None) -> Iterator[Whole]:
    """Plain full parameters in the place of FSDP2's shards; ``agree`` comes before an exchange."""
    sharded = _fsdp_modules(pl_module)
    if not sharded:
        yield Whole()
        return
    for module in sharded:
        module.reshard()  # after an evaluation FSDP leaves some whole
    places = [
        (module, name, shard)
        for module in pl_module.modules()
        for name, shard in module._parameters.items()
        if _is_sharded(shard)
    ]
    shards: dict[int, Any] = {id(shard): shard for _, _, shard in places}
    copies = _gathered([shard.detach() for shard in shards.values()], agree)
    parameters = {
        key: nn.Parameter(copy, requires_grad=shard.requires_grad)
        for (key, shard), copy in zip(shards.items(), copies, strict=True)
    }
    back = {id(parameters[key]): shard for key, shard in shards.items()}
    with _without_fsdp(pl_module, sharded) as dtype:
        try:
            # By setattr, as FSDP does: recurrent layers keep lists of their parameters.
            for module, name, shard in places:
                setattr(module, name, parameters[id(shard)])
            yield Whole(parameters, back, dtype, agree)
        finally:
            for module, name, shard in places:
                setattr(module, name, shard)


def is_sharded(pl_module: nn.Module) -> bool:
    """Whether FSDP2 keeps the module's parameters in shards."""
    return bool(_fsdp_modules(pl_module))


def refuse_tensor_parallel(trainer: object, pl_module: nn.Module) -> None:
    """Raise if parameters stay in pieces where FSDP makes its own whole.

    Raises:
        MisconfigurationException: tensor parallelism.
    """
    if not any(_is_sharded(parameter) for parameter in pl_module.parameters()):
        return
    sharded = _fsdp_modules(pl_module)
    try:
        for module in sharded:
            module.unshard()
        pieces = [name for name, p in pl_module.named_parameters() if _is_sharded(p)]
    finally:
        for module in sharded:
            module.reshard()
    if pieces:
        raise misconfiguration(
            trainer,
            f"parameters such as {pieces[0]!r} are split by tensor parallelism, which "
            f"lightning_landscape does not measure: use DDPStrategy, or ModelParallelStrategy with "
            f"fully_shard alone (data_parallel_size=the number of devices, tensor_parallel_size=1)",
        )


def _fsdp_modules(pl_module: nn.Module) -> list[Any]:
    # Nothing was sharded unless this is loaded, and loading it takes time.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in pl_module.modules() if isinstance(m, kind)]


def _is_sharded(value: object) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def _gathered(tensors: Sequence[Tensor], agree: _Agree) -> list[Tensor]:
    """Full copies of shards, other tensors as they are."""
    # Where to goes first, by itself: a process without room for it fails before the exchange.
    room: list[Any] = [
        torch.empty(t.shape, dtype=t.dtype, device=_mesh_device(t)) if _is_sharded(t) else None
        for t in tensors
    ]
    if all(place is None for place in room):
        return list(tensors)
    agree()
    with torch.no_grad():
        for place, tensor in zip(room, tensors, strict=True):
            if place is not None:
                shard: Any = tensor.detach()
                place.copy_(shard.to(place.device).full_tensor())
    return [tensor if place is None else place for place, tensor in zip(room, tensors, strict=True)]


def _mesh_device(tensor: Any) -> torch.device:
    """Where the exchange happens; with CPU offload the shards lie elsewhere."""
    kind = tensor.device_mesh.device_type
    return tensor.device if tensor.device.type == kind else torch.device(kind)


@contextlib.contextmanager
def _without_fsdp(pl_module: nn.Module, sharded: Sequence[Any]) -> Iterator[torch.dtype | None]:
    """Take FSDP's hooks off the modules; gives the dtype that it would compute in.

    They would gather the shards again, in the place of the copies.
    """
    states = {id(state): state for state in (module._get_fsdp_state() for module in sharded)}
    dtypes = [getattr(getattr(s, "_mp_policy", None), "param_dtype", None) for s in states.values()]
    taken: list[tuple[Any, dict[int, Any]]] = []
    found: set[tuple[str, int]] = set()
    try:
        for module in pl_module.modules():
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, kind)
                owners = {key: _owner(hook, states) for key, hook in hooks.items()}
                if any(owner is not None for owner in owners.values()):
                    taken.append((hooks, dict(hooks)))
                    found |= {(kind, owner) for owner in owners.values() if owner is not None}
                    for key in [key for key, owner in owners.items() if owner is not None]:
                        del hooks[key]
        if len(found) < 2 * len(states):
            raise RuntimeError(
                "FSDP's forward hooks were not found where this version of torch keeps them, so a "
                "module sharded by it cannot be measured"
            )
        for state in states.values():  # for methods given to register_fsdp_forward_method
            state._pre_forward = lambda module, args, kwargs: (args, kwargs)
            state._post_forward = lambda module, args, output: output
        for module in sharded:  # models call these themselves, to gather ahead
            module.__dict__.update(unshard=_nothing, reshard=_nothing)
        yield next((dtype for dtype in dtypes if dtype is not None), None)
    finally:
        for module in sharded:
            for name in ("unshard", "reshard"):
                module.__dict__.pop(name, None)
        for state in states.values():
            for name in ("_pre_forward", "_post_forward"):
                vars(state).pop(name, None)
        for hooks, before in taken:
            hooks.clear()  # and again in their order
            hooks.update(before)


def _owner(hook: Any, states: Mapping[int, Any]) -> int | None:
    """The FSDP state whose method this hook is, also inside wrappers."""
    while hook is not None:
        owner = id(getattr(hook, "__self__", None))
        if owner in states:
            return owner
        hook = getattr(hook, "__wrapped__", None)
    return None


class _Done:
    """What ``unshard(async_op=True)`` returns, with nothing to wait for."""

    def wait(self) -> None:
        pass


def _nothing(*args: Any, **kwargs: Any) -> _Done:
    return _Done()
