"""The ascent against exact maxima over balls and boxes, and its guarantees for any loss."""

import math
import re

import pytest
import torch

from lightning_landscape.geometry.ascent import Ascent, Endpoint, largest_rise
from lightning_landscape.geometry.eigen import top_eigenvalues
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import sam_sharpness
from lightning_landscape.geometry.worst_case import keskar_sharpness, worst_case_sharpness
from tests.geometry.forms import (
    RaisesAt,
    ReluNetwork,
    ball_maximum,
    box_maximum,
    corners,
)
from tests.oracles import F64, Quadratic, bits, flat, normal, symmetric

SPECTRA = {
    "convex": [5.0, 3.0, 1.0, 0.5, 0.1, 0.0],
    "crowded": [5.0, 4.9, 4.8, 1.0, 0.5, 0.1],
    "saddle": [3.0, 1.0, 0.5, -0.5, -1.0, -2.0],
    "negative dominates": [3.0, 1.0, 0.5, 0.1, -2.0, -20.0],
    "all negative": [-0.5, -1.0, -2.0, -3.0, -4.0, -5.0],
}


def problem_of(spectrum, seed=0, **settings):
    return Quadratic(symmetric(spectrum, seed), seed=seed, **settings)


def objective_of(problem, **settings):
    return Objective(problem.loss, problem.params, check_deterministic=False, **settings)


# -- the ball --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
def test_maximum_over_a_ball(spectrum, rho):
    problem = problem_of(spectrum)
    truth = ball_maximum(problem.A, problem.g(), rho)
    found = worst_case_sharpness(objective_of(problem), rho, steps=400)
    assert found.value == pytest.approx(truth, rel=1e-6)
    # The displacement is where the value was found, and inside.
    d = flat(found.displacement)
    assert float(d.norm()) <= rho * (1 + 1e-12)
    assert problem.value(problem.w() + d) - problem.value(problem.w()) == pytest.approx(
        found.value, rel=1e-9
    )
    short = worst_case_sharpness(objective_of(problem), rho)
    # Twenty steps: with clustered eigenvalues only the value has nearly converged.
    assert 0.998 * truth <= short.value <= truth * (1 + 1e-12)
    # What a multi-step ascent is for: one step falls short of it.
    assert found.value >= sam_sharpness(objective_of(problem), rho).value * (1 - 1e-12)


def test_curvature_near_a_stationary_point():
    problem = problem_of(SPECTRA["convex"])
    minimum = torch.linalg.lstsq(problem.A, -problem.b[:, None]).solution[:, 0]
    problem.A += 1e-3 * torch.eye(6, dtype=F64)
    with torch.no_grad():
        problem.params["w"].copy_(minimum)
    objective = objective_of(problem)
    rho = 100 * float(problem.g().norm())
    truth = ball_maximum(problem.A, problem.g(), rho)
    assert worst_case_sharpness(objective, rho, steps=400).value == pytest.approx(truth, rel=1e-6)
    assert worst_case_sharpness(objective, rho).value > 0.9 * truth
    assert sam_sharpness(objective, rho).value < 0.5 * truth


@pytest.mark.parametrize("spectrum", [[4.0, 2.0, 1.0], [4.0, 1.0, -6.0]])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_at_a_stationary_point(spectrum, norm):
    w = torch.nn.Parameter(torch.zeros(3, dtype=F64))
    values = torch.tensor(spectrum, dtype=F64)
    found = worst_case_sharpness(
        Objective(lambda: (values * w**2).sum() / 2, {"w": w}), 0.3, norm, steps=200
    )
    positive = [v for v in spectrum if v > 0]
    truth = 0.3**2 * (positive[0] if norm == "l2" else sum(positive)) / 2
    assert found.value == pytest.approx(truth, rel=1e-6)


