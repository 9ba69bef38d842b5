"""Values on a GPU against dense Hessians and losses in float64 on the CPU."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_landscape.geometry import (
    Objective,
    average_sharpness,
    curvature_along,
    hessian_trace,
    line_slice,
    random_direction,
    sam_sharpness,
    spectral_density,
    top_eigenvalues,
)
from tests.gpu.networks import NETWORKS, flat_loss, hessian, trained
from tests.oracles import flat, named

pytestmark = pytest.mark.gpu

# In float32 products with images are made with 11 bits, as training has them; losses with all 24.
PRODUCTS, LOSSES = 1e-2, 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_in_float64(name):
    """Every column by a product, whatever kernels the loss is made of."""
    exact = trained(name)
    matrix = hessian(exact)
    problem = exact.to("cuda", torch.float64)
    objective = Objective(problem.loss, problem.params)
    sizes = [p.numel() for p in problem.params.values()]
    columns = []
    for unit in torch.eye(len(matrix), dtype=torch.float64, device="cuda"):
        pieces = zip(problem.params.items(), unit.split(sizes), strict=True)
        columns.append(flat(objective.hvp({n: t.view(p.shape) for (n, p), t in pieces})).cpu())
    torch.testing.assert_close(torch.stack(columns), matrix, rtol=1e-8, atol=1e-9)
    assert objective.engine_used == "double_backward"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_of_monitors(name, dtype):
    exact = trained(name)
    matrix, (loss_of, w) = hessian(exact), flat_loss(exact)
    (gradient,) = torch.autograd.grad(loss_of(w.requires_grad_()), w)
    w = w.detach()
    problem = exact.to("cuda", dtype)
    objective = Objective(problem.loss, problem.params)
    rel, rel_loss = (1e-7, 1e-7) if dtype == torch.float64 else (PRODUCTS, LOSSES)

    spectrum = torch.linalg.eigvalsh(matrix)
    found = top_eigenvalues(objective, tol=1e-5, max_hvps=200)
    assert float(found.eigenvalues[0]) == pytest.approx(float(spectrum[-1]), rel=rel)
    lowest = top_eigenvalues(objective, which="SA", tol=1e-5, max_hvps=200).eigenvalues[0]
    assert float(lowest) == pytest.approx(
        float(spectrum[0]), rel=rel, abs=rel * float(spectrum[-1])
    )

    rounding = 4 * torch.finfo(dtype).eps * float(loss_of(w))  # of a difference of two losses
    for rho in (0.05, 1e-3):
        rise = float(loss_of(w + rho * gradient / gradient.norm()) - loss_of(w))
        assert sam_sharpness(objective, rho).value == pytest.approx(
            rise, rel=rel_loss, abs=rounding
        )
    along = float(gradient @ matrix @ gradient / (gradient @ gradient))
    assert curvature_along(objective, objective.gradient()) == pytest.approx(along, rel=rel)

    d = random_direction(problem.params, generator=torch.Generator().manual_seed(1))
    line = line_slice(objective, d, resolution=5)
    away = flat(d).cpu().double()
    expected = [float(loss_of(w + a * away)) for a in torch.linspace(-1, 1, 5).tolist()]
    assert line.losses.tolist() == pytest.approx(expected, rel=rel_loss / 100)


def test_estimates_agree_with_exact_values():
    """Within three of their standard errors."""
    exact = trained("images")
    matrix = hessian(exact)
    problem = exact.to("cuda", torch.float32)
    objective = Objective(problem.loss, problem.params)
    trace = hessian_trace(objective, samples=64)
    assert abs(trace.value - float(matrix.trace())) < 3 * trace.stderr

    (loss_of, w), sigma = flat_loss(exact), 0.05
    noise = sigma * torch.randn(200, len(w), generator=torch.Generator().manual_seed(5)).double()
    rises = torch.stack([(loss_of(w + d) + loss_of(w - d)) / 2 - loss_of(w) for d in noise])
    average = average_sharpness(objective, sigma=sigma, samples=64)
    spread = math.hypot(average.stderr, float(rises.std()) / len(rises) ** 0.5)
    assert abs(average.value - float(rises.mean())) < 3 * spread

    density = spectral_density(objective, samples=16)
    means = (density.ritz_values * density.ritz_weights).sum(1)  # v'Hv/v'v: the trace over n
    standard_error = float(means.std()) / len(means) ** 0.5
    assert abs(float(means.mean()) - float(matrix.trace()) / len(matrix)) < 3 * standard_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_under_autocast(dtype):
    """Along the top eigenvector."""
    exact = trained("dense", 128)
    values, vectors = torch.linalg.eigh(hessian(exact))
    problem = exact.to("cuda", torch.float32)

    def loss():
        with torch.autocast("cuda", dtype):
            return problem.loss()

    top = named(vectors[:, -1], problem.params)
    product = flat(Objective(loss, problem.params).hvp(top)).cpu().double()
    error = product - values[-1] * vectors[:, -1]
    assert float(error.norm()) < 0.02 * float(values[-1])


def waits(call):
    """How often the host waits for the device in ``call()``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len([w for w in caught if "synchronizing" in str(w.message)])


def test_slice_does_not_read_losses_per_point():
    problem = trained("images").to("cuda", torch.float32)
    objective = Objective(problem.loss, problem.params)
    direction = random_direction(problem.params)

    def points(count):
        return waits(lambda: objective.losses_at([direction], [(0.1 * i,) for i in range(count)]))

    points(3)
    assert points(30) == points(3)


def test_product_synchronizes_once():
    """To check that the weights have not changed."""
    problem = trained("images").to("cuda", torch.float32)
    objective = Objective(problem.loss, problem.params)
    vector = objective.gradient(products_follow=True)
    objective.hvp(vector)
    assert waits(lambda: objective.hvp(vector)) <= 1
