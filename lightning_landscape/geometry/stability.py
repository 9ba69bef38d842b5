"""The stability edge: the largest curvature at which the optimizer, as it is set now, is stable.

Every optimizer treated here moves a parameter by a linear recurrence in its gradient g,

    w <- (1 - shrink) w - P^-1 (direct g + buffered m),    m <- momentum m + g,

if everything that changes slowly is frozen at its current value: P, the learning rate, NAdam's
schedule, RAdam's rectification.  As H in g = H w grows, the first mode that stops decaying has
period two, w <- -w: no other root can reach the unit circle first, because the imaginary part of
the transfer function keeps one sign on each half of it.  That holds for any mixture of learning
rates and momenta among the groups, so a single symmetric eigenvalue problem covers them all.
Substituting w <- -w into the recurrence gives the effective step

    S = 2 / (2 - shrink) * (direct + buffered / (1 + momentum)) P^-1

and stability while lambda_max(S^1/2 (H + wd) S^1/2) / 2 < 1.  Terms that vanish on the time scale
of the momentum (Adam's 1 - beta1^t, SGD's first buffer) are replaced by their limit, because a
recurrence that changes as fast as it responds has no edge.  Adam's steps exceed that limit by the
factor 1 / (1 - beta1^t): at beta1 = 0.9 tenfold at t = 1, 14 % at t = 20, 4 % at t = 30.

P changes slowly only when it decreases.  A second moment nu falls at most by the factor beta2 per
step, but a single gradient g raises it to at least (1 - beta2) g^2.  Where that doubles nu, P after
a step with g is used.  Where nu is 0 no step has had a gradient yet (a ReLU path that has just
become active, an unused row of an embedding), and the step is not lr / eps: the first one is
lr (1 - beta1) / sqrt(1 - beta2), 3.2 lr, for a gradient of any size.  That is not linear in g, so
such a coordinate is left out.  It cannot make a run unstable: if all such coordinates move by d,
their first step, the gradient grows up to sum_j |H_ij| d and P to sqrt(1 - beta2) times that, and
then, by Gershgorin's theorem, they have a ratio of at most 1 / (2 (1 + beta1)), 0.26.

References:
    Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
    stability": SGD, momentum, Nesterov.  Cohen et al. 2022, "Adaptive gradient methods at the edge
    of stability": Adam and variants.  Long & Bartlett 2024, "Sharpness-aware minimization and the
    edge of stability": SAM.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_landscape.geometry.checks import check_number
from lightning_landscape.geometry.vectors import Vector, check_vector, norm, real, scaled

# Thresholds within this relative difference count as one edge: those of AdamW with weight decay on
# some groups only differ by 1e-5.  The exact edge lies between the smallest and the largest.
_AGREE = 1e-3

# If one gradient raises P by this factor, which doubles nu, P is not frozen at its current value.
_JUMP = math.sqrt(2)

_TINY = 1e-300  # for a step counter at 0


@dataclass(frozen=True)
class StabilityEdge:
    """The scaling that turns a Hessian into a stability ratio; see :func:`stability_edge`.

    The ratio is ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``; 1 is the edge, and a run at 1 is healthy.

    Attributes:
        scale: S per name, a number or a tensor of the parameter's shape, in units of w per unit of
            g.  0.0: the parameter does not move.  Empty when no edge is known.  Real: of a complex
            parameter's shape and a last dimension for its two parts.
        weight_decay: coupled weight decay per name, to be added to H *before* scaling.  0.0 where
            there is none or it is decoupled (then it is part of ``scale``).  Empty if ``scale`` is.
        edge: the threshold as one number if all groups agree on it to 0.1 % (the smallest), else
            None.  SGD and variants: of ``lambda_max(H)``, with weight decay already subtracted.
            Adaptive: of ``lambda_max(P^-1/2 (H + wd) P^-1/2)`` with coupled weight decay.
        note: one sentence: what the edge is, or why there is none.
        preconditioner: P per name for adaptive optimizers, without the learning rate; infinite
            for parameters or coordinates that are left out, so that ``P^-1/2`` is 0 there.  Empty
            for SGD and variants; in a mixture it has the adaptive names only, and ``edge`` is None.
        maximize: the optimizer maximizes the loss: use the Hessian of -L.
        inactive_share: the fraction of all coordinates that are left out because an adaptive
            optimizer has had no gradient there yet: its second moment is 0.
    """

    scale: dict[str, Tensor | float]
    weight_decay: dict[str, float]
    edge: float | None
    note: str
    preconditioner: dict[str, Tensor]
    maximize: bool
    inactive_share: float = 0.0


def stability_edge(
    optimizers: object,
    params: Mapping[str, Tensor],
    gradient_norm: float | Tensor | None = None,
    gradient: Vector | None = None,
) -> StabilityEdge:
    r"""The stability edge of the optimizers in their current state.

    With b the momentum (beta1), d the dampening and wd the weight decay:

    ====================== =================================== ===================================
    optimizer              S P                                 P
    ====================== =================================== ===================================
    SGD                    lr                                  1
    SGD, momentum          lr (1 - d) / (1 + b)                1
    SGD, Nesterov          lr (1 + 2b) / (1 + b)               1
    Adam, AdamW, AMSGrad   lr (1 - b) / (1 + b)                sqrt(nu / (1 - beta2^t)) + eps
    NAdam                  lr (1 - mu_t                        as Adam
                           + mu_t+1 (1 - b) / (1 + b))
    RAdam                  Adam's times the rectification      (sqrt(nu) + eps) / sqrt(1 - beta2^t)
    RMSprop                lr / (1 + b)                        sqrt(nu [- mean^2]) + eps
    decoupled wd           any of these times 2 / (2 - lr wd)
    ====================== =================================== ===================================

    so that 2 / (S P) is the well-known 2 / lr for SGD and 38 / lr for Adam at beta1 = 0.9.  NAdam's
    mu_t = b (1 - 0.96^(t momentum_decay) / 2) is taken at the current t: with the defaults it needs
    25,000 steps to reach b, while the threshold moves from 3.5 / lr to 13.6 / lr.  Adam's factor
    1 / (1 - b^t) is not in S: it is 14 % at t = 20 and negligible after 30 steps.  SAM over SGD or
    a variant with edge e has the edge 2e / (1 + sqrt(1 + 4 rho e / ||g||)), which at e = 2 / lr is
    Long & Bartlett's (||g|| / 2 rho)(sqrt(1 + 8 rho / (lr ||g||)) - 1).

    Args:
        optimizers: a torch optimizer or a sequence of them, also as wrapped by Lightning.  Known
            are the classes above, their subclasses that keep ``step``, and two-step SAM (a
            ``base_optimizer``, and ``rho`` in the groups).  An optimizer without any of ``params``
            is ignored.
        params: name -> parameter, those of the Hessian, matched by identity.  A parameter of no
            optimizer does not move: scale 0.0.  The same holds for one without state in an adaptive
            optimizer that has stepped others (it never had a gradient), and for coordinates whose
            second moment is 0.
        gradient_norm: ||g||_2 of the loss, for SAM only.
        gradient: g of the optimized loss, name -> tensor, for adaptive optimizers only.  Where a
            step with g would at least double nu, P after that step is used, with
            beta2 nu + (1 - beta2) g^2 for nu.  A g longer than the gradients so far,
            ||g||^2 > sum of nu / (1 - beta2^t), is shortened to that: it would hide a divergence.
            Missing names, or None: P as above.

    Returns:
        The edge.  If none is known ``scale`` is empty and ``note`` says why.

    Raises:
        TypeError: not an optimizer, or a gradient that is not a mapping to tensors.
        ValueError: a gradient with names or shapes that do not match ``params``.

    Cost: no gradient; one pass over the second moments of adaptive optimizers, two with
    ``gradient``.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> stability_edge(torch.optim.SGD([w], lr=0.5), {"w": w}).edge
        4.0
    """
    check_vector("params", params)
    if gradient is not None:
        check_vector("gradient", gradient, params)
    if gradient_norm is not None:
        expected = "a number, the norm of the loss's gradient, or None"
        check_number("", "gradient_norm", gradient_norm, expected, lambda x: not x < 0.0)
    try:
        owners = _owners(_unwrapped(optimizers), params)
        sam = next((owner for owner, _ in owners.values() if _is_sam(owner)), None)
        if sam is None:
            return _edge_of(owners, params, gradient or {})
        if any(owner is not sam for owner, _ in owners.values()):
            raise _NoEdge("SAM beside another optimizer has no known stability edge.")
        base = {name: (sam.base_optimizer, group) for name, (_, group) in owners.items()}
        return _sharpness_aware(_edge_of(base, params, {}), list(owners.values()), gradient_norm)
    except _NoEdge as reason:
        return StabilityEdge({}, {}, None, str(reason), {}, False)


class _NoEdge(Exception):
    """Carries the reason to ``StabilityEdge.note``."""


class _Update(NamedTuple):
    """One parameter's recurrence, in the notation of the module's docstring."""

    direct: float
    buffered: float
    momentum: float
    preconditioner: Tensor | None = None
    inactive: Tensor | None = None  # where the second moment is 0: no gradient so far


_Group = dict[str, Any]
_State = Mapping[str, Any]
_Owner = tuple[Any, _Group]  # an optimizer and one of its groups
_Rule = Callable[[_Group, _State], _Update]


def _sgd(group: _Group, state: _State) -> _Update:
    lr, b = float(group["lr"]), float(group["momentum"])
    if b == 0:  # torch then ignores dampening and nesterov
        return _Update(lr, 0.0, 0.0)
    kept = lr * (1 - float(group["dampening"]))
    return _Update(lr, kept * b, b) if group["nesterov"] else _Update(0.0, kept, b)


def _adam(group: _Group, state: _State) -> _Update:
    b1, b2 = (float(beta) for beta in group["betas"])
    nu = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    p = (nu / (1 - b2 ** float(state["step"]))).sqrt() + float(group["eps"])
    return _Update(0.0, float(group["lr"]) * (1 - b1), b1, p)


def _nadam(group: _Group, state: _State) -> _Update:
    adam, t = _adam(group, state), float(state["step"])
    now, following = (
        adam.momentum * (1 - 0.5 * 0.96 ** (step * float(group["momentum_decay"])))
        for step in (t, t + 1)
    )
    return adam._replace(direct=float(group["lr"]) * (1 - now), buffered=following * adam.buffered)


def _radam(group: _Group, state: _State) -> _Update:
    (b1, b2), t = (float(beta) for beta in group["betas"]), float(state["step"])
    correction, limit = 1 - b2**t, 2 / (1 - b2) - 1
    rho = limit - 2 * t * b2**t / correction
    if rho <= 5:
        raise _NoEdge(f"RAdam has no stability edge before it rectifies (rho_t {rho:.2g} <= 5).")
    rectification = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    # Unlike Adam, RAdam adds eps before it corrects the bias.
    p = (state["exp_avg_sq"].sqrt() + float(group["eps"])) / math.sqrt(correction)
    return _Update(0.0, float(group["lr"]) * rectification * (1 - b1), b1, p)


def _rmsprop(group: _Group, state: _State) -> _Update:
    nu = state["square_avg"]
    if group["centered"]:
        nu = nu - state["grad_avg"].square()
    # The buffer holds g / P instead of g: the same while P stands still.
    p = nu.sqrt() + float(group["eps"])
    return _Update(0.0, float(group["lr"]), float(group["momentum"]), p)


def _moment_decay(group: _Group) -> float:
    """beta2, or RMSprop's alpha: the decay of the second moment."""
    return float(group["alpha"] if "alpha" in group else group["betas"][1])


