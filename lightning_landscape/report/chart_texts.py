"""Titles of the charts, and a sentence on how to read each."""

from __future__ import annotations

# Last part of a key -> title, and how to read the chart.
SCALARS = {
    "top_eigenvalue": (
        "Largest eigenvalue of the Hessian",
        "The steepest curvature at the weights, solid, against the optimizer's edge, dashed: "
        "full-batch training climbs to the edge and stays about there.",
    ),
    "preconditioned_eigenvalue": (
        "Largest preconditioned eigenvalue",
        "With adaptive optimizers such as Adam the edge is a bound of this eigenvalue.",
    ),
    "edge_ratio": (
        "Ratio to the edge of stability",
        "1 is the edge: below it a step is smaller than the curvature allows, and a run that stays "
        "near 1 is healthy.",
    ),
    "batch_edge_ratio": (
        "Ratio to the edge, on the training batch",
        "Above 1 at several measurements in a row is a warning that the run may blow up.",
    ),
    "edge": ("The optimizer's edge", "The curvature above which its steps begin to overshoot."),
    "residual": (
        "Residual of the eigenvalue",
        "An eigenvalue lies within this distance of the one shown: small is good.",
    ),
    "hvps": (
        "Hessian-vector products used",
        "The work of one measurement; each costs about two gradients of the probe.",
    ),
    "inactive_share": (
        "Share of inactive coordinates",
        "Without a gradient in any step so far: the edge of adaptive optimizers leaves them out.",
    ),
    "min_eigenvalue": (
        "Smallest eigenvalue of the Hessian",
        "Below zero there is a direction in which the loss curves downwards.",
    ),
    "trace": ("Trace of the Hessian", "The sum of all curvatures, estimated from random signs."),
    "trace_stderr": ("Standard error of the trace", "How accurate the trace is: small is good."),
    "frobenius": ("Frobenius norm of the Hessian", "The overall size of the curvature."),
    "update_curvature": (
        "Curvature along the last step",
        "How the loss curves in the direction in which the optimizer has just moved.",
    ),
    "sam": (
        "SAM sharpness",
        "How far the loss rises after one step of fixed length uphill: lower is flatter.",
    ),
    "gradient_norm": ("Norm of the gradient", "How steep the loss is at the weights."),
    "gradient_curvature": (
        "Curvature along the gradient",
        "How the loss curves in the direction of steepest descent.",
    ),
    "worst_case": (
        "Worst-case sharpness",
        "The largest rise of the loss that was found nearby: lower is flatter.",
    ),
    "average": (
        "Average sharpness",
        "The mean rise of the loss under random noise on the weights.",
    ),
    "average_stderr": ("Standard error of the average", "How accurate it is: small is good."),
    "keskar": ("Keskar sharpness", "The largest rise in a small box, in per cent of 1 + loss."),
    "critical": (
        "Critical sharpness",
        "2 / the shortest step along the optimizer's update that raises the loss.",
    ),
    "barrier": (
        "Loss barrier",
        "How far the loss on the line to the reference rises above the straight line between both "
        "ends: 0 means that there is no barrier between them.",
    ),
    "distance": (
        "Distance to the reference",
        "The Euclidean length of the difference between the weights and the reference.",
    ),
    "reference_loss": (
        "Loss at the reference",
        "The probe's loss at the reference's weights, the other end of the line.",
    ),
    "train_loss": (
        "Loss on training data",
        "Solid, of the weights on a fixed set of examples; dashed, where it was measured, on "
        "validation data: they part as the network overfits.",
    ),
    "val_loss": (
        "Loss on validation data",
        "The same loss on as many examples that are not in the training data.",
    ),
    "gap": (
        "Generalization gap",
        "Validation loss minus training loss: how much better the model is on its training data.",
    ),
    "gap_stderr": (
        "Standard error of the gap",
        "From the spread over the probes' batches: a gap below two of these is not significant.",
    ),
    "center_loss": ("Loss at the weights", "The probe's loss where each picture has its centre."),
}
# The same for keys ``interpolation/<name>_<suffix>``, by the suffix.
_INTERPOLATION = {
    "loss": ("Loss on other examples", "Of the weights now, on the probe of that name."),
    "rise": (
        "Rise since the reference",
        "Loss of the weights now less that of the reference, on the probe of that name: with an "
        "old task, what was forgotten.",
    ),
    "barrier": SCALARS["barrier"],
}
OTHER = "A value that was logged at these steps."


def scalar_text(key: str) -> tuple[str, str]:
    """The title of the chart of a key, and how to read it; unknown keys are their own title.

    Example:
        >>> scalar_text("interpolation/init_barrier")[0], scalar_text("mine/x")[0]
        ('Loss barrier (init)', 'mine/x')
    """
    prefix, _, name = key.rpartition("/")
    if name in SCALARS:
        return SCALARS[name]
    of, _, suffix = name.rpartition("_")
    if of and suffix in _INTERPOLATION and prefix.partition("/")[0] == "interpolation":
        title, reading = _INTERPOLATION[suffix]
        return f"{title} ({of})", reading
    return key, OTHER


def slices_text(kind: str, planes: bool) -> str:
    """How to read lines or planes of a kind such as ``landscape-line``."""
    if kind.startswith("interpolation-"):
        return INTERPOLATED_PLANE if planes else INTERPOLATED_LINE
    return PLANE if planes else LINE


LINE = (
    "Each curve is the loss minus the loss at the weights, along one direction: a narrow valley is "
    "a sharp one, and all frames share one axis."
)
INTERPOLATED_LINE = (
    "The loss minus the loss at the weights, on the straight line between the weights and the "
    "reference: a hump on the way is a barrier. All frames share one axis."
)
INTERPOLATED_PLANE = (
    "The loss on a plane through the weights and the references. Colour is the loss minus the loss "
    "at the cross, which is where the weights are; all frames share one scale."
)
PLANE = (
    "Colour is the loss minus the loss at the cross, which is where the weights are: dark blue "
    "lies lower, light orange higher, and all frames share one scale."
)
DENSITY = (
    "The share of the Hessian's eigenvalues at each value: the peak at zero holds nearly all of "
    "them, bumps far to the right are the sharp directions."
)
