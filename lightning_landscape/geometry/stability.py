"""The stability edge: how much curvature the optimizer, as it is set up now, can bear.

Every optimizer treated here moves a parameter by a linear recurrence in its gradient g,

    w <- (1 - shrink) w - P^-1 (direct g + buffered m),    m <- momentum m + g,

once everything that drifts slowly (P, the learning rate, NAdam's schedule, RAdam's rectification) is
held at its current value. With g = H w, the first oscillation that fails to die out as H grows is the
one of period two, w <- -w: no other root can reach the unit circle first, because the imaginary part
of the transfer function keeps one sign on each half of it. This holds whatever mixture of learning
rates and momenta the groups have, so one symmetric eigenvalue problem covers them all. Putting
w <- -w into the recurrence gives the effective step

    S = 2 / (2 - shrink) * (direct + buffered / (1 + momentum)) P^-1

and the run is stable while lambda_max(S^1/2 (H + wd) S^1/2) / 2 < 1.

What vanishes on the momentum's own time scale (Adam's 1 - beta1^t, SGD's first buffer) is taken at
its limit: a recurrence that changes as fast as it responds has no edge.

References:
    Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
    stability" (SGD, momentum, Nesterov); Cohen et al. 2022, "Adaptive gradient methods at the edge of
    stability" (Adam and kin); Long & Bartlett 2024, "Sharpness-aware minimization and the edge of
    stability" (SAM).
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

# Parameters whose thresholds agree to this share one edge. AdamW with weight decay on some groups only
# has thresholds a few 1e-5 apart; the exact edge always lies between the smallest and the largest.
_AGREE = 1e-3


@dataclass(frozen=True)
class StabilityEdge:
    """What turns a Hessian into a distance from instability; see :func:`stability_edge`.

    The ratio is ``lambda_max(S^1/2 (H + wd) S^1/2) / 2``; 1 is the edge, and a run at 1 is healthy.

    Attributes:
        scale: S per name, a float or a tensor of the parameter's shape, in units of w per unit of g.
            0.0: the parameter does not move. Empty when no edge is known.
        weight_decay: Coupled weight decay per name, to be added to H *before* scaling. 0.0 where there
            is none or where it is decoupled, which ``scale`` accounts for. Empty when no edge is known.
        edge: The threshold as one number, when all of ``params`` share it to 0.1 % (the smallest is
            given), else None. SGD and kin: on ``lambda_max(H)``, coupled weight decay subtracted.
            Adaptive: on ``lambda_max(P^-1/2 (H + wd) P^-1/2)``, coupled weight decay inside; to 0.1 %
            that eigenvalue is ``ratio * edge``.
        note: One sentence: what the edge is, or why there is none.
        preconditioner: P per name for the parameters that an adaptive optimizer moves, without the
            learning rate; empty for SGD and kin.
        maximize: The optimizer climbs: use the Hessian of -L.
    """

    scale: dict[str, Tensor | float]
    weight_decay: dict[str, float]
    edge: float | None
    note: str
    preconditioner: dict[str, Tensor]
    maximize: bool


def stability_edge(
    optimizers: object,
    params: Mapping[str, Parameter],
    gradient_norm: float | Tensor | None = None,
) -> StabilityEdge:
    """Reads from the optimizers how much curvature they can bear at this moment.

    With b the momentum (beta1), lr the learning rate and wd the weight decay, S times P is

    ========================  =================================================================
    SGD, momentum, Nesterov   lr, lr (1 - dampening) / (1 + b), lr (1 + 2b) / (1 + b);  P = 1
    Adam, AMSGrad             lr (1 - b) / (1 + b);  P = sqrt(nu / (1 - beta2^t)) + eps
    RAdam                     Adam's times the rectification;  P = (sqrt(nu) + eps) / sqrt(1 - beta2^t)
    NAdam                     lr (1 - mu_t + mu_t+1 (1 - b) / (1 + b));  Adam's P
    RMSprop                   lr / (1 + momentum);  P = sqrt(nu [- mean^2]) + eps
    decoupled weight decay    any of these times 2 / (2 - lr wd)
    ========================  =================================================================

    so that 2 / S, the familiar form, is 2 / lr for SGD and 38 / lr for Adam with beta1 = 0.9. NAdam's
    mu_t = b (1 - 0.96^(t momentum_decay) / 2) is taken at the current step t: by default it needs
    some 25,000 steps to reach b, and until then the edge moves from 3.5 / lr to 13.6 / lr. SAM over
    SGD and kin of edge e has the edge 2e / (1 + sqrt(1 + 4 rho e / ||g||)); for e = 2 / lr that is
    Long & Bartlett's (||g|| / 2 rho)(sqrt(1 + 8 rho / (lr ||g||)) - 1).

    Args:
        optimizers: A torch optimizer or a sequence of them, also as wrapped by Lightning. Known are the
            classes above, their subclasses that keep ``step``, and two-step SAM (``base_optimizer``
            and a ``rho`` in its groups). Optimizers that hold none of ``params`` do not matter.
        params: Name -> parameter, those that the Hessian is taken over, matched by identity. One that
            no optimizer holds, or that an adaptive optimizer has not stepped while it did step others
            (no gradient so far), does not move: its scale is 0.0.
        gradient_norm: ||g||_2 of the loss, needed for SAM only.

    Returns:
        The edge. When none is known ``scale`` is empty and ``note`` says why.

    Raises:
        TypeError: If something in ``optimizers`` is not an optimizer.

    Cost: no gradient; one pass over the second moments of adaptive optimizers.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> stability_edge(torch.optim.SGD([w], lr=0.5), {"w": w}).edge
        4.0
    """
    try:
        owners = _owners(_unwrapped(optimizers), params)
        sam = next((owner for owner, _ in owners.values() if _is_sam(owner)), None)
        if sam is None:
            return _fold(owners, params)
        if any(owner is not sam for owner, _ in owners.values()):
            raise _NoEdge("SAM beside another optimizer has no known stability edge.")
        # SAM rewrites the gradient and lets its base optimizer step.
        base = {name: (sam.base_optimizer, group) for name, (_, group) in owners.items()}
        rules = [(group["rho"], group.get("adaptive", False)) for _, group in owners.values()]
        return _sharpness_aware(_fold(base, params), rules, gradient_norm)
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

    def step(self, shrink: float) -> float:
        """S P: what a gradient of alternating sign moves the parameter by."""
        return 2 / (2 - shrink) * (self.direct + self.buffered / (1 + self.momentum))


_Group = dict[str, Any]
_State = Mapping[str, Any]
_Owners = dict[str, tuple[Any, _Group]]


def _sgd(group: _Group, state: _State) -> _Update:
    lr, b = float(group["lr"]), float(group["momentum"])
    if b == 0:  # torch then ignores dampening and nesterov
        return _Update(lr, 0.0, 0.0)
    kept = lr * (1 - float(group["dampening"]))
    return _Update(lr, kept * b, b) if group["nesterov"] else _Update(0.0, kept, b)


def _adam(group: _Group, state: _State) -> _Update:
    b1, b2 = (float(beta) for beta in group["betas"])
    nu = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    correction = 1 - b2 ** float(state["step"])
    p = (nu / correction).sqrt() + float(group["eps"])
    return _Update(0.0, float(group["lr"]) * (1 - b1), b1, p)


def _nadam(group: _Group, state: _State) -> _Update:
    adam, lr, b1 = _adam(group, state), float(group["lr"]), float(group["betas"][0])
    now, following = (
        b1 * (1 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))
        for t in (float(state["step"]), float(state["step"]) + 1)
    )
    return adam._replace(direct=lr * (1 - now), buffered=following * adam.buffered)


def _radam(group: _Group, state: _State) -> _Update:
    t, b2 = float(state["step"]), float(group["betas"][1])
    correction = 1 - b2**t
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t * b2**t / correction
    if rho <= 5:
        raise _NoEdge(f"RAdam has no stability edge before it rectifies (rho_t = {rho:.2g} <= 5).")
    rectification = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    # Unlike Adam, RAdam adds eps before it corrects the bias.
    p = (state["exp_avg_sq"].sqrt() + float(group["eps"])) / math.sqrt(correction)
    b1 = float(group["betas"][0])
    return _Update(0.0, float(group["lr"]) * rectification * (1 - b1), b1, p)


def _rmsprop(group: _Group, state: _State) -> _Update:
    nu = state["square_avg"]
    if group["centered"]:
        nu = nu - state["grad_avg"].square()
    # The buffer holds g / P, not g: the same thing while P stands still.
    p = nu.sqrt() + float(group["eps"])
    return _Update(0.0, float(group["lr"]), float(group["momentum"]), p)


_RULES: dict[type, tuple[Callable[[_Group, _State], _Update], str | None]] = {
    SGD: (_sgd, None),
    Adam: (_adam, "exp_avg_sq"),
    AdamW: (_adam, "exp_avg_sq"),
    NAdam: (_nadam, "exp_avg_sq"),
    RAdam: (_radam, "exp_avg_sq"),
    RMSprop: (_rmsprop, "square_avg"),
}  # and the state without which an adaptive optimizer has not stepped


def _rule(optimizer: object) -> tuple[Callable[[_Group, _State], _Update], str | None]:
    kind = type(optimizer)
    for known in kind.__mro__:
        if known in _RULES:
            # torch wraps `step` on whichever class is instantiated first: compare what is inside.
            steps = (inspect.unwrap(cls.step) for cls in (cast(Any, kind), cast(Any, known)))
            if next(steps) is next(steps):
                return _RULES[known]
            break
    raise _NoEdge(f"{kind.__name__} has no known stability edge: the ratio is not available.")


def _fold(owners: _Owners, params: Mapping[str, Parameter]) -> StabilityEdge:
    """Reads every parameter's S, weight decay and threshold, and whether they share one."""
    scale: dict[str, Tensor | float] = dict.fromkeys(params, 0.0)
    weight_decay = dict.fromkeys(params, 0.0)
    preconditioner: dict[str, Tensor] = {}
    thresholds: list[float] = []  # of the parameters that move
    for name, (optimizer, group) in owners.items():
        update, decay, decoupled = _update(optimizer, group, params[name])
        if update is None:
            continue
        shrink = float(group["lr"]) * decay if decoupled else 0.0
        coupled = 0.0 if decoupled else decay
        if shrink >= 2 or update.momentum >= 1:
            culprit = "weight decay" if shrink >= 2 else f"momentum {update.momentum:g}"
            raise _NoEdge(f"{_kind(optimizer)} diverges at any curvature: {culprit} is too large.")
        step, p = update.step(shrink), update.preconditioner
        if step == 0:
            continue
        scale[name] = step if p is None else step / p
        if not (step > 0 and bool(torch.as_tensor(scale[name]).isfinite().all())):
            raise _NoEdge(f"{_kind(optimizer)} takes no finite step downhill for {name!r}.")
        weight_decay[name] = coupled
        thresholds.append(2 / step - (coupled if p is None else 0.0))
        if p is not None:
            preconditioner[name] = p

    kinds = " and ".join(sorted({_kind(optimizer) for optimizer, _ in owners.values()}))
    climbs = {bool(group.get("maximize", False)) for _, group in owners.values()}
    if not thresholds:
        raise _NoEdge(f"{kinds} has no stability edge while its learning rate is 0.")
    if len(climbs) > 1:
        raise _NoEdge(f"{kinds} climbs for some parameters and descends for others: no edge.")
    edge, note = None, f"{kinds}: no single edge, only the ratio, because "
    if len(thresholds) < len(params):
        note += f"{len(params) - len(thresholds)} of {len(params)} parameters do not move."
    elif 0 < len(preconditioner) < len(params):
        note += "adaptive and plain optimizers step together."
    elif max(thresholds) - min(thresholds) > _AGREE * abs(min(thresholds)):
        note += f"thresholds run from {min(thresholds):.4g} to {max(thresholds):.4g}."
    else:
        edge = min(thresholds)
        matrix = "preconditioned Hessian" if preconditioner else "Hessian"
        note = f"{kinds}: the edge is a threshold on the top eigenvalue of the {matrix}."
    return StabilityEdge(scale, weight_decay, edge, note, preconditioner, climbs.pop())


