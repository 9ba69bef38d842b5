"""Results do not depend on the user's default device: small internal tensors stay on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_landscape.geometry import (
    Objective,
    Trajectory,
    average_sharpness,
    block_eigenvalues,
    critical_sharpness,
    filter_normalize,
    hessian_frobenius,
    hessian_trace,
    keskar_sharpness,
    pca_directions,
    plane_slice,
    project,
    random_direction,
    sam_sharpness,
    spectral_density,
    top_eigenvalues,
    worst_case_sharpness,
)


class Problem:
    def __init__(self):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5)
        self.net = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        self.x, self.y = torch.randn(20, 4), torch.arange(20) % 3
        self.params = dict(self.net.named_parameters())
        self.objective = Objective(self.loss, self.params)

    def loss(self):
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def direction(self, seed):
        return random_direction(self.params, generator=torch.Generator("cpu").manual_seed(seed))

    def downhill(self):
        return {name: -slope for name, slope in self.objective.gradient().items()}

    def plane(self):
        directions = [filter_normalize(self.direction(seed), self.params) for seed in (1, 2)]
        return plane_slice(self.objective, *directions, resolution=3).losses.tolist()

    def trajectory(self):
        path, along, beside = Trajectory(), self.direction(1), self.direction(2)
        for step in range(4):
            shift = {n: 0.1 * step * along[n] + 0.01 * step**2 * beside[n] for n in along}
            path.add(step, {n: p.detach() + shift[n] for n, p in self.params.items()})
        directions = pca_directions(path.weights, self.params)
        assert len(directions) == 2
        return project(path.weights, self.params, directions).coordinates.tolist()


MEASURES = {
    "Lanczos": lambda p: top_eigenvalues(p.objective, 2).eigenvalues.tolist(),
    "power iteration": lambda p: top_eigenvalues(p.objective, method="power").eigenvalues.tolist(),
    "blocks": lambda p: [
        r.eigenvalues.tolist()
        for r in block_eigenvalues(p.objective, {n: n for n in p.params}).values()
    ],
    "trace": lambda p: hessian_trace(p.objective, 4).value,
    "Frobenius": lambda p: hessian_frobenius(p.objective, 4).value,
    "density": lambda p: spectral_density(p.objective, samples=2, sigma=0.1).density.tolist(),
    "SAM": lambda p: sam_sharpness(p.objective).value,
    "average": lambda p: average_sharpness(p.objective, samples=3).value,
    "worst case": lambda p: worst_case_sharpness(p.objective).value,
    "Keskar": lambda p: keskar_sharpness(p.objective).value,
    "critical": lambda p: critical_sharpness(p.objective, p.downhill()).value,
    "plane": Problem.plane,
    "trajectory": Problem.trajectory,
}


@pytest.mark.parametrize("name", MEASURES)
def test_values_do_not_depend_on_the_default_device(name):
    """Tensors created on ``meta`` have no values: using them raises, or gives no value."""
    expected = MEASURES[name](Problem())
    problem = Problem()
    with torch.device("meta"):
        assert MEASURES[name](problem) == expected