def test_long_ascent_with_nearly_equal_eigenvalues():
    # The moves stay above a millionth of the radius for thousands of steps, ever longer ones.
    w = torch.nn.Parameter(torch.zeros(2, dtype=F64))
    values = torch.tensor([1.0, 0.998], dtype=F64)
    objective = Objective(lambda: (values * w**2).sum() / 2, {"w": w})
    ascent = Ascent(objective, torch.ones_like(w), 1.0, "l2")
    start = ascent.ball_maximizer(normal(2))
    found = ascent.climb(Endpoint(ascent.rise(start), start), 2.0, 4000)
    assert found.height == pytest.approx(0.5, rel=1e-6)
    assert objective.gradients > 1000
    assert objective.forwards <= objective.gradients + 2  # no unnecessary evaluations
    # From the eigenvector a few steps are enough.
    whole = Objective(lambda: (values * w**2).sum() / 2, {"w": w})
    assert worst_case_sharpness(whole, 1.0).value == pytest.approx(0.5, rel=1e-6)


def test_zero_at_a_maximum():
    w = torch.nn.Parameter(torch.zeros(3, dtype=F64))
    values = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    for norm in ("l2", "linf"):
        objective = Objective(lambda: -(values * w**2).sum(), {"w": w})
        found = worst_case_sharpness(objective, norm=norm, steps=4)
        assert found.value == 0.0
        assert not found.displacement["w"].any()


def test_sam_step_that_overshoots():
    # sin(10) < 0 = sin(0): the ascent from the weights finds the top at pi/2 all the same.
    w = torch.nn.Parameter(torch.zeros((), dtype=F64))
    objective = Objective(lambda: torch.sin(w), {"w": w}, check_deterministic=False)
    assert sam_sharpness(objective, 10.0).value < 0
    for norm in ("l2", "linf"):
        found = worst_case_sharpness(objective, 10.0, norm, steps=80)
        assert found.value == pytest.approx(1.0, rel=1e-6)


def test_never_negative_and_at_least_one_sam_step():
    torch.manual_seed(0)
    for seed in range(20):
        x = normal(8, seed=seed)
        w = torch.nn.Parameter(normal(8, seed=seed + 100))
        objective = Objective(
            lambda x=x, w=w: torch.sin(3 * w @ x) + torch.cos(2 * w).sum(), {"w": w}
        )
        for rho in (0.05, 0.5, 2.0):
            step = sam_sharpness(objective, rho).value
            for steps in (1, 2, 5, 20):
                found = worst_case_sharpness(objective, rho, steps=steps).value
                assert found >= max(step, 0.0) - 1e-12
                if steps == 1:
                    assert found == pytest.approx(max(step, 0.0), abs=1e-12)


# -- the box ---------------------------------------------------------------------------------------


def test_maximum_over_a_box_with_diagonal_curvature():
    problem = Quadratic(torch.diag(torch.tensor(SPECTRA["convex"], dtype=F64)))
    for rho in (0.01, 0.3, 3.0):
        truth = box_maximum(problem.A, problem.g(), torch.full((6,), rho, dtype=F64))
        found = worst_case_sharpness(objective_of(problem), rho, "linf", steps=200)
        # A corner near which the gradient points back is left only by a longer way: at large rho
        # the ascent may end at another corner.
        assert found.value <= truth * (1 + 1e-12)
        if rho < 3.0:
            assert found.value == pytest.approx(truth, rel=1e-6)


def test_maximum_over_a_small_box_by_enumeration():
    exact = 0
    for seed in range(20):
        problem = problem_of(SPECTRA["convex"], seed)
        truth = box_maximum(problem.A, problem.g(), torch.full((6,), 0.1, dtype=F64))
        found = worst_case_sharpness(objective_of(problem), 0.1, "linf")
        assert found.value <= truth * (1 + 1e-12)
        assert float(flat(found.displacement).abs().max()) <= 0.1
        # One step to the corner that the gradient points to.
        e = 0.1 * problem.g().sign()
        assert found.value >= float(problem.g() @ e + e @ problem.A @ e / 2) - 1e-12
        exact += found.value >= truth * (1 - 1e-6)
    assert exact >= 16


def test_box_with_negative_curvature():
    # Separable: each weight moves to its own best place, -g/a, or to the side of the box.
    a = torch.tensor([-1.0, -4.0, 2.0], dtype=F64)
    problem = Quadratic(torch.diag(a))
    g, rho = problem.g(), 2.0
    inner = torch.where(a < 0, (-g / a).clamp(-rho, rho), rho * g.sign())
    truth = float(g @ inner + (a * inner**2).sum() / 2)
    found = worst_case_sharpness(objective_of(problem), rho, "linf", steps=2000)
    assert found.value == pytest.approx(truth, rel=1e-4)


