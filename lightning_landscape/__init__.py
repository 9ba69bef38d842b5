"""Measure the loss landscape while a model trains: PyTorch Lightning callbacks.

Functions that need no Lightning are in :mod:`lightning_landscape.geometry`, figures in
:mod:`lightning_landscape.figures`.
"""

import warnings
from typing import Any

import lightning_landscape.training.lightning_packages  # noqa: F401  # before any other import of Lightning
from lightning_landscape import geometry as _geometry
from lightning_landscape.callbacks.early_stopping import SharpnessEarlyStopping
from lightning_landscape.callbacks.generalization import GeneralizationMonitor
from lightning_landscape.callbacks.hessian import HessianMonitor
from lightning_landscape.callbacks.interpolation import InterpolationMonitor
from lightning_landscape.callbacks.landscape import LandscapeMonitor
from lightning_landscape.callbacks.sharpness import SharpnessMonitor
from lightning_landscape.callbacks.suite import landscape_callbacks
from lightning_landscape.compare import compare
from lightning_landscape.geometry import Slice
from lightning_landscape.measure import measure
from lightning_landscape.report import write_at_end as _write_at_end
from lightning_landscape.report import write_report
from lightning_landscape.training.data.probe import Probe
from lightning_landscape.training.monitor import Monitor
from lightning_landscape.training.output.history import read_history
from lightning_landscape.training.output.measured import Measured
from lightning_landscape.training.publisher import Publisher as _Publisher
from lightning_landscape.training.round import Round

_Publisher.write_report = staticmethod(_write_at_end)

__version__ = "0.1.0"

__all__ = [
    "GeneralizationMonitor",
    "HessianMonitor",
    "InterpolationMonitor",
    "LandscapeMonitor",
    "Measured",
    "Monitor",
    "Probe",
    "Round",
    "SharpnessEarlyStopping",
    "SharpnessMonitor",
    "Slice",
    "compare",
    "landscape_callbacks",
    "measure",
    "read_history",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """A name that has moved, with a warning that says where it is now."""
    if name == "Comparison":
        place = "lightning_landscape.compare"
        found: Any = compare.__globals__[name]
    elif name in _geometry.__all__:
        place = "lightning_landscape.geometry"
        found = getattr(_geometry, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"lightning_landscape.{name} is deprecated: import {name} from {place}",
        DeprecationWarning,
        stacklevel=2,
    )
    return found
