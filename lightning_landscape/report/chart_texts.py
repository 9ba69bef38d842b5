"""Titles of the charts, and a sentence on what each shows."""

from __future__ import annotations

# Last part of a key -> title, and what is drawn.
SCALARS = {
    "top_eigenvalue": (
        "Top Hessian eigenvalue",
        "The largest curvature of the loss at the weights.",
    ),
    "preconditioned_eigenvalue": (
        "Top preconditioned eigenvalue",
        "The largest curvature in the scaling of the optimizer's step.",
    ),
    "edge_ratio": (
        "Ratio to the edge of stability",
        "The largest curvature in the scaling of the optimizer's step, divided by the edge.",
    ),
    "batch_edge_ratio": (
        "Ratio to the edge, on the training batch",
        "The same ratio, with the curvature of the training batch.",
    ),
    "edge": ("The optimizer's edge", "The curvature above which the optimizer's steps overshoot."),
    "residual": (
        "Residual of the eigenvalue",
        "An eigenvalue lies within this distance of the one shown.",
    ),
    "hvps": ("Hessian-vector products used", "Of one measurement."),
    "inactive_share": (
        "Share of inactive coordinates",
        "Coordinates without a gradient in any step so far.",
    ),
    "clipped_share": (
        "Share of clipped steps",
        "Of the last steps, those in which the gradient was clipped.",
    ),
    "min_eigenvalue": (
        "Smallest eigenvalue of the Hessian",
        "The smallest curvature of the loss at the weights.",
    ),
    "trace": ("Trace of the Hessian", "The sum of all eigenvalues, estimated from random signs."),
    "trace_stderr": ("Standard error of the trace", "From the spread over random signs."),
    "frobenius": (
        "Frobenius norm of the Hessian",
        "The square root of the sum of all squared eigenvalues.",
    ),
    "update_curvature": (
        "Curvature along the last step",
        "The curvature of the loss in the direction of the last step.",
    ),
    "sam": (
        "SAM sharpness",
        "The rise of the loss after one step of fixed length along the gradient.",
    ),
    "gradient_norm": ("Norm of the gradient", "The length of the gradient at the weights."),
    "gradient_curvature": (
        "Curvature along the gradient",
        "The curvature of the loss in the direction of the gradient.",
    ),
    "worst_case": ("Worst-case sharpness", "The largest rise of the loss that was found nearby."),
    "average": (
        "Average sharpness",
        "The mean rise of the loss under random noise on the weights.",
    ),
    "average_stderr": (
        "Standard error of the average",
        "From the spread over samples of the noise.",
    ),
    "keskar": (
        "Keskar sharpness",
        "The largest rise of the loss in a small box, in per cent of 1 + loss.",
    ),
    "critical": (
        "Critical sharpness",
        "2 / the shortest step along the optimizer's update that raises the loss.",
    ),
    "barrier": (
        "Loss barrier",
        "The rise of the loss above the straight line between the losses at both ends.",
    ),
    "distance": (
        "Distance to the reference",
        "The length of the difference between the weights and the reference.",
    ),
    "reference_loss": ("Loss at the reference", "On the same probe."),
    "train_loss": ("Loss on training data", "At the weights, on a fixed set of examples."),
    "val_loss": (
        "Loss on validation data",
        "At the weights, on as many validation examples.",
    ),
    "gap": ("Generalization gap", "The validation loss minus the training loss."),
    "gap_stderr": (
        "Standard error of the gap",
        "From the spread over batches.",
    ),
    "center_loss": ("Loss at the weights", "On the probe of the pictures."),
}
# The same for keys ``interpolation/<name>_<suffix>``, by the suffix.
_INTERPOLATION = {
    "loss": ("Loss on other examples", "The loss at the weights, on the probe of that name."),
    "rise": (
        "Rise since the reference",
        "The loss at the weights minus that at the reference, on the probe of that name.",
    ),
    "barrier": SCALARS["barrier"],
}
OTHER = "As logged."


def scalar_text(key: str) -> tuple[str, str]:
    """The title of the chart of a key, and what it is; unknown keys are their own title.

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
    """What is drawn on lines or planes of a kind such as ``landscape-line``."""
    if kind.startswith("interpolation-"):
        return INTERPOLATED_PLANE if planes else INTERPOLATED_LINE
    return PLANE if planes else LINE


LINE = "The loss along each direction. All steps share one axis."
INTERPOLATED_LINE = (
    "The loss on the straight line from the weights to the reference. All steps share one axis."
)
PLANE = "Colour: the loss, on a logarithmic scale. Cross: the weights. All steps share one scale."
INTERPOLATED_PLANE = f"A plane through the weights and the references. {PLANE}"
DENSITY = "The share of the Hessian's eigenvalues at each value."