# -- starts other than the gradient ----------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_top_eigenvector_orthogonal_to_the_gradient(norm):
    # The gradient is along the second axis for good: its ascent ends at curvature 1.
    w = torch.nn.Parameter(torch.tensor([0.0, 1e-3, 0.0], dtype=F64))
    values = torch.tensor([5.0, 1.0, -1.0], dtype=F64)
    objective = Objective(lambda: (values * w**2).sum() / 2, {"w": w})
    found = worst_case_sharpness(objective, 0.3, norm)
    best = 0.3**2 * (5.0 if norm == "l2" else 5.0 + 1.0) / 2
    assert best <= found.value <= best + 0.3 * 1e-3
    assert abs(float(found.displacement["w"][0])) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_higher_side_of_the_top_eigenvector(norm, adaptive):
    # v^2 - v^3 + v/100: the gradient points to the lower of the two sides, .19 for .29 at 1/2.
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    start = w.detach().clone()

    def loss():
        v = (w - start)[0]
        return v**2 - v**3 + v / 100

    found = worst_case_sharpness(Objective(loss, {"w": w}), 0.5, norm, adaptive=adaptive)
    truth = 0.5**2 + 0.5**3 - 0.5 / 100
    # The edge of the ball, or a bend of the loss on the way along the other axis: there is none.
    assert found.value == pytest.approx(truth, rel=1e-6)


def test_adaptive_starts_along_the_eigenvectors_of_the_scaled_hessian():
    # In units of |w| the second axis has the larger curvature: 1 * 10^2 for 5 * 1^2.
    w = torch.nn.Parameter(torch.tensor([1.0, 10.0], dtype=F64))
    values, start = torch.tensor([5.0, 1.0], dtype=F64), w.detach().clone()
    slope = torch.tensor([1e-3, 0.0], dtype=F64)

    def loss():
        d = w - start
        return (values * d**2).sum() / 2 + slope @ d

    found = worst_case_sharpness(Objective(loss, {"w": w}), 0.1, adaptive=True)
    assert found.value == pytest.approx(0.1**2 * 100 / 2, rel=1e-3)


# -- settled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_settled_where_the_maximum_is_known(norm, adaptive):
    w = torch.nn.Parameter(normal(6))
    slope = normal(6, seed=1)
    linear = Objective(lambda: slope @ w, {"w": w}, check_deterministic=False)
    found = worst_case_sharpness(linear, 0.1, norm, adaptive=adaptive)
    scaled = slope * (w.detach().abs() if adaptive else 1.0)
    assert found.value == pytest.approx(0.1 * float(scaled.norm(2 if norm == "l2" else 1)))
    assert found.settled is True

    problem = problem_of(SPECTRA["convex"])
    found = worst_case_sharpness(objective_of(problem), 0.1, norm, adaptive=adaptive)
    scale = problem.w().abs() if adaptive else torch.ones(6, dtype=F64)
    A, g = scale[:, None] * problem.A * scale, scale * problem.g()
    best = ball_maximum if norm == "l2" else box_maximum
    truth = best(A, g, 0.1 if norm == "l2" else torch.full((6,), 0.1, dtype=F64))
    assert found.value == pytest.approx(truth, rel=1e-6)
    assert found.settled is True


def long_ascent(network, norm, radius, scale, steps=300):
    """The largest rise of four ascents from random starts, in float64."""
    best = 0.0
    for seed in range(4):
        d = normal(len(scale), seed=seed)
        d = radius * (d / d.norm() if norm == "l2" else d.sign())
        for step in range(steps):
            value, gradient = network.rise_and_gradient(scale * d)
            best, gradient = max(best, value), scale * gradient
            length = radius if step < steps // 2 else radius / 10
            if norm == "l2":
                d = d + length * gradient / gradient.norm()
                d = d * min(1.0, radius / float(d.norm()))
            else:
                d = (d + 0.3 * length * gradient.sign()).clamp(-radius, radius)
    return best


