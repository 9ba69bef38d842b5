"""Measure the loss landscape while a model trains: PyTorch Lightning callbacks and functions."""

import lightning_landscape.training.lightning_packages  # noqa: F401  # before any other import of Lightning
from lightning_landscape.callbacks.early_stopping import SharpnessEarlyStopping
from lightning_landscape.callbacks.generalization import GeneralizationMonitor
from lightning_landscape.callbacks.hessian import HessianMonitor
from lightning_landscape.callbacks.interpolation import InterpolationMonitor
from lightning_landscape.callbacks.landscape import LandscapeMonitor
from lightning_landscape.callbacks.sharpness import SharpnessMonitor
from lightning_landscape.callbacks.suite import landscape_callbacks
from lightning_landscape.compare import Comparison, compare
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
from lightning_landscape.geometry.trajectory import (
    Projection,
    Trajectory,
    pca_directions,
    project,
)
from lightning_landscape.geometry.worst_case import keskar_sharpness, worst_case_sharpness
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.history import read_history
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.round import Round

__version__ = "0.1.0"

__all__ = [
    "AverageSharpness",
    "Comparison",
    "CriticalSharpness",
    "EdgeRatio",
    "EigenResult",
    "Estimate",
    "GeneralizationMonitor",
    "GraphMemory",
    "HessianMonitor",
    "InterpolationMonitor",
    "LandscapeMonitor",
    "Measured",
    "Monitor",
    "Objective",
    "Probe",
    "Projection",
    "Round",
    "Sharpness",
    "SharpnessEarlyStopping",
    "SharpnessMonitor",
    "Slice",
    "SpectralDensity",
    "StabilityEdge",
    "TraceEstimate",
    "Trajectory",
    "average_sharpness",
    "block_eigenvalues",
    "compare",
    "critical_sharpness",
    "curvature_along",
    "edge_ratio",
    "filter_dims_of",
    "filter_normalize",
    "hessian_frobenius",
    "hessian_trace",
    "keskar_sharpness",
    "landscape_callbacks",
    "line_between",
    "line_slice",
    "loss_barrier",
    "module_blocks",
    "pca_directions",
    "plane_slice",
    "plane_through",
    "project",
    "random_direction",
    "read_history",
    "reestimate_batch_norm",
    "sam_sharpness",
    "spectral_density",
    "stability_edge",
    "top_eigenvalues",
    "worst_case_sharpness",
]
