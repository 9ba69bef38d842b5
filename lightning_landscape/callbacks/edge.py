"""The optimizer's stability edge during a run; none while gradients are clipped."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_landscape.geometry.checks import few
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.geometry.vectors import norm, scaled
from lightning_landscape.training.lightning_packages import package_of
from lightning_landscape.training.round import Round


def edge_of(
    this_round: Round, objective: Objective, share: float, warn: Callable[[str], None]
) -> StabilityEdge | None:
    """The edge of the optimizers in their current state; None, with a warning, if unknown.

    ``share``: the gradient of one batch relative to that of the objective.
    """
    gradient = objective.gradient()
    gradient_norm = norm(gradient)
    edge = stability_edge(
        this_round.optimizers, objective.params, gradient_norm, scaled(gradient, share)
    )
    reason = _hooks(this_round) or _clipping(this_round.trainer, objective, gradient_norm)
    if reason or not edge.scale:
        warn(f"no stability edge is logged: {reason or edge.note}")
        return None
    module = this_round.pl_module
    parent = package_of(module).LightningModule
    if is_overridden("configure_gradient_clipping", module, parent=parent):
        warn(
            "configure_gradient_clipping is overridden; the stability edge is that of gradients "
            "that are not clipped, so ignore it at steps with clipping"
        )
    return edge


def _hooks(this_round: Round) -> str:
    """Why hooks on parameters leave no edge, or an empty string."""
    hooked = this_round.hooked_parameters
    if not hooked:
        return ""
    return (
        f"hooks of {few(hooked)} (register_hook) change the gradient that training uses; the loss "
        f"is measured without them"
    )


def _clipping(trainer: Trainer, objective: Objective, gradient_norm: float) -> str:
    """Why clipping leaves no edge at these weights, or an empty string."""
    limit = trainer.gradient_clip_val
    if not limit:
        return ""
    if str(trainer.gradient_clip_algorithm or "norm").endswith("value"):
        largest = max(float(g.abs().max()) for g in objective.gradient().values())
        active = largest > limit
    else:
        active = gradient_norm > limit
    return f"gradient clipping at {limit} is active" if active else ""
