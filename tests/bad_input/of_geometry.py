"""Wrong uses of the functions that do not need Lightning."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import Parameter

from lightning_landscape.geometry import (
    GraphMemory,
    Objective,
    Trajectory,
    average_sharpness,
    block_eigenvalues,
    critical_sharpness,
    curvature_along,
    edge_ratio,
    filter_dims_of,
    filter_normalize,
    hessian_frobenius,
    hessian_trace,
    keskar_sharpness,
    module_blocks,
    pca_directions,
    project,
    random_direction,
    reestimate_batch_norm,
    sam_sharpness,
    spectral_density,
    stability_edge,
    top_eigenvalues,
    worst_case_sharpness,
)
from tests.bad_input.rows import Call, wrong

INF, NAN = math.inf, math.nan
ONES = torch.ones(2, 3)


def parameters():
    return {"w": Parameter(torch.tensor([[1.0, 2.0, -1.0], [0.5, 1.0, 3.0]]))}


def objective():
    params = parameters()
    return Objective(lambda: (params["w"] ** 4).sum() / 4, params)


def _of_loss(function, **more):
    return lambda: {"objective": objective(), **more}


def _edge_arguments():
    loss = objective()
    optimizer = torch.optim.Adam(loss.params.values())
    loss.params["w"].grad = loss.gradient()["w"]
    optimizer.step()
    return {
        "objective": loss,
        "edge": stability_edge(optimizer, loss.params),
        "plain": top_eigenvalues(loss),
    }


def _batch_norm_arguments():
    net = nn.BatchNorm1d(2)
    return {"module": net, "forward": lambda: net(torch.randn(4, 2))}


def _optimizer_arguments():
    params = parameters()
    return {"optimizers": torch.optim.SGD(params.values(), lr=0.1), "params": params}


def _objective_arguments():
    params = parameters()
    return {"loss_fn": lambda: params["w"].square().sum(), "params": params}


OBJECTIVE = Call("Objective", Objective, _objective_arguments)
TOP = Call("top_eigenvalues", top_eigenvalues, _of_loss(top_eigenvalues))
BLOCKS = Call("block_eigenvalues", block_eigenvalues, _of_loss(block_eigenvalues))
EDGE_RATIO = Call("edge_ratio", edge_ratio, _edge_arguments)
TRACE = Call("hessian_trace", hessian_trace, _of_loss(hessian_trace, samples=2))
FROBENIUS = Call("hessian_frobenius", hessian_frobenius, _of_loss(hessian_frobenius, samples=2))
DENSITY = Call("spectral_density", spectral_density, _of_loss(spectral_density, samples=2))
SAM = Call("sam_sharpness", sam_sharpness, _of_loss(sam_sharpness))
WORST = Call("worst_case_sharpness", worst_case_sharpness, _of_loss(worst_case_sharpness, steps=1))
KESKAR = Call("keskar_sharpness", keskar_sharpness, _of_loss(keskar_sharpness, steps=1))
AVERAGE = Call("average_sharpness", average_sharpness, _of_loss(average_sharpness, samples=2))
CRITICAL = Call(
    "critical_sharpness", critical_sharpness, _of_loss(critical_sharpness, direction={"w": -ONES})
)
ALONG = Call("curvature_along", curvature_along, _of_loss(curvature_along, direction={"w": ONES}))
RANDOM = Call("random_direction", random_direction, lambda: {"params": parameters()})
NORMALIZE = Call(
    "filter_normalize",
    filter_normalize,
    lambda: {"direction": {"w": ONES}, "params": parameters()},
)
FILTER_DIMS = Call("filter_dims_of", filter_dims_of, lambda: {"module": nn.Linear(2, 1)})
PATH = ({"w": ONES}, {"w": 2 * ONES}, {"w": ONES * torch.arange(3.0)})
PCA = Call("pca_directions", pca_directions, lambda: {"path": PATH, "center": parameters()})
PROJECT = Call(
    "project",
    project,
    lambda: {"path": PATH, "center": parameters(), "directions": [{"w": ONES}]},
)
TRAJECTORY = Call("Trajectory", Trajectory)
ADD = Call("Trajectory().add", Trajectory().add, lambda: {"step": 1, "params": parameters()})
MODULE_BLOCKS = Call("module_blocks", module_blocks, lambda: {"names": ["a.weight"]})
EDGE = Call("stability_edge", stability_edge, _optimizer_arguments)
BATCH_NORM = Call("reestimate_batch_norm", reestimate_batch_norm, _batch_norm_arguments)
MEMORY = Call("GraphMemory", GraphMemory)

HESSIANS = (TOP, BLOCKS, EDGE_RATIO, TRACE, FROBENIUS, DENSITY)
SHARPNESSES = (SAM, WORST, KESKAR, AVERAGE, CRITICAL, ALONG)
SOLVERS = (TOP, BLOCKS, EDGE_RATIO)
RANDOMS = (TRACE, TOP, BLOCKS, FROBENIUS, DENSITY, AVERAGE, RANDOM)

NET = nn.Linear(3, 2)
UNKNOWN = ({"v": ONES},)
SHAPED = ({"w": torch.ones(3)}, {"w": torch.ones(2, 1)}, {"w": torch.ones(())})
COMPLEX = ({"w": 1j * ONES},)
NO_VECTOR = (3, "w", [ONES], ONES, None)
VECTOR = "expected a mapping from parameter name to tensor"
COUNTS = (0, -1, 1.5, True, "3", None, NAN)

ROWS = [
    # The loss and its parameters.
    wrong(OBJECTIVE, "loss_fn", ("loss", 3, None, {"w": 1}), TypeError, r"expected a function \("),
    wrong(OBJECTIVE, "loss_fn", ([],), ValueError, "expected at least one"),
    wrong(
        OBJECTIVE,
        "loss_fn",
        ([len], [(1.0, len, 2)], [(1.0, 2.0)], [(-1.0, len)], [(NAN, len)], [("1", len)]),
        ValueError,
        r"expected \(weight > 0, callable\) pairs",
        names="loss_fn holds",
    ),
    wrong(OBJECTIVE, "params", ([ONES], NET.parameters(), "w", None, NET), TypeError, "named_par"),
    wrong(OBJECTIVE, "params", ({"w": 3.0}, {"w": NET}), TypeError, "expected a parameter, e.g"),
    wrong(
        OBJECTIVE, "params", ({}, {"w": ONES}), ValueError, "expected at least one trainable",
        names="tensors",
    ),
    wrong(OBJECTIVE, "engine", ("jax", None, 3, ""), ValueError, "expected 'auto', 'double_b"),
    wrong(OBJECTIVE, "reduce", (3, "sum"), TypeError, "expected a function that sums"),
    wrong(OBJECTIVE, "check_deterministic", (1, "no", None), TypeError, "expected True or False"),
    wrong(OBJECTIVE, "memory", (3, "8GB"), TypeError, "expected a GraphMemory, or None"),
    wrong(OBJECTIVE, "cut", (3, [1, 2]), TypeError, r"expected a function \(i, most\)"),
    wrong(MEMORY, "examples", (0, -1, NAN), ValueError, "expected a number > 0, or None"),
    wrong(MEMORY, "examples", ("64", True), TypeError, "expected a number > 0, or None"),
    wrong(MEMORY, "share", (0.0, 50, NAN), ValueError, "expected a number above 0, at most 1"),
    wrong(MEMORY, "share", ("half", None), TypeError, "expected a number above 0, at most 1"),
    wrong(MEMORY, "tell", (3, "warn", None), TypeError, "expected a function that takes a mess"),
    # Functions of an objective.
    wrong(
        HESSIANS + SHARPNESSES, "objective", (NET, 3, None, len, Objective), TypeError,
        r"expected an Objective, e\.g\. Objective\(loss_fn, dict\(model",
    ),
    # Eigenvalues.
    wrong(TOP, "k", (7, 0, -1, 1.5, True, "2"), ValueError, "integer from 1 to the 6 parameters"),
    wrong(BLOCKS, "k", COUNTS, ValueError, "expected an integer >= 1"),
    wrong((TOP, BLOCKS), "which", ("LM", "largest", None, 1), ValueError, "expected 'LA'"),
    wrong(SOLVERS, "method", ("arpack", None, 0), ValueError, "expected 'lanczos' or 'power'"),
    wrong(SOLVERS, "tol", (0.0, -1.0, NAN, INF), ValueError, "expected a number > 0"),
    wrong(SOLVERS, "tol", ("1e-2", None, True, ONES), TypeError, "expected a number > 0"),
    wrong(SOLVERS, "rtol", (-0.1, 1.0, NAN, INF), ValueError, "expected a number from 0 to 1"),
    wrong(SOLVERS, "rtol", ("0", None, False), TypeError, "expected a number from 0 to 1"),
    wrong(SOLVERS, "max_hvps", (0, -5, 2.5, "50", None, True), ValueError, "expected at least k"),
    wrong(TOP, "max_hvps", (2,), ValueError, "expected at least k=3 products", k=3),
    wrong(TOP, "max_basis", (5, -1, 8.0, "16", True), ValueError, r"expected at least 2k \+ 4"),
    wrong(TOP, "init", (3, "last", ONES, [ONES]), TypeError, "expected a vector|expected a mapp"),
    wrong(
        TOP, "init", ({"w": 0 * ONES}, {}, {"w": NAN * ONES}), ValueError, "expected a direction",
        names="zero or not finite",
    ),
    wrong(TOP, "hint", (3, "last", ONES, [ONES]), TypeError, "expected a vector"),
    wrong(BLOCKS, "hint", (3, [ONES]), TypeError, "expected a vector"),
    wrong(EDGE_RATIO, "hint", (3, "last", ONES), TypeError, "expected a vector"),
    wrong(BLOCKS, "init", (3, [ONES]), TypeError, "expected a mapping from block to EigenResult"),
    wrong(EDGE_RATIO, "init", (3, "last", ONES), TypeError, "expected a vector"),
    wrong(TOP, "preconditioner", (3, ONES, "adam"), TypeError, "expected a mapping from param"),
    wrong(
        TOP, "preconditioner", ({"w": 0.0}, {"w": -ONES}, {"w": NAN}), ValueError,
        "expected positive entries only", names="its lowest is",
    ),
    wrong(EDGE_RATIO, "edge", (38.0, None, {"w": 1.0}), TypeError, "expected what stability_edge"),
    wrong(EDGE_RATIO, "plain", (9.6, None, ONES), TypeError, "expected what top_eigenvalues ret"),
    wrong(RANDOMS, "generator", (0, "seed", True), TypeError, r"torch\.Generator\(\)\.manual_seed"),
    # Traces and densities.
    wrong(
        (TRACE, FROBENIUS, DENSITY, AVERAGE), "samples", (1, *COUNTS), ValueError,
        "expected an integer >= 2, as one sample has no standard error",
    ),
    wrong((TRACE, BLOCKS), "blocks", (3, "w", ["w"], True), TypeError, "expected a mapping from"),
    wrong(
        (TRACE, BLOCKS), "blocks", ({"v": "first"}, {}), ValueError,
        r"expected a mapping from trainable parameters .* module_blocks\(objective", names="names",
    ),
    wrong(DENSITY, "steps", COUNTS, ValueError, "expected an integer >= 1"),
    wrong(DENSITY, "points", (127, *COUNTS), ValueError, "expected an integer >= 128"),
    wrong(DENSITY, "points", (200,), ValueError, "expected at least .* points", sigma=1e-6),
    wrong(DENSITY, "sigma", (0.0, -1.0, NAN, INF), ValueError, "expected a finite number > 0, or "),
    wrong(DENSITY, "sigma", ("1 %", True, ONES), TypeError, "expected a finite number > 0, or Non"),
    wrong(
        DENSITY, "span", ((1.0, 1.0), (1.0, 0.0), (0.0, INF), (NAN, 1.0), (0.0, 1.0, 2.0), ()),
        ValueError, "expected two finite numbers, the smaller first, or None",
    ),
    wrong(DENSITY, "span", (3.0, "01", ("0", "1")), TypeError, "expected two finite numbers, the"),
    # Sharpness.
    wrong((SAM, WORST), "rho", (0.0, -0.05, NAN, INF), ValueError, "expected a finite number > 0"),
    wrong((SAM, WORST), "rho", ("0.05", True, ONES), TypeError, "expected a finite number > 0"),
    wrong(SAM, "eta", (-1e-3, NAN, INF), ValueError, "expected a number >= 0"),
    wrong(SAM, "eta", ("0", True, None), TypeError, "expected a number >= 0"),
    wrong((SAM, WORST, AVERAGE), "adaptive", (0.5, "no", None), TypeError, "expected True or Fals"),
    wrong(WORST, "norm", ("l1", 2, None, "L2"), ValueError, "expected 'l2' or 'linf'"),
    wrong((WORST, KESKAR), "steps", COUNTS, ValueError, "expected an integer >= 1"),
    wrong(WORST, "per_batch", (1, "mean", None), TypeError, "expected True or False"),
    wrong(KESKAR, "epsilon", (0.0, -1.0, NAN, INF), ValueError, "expected a finite number > 0"),
    wrong(KESKAR, "epsilon", ("1e-3", True, None), TypeError, "expected a finite number > 0"),
    wrong(AVERAGE, "sigma", (0.0, -1.0, NAN, INF), ValueError, "expected a finite number > 0"),
    wrong(AVERAGE, "sigma", ("0.01", True, None), TypeError, "expected a finite number > 0"),
    wrong(CRITICAL, "rtol", (0.0, 1.0, -1, NAN), ValueError, "expected a number above 0 and below"),
    wrong(CRITICAL, "rtol", ("5 %", True, None), TypeError, "expected a number above 0 and below"),
    wrong(CRITICAL, "start", (0.0, -0.1, NAN, INF), ValueError, "expected a finite number > 0, or"),
    wrong(CRITICAL, "start", ("lr", True), TypeError, "expected a finite number > 0, or None"),
    # Directions.
    wrong((ALONG, CRITICAL, NORMALIZE), "direction", NO_VECTOR, TypeError, VECTOR),
    wrong(
        (ALONG, CRITICAL, NORMALIZE), "direction", ({"w": 1.0}, {"w": [1.0]}), TypeError,
        "expected a tensor of the parameter's shape", names="direction['w'] is",
    ),
    wrong(
        (ALONG, CRITICAL, NORMALIZE), "direction", UNKNOWN, ValueError,
        r"no trainable parameter of that name; expected names among \['w'\]", names="'v'",
    ),
    wrong(
        (ALONG, CRITICAL, NORMALIZE), "direction", SHAPED, ValueError,
        r"expected the parameter's shape \(2, 3\)", names="has shape",
    ),
    wrong((RANDOM, NORMALIZE, EDGE, ADD), "params", NO_VECTOR, TypeError, VECTOR),
    wrong(RANDOM, "params", ({"w": 3},), TypeError, "expected a tensor", names="params['w'] is 3"),
    wrong(NORMALIZE, "filter_dims", (1, "w", [0]), TypeError, "as filter_dims_of returns, or None"),
    wrong(
        NORMALIZE, "filter_dims", ({"w": 2}, {"w": -1}, {"w": "0"}, {"w": True}), ValueError,
        "expected a dimension from 0 to 1", names="filter_dims['w']=",
    ),
    wrong(FILTER_DIMS, "module", (NET.weight, None, nn.Linear, "net"), TypeError, "expected a tor"),
    wrong(PCA, "k", COUNTS, ValueError, "expected an integer >= 1"),
    wrong((PCA, PROJECT), "path", (3, "path", {"w": ONES}), TypeError, "expected a list of weight"),
    wrong((PCA, PROJECT), "path", ([3], [[ONES]]), TypeError, VECTOR, names="path[0]"),
    wrong(
        (PCA, PROJECT), "path", ([{"w": torch.ones(2)}],), ValueError, "expected the parameter's s",
        names="path[0]['w'] has shape (2,)",
    ),
    wrong((PCA, PROJECT), "center", NO_VECTOR, TypeError, VECTOR),
    wrong(PROJECT, "directions", (3, [], "xy", None), TypeError, "expected a list of one or more"),
    wrong(
        PROJECT, "directions", ([{"w": ONES}, {"w": ONES}], [{"w": 0 * ONES}]), ValueError,
        "linearly dependent, or one is zero: expected independent ones", names="lengths",
    ),
    wrong(
        PROJECT, "directions", ([{"v": ONES}],), ValueError, "expected names among", names="'v'"
    ),
    wrong(TRAJECTORY, "capacity", (3, 0, 16.0, True, "16", None), ValueError, "an integer >= 4"),
    wrong(ADD, "step", (-1, 1.5, None, True, "3"), ValueError, "expected an integer >= 0"),
    wrong(MODULE_BLOCKS, "names", ("fc.weight", 3, None, [1]), TypeError, "expected the names of "),
    # The optimizer's edge, BatchNorm.
    wrong(
        EDGE, "optimizers", (0.1, None, "sgd", [3]), TypeError, "expected torch optimizers, got",
        names="got",
    ),
    wrong(EDGE, "gradient_norm", (-1.0,), ValueError, "expected a number, the norm of the loss's"),
    wrong(EDGE, "gradient_norm", ("1", True, ONES), TypeError, "expected a number, the norm of th"),
    wrong(EDGE, "gradient", (3, "last", [ONES], ONES), TypeError, "expected a mapping from"),
    wrong(BATCH_NORM, "module", (3, None, nn.BatchNorm1d, ONES), TypeError, "expected a torch.nn"),
    wrong(BATCH_NORM, "forward", (3, None, ONES), TypeError, r"expected a function \(\) that eval"),
]  # fmt: skip


# -- losses and vectors, which are checked only when they are used ---------------------------------


def _call_of(what, **settings):
    def evaluate(loss):
        params = parameters()
        objective = Objective(lambda: loss(params["w"]), params, **settings)
        return getattr(objective, what)(*([{"w": ONES}] if what == "hvp" else []))

    return Call(f"Objective(loss).{what}", evaluate)


_LOSS, _GRADIENT, _HVP = map(_call_of, ("loss", "gradient", "hvp"))
CALLED = (_GRADIENT, _LOSS, _HVP)
_calls = iter(range(10**6))


def no_tensor(w):
    return float(w.sum())


def a_dict(w):
    return {"loss": w.sum()}


def a_vector(w):
    return w.square().sum(0)


def empty(w):
    return w[:0].sum(0)[:0]


def complex_valued(w):
    return w.sum() * 1j


def detached(w):
    return w.detach().sum()


def rounded(w):
    return w.sum().long()


def of_other_weights(w):
    return torch.ones((), requires_grad=True) * 2


def nondeterministic(w):
    return w.sum() * (1 + next(_calls))


def _vector_of(name):
    params = parameters()
    loss = Objective(lambda: params["w"].square().sum(), params)
    return Call(f"objective.{name}", lambda vector: getattr(loss, name)(vector))


USES = tuple(map(_vector_of, ("hvp", "loss_at", "gradient_at")))

LATER = [
    wrong(CALLED, "loss", (no_tensor, a_dict), TypeError, "loss_fn returned .*expected a scalar",
          names="loss_fn returned"),
    wrong(CALLED, "loss", (a_vector, empty), ValueError, r"expected a scalar, e\.g\. loss\.mean",
          names="of shape"),
    wrong(CALLED, "loss", (complex_valued,), TypeError, r"expected a real scalar, e\.g\. loss\.abs",
          names="complex"),
    wrong((_GRADIENT, _HVP), "loss", (detached, rounded), ValueError,
          "detached, rounded to an integer, .* expected one that loss.backward", names="graph"),
    wrong(CALLED, "loss", (nondeterministic,), ValueError,
          "not deterministic: two .* or pass check_deterministic=False", names="gave"),
    wrong(USES, "vector", NO_VECTOR, TypeError, VECTOR),
    wrong(USES, "vector", UNKNOWN, ValueError, "expected names among", names="'v'"),
    wrong(USES, "vector", SHAPED, ValueError, "expected the parameter's shape", names="has shape"),
    wrong(USES, "vector", ({"w": 1.0},), TypeError, "expected a tensor", names="vector['w'] is 1."),
    wrong(USES, "vector", COMPLEX, TypeError, "expected real numbers", names="is complex"),
]  # fmt: skip
