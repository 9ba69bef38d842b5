"""The optimizer's stability edge during a run; none while gradients are clipped."""

from __future__ import annotations

from lightning_landscape.geometry.edge_ratio import shared_step
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.geometry.vectors import norm, scaled
from lightning_landscape.training.objectives import Measurer
from lightning_landscape.training.round import Round

# Of the last 20 steps that were seen: one may be clipped.
_CLIPPED = 0.05


def edge_of(
    this_round: Round, objective: Objective, monitor: Measurer, share: float = 1.0
) -> StabilityEdge | None:
    """The edge of the optimizers in their current state; None, with a warning, if unknown.

    ``share``: the gradient of one batch relative to that of the objective.
    """
    edge = _edge(this_round, objective, share)
    reason = (
        this_round.altered_gradient(monitor)
        or _clipping(this_round, objective)
        or ("" if edge.scale else edge.note)
    )
    if reason:
        monitor.warn_once(f"no stability edge is logged: {reason}")
        return None
    return edge


def has_own_problem(this_round: Round, objective: Objective) -> bool:
    """Whether the ratio to the edge is an eigenvalue of another matrix than the Hessian."""
    edge = _edge(this_round, objective, 1.0)
    return bool(edge.scale) and shared_step(objective, edge) is None


def _edge(this_round: Round, objective: Objective, share: float) -> StabilityEdge:
    gradient = objective.gradient()
    return stability_edge(
        this_round.optimizers, objective.params, norm(gradient), scaled(gradient, share)
    )


def _clipping(this_round: Round, objective: Objective) -> str:
    """Why clipping leaves no edge at these weights, or an empty string."""
    clipped = this_round.clipped_share
    if clipped is not None:
        if clipped <= _CLIPPED:
            return ""
        return (
            f"gradient clipping is active ({clipped:.0%} of the last steps that were looked at), "
            f"and a clipped step does not follow from the curvature"
        )
    limit = this_round.trainer.gradient_clip_val  # no step was seen: by the probe's gradient
    if not limit:
        return ""
    if str(this_round.trainer.gradient_clip_algorithm or "norm").endswith("value"):
        largest = max(float(g.abs().max()) for g in objective.gradient().values())
        active = largest > limit
    else:
        active = norm(objective.gradient()) > limit
    return f"gradient clipping at {limit} is active" if active else ""