class Trained:
    """A classifier of 484 weights after 300 steps."""

    def __init__(self, seed, activation):
        torch.manual_seed(seed)
        sizes = [(8, 16), (16, 16), (16, 4)]
        layers = [layer for i, o in sizes for layer in (torch.nn.Linear(i, o), activation())]
        self.network = torch.nn.Sequential(*layers[:-1]).to(F64)
        self.x = normal(128, 8, seed=seed)
        self.y = (2 * self.x[:, 0]).long().clamp(-1, 2) + 1
        self.params = dict(self.network.named_parameters())
        optimizer = torch.optim.SGD(self.params.values(), lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        self.w = flat(self.params).detach()
        self.base = float(self.loss().detach())

    def loss(self):
        return torch.nn.functional.cross_entropy(self.network(self.x), self.y)

    def rise_and_gradient(self, d):
        parameters = list(self.params.values())
        torch.nn.utils.vector_to_parameters(self.w + d, parameters)
        value = self.loss()
        gradient = torch.autograd.grad(value, parameters)
        torch.nn.utils.vector_to_parameters(self.w, parameters)
        return float(value.detach()) - self.base, torch.cat([g.reshape(-1) for g in gradient])


CASES = [("l2", 0.05, False), ("linf", 0.01, False), ("l2", 0.2, True), ("linf", 0.03, True)]


def test_settled_on_trained_networks():
    settled = []
    for seed, activation in ((1, torch.nn.ReLU), (2, torch.nn.ReLU), (3, torch.nn.Tanh)):
        network = Trained(seed, activation)
        for norm, radius, adaptive in CASES:
            objective = Objective(network.loss, network.params, check_deterministic=False)
            found = worst_case_sharpness(objective, radius, norm, adaptive=adaptive)
            scale = network.w.abs() if adaptive else torch.ones_like(network.w)
            best = long_ascent(network, norm, radius, scale)
            assert found.value >= 0.97 * best or found.settled is False, (seed, norm, adaptive)
            assert objective.gradients + 2 * objective.hvps <= 80
            settled.append(found.settled)
    assert sum(settled) >= 0.75 * len(settled)


def rise_of(loss, size, radius, norm="l2", steps=20):
    w = torch.nn.Parameter(torch.zeros(size, dtype=F64))
    objective = Objective(lambda: loss(w), {"w": w}, check_deterministic=False)
    return largest_rise(objective, torch.ones_like(w), radius, norm, steps)


def test_not_settled_if_every_start_ends_elsewhere():
    # A box and a flat spectrum: hardly two ascents end at the same corner.
    A = normal(60, 60)
    found = rise_of(lambda w: w @ (A @ A.T) @ w, 60, 1.0, "linf")
    assert found.height > 0
    assert not found.settled


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: (w + 3 * w**3).sum(),
        lambda w: (w**2 / 100 + torch.relu(w.abs() - 0.01) ** 2).sum(),
        lambda w: (w**2 + 0.98 * w**6).sum(),
    ],
    ids=["cubic", "flat at the weights only", "steep at the end only"],
)
def test_not_settled_if_the_hessian_does_not_describe_the_ball(loss):
    assert not rise_of(loss, 1, 1.0).settled
    assert rise_of(loss, 1, 0.005).settled


def test_not_settled_before_the_ascent_has_converged():
    A = torch.diag(torch.tensor([1.0, 0.3, 0.1], dtype=F64))
    problem = Quadratic(A)
    with torch.no_grad():
        problem.params["w"].zero_()
    objective = Objective(lambda: problem.loss() * 1.0, problem.params, check_deterministic=False)
    ascent = Ascent(objective, torch.ones(3, dtype=F64), 1.0, "l2")
    top = float(ascent.top(3).eigenvalues[0])
    best = ascent.ball_maximizer(ascent.gradient)
    for _ in range(200):
        best = ascent.ball_maximizer(ascent.slope(best))
    assert ascent.settled(Endpoint(ascent.rise(best), best), top)
    for short in (
        0.9 * best,
        ascent.ball_maximizer(best + torch.tensor([0.0, 0.5, 0.5], dtype=F64)),
    ):
        assert not ascent.settled(Endpoint(ascent.rise(short), short), top)


@pytest.mark.parametrize("steps", [1, 4])
def test_single_ascent_is_never_settled(steps):
    problem = problem_of(SPECTRA["convex"], constant=10.0)
    assert worst_case_sharpness(objective_of(problem), 0.1, steps=steps).settled is False
    assert keskar_sharpness(objective_of(problem), steps=steps).settled is False


