"""A complex parameter equals two real ones: all results are those of the real loss."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_landscape.geometry import (
    Objective,
    Trajectory,
    average_sharpness,
    block_eigenvalues,
    critical_sharpness,
    edge_ratio,
    filter_normalize,
    hessian_frobenius,
    hessian_trace,
    keskar_sharpness,
    line_between,
    line_slice,
    pca_directions,
    project,
    random_direction,
    sam_sharpness,
    spectral_density,
    stability_edge,
    top_eigenvalues,
    worst_case_sharpness,
)
from tests.oracles import F64, bits, close, flat, generator, named, normal

RATE = 0.05


class Twin:
    """A network whose middle weight is complex, or the same with a real weight in its place.

    The weight before it has an odd number of entries, so that the complex ones begin at an odd
    place of a flat vector.
    """

    def __init__(self, is_complex, dtype=F64):
        weights = {"first": normal(3, 1, seed=1), "middle": normal(3, 4, 2, seed=2)}
        self.params = {name: Parameter(weight.to(dtype)) for name, weight in weights.items()}
        if is_complex:
            self.params["middle"] = Parameter(torch.view_as_complex(self.params["middle"].data))
        self.params["last"] = Parameter(normal(4, seed=3).to(dtype))
        self.x, self.y = normal(8, 3, seed=4).to(dtype), normal(8, seed=5).to(dtype)

    def loss(self):
        first, middle, last = self.params.values()
        waves = torch.fft.fft(self.x * first.T, dim=1)
        out = waves @ (middle if middle.is_complex() else torch.complex(*middle.unbind(-1)))
        return (((out.abs().square() + out.imag) @ last / 10).tanh() - self.y).square().mean()

    def objective(self, **options):
        return Objective(self.loss, self.params, **options)

    def vector(self, numbers):
        """A vector given by its real entries."""
        found = named(numbers, parts({n: p.detach() for n, p in self.params.items()}))
        if self.params["middle"].is_complex():
            found["middle"] = torch.complex(*found["middle"].unbind(-1))
        return found


def parts(vector):
    """The same with real entries only."""
    return {n: torch.view_as_real(v) if v.is_complex() else v for n, v in vector.items()}


def entries(vector):
    """The real entries, one after the other."""
    return flat(parts(vector))


def optimizer_of(twin, kind):
    optimizer = kind(twin.params.values(), lr=RATE)
    for _ in range(3):
        optimizer.zero_grad()
        twin.loss().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
def test_derivatives(engine):
    """Against autograd's Hessian of the real parameters, column by column."""
    twin, other = Twin(True), Twin(False)
    objective, weights = twin.objective(engine=engine), other.params

    def loss(w):
        other.params = named(w, weights)
        return other.loss()

    w = flat(weights).detach()
    close(objective.loss(), loss(w))
    close(entries(objective.gradient()), torch.func.grad(loss)(w))
    hessian, identity = torch.func.hessian(loss)(w), torch.eye(len(w), dtype=F64)
    exact = 1e-12 if engine == "double_backward" else 1e-6
    columns = [entries(objective.hvp(twin.vector(row))) for row in identity]
    close(torch.stack(columns), hessian, exact)
    with objective.products() as product:
        close(torch.stack([product(row) for row in identity]), hessian, exact)
    assert objective.engine_used == engine
    move = normal(len(w), seed=6)
    close(objective.loss_at(twin.vector(move)), loss(w + move))
    close(entries(objective.gradient_at(twin.vector(move))), torch.func.grad(loss)(w + move))


def line_of(twin):
    u = filter_normalize(random_direction(twin.params, generator=generator(1)), twin.params)
    return torch.from_numpy(line_slice(twin.objective(), u, resolution=5).losses)


def ratio_of(kind):
    def ratio(twin):
        optimizer = optimizer_of(twin, kind)
        objective = twin.objective()
        edge = stability_edge(optimizer, twin.params)
        plain = top_eigenvalues(objective, tol=1e-8)
        return edge_ratio(objective, edge, plain, tol=1e-8, max_hvps=300).ratio

    return ratio


