"""The same Hessian by independent libraries, curvlinops and hessian-eigenthings.

Both compute products in another way than this package: curvlinops forward over reverse,
hessian-eigenthings on a graph rebuilt at every product.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from lightning_landscape.geometry import Objective, hessian_trace, top_eigenvalues
from tests.geometry.networks import NETWORKS
from tests.oracles import flat, named, normal

INSTALL = (
    "install the peers: pip install --no-deps -c constraints.txt -r requirements-peers.txt, then "
    "pip install -c constraints.txt einops opt-einsum jaxtyping tqdm"
)
K, SAMPLES = 3, 300

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=NETWORKS)
def problem(request):
    """A tanh network, a CNN with BatchNorm in eval mode, attention; all in float64."""
    return NETWORKS[request.param]()


def written_out(problem):
    """Its module with attention in plain operations: the fused kernel has no forward mode."""
    module = copy.deepcopy(problem.module)
    if hasattr(module, "fused"):
        module.fused = False
    return module


def by_curvlinops(problem):
    curvlinops = pytest.importorskip("curvlinops", reason=INSTALL)
    module, data = written_out(problem), [(problem.x, problem.y)]
    return curvlinops.HessianLinearOperator(
        module, nn.CrossEntropyLoss(), list(module.parameters()), data
    )


def by_eigenthings(problem):
    peer = pytest.importorskip("hessian_eigenthings", reason=INSTALL)

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    operator = peer.HessianOperator(written_out(problem), [(problem.x, problem.y)], loss)
    return peer, operator


def objective(problem):
    return Objective(problem.loss, problem.params)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_extreme_eigenvalues(problem, which):
    """Agreement with the dense Hessian and with both, each by its own products and solver."""
    ours = top_eigenvalues(objective(problem), K, which=which, tol=1e-6, max_hvps=200)
    assert ours.converged
    exact = torch.linalg.eigvalsh(problem.hessian)
    exact = exact.flip(0)[:K] if which == "LA" else exact[:K]
    operator = by_curvlinops(problem).to_scipy()
    values = eigsh(operator, K, which=which, tol=1e-10, return_eigenvectors=False)
    curvlinops = torch.tensor(sorted(values, reverse=which == "LA"))
    peer, operator = by_eigenthings(problem)
    steps = min(60, operator.size)
    eigenthings = peer.lanczos(operator, k=K, max_iter=steps, which=which, reorthogonalize=True)

    scale = float(exact.abs().max())  # the smallest ones may lie near zero
    peers = {"curvlinops": curvlinops, "hessian-eigenthings": eigenthings.eigenvalues}
    for name, found in {"the dense Hessian": exact, **peers}.items():
        torch.testing.assert_close(
            ours.eigenvalues,
            found,
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda text, name=name: f"against {name}: {text}",
        )


def test_products(problem):
    """Hv itself, to rounding."""
    operator = by_curvlinops(problem)
    _, other = by_eigenthings(problem)
    vector = normal(operator.shape[1], seed=3)
    ours = flat(objective(problem).hvp(named(vector, problem.params)))
    torch.testing.assert_close(ours, operator @ vector, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, other.matvec(vector), rtol=1e-9, atol=1e-12)


def test_trace(problem):
    """Ours within three standard errors of the exact trace, and of Hutchinson by the peer."""
    operator = by_curvlinops(problem)
    exact = float((operator @ torch.eye(operator.shape[1], dtype=torch.float64)).trace())
    assert exact == pytest.approx(float(problem.hessian.trace()), rel=1e-9)
    ours = hessian_trace(objective(problem), SAMPLES)
    assert ours.stderr < 0.2 * abs(exact)  # otherwise the check would be weak
    assert abs(ours.value - exact) <= 3 * ours.stderr
    peer, other = by_eigenthings(problem)
    theirs = peer.hutchinson(other, num_samples=SAMPLES, seed=0)
    assert abs(ours.value - theirs.estimate) <= 3 * math.hypot(ours.stderr, theirs.stderr)
    # Signs on both sides: the two standard errors estimate one number.
    assert ours.stderr == pytest.approx(theirs.stderr, rel=0.25)