def test_keskar_is_settled_like_the_box():
    problem = problem_of(SPECTRA["convex"], constant=10.0)
    assert keskar_sharpness(objective_of(problem), 0.01).settled is True
    w = torch.nn.Parameter(torch.zeros(60, dtype=F64))
    A = normal(60, 60)
    assert keskar_sharpness(Objective(lambda: w @ (A @ A.T) @ w, {"w": w}), 1.0).settled is False


def test_per_batch_is_settled_if_every_batch_is():
    w, A, slope = torch.nn.Parameter(torch.zeros(60, dtype=F64)), normal(60, 60), normal(60, seed=1)
    terms = {"linear": (1.0, lambda: slope @ w), "rough": (1.0, lambda: w @ (A @ A.T) @ w)}
    for names, settled in ((["linear", "linear"], True), (["linear", "rough"], False)):
        objective = Objective([terms[n] for n in names], {"w": w}, check_deterministic=False)
        found = worst_case_sharpness(objective, 1.0, "linf", per_batch=True)
        assert found.settled is settled


# -- per batch ------------------------------------------------------------------------------------


def test_per_batch_is_the_weighted_mean_of_each_batch():
    # Linear losses g_i'w: the worst case in a ball is rho |g_i|, in a box rho sum |g_i|.
    w = torch.nn.Parameter(normal(5))
    slopes, weights = [normal(5, seed=i) for i in (1, 2, 3)], [3.0, 1.0, 4.0]
    terms = [(n, lambda g=g: g @ w) for n, g in zip(weights, slopes, strict=True)]
    objective = Objective(terms, {"w": w}, check_deterministic=False)
    before = bits({"w": w})
    mean = sum(n * g for n, g in zip(weights, slopes, strict=True)) / 8
    for norm, order in (("l2", 2), ("linf", 1)):
        found = worst_case_sharpness(objective, 0.1, norm, per_batch=True)
        truth = (
            sum(n * 0.1 * float(g.norm(order)) for n, g in zip(weights, slopes, strict=True)) / 8
        )
        assert found.value == pytest.approx(truth, rel=1e-9)
        assert found.displacement == {}
        whole = worst_case_sharpness(objective, 0.1, norm)
        assert whole.value == pytest.approx(0.1 * float(mean.norm(order)), rel=1e-9)
        assert whole.value < found.value
    assert bits({"w": w}) == before


def test_per_batch_over_processes():
    # Two processes with shares (3: g1) and (1: g2): each sees the sum of both in its reduction.
    w = torch.nn.Parameter(normal(5))
    slopes, weights = [normal(5, seed=1), normal(5, seed=2)], [3.0, 1.0]
    carried = []

    def share(rank, reduce):
        terms = [(weights[rank], lambda: slopes[rank] @ w)]
        objective = Objective(terms, {"w": w}, reduce=reduce, check_deterministic=False)
        return worst_case_sharpness(objective, 0.1, per_batch=True)

    def keep(tensor):
        carried.append(tensor.clone())
        return tensor

    share(1, keep)
    # Reductions of the rises and of whether they are settled: no process waits for another one.
    assert len(carried) == 2
    others = iter(carried)
    found = share(0, lambda tensor: tensor + next(others))
    truth = (3 * 0.1 * float(slopes[0].norm()) + 0.1 * float(slopes[1].norm())) / 4
    assert found.value == pytest.approx(truth, rel=1e-9)
    assert found.settled is True
    # A rise that is not settled on another process: 0.25 of the weight.
    others = iter([carried[0], carried[1] + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])])
    assert share(0, lambda tensor: tensor + next(others)).settled is False


def test_per_batch_reduces_even_after_an_error():
    problem = problem_of(SPECTRA["crowded"])
    carried = []

    def reduce(tensor):
        carried.append(tensor.clone())
        return tensor

    objective = Objective(
        RaisesAt(problem.loss, 5), problem.params, reduce=reduce, check_deterministic=False
    )
    with pytest.raises(ArithmeticError, match="half way"):
        worst_case_sharpness(objective, per_batch=True)
    assert len(carried) == 1