def _next_state(group: _Group, state: _State, moment: str, g: Tensor) -> _State:
    """The second moments as they will be after a step with the gradient ``g``."""
    decay, g = _moment_decay(group), g.to(state[moment])
    following = {**state, "step": float(state["step"]) + 1}
    following[moment] = decay * state[moment] + (1 - decay) * g.square()
    if group.get("amsgrad"):
        following["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], following[moment])
    if group.get("centered"):
        following["grad_avg"] = decay * state["grad_avg"] + (1 - decay) * g
    return following


# Class -> rule, and the state entry of the second moment that it needs, which exists after a step.
_RULES: dict[type[Optimizer], tuple[_Rule, str | None]] = {
    SGD: (_sgd, None),
    Adam: (_adam, "exp_avg_sq"),
    AdamW: (_adam, "exp_avg_sq"),
    NAdam: (_nadam, "exp_avg_sq"),
    RAdam: (_radam, "exp_avg_sq"),
    RMSprop: (_rmsprop, "square_avg"),
}


def _next_gradients(
    owners: Mapping[str, _Owner], params: Mapping[str, Tensor], gradient: Vector
) -> dict[str, Tensor]:
    """The gradients that adaptive optimizers would square, including coupled weight decay.

    Together they are no longer than the gradients so far, according to the second moments.
    """
    found: dict[str, Tensor] = {}
    past = 0.0
    for name in [name for name in gradient if name in owners]:
        optimizer, group = owners[name]
        _, moment = _rule_of(optimizer)
        state, g = optimizer.state.get(params[name], {}), real(gradient[name].detach())
        if moment not in state:
            continue
        decay = 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
        sign = -1.0 if group.get("maximize") else 1.0
        found[name] = sign * g + decay * real(params[name].detach()).to(g.device)
        correction = 1 - _moment_decay(group) ** float(state["step"])
        past += float(real(state[moment]).sum()) / max(correction, _TINY)
    length = norm(found)
    return scaled(found, min(1.0, math.sqrt(past) / length)) if length > 0 else {}


def _update(
    optimizer: Any, group: _Group, param: Tensor, gradient: Tensor | None
) -> _Update | None:
    """The recurrence of ``param``; None if it is not being stepped."""
    rule, moment = _rule_of(optimizer)
    # `get`, because reading a missing entry of `state` would create it.
    state = optimizer.state.get(param, {})
    # An optimizer steps the parts of a complex parameter like two real ones.
    parts = {k: real(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    if moment is None:
        return rule(group, parts)
    if moment in parts:
        update = rule(group, parts)
        p = cast(Tensor, update.preconditioner)
        if gradient is not None:
            following = rule(group, _next_state(group, parts, moment, gradient)).preconditioner
            p = torch.where(cast(Tensor, following) > _JUMP * p, cast(Tensor, following), p)
        inactive = parts["max_exp_avg_sq" if group.get("amsgrad") else moment] == 0
        return update._replace(preconditioner=p.masked_fill(inactive, math.inf), inactive=inactive)
    if any(moment in other for other in optimizer.state.values()):
        return None
    raise _NoEdge(f"{_kind(optimizer)} has no state yet: no step taken, or only skipped ones.")


def _rule_of(optimizer: Any) -> tuple[_Rule, str | None]:
    known = next((cls for cls in type(optimizer).__mro__ if cls in _RULES), None)
    # torch wraps `step` on whichever class is instantiated first: compare what is inside.
    if known is None or _step_of(type(optimizer)) is not _step_of(known):
        name = _kind(optimizer)
        raise _NoEdge(f"{name} has no known stability edge: the ratio is not available.")
    return _RULES[known]


def _edge_of(
    owners: Mapping[str, _Owner], params: Mapping[str, Tensor], gradient: Vector
) -> StabilityEdge:
    """S and weight decay of every parameter, and their common threshold if there is one."""
    scale: dict[str, Tensor | float] = dict.fromkeys(params, 0.0)
    weight_decay = dict.fromkeys(params, 0.0)
    preconditioner: dict[str, Tensor] = {}
    thresholds: dict[str, float] = {}  # of the parameters that move
    inactive: dict[str, int] = {}  # coordinates without a second moment
    gradient = _next_gradients(owners, params, gradient)
    for name, (optimizer, group) in owners.items():
        update = _update(optimizer, group, params[name], gradient.get(name))
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if lr == 0:
            continue
        if update is None or (update.inactive is not None and bool(update.inactive.all())):
            inactive[name] = _size(params[name])
            continue
        direct, buffered, momentum, p, without = update
        if without is not None:
            inactive[name] = int(without.sum())
        decoupled = bool(group.get("decoupled_weight_decay"))
        shrink = lr * decay if decoupled else 0.0
        if shrink >= 2 or momentum >= 1:
            culprit = f"momentum {momentum:g}" if shrink < 2 else f"lr * weight decay {shrink:g}"
            raise _NoEdge(f"{_kind(optimizer)} diverges at any curvature: {culprit}.")
        step = 2 / (2 - shrink) * (direct + buffered / (1 + momentum))
        scale[name] = step if p is None else step / p
        if not (step > 0 and bool(torch.as_tensor(scale[name]).isfinite().all())):
            raise _NoEdge(f"{_kind(optimizer)} takes no finite step downhill for {name!r}.")
        weight_decay[name] = 0.0 if decoupled else decay
        thresholds[name] = 2 / step - (weight_decay[name] if p is None else 0.0)
        if p is not None:
            preconditioner[name] = p

    kinds = " and ".join(sorted({_kind(optimizer) for optimizer, _ in owners.values()}))
    climbs = {bool(group.get("maximize")) for _, group in owners.values()}
    if inactive and not thresholds:
        raise _NoEdge(
            f"{kinds} takes no finite step downhill for {next(iter(inactive))!r}: its second "
            f"moment is 0, no step has had a gradient yet."
        )
    if not thresholds:
        raise _NoEdge(f"{kinds} has no stability edge while the learning rate is 0.")
    if len(climbs) > 1:
        raise _NoEdge(f"{kinds} has no known edge: some parameters climb while others descend.")

    low, high = min(thresholds.values()), max(thresholds.values())
    edge = None
    if 0 < len(preconditioner) < len(thresholds):
        why = "adaptive and plain optimizers step together"
    elif high - low > _AGREE * abs(low):
        why = f"the groups' thresholds run from {low:.4g} to {high:.4g}"
    elif not preconditioner and len(thresholds) < len(params):
        why = f"{len(params) - len(thresholds)} of {len(params)} parameters do not move"
    else:
        edge = low
    if preconditioner and len(preconditioner) == len(thresholds):
        for name in params.keys() - thresholds.keys():
            preconditioner[name] = torch.full_like(real(params[name].detach()), math.inf)
    matrix = "preconditioned Hessian" if preconditioner else "Hessian"
    note = (
        f"{kinds}: no single edge, only the ratio, because {why}."
        if edge is None
        else f"{kinds}: the edge is a threshold on the top eigenvalue of the {matrix}."
    )
    share = sum(inactive.values()) / sum(map(_size, params.values()))
    return StabilityEdge(scale, weight_decay, edge, note, preconditioner, climbs.pop(), share)


def _sharpness_aware(
    base: StabilityEdge, owners: Sequence[_Owner], gradient_norm: float | Tensor | None
) -> StabilityEdge:
    """SAM's edge.

    On a quadratic SAM descends along g + rho H g / ||g||, so the curvature for its base optimizer
    is h + rho h^2 / ||g||; the edge is the h at which that equals the base's edge.  The square of H
    can be part of S only if all of H is scaled alike.
    """
    if base.edge is None or base.edge <= 0 or base.preconditioner or base.maximize:
        raise _NoEdge("SAM has a known stability edge over SGD only, downhill, with one edge.")
    settings = {(float(group["rho"]), bool(group.get("adaptive"))) for _, group in owners}
    rho, adaptive = settings.pop()
    if adaptive or settings:
        raise _NoEdge("SAM has a known stability edge for a single rho and adaptive=False only.")
    if gradient_norm is None or not 0 < float(gradient_norm) < math.inf:
        raise _NoEdge(f"SAM's stability edge needs a gradient norm > 0, got {gradient_norm}.")
    edge = 2 * base.edge / (1 + math.sqrt(1 + 4 * rho * base.edge / float(gradient_norm)))
    return replace(
        base,
        scale={name: 2 / (edge + decay) for name, decay in base.weight_decay.items()},
        edge=edge,
        note=base.note.replace(":", " under SAM: at this gradient norm", 1),
    )


def _unwrapped(optimizers: object) -> Iterator[Any]:
    """The torch optimizers inside, each once."""
    seen = set()
    several = isinstance(optimizers, Sequence) and not isinstance(optimizers, str)
    for item in cast(Sequence[Any], optimizers) if several else (optimizers,):
        optimizer = item
        # Lightning's wrapper only forwards calls, and is an instance of the class it wraps.  Any
        # other Optimizer with an attribute `optimizer` may step differently, as Lookahead does.
        while (inner := getattr(optimizer, "optimizer", None)) is not None and (
            not isinstance(optimizer, Optimizer) or getattr(optimizer, "_optimizer", None) is inner
        ):
            optimizer = inner
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"stability_edge(optimizers=...): expected torch optimizers, got {item!r}"
            )
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer


def _owners(optimizers: Iterator[Any], params: Mapping[str, Tensor]) -> dict[str, _Owner]:
    """Name -> the optimizer and group that step it."""
    wanted = {id(param) for param in params.values()}
    held: dict[int, _Owner] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in wanted.intersection(map(id, group["params"])):
                if key in held:
                    raise _NoEdge("Two optimizers step the same parameter: no edge is known.")
                held[key] = optimizer, group
    if not held:
        raise _NoEdge("No optimizer holds any of these parameters.")
    return {name: held[id(param)] for name, param in params.items() if id(param) in held}


def _is_sam(optimizer: Any) -> bool:
    return hasattr(optimizer, "base_optimizer") and all("rho" in g for g in optimizer.param_groups)


def _size(param: Tensor) -> int:
    return real(param.detach()).numel()


def _step_of(cls: type) -> object:
    return inspect.unwrap(cast(Any, cls).step)


def _kind(optimizer: object) -> str:
    return type(optimizer).__name__