def _update(optimizer: Any, group: _Group, param: Parameter) -> tuple[_Update | None, float, bool]:
    """One parameter's recurrence (None: it is not stepped), weight decay, and whether decoupled."""
    rule, needs = _rule(optimizer)
    decay = float(group["weight_decay"]), bool(group.get("decoupled_weight_decay", False))
    if needs is None:
        return rule(group, {}), *decay
    # `get`, because reading a missing entry of `state` creates it.
    state = optimizer.state.get(param, {})
    if needs in state:
        return rule(group, state), *decay
    if any(needs in other for other in optimizer.state.values()):
        return None, *decay
    raise _NoEdge(f"{_kind(optimizer)} has no state yet: no step taken, or only skipped ones.")


def _sharpness_aware(
    base: StabilityEdge, rules: list[tuple[float, bool]], gradient_norm: float | Tensor | None
) -> StabilityEdge:
    """SAM's edge. On a quadratic it descends g + rho H g / ||g||, so its base optimizer meets the
    curvature h + rho h^2 / ||g||; the edge is where that reaches the base's edge. With the H^2, S
    cannot be folded unless all of the Hessian is scaled alike."""
    if base.edge is None or base.edge <= 0 or base.preconditioner or base.maximize:
        raise _NoEdge("SAM's stability edge is known over plain descent by SGD with one edge only.")
    rho, adaptive = rules[0]
    if adaptive or any(rule != rules[0] for rule in rules):
        raise _NoEdge("SAM's stability edge is known for one rho and adaptive=False only.")
    if gradient_norm is None or not 0 < float(gradient_norm) < math.inf:
        raise _NoEdge(f"SAM's stability edge needs a gradient norm > 0, got {gradient_norm}.")
    root = math.sqrt(1 + 4 * float(rho) * base.edge / float(gradient_norm))
    edge = 2 * base.edge / (1 + root)
    return replace(
        base,
        scale={name: 2 / (edge + decay) for name, decay in base.weight_decay.items()},
        edge=edge,
        note="SAM: the edge is a threshold on the top eigenvalue of the Hessian "
        "at this gradient norm.",
    )


