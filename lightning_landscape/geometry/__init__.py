"""Losses, curvature, sharpness and slices as pure functions; imports torch and numpy only."""

from lightning_landscape.geometry.average import AverageSharpness, average_sharpness
from lightning_landscape.geometry.batch_norm import reestimate_batch_norm
from lightning_landscape.geometry.blocks import block_eigenvalues, module_blocks
from lightning_landscape.geometry.critical import CriticalSharpness, critical_sharpness
from lightning_landscape.geometry.directions import (
    filter_dims_of,
    filter_normalize,
    random_direction,
)
from lightning_landscape.geometry.edge_ratio import EdgeRatio, edge_ratio
from lightning_landscape.geometry.eigen import EigenResult, top_eigenvalues
from lightning_landscape.geometry.estimate import Estimate
from lightning_landscape.geometry.memory import GraphMemory
from lightning_landscape.geometry.mode_connectivity import line_between, loss_barrier, plane_through
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import Sharpness, curvature_along, sam_sharpness
from lightning_landscape.geometry.slices import Slice, line_slice, plane_slice
from lightning_landscape.geometry.spectrum import SpectralDensity, spectral_density
from lightning_landscape.geometry.stability import StabilityEdge, stability_edge
from lightning_landscape.geometry.trace import TraceEstimate, hessian_frobenius, hessian_trace
from lightning_landscape.geometry.trajectory import Projection, Trajectory, pca_directions, project
from lightning_landscape.geometry.worst_case import keskar_sharpness, worst_case_sharpness

__all__ = [
    "AverageSharpness",
    "CriticalSharpness",
    "EdgeRatio",
    "EigenResult",
    "Estimate",
    "GraphMemory",
    "Objective",
    "Projection",
    "Sharpness",
    "Slice",
    "SpectralDensity",
    "StabilityEdge",
    "TraceEstimate",
    "Trajectory",
    "average_sharpness",
    "block_eigenvalues",
    "critical_sharpness",
    "curvature_along",
    "edge_ratio",
    "filter_dims_of",
    "filter_normalize",
    "hessian_frobenius",
    "hessian_trace",
    "keskar_sharpness",
    "line_between",
    "line_slice",
    "loss_barrier",
    "module_blocks",
    "pca_directions",
    "plane_slice",
    "plane_through",
    "project",
    "random_direction",
    "reestimate_batch_norm",
    "sam_sharpness",
    "spectral_density",
    "stability_edge",
    "top_eigenvalues",
    "worst_case_sharpness",
]
