"""Wrong uses of the callbacks that are detected before there is a Trainer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    landscape_callbacks,
)
from tests.bad_input.rows import Call, wrong
from tests.small import Linear, regression

INF, NAN = math.inf, math.nan
HESSIAN = Call("HessianMonitor", HessianMonitor)
SHARPNESS = Call("SharpnessMonitor", SharpnessMonitor)
LANDSCAPE = Call("LandscapeMonitor", LandscapeMonitor)
INTERPOLATION = Call("InterpolationMonitor", InterpolationMonitor)
GENERALIZATION = Call("GeneralizationMonitor", GeneralizationMonitor)
SUITE = Call("landscape_callbacks", landscape_callbacks)
PROBE = Call("Probe", Probe)
STOPPING = Call(
    "SharpnessEarlyStopping",
    SharpnessEarlyStopping,
    lambda: {"monitor": "hessian/edge_ratio", "threshold": 1.5},
)
MONITORS = (HESSIAN, SHARPNESS, LANDSCAPE, INTERPOLATION, GENERALIZATION)
ALL = (*MONITORS, SUITE)

NO_HESSIAN = {"monitors": ["landscape"]}
BATCH = (torch.ones(4, 5), torch.ones(4, 1))
STATE = {"layer.weight": torch.ones(1, 5)}
COUNTS = (0, -1, 1.5, True, "100", NAN)
FLAGS = (1, 0, "no", "false", None)
NO_DATA = ("train", 512, 0.5, True, regression().dataset, Linear, nn.Linear(5, 1), regression, b"x")
DATA = r"expected a DataLoader, a list of batches, one batch \(a tuple or a dict"


class Datamodule:
    """The attribute by which a datamodule is recognized."""

    def train_dataloader(self):
        return regression()


def _rate(call, argument, *, low=(0.0, -1.0), message="expected a finite number > 0"):
    """Rows for an argument that must be a number above 0."""
    return [
        wrong(call, argument, (*low, NAN, INF), ValueError, message),
        wrong(call, argument, ("0.05", True, torch.ones(2)), TypeError, message),
    ]


def _flags(call, *arguments):
    return [wrong(call, name, FLAGS, TypeError, "expected True or False") for name in arguments]


ROWS = [
    # Arguments of all monitors.
    wrong(
        ALL, "every_n_train_steps", (*COUNTS, "Auto"), ValueError,
        "expected an integer >= 1, 'auto', or None",
    ),
    wrong(ALL, "every_n_epochs", COUNTS, ValueError, "expected an integer >= 1"),
    wrong(
        ALL, "every_n_train_steps", (None,), ValueError,
        r"every_n_epochs=None\): expected an integer >= 1 for at least one",
    ),
    wrong(
        ALL, "max_overhead", (0.0, -0.05, NAN, INF, 10**400), ValueError,
        r"expected a share of .*\(0\.05 is 5 per cent\), or None for the exact schedule",
    ),
    wrong(ALL, "max_overhead", ("5%", "0.05", True, [0.05]), TypeError, "expected a share of the "),
    wrong(
        ALL, "grace_seconds", (-1.0, NAN, INF, 10**400), ValueError,
        "expected seconds >= 0; 0: only max_overhead counts",
    ),
    wrong(
        ALL, "grace_seconds", ("30", True, None, [30.0]), TypeError,
        "expected seconds >= 0; 0: only max_overhead counts",
    ),
    wrong(ALL, "probe", (*NO_DATA, Datamodule()), TypeError, DATA),
    wrong(ALL, "probe", ("data.train",), TypeError, "a LightningCLI, .* -> DataLoader or -> Probe"),
    wrong(ALL, "probe", ([],), ValueError, f"it holds no batch; {DATA}"),
    wrong(ALL, "probe", ([None], ["a"], [1, 2, 3], [BATCH, 1]), TypeError, "its item .*Loader"),
    wrong(ALL, "probe_samples", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(ALL, "probe_mode", ("test", None, True, "Train"), ValueError, "expected 'train' or 'eva"),
    wrong(ALL, "loss_fn", (3, "mse", len, abs), TypeError, r"a function \(pl_module, batch\)"),
    wrong(ALL, "loss_reduction", ("none", None, 0), ValueError, "expected 'mean' or 'sum'"),
    wrong(
        MONITORS, "parameters", (3, [], [3], b"layer.*", [None], {"a": 1}, ""), TypeError,
        r"expected glob patterns over parameter names, e\.g\. \['encoder\.\*'\], or None",
    ),
    wrong(MONITORS, "engine", ("jax", None, 3), ValueError, "expected 'auto' or 'double_backward'"),
    wrong(MONITORS, "name", ("a/b", "", 3, ["a"]), ValueError, "expected a word without '/', or N"),
    *_flags(ALL, "save_probe"),
    *_flags(MONITORS, "prog_bar", "verbose"),
    # HessianMonitor.
    wrong(HESSIAN, "k", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(HESSIAN, "method", ("arpack", None), ValueError, "expected 'lanczos' or 'power'"),
    wrong(HESSIAN, "tol", (0.0, 1.0, -1, NAN), ValueError, "expected a number between 0 and 1"),
    wrong(HESSIAN, "tol", ("1%", None, True), TypeError, "expected a number between 0 and 1"),
    wrong(HESSIAN, "rtol", (-0.1, 1.0, NAN), ValueError, "expected a number from 0 to 1, or None"),
    wrong(HESSIAN, "rtol", ("1%", False), TypeError, "expected a number from 0 to 1, or None"),
    wrong(HESSIAN, "max_hvps", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(HESSIAN, "max_hvps", (4,), ValueError, "expected an integer >= k=5", k=5),
    wrong(
        HESSIAN, "trace_samples", (1, -3, 2.5, True, False, "30", None), ValueError,
        "expected an integer >= 2, or 0",
    ),
    wrong(HESSIAN, "density_samples", (1, -3, True), ValueError, "expected an integer >= 2, or 0"),
    wrong(
        (HESSIAN, INTERPOLATION), "blocks", ("layer", 3, None, ["layer"], {"a": 1}, {1: "a"}),
        TypeError, "expected True, False or a mapping",
    ),
    *_flags(HESSIAN, "min_eigenvalue", "batch_edge_ratio", "update_curvature"),
    # SharpnessMonitor.
    *_rate(SHARPNESS, "rho"),
    *_rate(SHARPNESS, "sigma"),
    *_rate(SHARPNESS, "epsilon"),
    *_rate(SHARPNESS, "critical_rtol", low=(0.0, 1.0), message="expected a number from 0 to 1"),
    wrong(SHARPNESS, "worst_case_norm", ("l1", None, 2), ValueError, "expected 'l2' or 'linf'"),
    wrong(SHARPNESS, "worst_case_steps", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(SHARPNESS, "samples", (1, *COUNTS, None), ValueError, "expected an integer >= 2"),
    *_flags(
        SHARPNESS, "adaptive", "worst_case", "per_batch", "average", "keskar", "critical",
    ),
    # LandscapeMonitor.
    wrong(
        LANDSCAPE, "directions", ("pac", None, 3, ("random", "up"), torch.ones(2)), ValueError,
        "expected 'random' or 'eigenvectors' or", names="LandscapeMonitor(directions=",
    ),
    wrong(LANDSCAPE, "directions", ((), ("random",) * 3), ValueError, "expected one or two of"),
    wrong(
        LANDSCAPE, "between", (3, "a.ckpt", (STATE,), (STATE, 3), [1, 2]), ValueError,
        r"expected two checkpoint files or state dicts \(a, b\)", directions="between",
    ),
    wrong(
        LANDSCAPE, "between", (("gone.ckpt", STATE), (STATE, Path("gone.ckpt"))), FileNotFoundError,
        "no such file; pass a checkpoint", directions="between", names="gone.ckpt",
    ),
    wrong(LANDSCAPE, "between", ((STATE, STATE),), ValueError, "expected both 'between' among"),
    wrong(LANDSCAPE, "directions", ("between",), ValueError, "and the two checkpoints, or neither"),
    wrong(
        LANDSCAPE, "span", ((1.0, 1.0), (1, -1), (0.0, INF), (NAN, 1.0), (1.0,), (0, 1, 2)),
        ValueError, "expected two finite numbers, the smaller first, or None",
    ),
    wrong(LANDSCAPE, "span", (1.0, "01", ("0", "1"), (False, True)), TypeError, "two finite num"),
    wrong(
        LANDSCAPE, "resolution", (1, -2, 2.5, True, "15", None), ValueError,
        "expected an integer >= 2, or 0",
    ),
    wrong(LANDSCAPE, "resolution", ((5, 2.5), (1, 5)), ValueError, "an integer >= 2, or 0",
          names="resolution="),
    wrong(LANDSCAPE, "resolution", ((), (5, 5, 5)), ValueError, "expected one integer, or one eac"),
    wrong(LANDSCAPE, "resolution", (0,), ValueError, "nothing is left to draw; pass",
          line_resolution=0),
    wrong(LANDSCAPE, "line_resolution", (1, -2, 2.5, True, None), ValueError, "integer >= 2, or 0"),
    wrong(LANDSCAPE, "seed", (-1, 1.5, "0", None, True), ValueError, "expected an integer >= 0"),
    wrong(LANDSCAPE, "seeds", (1, *COUNTS, None), ValueError, "expected an integer >= 2"),
    wrong(LANDSCAPE, "seeds", (3,), ValueError, "expected directions='random' with it",
          directions="pca"),
    *_flags(LANDSCAPE, "surface", "trajectory"),
    wrong((LANDSCAPE, GENERALIZATION), "validation_probe", NO_DATA, TypeError, DATA),
    wrong((LANDSCAPE, GENERALIZATION), "validation_probe", ([],), ValueError, "it holds no batch"),
    wrong((LANDSCAPE, GENERALIZATION), "validation_probe", (Probe(),), ValueError,
          "expected one with a source, or None"),
    # InterpolationMonitor.
    wrong(INTERPOLATION, "reference", (3, None, [STATE]), TypeError,
          "expected 'initial', 'last_epoch', a checkpoint file or a state dict"),
    wrong(INTERPOLATION, "reference", ("first", Path("gone.ckpt")), FileNotFoundError,
          "no such file; expected 'initial', 'last_epoch', a check", names="(reference='"),
    wrong(INTERPOLATION, "third", (3, [STATE]), TypeError, "expected a checkpoint file or a state"),
    wrong(INTERPOLATION, "third", ("gone.ckpt",), FileNotFoundError, "no such file; expected a ch"),
    wrong(INTERPOLATION, "resolution", (1, *COUNTS, None), ValueError, "expected an integer >= 2"),
    wrong(INTERPOLATION, "plane_resolution", (1, *COUNTS), ValueError, "expected an integer >= 2"),
    *_flags(INTERPOLATION, "reestimate_batch_norm"),
    wrong(INTERPOLATION, "other_probes", (3, [BATCH], "old", regression()), TypeError,
          "expected a mapping from name to data, or None"),
    wrong(INTERPOLATION, "other_probes", ({"old": "data"}, {"old": 3}), TypeError, DATA,
          names="other_probes['old']="),
    wrong(INTERPOLATION, "other_probes", ({"a/b": BATCH}, {"": BATCH}, {3: BATCH},
          {"reference": BATCH}), ValueError, "expected a word, no '/'", names="other_probes={"),
    wrong(INTERPOLATION, "other_probes", ({"old": None}, {"old": Probe()}), ValueError,
          "expected data, not None", names="'old'"),
    # GeneralizationMonitor.
    wrong(GENERALIZATION, "metric_fn", (3, "accuracy", len), TypeError,
          r"expected a function \(pl_module, batch\) -> mapping from name to value"),
    # SharpnessEarlyStopping.
    wrong(STOPPING, "monitor", ("", 3, None, HessianMonitor(), ["a"]), ValueError,
          "expected a key such as 'hessian/top_eigenvalue'"),
    wrong(STOPPING, "threshold", (NAN, INF, -INF), ValueError, "expected a finite number"),
    wrong(STOPPING, "threshold", ("1.5", None, True, [1.0], np.True_), TypeError, "a finite numbe"),
    wrong(STOPPING, "stop_when", ("over", None, True, ">"), ValueError, "'above' or 'below'"),
    wrong(STOPPING, "stop_when", ("below",), ValueError, "pass the step .* min_steps=1000"),
    wrong(STOPPING, "patience", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(STOPPING, "min_steps", (-1, 1.5, True, "10", None), ValueError, "expected an integer >="),
    wrong(STOPPING, "action", ("halt", None, True), ValueError, "expected 'stop' or 'warn'"),
    # The usual list, the probe.
    wrong(SUITE, "monitors", ("hessian", 5, None, ()), TypeError, "expected a sequence of names"),
    wrong(SUITE, "monitors", (["hessain"], [None]), ValueError, "expected 'hessian' or 'sharpn"),
    wrong(SUITE, "monitors", (["hessian"] * 2,), ValueError, "expected each name once"),
    wrong(SUITE, "stop_above", (2.0,), ValueError, "pass monitors=", **NO_HESSIAN),
    wrong(SUITE, "stop_above", (NAN, INF), ValueError, "the edge ratio above which to stop, or No"),
    wrong(SUITE, "stop_above", ("1.5", True, [1.0]), TypeError, "the edge ratio above which to st"),
    wrong(SUITE, "patience", (*COUNTS, None), ValueError, "expected an integer >= 1"),
    wrong(PROBE, "source", (*NO_DATA, Probe(), Datamodule()), TypeError, DATA),
    wrong(PROBE, "source", ([],), ValueError, f"it holds no batch; {DATA}"),
    wrong(PROBE, "samples", (*COUNTS, None), ValueError, "expected an integer >= 1"),
]  # fmt: skip

# Unusual but valid: none of this may be rejected.
FINE = [
    (HESSIAN, {"every_n_train_steps": np.int64(5), "k": np.int32(2), "tol": np.float32(0.1)}),
    (HESSIAN, {"max_overhead": 1, "blocks": {}}),
    (HESSIAN, {"max_overhead": 5}),  # 500 percent: a warning
    (HESSIAN, {"every_n_train_steps": "auto", "grace_seconds": 0}),
    (HESSIAN, {"parameters": "layer.*"}),
    (SHARPNESS, {"parameters": ("layer.*",), "rho": torch.tensor(0.1), "sigma": 1}),
    (LANDSCAPE, {"span": np.array([0.0, 1.0]), "resolution": [3, 0], "directions": ["pca", "pca"]}),
    (LANDSCAPE, {"resolution": np.int64(5), "seed": np.int64(2**40)}),
    (STOPPING, {"threshold": np.float32(1.0)}),
    *((PROBE, {"source": source}) for source in (
        BATCH, {"x": torch.ones(2)}, torch.ones(2, 3), [BATCH, BATCH], [["words", "in"]],
        DataLoader(TensorDataset(torch.ones(4, 1))), iter([BATCH]), itertools.repeat(BATCH),
    )),
]  # fmt: skip