def _unwrapped(optimizers: object) -> Iterator[Any]:
    """The torch optimizers inside, each once."""
    seen = set()
    for item in optimizers if isinstance(optimizers, Sequence) else (optimizers,):
        # Lightning's wrapper passes for the class it wraps, so its attribute is asked first. A public
        # `optimizer` on a real Optimizer is another matter: Lookahead steps differently.
        inner = getattr(item, "_optimizer", None)
        if inner is None and not isinstance(item, Optimizer):
            inner = getattr(item, "optimizer", None)
        optimizer = item if inner is None else inner
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"stability_edge(optimizers={optimizers!r}): expected a torch optimizer or a "
                f"sequence of them, got {type(item).__name__}"
            )
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer


def _owners(optimizers: Iterator[Any], params: Mapping[str, Parameter]) -> _Owners:
    """Which optimizer and group steps which name."""
    held: dict[int, tuple[Any, _Group]] = {}
    wanted = {id(param) for param in params.values()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in wanted.intersection(map(id, group["params"])):
                if key in held:
                    raise _NoEdge("A parameter is stepped by two optimizers: no edge is known.")
                held[key] = optimizer, group
    if not held:
        raise _NoEdge("No optimizer holds any of these parameters.")
    return {name: held[id(param)] for name, param in params.items() if id(param) in held}


def _is_sam(optimizer: Any) -> bool:
    return hasattr(optimizer, "base_optimizer") and all("rho" in g for g in optimizer.param_groups)


def _kind(optimizer: object) -> str:
    return type(optimizer).__name__
