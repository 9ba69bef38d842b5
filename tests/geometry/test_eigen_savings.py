"""Saving products and memory: stopping on the estimated error, and a bounded basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_landscape.geometry import EigenResult, eigen, lanczos, subspace, top_eigenvalues
from tests.geometry.forms import Matrix, film, spread
from tests.oracles import symmetric

TOL, RTOL = 1e-3, 5e-3


@pytest.mark.parametrize("pace", [0.003, 0.01, 0.03, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_stopping_on_the_estimated_error_through_a_crossing(pace, seed):
    """Every value is within the tolerance, with fewer products than the residual needs."""
    previous, loose, strict = None, 0, 0
    last = None
    for matrix, expected in film(pace, seed):
        previous = top_eigenvalues(Matrix(matrix), init=previous, tol=TOL, rtol=RTOL)
        assert previous.converged
        assert float(previous.eigenvalues) == pytest.approx(expected, rel=RTOL)
        last = top_eigenvalues(Matrix(matrix), init=last, tol=TOL)
        loose += previous.hvps
        strict += last.hvps
    assert loose < strict


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_errors_of_moved_starts_are_below_the_tolerance(k, rtol):
    """Started beside the eigenvectors of spectra with gaps below the wanted ones."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        matrix = symmetric(spread([5.0, 4.5, 3.0, 2.0], 80, seed))
        noise = 0.02 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        start = top_eigenvalues(Matrix(matrix), k, tol=1e-6, max_hvps=200)
        turned = matrix + noise + noise.T
        # The residual alone would not stop here.
        moved = top_eigenvalues(Matrix(turned), k, tol=1e-12, init=start, rtol=rtol)
        exact = np.linalg.eigvalsh(turned.numpy())[::-1][:k]
        assert moved.converged
        np.testing.assert_allclose(moved.eigenvalues, exact, atol=rtol * exact[0])


def test_residual_decides_without_a_tolerance_of_the_error():
    for matrix, _ in film(0.03, frames=6):
        result = top_eigenvalues(Matrix(matrix), tol=1e-3)
        assert float(result.residuals) <= 1e-3 * float(np.abs(np.linalg.eigvalsh(matrix)).max())


def test_no_early_stop_if_another_eigenvalue_may_be_larger():
    """Started on the second eigenvector, with half of the first: the pair itself has converged."""
    values = torch.tensor([5.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    operator = Matrix(torch.diag(values))
    second, half = torch.eye(4, dtype=torch.float64)[1], torch.tensor([1.0, 0.0, 0.0, 1.0])
    known = EigenResult(
        values[1:2], ({"w": second},), torch.zeros(1), 0, True, outside={"w": half.double()}
    )
    result = top_eigenvalues(operator, init=known, rtol=0.3)
    assert float(result.eigenvalues) > 4.9


@pytest.mark.parametrize(
    ("values", "residuals", "expected"),
    [
        ([5.0, 4.0, 1.0], [0.1, 0.5], [0.01 / 0.5]),  # the next is at most 4.5
        ([5.0, 4.9, 1.0], [0.1, 0.2], [np.inf]),  # it may be 5.1
        ([5.0, 4.0, 3.0, 1.0], [0.1, 0.2, 0.5], [0.01 / 1.5, 0.04 / 0.5]),
        ([5.0, 4.0], [0.1, 0.2], [np.inf, np.inf]),  # no information about a third
    ],
)
def test_estimated_error_of_a_value(values, residuals, expected):
    values, residuals = (torch.tensor(x, dtype=torch.float64) for x in (values, residuals))
    found = lanczos.estimated_errors(values, residuals, len(expected))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("most", [6, 8, 16])
@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_bounded_basis_needs_few_more_products(most, tol):
    """Down to six vectors: a slowly converging problem restarts many times."""
    bounded, free = 0, 0
    for seed in range(5):
        matrix = symmetric(spread([5.0, 4.9, 4.8], 150, seed))
        exact = np.linalg.eigvalsh(matrix.numpy())[-1]
        settings = {"tol": tol, "max_hvps": 400}
        result = top_eigenvalues(Matrix(matrix), max_basis=most, **settings)
        assert result.converged
        assert float(result.eigenvalues) == pytest.approx(exact, rel=max(tol**2 * 100, 1e-12))
        bounded += result.hvps
        free += top_eigenvalues(Matrix(matrix), max_basis=400, **settings).hvps
    assert bounded <= 1.3 * free


def test_basis_is_within_its_bound(monkeypatch):
    largest = 0
    append = subspace._Rows.append

    def watched(rows, row):
        nonlocal largest
        append(rows, row)
        largest = max(largest, len(rows._store))

    monkeypatch.setattr(subspace._Rows, "append", watched)
    matrix = symmetric(spread([5.0, 4.9, 4.8], 150))
    result = top_eigenvalues(Matrix(matrix), max_basis=8, tol=1e-8, max_hvps=400)
    assert result.hvps > 16
    assert largest == 8


def test_large_networks_have_a_small_basis():
    assert eigen._basis_size(1, 1000) == 17
    assert eigen._basis_size(1, 124_000_000) == 6
    assert eigen._basis_size(10, 124_000_000) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": -1.0}, "rtol=-1.0: expected a number from 0 to 1"),
        ({"rtol": 1.0}, "rtol=1.0: expected a number from 0 to 1"),
        ({"max_basis": 5}, "max_basis=5: expected at least 2k"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(Matrix(torch.eye(3, dtype=torch.float64)), **arguments)