def path_of(twin):
    path, optimizer = Trajectory(), torch.optim.SGD(twin.params.values(), lr=RATE)
    for step in range(6):
        path.add(step, twin.params)
        optimizer.zero_grad()
        twin.loss().backward()
        optimizer.step()
    found = pca_directions(path.weights, twin.params)
    return torch.cat([entries(d) for d in found]), project(path.weights, twin.params, found)


def way_of(twin):
    start = {name: p.detach().clone() for name, p in twin.params.items()}
    optimizer_of(twin, torch.optim.SGD)
    line = line_between(twin.objective(), start, twin.params, resolution=5)
    return torch.from_numpy(line.losses)


QUANTITIES = {
    "eigenvalue": lambda t: top_eigenvalues(t.objective(), 2, tol=1e-8, max_hvps=200).eigenvalues,
    "power": lambda t: top_eigenvalues(t.objective(), method="power", tol=1e-3).eigenvalues,
    "blocks": lambda t: torch.cat(
        [r.eigenvalues for r in block_eigenvalues(t.objective(), k=2, max_hvps=100).values()]
    ),
    "trace": lambda t: hessian_trace(t.objective(), samples=5, generator=generator(0)).value,
    "frobenius": lambda t: hessian_frobenius(t.objective(), 5, generator=generator(0)).value,
    "density": lambda t: spectral_density(t.objective(), 2, 8, generator=generator(0)).density,
    "sam": lambda t: sam_sharpness(t.objective()).value,
    "worst_case": lambda t: worst_case_sharpness(t.objective(), steps=5).value,
    "keskar": lambda t: keskar_sharpness(t.objective(), steps=5).value,
    "average": lambda t: average_sharpness(t.objective(), samples=5).value,
    "critical": lambda t: (
        critical_sharpness(
            t.objective(), {n: -g for n, g in t.objective().gradient().items()}
        ).value
    ),
    "path": lambda t: path_of(t)[0],
    "projection": lambda t: path_of(t)[1].coordinates,
    "way": way_of,
    "line": line_of,
    "sgd": ratio_of(torch.optim.SGD),
    "adam": ratio_of(torch.optim.Adam),
    "rmsprop": ratio_of(torch.optim.RMSprop),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_quantities(name):
    found, expected = (torch.as_tensor(QUANTITIES[name](Twin(k))) for k in (True, False))
    assert expected.isfinite().all()
    assert expected.abs().max() > 1e-6
    close(found.to(F64), expected.to(F64), 1e-7)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_weights_are_restored_and_changes_detected(dtype):
    z = Parameter(torch.tensor([1e4 + 0.1j, complex(-0.0, 1e-4)], dtype=dtype))
    objective = Objective(lambda: (z.abs() ** 2).sum(), {"z": z})
    before, v = bits(parts({"z": z})), {"z": torch.tensor([0.7 - 0.3j, 0.1j], dtype=dtype)}
    objective.loss_at(v)
    objective.losses_at([v, v], [(0.3, 0.1), (-0.2, 5.0)])
    assert bits(parts({"z": z})) == before
    assert objective.hvp(v)["z"].dtype == dtype
    close(objective.hvp(v)["z"], 2 * v["z"], 1e-6)
    for part in (z.data.imag, z.data.real):
        part.mul_(3)  # leaves no trace in the version counter
        close(objective.gradient()["z"], 2 * z.detach(), 1e-6)


def test_adaptive_steps_scale_with_the_modulus():
    """``L = |z|^2/2``: g = z, so that the ascent is ``e = rho |z|^2 z / ||(|z| z)||``."""
    z = Parameter(torch.tensor([3.0 + 4.0j, 1.0 - 1.0j, 0.5j], dtype=torch.complex128))
    found = sam_sharpness(
        Objective(lambda: (z.abs() ** 2).sum() / 2, {"z": z}), rho=0.1, adaptive=True
    )
    size = z.detach().abs().numpy()
    e = 0.1 * size**3 / np.linalg.norm(size**2)
    assert found.value == pytest.approx(float((size * e + e**2 / 2).sum()), rel=1e-12)


def test_complex_vector_over_real_weights():
    twin = Twin(False)
    with pytest.raises(TypeError, match=r"vector\['last'\] is complex: expected real numbers"):
        twin.objective().hvp({"last": torch.ones(4, dtype=torch.complex128)})