# -- rescaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adaptive_is_invariant_to_rescaling(norm):
    network = ReluNetwork()
    objective = Objective(network.loss, network.params)

    def both():
        top = float(top_eigenvalues(objective, tol=1e-6, max_hvps=40).eigenvalues[0])
        rises = [
            worst_case_sharpness(objective, 0.02, norm, adaptive=adaptive).value
            for adaptive in (True, False)
        ]
        return *rises, top

    adaptive, plain, top = both()
    network.rescale(3.0)
    adaptive_after, plain_after, top_after = both()
    assert adaptive > 0
    assert adaptive_after == pytest.approx(adaptive, rel=1e-9)
    assert abs(plain_after / plain - 1) > 0.1
    assert abs(top_after / top - 1) > 0.1


def test_adaptive_is_the_ball_in_units_of_the_weights():
    # With d = |w| u the quadratic has slope |w| g and curvature |w| A |w|.
    problem = problem_of(SPECTRA["convex"])
    scale = problem.w().abs()
    scaled = scale[:, None] * problem.A * scale
    truth = ball_maximum(scaled, scale * problem.g(), 0.5)
    found = worst_case_sharpness(objective_of(problem), 0.5, steps=400, adaptive=True)
    assert found.value == pytest.approx(truth, rel=1e-6)
    assert float((flat(found.displacement) / scale).norm()) == pytest.approx(0.5, rel=1e-9)
    assert found.value >= sam_sharpness(objective_of(problem), 0.5, adaptive=True).value - 1e-12


def test_adaptive_keeps_weights_at_zero():
    w = torch.nn.Parameter(torch.tensor([0.0, 2.0], dtype=F64))
    objective = Objective(lambda: (3 * w).sum(), {"w": w})
    found = worst_case_sharpness(objective, 0.1, adaptive=True)
    assert found.displacement["w"].tolist() == pytest.approx([0.0, 0.2])
    assert found.value == pytest.approx(0.6)
    with torch.no_grad():
        w.zero_()
    assert worst_case_sharpness(objective, 0.1, adaptive=True).value == 0.0


# -- Keskar ----------------------------------------------------------------------------------------


def test_keskar_with_diagonal_curvature_at_the_corner_that_the_weights_point_to():
    a = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=F64)
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.3, -0.1], dtype=F64))
    objective = Objective(lambda: (a * w**2).sum() / 2, {"w": w})
    for epsilon in (1e-3, 5e-4, 0.1):
        found = keskar_sharpness(objective, epsilon)
        z = w.detach().sign() * epsilon * (w.detach().abs() + 1)
        base = float((a * w.detach() ** 2).sum() / 2)
        rise = float((a * (w.detach() + z) ** 2).sum() / 2) - base
        assert found.value == pytest.approx(100 * rise / (1 + base), rel=1e-6)
        assert found.displacement["w"].tolist() == pytest.approx(z.tolist())


def test_keskar_by_enumeration():
    problem = problem_of(SPECTRA["convex"], constant=10.0)
    sides = 0.01 * (problem.w().abs() + 1)
    rise = box_maximum(problem.A, problem.g(), sides)
    truth = 100 * rise / (1 + problem.value(problem.w()))
    assert len(corners(6)) == 64
    assert keskar_sharpness(objective_of(problem), 0.01).value == pytest.approx(truth, rel=1e-6)


def test_keskar_of_a_loss_below_minus_one_has_a_reason():
    problem = problem_of(SPECTRA["convex"], constant=-100.0)
    found = keskar_sharpness(objective_of(problem))
    assert math.isnan(found.value)
    assert "divides by 1 + L" in found.note
    assert found.settled is None


# -- costs and contracts ---------------------------------------------------------------------------


