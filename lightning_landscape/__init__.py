"""Measure the loss landscape while a model trains: PyTorch Lightning callbacks and functions."""

from lightning_landscape.callbacks.early_stopping import SharpnessEarlyStopping
from lightning_landscape.callbacks.hessian import HessianMonitor
from lightning_landscape.callbacks.landscape import LandscapeMonitor
from lightning_landscape.callbacks.sharpness import SharpnessMonitor
from lightning_landscape.callbacks.suite import landscape_callbacks
from lightning_landscape.geometry.directions import (
    filter_dims_of,
    filter_normalize,
    random_direction,
)
from lightning_landscape.geometry.edge_ratio import EdgeRatio, edge_ratio
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sharpness import Sharpness, curvature_along, sam_sharpness
from lightning_landscape.geometry.slices import Slice, line_slice, plane_slice
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.training.probe import Probe

__version__ = "0.1.0"

__all__ = [
    "EdgeRatio",
    "EigenResult",
    "HessianMonitor",
    "LandscapeMonitor",
    "Objective",
    "Probe",
    "Sharpness",
    "SharpnessEarlyStopping",
    "SharpnessMonitor",
    "Slice",
    "StabilityEdge",
    "curvature_along",
    "edge_ratio",
    "filter_dims_of",
    "filter_normalize",
    "landscape_callbacks",
    "line_slice",
    "plane_slice",
    "random_direction",
    "sam_sharpness",
    "stability_edge",
    "top_eigenvalues",
]
