"""The search for missed eigenvalues: sequences of known spectra, tolerances, scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lightning_landscape.geometry import top_eigenvalues
from lightning_landscape.geometry.lanczos import Start, Tolerance, _State
from tests.geometry.forms import Matrix, spread
from tests.oracles import F64, orthogonal, symmetric

RTOL = 5e-3
METHODS = {"lanczos": {"rtol": RTOL, "max_hvps": 50}, "power": {"method": "power", "max_hvps": 200}}


def blocks(tops, size=40):
    """Decoupled blocks, each with one large eigenvalue of its own on the same vector throughout."""
    parts = []
    for seed, top in enumerate(tops):
        basis = orthogonal(size, seed)
        bulk = 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
        bulk[0] = top
        parts.append(basis * bulk @ basis.T)
    return torch.block_diag(*parts)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_entry_that_jumps_is_found_within_three_solutions(settings):
    """Its direction is orthogonal to all retained vectors."""
    diagonal = 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=F64)
    diagonal[:3] = torch.tensor([5.0, 4.0, 3.0])
    result = top_eigenvalues(Matrix(torch.diag(diagonal)), **settings)
    assert float(result.eigenvalues) == pytest.approx(5.0, rel=RTOL)
    diagonal[50] = 15.0
    for _ in range(3):
        result = top_eigenvalues(Matrix(torch.diag(diagonal)), init=result, **settings)
    assert float(result.eigenvalues) == pytest.approx(15.0, rel=RTOL)
    assert result.checked


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_eigenvalue_that_rises_in_a_decoupled_block(settings):
    """The second of four blocks overtakes slowly, the third in a jump; all within 5 %."""
    result, off = None, 0
    for frame in range(30):
        tops = (5.0, 0.4 + 0.3 * frame, 0.2 if frame < 20 else 20.0, 2.0)
        result = top_eigenvalues(Matrix(blocks(tops)), init=result, **settings)
        assert result.converged
        off += abs(float(result.eigenvalues) / max(tops) - 1) > 0.05
    assert off <= 1


@pytest.mark.parametrize(("second", "ends"), [(0.5, True), (4.9, False)])
def test_unfinished_search_is_not_marked_as_checked(second, ends):
    """Five products are enough if all other eigenvalues are far below, but not in a cluster."""
    others = torch.linspace(-second, second, 59, dtype=torch.float64).tolist()
    matrix = symmetric([5.0, *others])
    start = top_eigenvalues(Matrix(matrix), tol=1e-6, max_hvps=60)
    same = top_eigenvalues(Matrix(matrix), init=start, max_hvps=1)
    assert same.converged
    assert not same.checked  # no product was left for one
    later = top_eigenvalues(Matrix(matrix), init=start, max_hvps=20)
    assert later.converged
    assert later.hvps <= 6
    assert later.checked is ends


def test_search_is_longer_after_a_value_has_moved():
    """The retained vectors contain little information about a matrix that has changed so much."""
    values = [5.0, *torch.linspace(-0.5, 0.5, 59, dtype=torch.float64).tolist()]
    start = top_eigenvalues(Matrix(symmetric(values)), tol=1e-6, max_hvps=60)
    for scale, fewest in ((1.0, 2), (1.2, 2), (1.5, 5), (0.6, 5)):
        found = top_eigenvalues(Matrix(scale * symmetric(values)), init=start)
        assert found.hvps == fewest, scale
        assert float(found.eigenvalues[0]) == pytest.approx(5.0 * scale, rel=1e-6)


def test_equal_solutions_draw_different_random_vectors():
    """A search that began at the same vector each time would miss the same things each time."""
    values = [5.0, *torch.linspace(-0.5, 0.5, 59, dtype=F64).tolist()]
    first = top_eigenvalues(Matrix(symmetric(values)), tol=1e-6, max_hvps=60)
    drawn = []

    class Seen(Matrix):
        def hvp(self, vector):
            drawn.append(vector["w"] / vector["w"].norm())
            return super().hvp(vector)

    for warm_starts in (0, 1):  # without a vector of the last search both are random alone
        start = dataclasses.replace(first, outside=None, warm_starts=warm_starts)
        assert top_eigenvalues(Seen(symmetric(values)), init=start).warm_starts == warm_starts + 1
    half = len(drawn) // 2
    assert abs(float(drawn[0] @ drawn[half])) == pytest.approx(1.0)  # that of the last solution
    assert abs(float(drawn[1] @ drawn[half + 1])) < 0.5


def test_hint_is_used():
    """A direction in 2,000 dimensions, to which random vectors are nearly orthogonal."""
    diagonal = torch.zeros(2000, dtype=F64)
    diagonal[0] = 1.0
    first = top_eigenvalues(Matrix(torch.diag(diagonal)))
    diagonal[7] = 1.2
    hint = {"w": torch.eye(2000, dtype=F64)[7]}
    found = top_eigenvalues(Matrix(torch.diag(diagonal)), init=first, hint=hint, max_hvps=4)
    assert float(found.eigenvalues) == pytest.approx(1.2, rel=1e-2)


# -- tolerances ----------------------------------------------------------------------------------


def long_end(random):
    values = 0.1 * random.standard_normal(300)
    count = random.integers(1, 5)
    values[:count] = -100 * random.uniform(0.3, 1, count)
    values[count : count + 7] = [3.0, *random.uniform(0.5, 2.9, 6)]
    return values


def below_a_long_end(random):
    values = random.uniform(-0.3, 0.3, 300)
    values[:5] = random.uniform(5, 10, 5)
    return values


def multiple(random):
    values = 0.1 * random.standard_normal(300)
    values[: random.integers(5, 8)] = 5.0
    return values


def test_tolerances_are_relative_to_each_value_or_the_floor():
    tolerance = Tolerance(tol=1e-2, rtol=5e-3)
    values = torch.tensor([50.0, -3.0, 0.01], dtype=F64)
    # 1e-2 of 50; of the others less than 1e-3 of 100, the largest in magnitude.
    assert tolerance.residual(values, 100.0).tolist() == pytest.approx([0.5, 0.1, 0.1])
    assert tolerance.error(values, 100.0).tolist() == pytest.approx([0.25, 0.1, 0.1])
    fine = Tolerance(tol=1e-6, rtol=0.0)
    assert fine.residual(values, 100.0).tolist() == pytest.approx([1e-4, 1e-4, 1e-4])
    assert fine.error(values, 100.0).tolist() == [0.0, 0.0, 0.0]


class Pairs:
    """Ritz pairs with known residuals, in the place of a space."""

    def __init__(self, values, lengths):
        self.values, self.lengths = (torch.tensor(v, dtype=F64) for v in (values, lengths))

    def solve(self, count):
        """The pairs are given."""

    def residuals(self, indices):
        return torch.diag(self.lengths)[list(indices)]


@pytest.mark.parametrize(("length", "converged"), [(0.55, True), (0.65, False)])
def test_no_error_estimate_for_an_inaccurate_vector(length, converged):
    """The estimate residual^2 / gap is below 5e-3 of 3 in both, because of the gap of 103."""
    tolerance = Tolerance(tol=1e-2, rtol=5e-3)
    assert length**2 / 103 < 5e-3 * 3
    state = _State(Pairs([3.0, -100.0], [length, 0.0]), 1, tolerance)
    assert state.converged is converged


@pytest.mark.parametrize(
    ("spectrum", "k", "which"),
    [(long_end, 1, "LA"), (below_a_long_end, 1, "SA"), (multiple, 5, "LA")],
)
def test_converged_is_relative_to_the_value(spectrum, k, which):
    """No result is more than 5 % off; 12 of 12 converge."""
    for seed in range(12):
        values = spectrum(np.random.default_rng(seed))
        matrix = symmetric(values, seed).float()
        found = top_eigenvalues(Matrix(matrix), k, which=which, rtol=RTOL, max_hvps=200)
        exact = np.sort(values)[:k] if which == "SA" else np.sort(values)[::-1][:k]
        assert found.converged
        np.testing.assert_allclose(found.eigenvalues, exact, rtol=0.05)


def test_floor_is_reported():
    """A cluster near zero beside -100 is accurate to 1e-3 of 100, not to its own size."""
    matrix = symmetric([-100.0, *np.linspace(-0.3, 0.3, 200)])
    coarse = top_eigenvalues(Matrix(matrix), max_hvps=60)
    assert coarse.converged
    assert coarse.at_floor
    assert float(coarse.residuals) <= 1e-3 * 100
    fine = top_eigenvalues(Matrix(matrix), tol=1e-7, max_hvps=201)
    assert float(fine.eigenvalues) == pytest.approx(0.3, rel=1e-6)
    assert not top_eigenvalues(Matrix(symmetric(spread([5.0, 4.0], 60)))).at_floor


# -- scales that float32 cannot square -------------------------------------------------------------


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_hessian_of_any_scale(method, scale):
    values = [5.0, 4.0, 3.0, *spread([0.5], 60)[1:]]
    matrix = (symmetric(values) * scale).float()
    found = top_eigenvalues(Matrix(matrix), 2, method=method, max_hvps=200)
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues / scale, [5.0, 4.0], rtol=1e-2)
    assert float(found.residuals.max()) <= 1e-2 * 5.0 * scale


@pytest.mark.parametrize(("angle", "products"), [(0.0, 1), (0.4, 1), (0.5, 4), (1.5, 4)])
def test_a_search_takes_more_products_where_the_eigenvectors_have_turned(angle, products):
    """More than 20 % of the squared length is outside the kept ones from an angle of 0.46 on."""
    kept, other = torch.eye(5, dtype=F64)[[1, 3]]
    start = Start(kept=[3.0 * kept], outside=None, hint=None, random=torch.zeros, top=2.0)
    turned = np.cos(angle) * kept + np.sin(angle) * other
    assert start.fewest_searches(2.0, turned[None]) == products
    assert start.fewest_searches(2.0, torch.stack([kept, turned])) == products