def test_costs():
    problem = problem_of(SPECTRA["crowded"])
    objective = objective_of(problem)
    before = bits(problem.params)
    worst_case_sharpness(objective, rho=20.0, steps=4)
    # L(w), four points; the gradient at w and at all points but the last.
    assert (objective.forwards, objective.gradients, objective.hvps) == (5, 4, 0)
    assert bits(problem.params) == before

    batches = Objective([(1.0, problem.loss)] * 3, problem.params, check_deterministic=False)
    worst_case_sharpness(batches, rho=20.0, steps=4, per_batch=True)
    assert (batches.forwards, batches.gradients) == (5, 4)  # of all three batches

    for steps in (5, 7, 20, 100):
        for rho in (0.05, 20.0):
            for norm in ("l2", "linf"):
                objective = objective_of(problem)
                worst_case_sharpness(objective, rho, norm, steps)
                assert objective.gradients + 2 * objective.hvps <= 4 * steps
                assert objective.hvps <= 0.4 * steps
        assert bits(problem.params) == before

    objective = objective_of(problem)
    worst_case_sharpness(objective, rho=0.05, steps=1000)
    assert objective.forwards < 30  # it ends when the point no longer changes

    corner = Quadratic(torch.diag(torch.tensor([4.0, 2.0], dtype=F64)))
    objective = objective_of(corner)
    keskar_sharpness(objective, steps=4)
    # L(w) and the corner, where the gradient points out: nothing more to try.
    assert (objective.forwards, objective.gradients) == (2, 2)


def test_loss_that_is_not_finite():
    w = torch.nn.Parameter(torch.ones(2, dtype=F64))
    for broken in (math.nan, math.inf):
        objective = Objective(lambda b=broken: (w**2).sum() * b, {"w": w})
        for found in (worst_case_sharpness(objective), keskar_sharpness(objective)):
            assert math.isnan(found.value)
            assert found.settled is None
            assert found.note == "the loss or its gradient at the weights is not finite"


def test_infinite_losses_in_the_ball():
    w = torch.nn.Parameter(torch.tensor(1.0, dtype=F64))
    before = bits({"w": w})
    # -log(1.04 - w) beyond the wall is NaN: the ascent keeps to this side of it.
    objective = Objective(lambda: -torch.log(1.04 - w), {"w": w})
    found = worst_case_sharpness(objective, 0.05, steps=60)
    assert 1.0 < found.value < math.inf
    wall = Objective(lambda: w + torch.where(w > 1.04, math.inf, 0.0), {"w": w})
    assert worst_case_sharpness(wall, 0.05).value == math.inf
    assert bits({"w": w}) == before


@pytest.mark.parametrize("call", [2, 3, 4, 8])
@pytest.mark.parametrize("per_batch", [False, True])
def test_weights_are_restored_after_an_error(call, per_batch):
    problem = problem_of(SPECTRA["convex"])
    before = bits(problem.params)
    loss = RaisesAt(problem.loss, call)
    objective = Objective(loss, problem.params, check_deterministic=False)
    with pytest.raises(ArithmeticError, match="half way"):
        worst_case_sharpness(objective, per_batch=per_batch)
    assert bits(problem.params) == before


def test_definitions_describe_the_arguments():
    objective = objective_of(problem_of(SPECTRA["convex"], constant=10.0))
    plain = worst_case_sharpness(objective, 0.1, steps=3).definition
    assert plain == "worst case in an l2 ball of radius 0.1, 3 ascent steps"
    box = worst_case_sharpness(objective, 0.1, "linf", 3, per_batch=True, adaptive=True).definition
    assert box == "worst case in an linf ball of radius 0.1 |w|, 3 ascent steps, one batch a group"
    keskar = keskar_sharpness(objective, 5e-4, steps=3).definition
    assert keskar == "Keskar, epsilon 0.0005, 3 ascent steps, per cent of 1 + L"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rho": 0.0}, "rho=0.0: expected a finite number > 0"),
        ({"rho": math.inf}, "rho=inf: expected a finite number > 0"),
        ({"norm": "l1"}, "norm='l1': expected 'l2' or 'linf'"),
        ({"steps": 0}, "steps=0: expected an integer >= 1"),
        ({"steps": 2.5}, "steps=2.5: expected an integer >= 1"),
    ],
)
def test_invalid_arguments(wrong, message):
    objective = objective_of(problem_of(SPECTRA["convex"]))
    with pytest.raises(ValueError, match=re.escape(message)):
        worst_case_sharpness(objective, **wrong)
    assert objective.forwards == objective.gradients == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": -1.0}, "epsilon=-1.0: expected a finite number > 0"),
        ({"steps": 0}, "steps=0: expected an integer >= 1"),
    ],
)
def test_invalid_arguments_of_keskar(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        keskar_sharpness(objective_of(problem_of(SPECTRA["convex"])), **wrong)
