"""The stability edge: how much curvature the optimizer, as it is set up now, can bear.

Every optimizer treated here moves a parameter by a linear recurrence in its gradient g,

    w <- (1 - shrink) w - P^-1 (direct g + buffered m),    m <- momentum m + g,

once everything that drifts slowly is held at its current value: P, the learning rate, NAdam's
schedule, RAdam's rectification.  As H in g = H w grows, the first motion that fails to die out has
period two, w <- -w: no other root can be first to the unit circle, because the imaginary part of
the transfer function keeps one sign on each half of it.  That holds for any mixture of learning
rates and momenta among the groups, so one symmetric eigenvalue problem covers them all.  Putting
w <- -w into the recurrence gives the effective step

    S = 2 / (2 - shrink) * (direct + buffered / (1 + momentum)) P^-1

and stability while lambda_max(S^1/2 (H + wd) S^1/2) / 2 < 1.  What vanishes on the momentum's own
time scale (Adam's 1 - beta1^t, SGD's first buffer) is taken at its limit: a recurrence that changes
as fast as it responds has no edge.

References:
    Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
    stability": SGD, momentum, Nesterov.  Cohen et al. 2022, "Adaptive gradient methods at the edge
    of stability": Adam and kin.  Long & Bartlett 2024, "Sharpness-aware minimization and the edge
    of stability": SAM.
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
from lightning_landscape.geometry.vectors import check_vector, real

# Thresholds that agree to this share count as one edge: AdamW with weight decay on some groups only
# has thresholds some 1e-5 apart.  The exact edge lies between the smallest and the largest.
_AGREE = 1e-3


@dataclass(frozen=True)
class StabilityEdge:
    """What turns a Hessian into a distance from instability; see :func:`stability_edge`.

    The ratio is ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``; 1 is the edge, and a run at 1 is healthy.

    Attributes:
        scale: S per name, a number or a tensor of the parameter's shape, in units of w per unit of
            g.  0.0: the parameter does not move.  Empty when no edge is known.  Real: of a complex
            parameter's shape and a last dimension for its two parts.
        weight_decay: coupled weight decay per name, to be added to H *before* scaling.  0.0 where
            there is none or where it is decoupled (``scale`` holds that).  Empty as ``scale``.
        edge: the threshold as one number when all groups share it to 0.1 % (the smallest is given),
            else None.  SGD and kin: on ``lambda_max(H)``, weight decay already subtracted.
            Adaptive: on ``lambda_max(P^-1/2 (H + wd) P^-1/2)``, coupled weight decay inside.
        note: one sentence: what the edge is, or why there is none.
        preconditioner: P per name for adaptive optimizers, without the learning rate; infinite
            where a parameter does not move, so that ``P^-1/2`` leaves it out.  Empty for SGD and
            kin; beside SGD and kin only the adaptive names, and then ``edge`` is None.
        maximize: the optimizer climbs: use the Hessian of -L.
    """

    scale: dict[str, Tensor | float]
    weight_decay: dict[str, float]
    edge: float | None
    note: str
    preconditioner: dict[str, Tensor]
    maximize: bool


def stability_edge(
    optimizers: object,
    params: Mapping[str, Tensor],
    gradient_norm: float | Tensor | None = None,
) -> StabilityEdge:
    r"""Reads from the optimizers how much curvature they can bear at this moment.

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

    so that 2 / (S P) is the familiar 2 / lr for SGD and 38 / lr for Adam at beta1 = 0.9.  NAdam's
    mu_t = b (1 - 0.96^(t momentum_decay) / 2) is taken at the current t: with the defaults it needs
    25,000 steps to reach b, while the threshold moves from 3.5 / lr to 13.6 / lr.  SAM over SGD and
    kin of edge e has the edge 2e / (1 + sqrt(1 + 4 rho e / ||g||)), which at e = 2 / lr is Long &
    Bartlett's (||g|| / 2 rho)(sqrt(1 + 8 rho / (lr ||g||)) - 1).

    Args:
        optimizers: a torch optimizer or a sequence of them, also as wrapped by Lightning.  Known
            are the classes above, their subclasses that keep ``step``, and two-step SAM (a
            ``base_optimizer``, and ``rho`` in the groups).  One that holds none of ``params`` does
            not matter.
        params: name -> parameter, those that the Hessian is taken over, matched by identity.  One
            that no optimizer holds does not move: scale 0.0.  Nor does one without state in an
            adaptive optimizer that has stepped others (it never had a gradient).
        gradient_norm: ||g||_2 of the loss, for SAM only.

    Returns:
        The edge.  Where none is known ``scale`` is empty and ``note`` says why.

    Raises:
        TypeError: for something that is not an optimizer.

    Cost: no gradient; one pass over the second moments of adaptive optimizers.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> stability_edge(torch.optim.SGD([w], lr=0.5), {"w": w}).edge
        4.0
    """
    check_vector("params", params)
    if gradient_norm is not None:
        words = "a number, the norm of the loss's gradient, or None"
        check_number("", "gradient_norm", gradient_norm, words, lambda x: not x < 0.0)
    try:
        owners = _owners(_unwrapped(optimizers), params)
        sam = next((owner for owner, _ in owners.values() if _is_sam(owner)), None)
        if sam is None:
            return _fold(owners, params)
        if any(owner is not sam for owner, _ in owners.values()):
            raise _NoEdge("SAM beside another optimizer has no known stability edge.")
        base = {name: (sam.base_optimizer, group) for name, (_, group) in owners.items()}
        return _sharpness_aware(_fold(base, params), list(owners.values()), gradient_norm)
    except _NoEdge as reason:
        return StabilityEdge({}, {}, None, str(reason), {}, False)


class _NoEdge(Exception):
    """Carries the reason to ``StabilityEdge.note``."""


class _Update(NamedTuple):
    """One parameter's recurrence, in the letters of the module's docstring."""

    direct: float
    buffered: float
    momentum: float
    preconditioner: Tensor | None = None


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


# With the state entry that says whether a parameter has been stepped, where the rule needs it.
_RULES: dict[type[Optimizer], tuple[_Rule, str | None]] = {
    SGD: (_sgd, None),
    Adam: (_adam, "exp_avg_sq"),
    AdamW: (_adam, "exp_avg_sq"),
    NAdam: (_nadam, "exp_avg_sq"),
    RAdam: (_radam, "exp_avg_sq"),
    RMSprop: (_rmsprop, "square_avg"),
}


def _update(optimizer: Any, group: _Group, param: Tensor) -> _Update | None:
    """The recurrence of ``param``; None when it is not being stepped."""
    known = next((cls for cls in type(optimizer).__mro__ if cls in _RULES), None)
    # torch wraps `step` on whichever class is instantiated first: compare what is inside.
    if known is None or _step_of(type(optimizer)) is not _step_of(known):
        name = _kind(optimizer)
        raise _NoEdge(f"{name} has no known stability edge: the ratio is not available.")
    rule, evidence = _RULES[known]
    # `get`, because reading a missing entry of `state` would create it.
    state = optimizer.state.get(param, {})
    if evidence is None or evidence in state:
        # An optimizer steps the parts of a complex parameter like two real ones.
        parts = {k: real(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        return rule(group, parts)
    if any(evidence in other for other in optimizer.state.values()):
        return None
    raise _NoEdge(f"{_kind(optimizer)} has no state yet: no step taken, or only skipped ones.")


def _fold(owners: Mapping[str, _Owner], params: Mapping[str, Tensor]) -> StabilityEdge:
    """Every parameter's S and weight decay, and the threshold that they may share."""
    scale: dict[str, Tensor | float] = dict.fromkeys(params, 0.0)
    weight_decay = dict.fromkeys(params, 0.0)
    preconditioner: dict[str, Tensor] = {}
    thresholds: dict[str, float] = {}  # of the parameters that move
    for name, (optimizer, group) in owners.items():
        update = _update(optimizer, group, params[name])
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if update is None or lr == 0:
            continue
        direct, buffered, momentum, p = update
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
    return StabilityEdge(scale, weight_decay, edge, note, preconditioner, climbs.pop())


def _sharpness_aware(
    base: StabilityEdge, owners: Sequence[_Owner], gradient_norm: float | Tensor | None
) -> StabilityEdge:
    """SAM's edge.  On a quadratic it descends g + rho H g / ||g||, so that its base optimizer meets
    the curvature h + rho h^2 / ||g||; h is the edge where that is the base's edge.  The square of H
    does not fold into S unless all of H is scaled alike."""
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
        # Lightning's wrapper only forwards, and passes for the class it wraps.  Any other Optimizer
        # with an `optimizer` inside may step differently, as Lookahead does.
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
    """Which optimizer and group step which name."""
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


def _step_of(cls: type) -> object:
    return inspect.unwrap(cast(Any, cls).step)


def _kind(optimizer: object) -> str:
    return type(optimizer).__name__
