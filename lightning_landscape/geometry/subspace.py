"""A growing orthonormal basis with its images, for Rayleigh-Ritz."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_landscape.geometry.kernels import full_float32
from lightning_landscape.geometry.matvec import Matvec

_COLUMNS = 2**20  # rotated at a time, so that no second basis is needed

# A Ritz vector with a small component of an eigenvector shows that eigenvalue in its residual only:
# an eigenvalue hidden in a pair is assumed to be at most its value plus this many residuals.
RESIDUAL_MARGIN = 3.0


class RitzSpace:
    """An orthonormal basis, its images, and the matrix between them: ``basis A basis^T``.

    All values are in units of ``unit``, a power of two near the largest entry of the first image,
    because squares of very small or very large entries would leave the range of float32.
    """

    def __init__(self, matvec: Matvec, like: Tensor, most: int) -> None:
        self.size = like.numel()
        self.basis = _Rows(self.size, like)
        self.images = _Rows(self.size, like)
        self.products = 0
        self.asymmetry = 0.0  # the largest |u'Av - v'Au|
        self.keep_uncertain = False  # at a restart, keep pairs that may hide a large one
        self.values = torch.zeros(
            0, dtype=torch.float64, device="cpu"
        )  # Ritz values, largest first
        self.lengths = self.values  # residual norms, accurate to the square root of the precision
        self._matvec = ScaledMatvec(matvec)
        self._most = most
        # On the CPU whatever the default device, as all small matrices are.
        self._matrix = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._gram = self._matrix  # of the images
        self._coefficients = torch.zeros(0, 0, device="cpu")
        # Coefficients of the leading Ritz vectors of the previous step.
        self._before = torch.zeros(0, 0, device="cpu")

    def __len__(self) -> int:
        return len(self.basis)

    @property
    def unit(self) -> float:
        return self._matvec.unit

    @property
    def finite(self) -> bool:
        return bool(self._matrix.isfinite().all())

    def grow(self, candidate: Tensor) -> bool:
        """Extend the basis by ``candidate``, with one product; False if it lies in the span."""
        direction = orthonormalized(candidate, self.basis.rows)
        if direction is None:
            return False
        if len(self) >= self._most:
            self._condense()
        image = self._matvec(direction)
        self.products += 1
        self._append(direction, image)
        return True

    @full_float32()
    def _append(self, direction: Tensor, image: Tensor) -> None:
        self.basis.append(direction)
        self.images.append(image)
        basis, images = self.basis.rows, self.images.rows
        # One transfer, because each one synchronizes the device.
        three = torch.stack([basis @ image, images @ direction, images @ image])
        column, row, inner = three.cpu().double()
        self.asymmetry = max(self.asymmetry, float((column - row).abs().max()))
        self._matrix, self._gram = (
            _bordered(m, e) for m, e in ((self._matrix, column), (self._gram, inner))
        )

    def solve(self, count: int) -> None:
        """Compute the Ritz pairs; a restart keeps the first ``count`` of the previous ones too."""
        self._before = self._coefficients[:, :count]
        values, coefficients = torch.linalg.eigh(self._matrix)
        self.values, self._coefficients = values.flip(0), coefficients.flip(1)
        squares = (self._coefficients * (self._gram @ self._coefficients)).sum(0)
        self.lengths = (squares - self.values.square()).clamp(min=0.0).sqrt()

    @full_float32()
    def residuals(self, indices: Sequence[int]) -> Tensor:
        """The residual vectors ``A y - theta y`` of some Ritz pairs, as rows."""
        chosen = self._coefficients[:, list(indices)].T
        scaled = (self.values[list(indices), None] * chosen).to(self.basis.rows)
        found = chosen.to(self.images.rows) @ self.images.rows
        return found.addmm_(scaled, self.basis.rows, alpha=-1.0)

    @full_float32()
    def vectors(self, count: int) -> Tensor:
        """The first Ritz vectors, as rows."""
        return self._coefficients[:, :count].T.to(self.basis.rows) @ self.basis.rows

    @full_float32()
    def beyond(self, count: int) -> Tensor:
        """A power iteration step outside the span of the first ``count`` Ritz vectors.

        ``sum_j (theta_j - min(theta_min, 0)) y_j`` over the other pairs, plus twice the sum of all
        residuals, which are orthogonal to the space.
        """
        further = self._coefficients[:, count:] @ (
            self.values[count:] - self.values[-1].clamp(max=0.0)
        )
        all_pairs = self._coefficients.sum(1)
        moved = further - 2.0 * (self._coefficients @ self.values)
        combined = torch.stack([moved, 2.0 * all_pairs]).to(self.basis.rows)
        return combined[0] @ self.basis.rows + combined[1] @ self.images.rows

    def _condense(self) -> None:
        """Restart with half of the Ritz vectors, and the leading ones of the previous step.

        Those of the previous step keep the history of Lanczos, as the third vector of LOBPCG does:
        a restart then costs almost no extra product.
        """
        reach = self.values + (RESIDUAL_MARGIN * self.lengths if self.keep_uncertain else 0.0)
        order = reach.argsort(descending=True)[: self._most // 2]
        kept = self._coefficients[:, order.sort().values]
        missing = len(self) - len(self._before)
        before = torch.nn.functional.pad(self._before, (0, 0, 0, missing))
        before = before - kept @ (kept.T @ before)
        before = before[:, torch.linalg.vector_norm(before, dim=0) > 1e-6]
        rotation = torch.linalg.qr(torch.cat([kept, before], 1))[0][:, : self._most - 1]
        self.basis.rotate(rotation)
        self.images.rotate(rotation)
        self._matrix = rotation.T @ self._matrix @ rotation
        self._gram = rotation.T @ self._gram @ rotation
        self._coefficients = rotation.T @ self._coefficients


class ScaledMatvec:
    """Products in units of ``unit``, a power of two near the largest entry of the first one."""

    def __init__(self, matvec: Matvec) -> None:
        self._matvec = matvec
        self._exponent: int | None = None

    @property
    def unit(self) -> float:
        return 2.0 ** (self._exponent or 0)

    def __call__(self, vector: Tensor) -> Tensor:
        image = self._matvec(vector)
        if self._exponent is None:
            largest = float(image.abs().max())
            if 0.0 < largest < math.inf:
                self._exponent = math.frexp(largest)[1]
        if self._exponent:
            half = -self._exponent // 2  # the whole power may be beyond float32
            image.mul_(2.0**half).mul_(2.0 ** (-self._exponent - half))
        return image


def _bordered(matrix: Tensor, edge: Tensor) -> Tensor:
    """A symmetric matrix with one more row and column."""
    grown = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    grown[-1, :] = grown[:, -1] = edge
    return grown


class _Rows:
    """A matrix to which rows are appended, with storage that grows a few rows at a time."""

    def __init__(self, width: int, like: Tensor) -> None:
        self._store = like.new_empty(4, width)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def rows(self) -> Tensor:
        return self._store[: self._used]

    def append(self, row: Tensor) -> None:
        if self._used == len(self._store):
            grown = self._store.new_empty(self._used + 4, self._store.shape[1])
            grown[: self._used] = self._store
            self._store = grown
        self._store[self._used] = row
        self._used += 1

    @full_float32()
    def rotate(self, rotation: Tensor) -> None:
        """Replace the rows by ``rotation.T @ rows``; ``rotation`` is ``(rows, fewer rows)``."""
        used, turn = rotation.shape[1], rotation.T.to(self._store)
        for part in torch.split(self._store[: self._used], _COLUMNS, dim=1):
            part[:used] = turn @ part
        self._used = used


@full_float32()
def without(vector: Tensor, basis: Tensor) -> Tensor:
    """``vector`` minus its projection on the orthonormal rows of ``basis``."""
    return vector - basis.T @ (basis @ vector)


@full_float32()
def orthonormalized(vector: Tensor, basis: Tensor) -> Tensor | None:
    """``vector`` orthonormalized against the rows of ``basis``, or None if it is in their span."""
    length = torch.linalg.vector_norm(vector)
    # In place from here on: allocating each result took as long as a product.
    direction: Tensor = vector / length
    for _ in range(3):  # twice is enough (Kahan, Parlett), unless almost nothing remains
        direction.addmv_(basis.T, basis @ direction, alpha=-1.0)
        norms = torch.stack([length, torch.linalg.vector_norm(direction)])
        given, remaining = norms.tolist()
        if not (0.0 < given < math.inf and remaining > 100 * torch.finfo(vector.dtype).eps):
            return None
        direction.div_(remaining)
        if remaining > 0.7:  # little cancellation, so little rounding error
            break
    return direction
