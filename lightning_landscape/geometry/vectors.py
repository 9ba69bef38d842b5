"""Vectors in weight space: mappings from parameter name to a tensor of the parameter's shape.

A missing name means zero.  A complex entry counts as two real ones, its real and imaginary part:
the loss is a real function of both, and its gradient is ``dL/dRe + i dL/dIm``, torch's convention.
Algorithms that do linear algebra on many vectors (Lanczos) use flat tensors, see :class:`Layout`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_landscape.geometry.checks import check_mapping, few, quoted, shown

Vector = Mapping[str, Tensor]


def real(tensor: Tensor) -> Tensor:
    """``tensor`` as real numbers: a complex one gets a last dimension of size 2 for both parts."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_complex(numbers: Tensor) -> Tensor:
    """The inverse of :func:`real` for complex tensors; a copy, as views need an even offset."""
    return torch.view_as_complex(numbers.clone())


def inner(a: Vector, b: Vector) -> float:
    """Inner product ``sum_i a_i b_i`` over the names in both, in the order of ``a``.

    Complex entries contribute ``Re a_i Re b_i + Im a_i Im b_i``.
    """
    total = 0.0
    for name in [name for name in a if name in b]:  # a set's order varies from run to run
        dtype = working_dtype(a[name].dtype)
        x, y = (real(v[name].detach().to(dtype)).flatten() for v in (a, b))  # may require grad
        total += float(torch.dot(x, y))
    return total


def norm(a: Vector) -> float:
    """Euclidean norm over all entries."""
    return math.sqrt(inner(a, a))


def scaled(a: Vector, factor: float) -> dict[str, Tensor]:
    """``factor * a``."""
    return {name: tensor * factor for name, tensor in a.items()}


def check_generator(generator: object) -> None:
    """Raise unless it is a ``torch.Generator`` or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{quoted('', 'generator', generator)}: expected a torch.Generator, e.g. "
            f"torch.Generator().manual_seed(0), or None"
        )


def check_vector(argument: str, vector: object, params: Mapping[str, Tensor] | None = None) -> None:
    """Raise unless ``vector`` maps names to tensors, those of ``params`` to their shapes."""
    check_mapping(
        "", argument, vector, "a mapping from parameter name to tensor, e.g. {'weight': tensor}"
    )
    assert isinstance(vector, Mapping)
    for name, value in vector.items():
        if params is not None and name not in params:
            raise ValueError(
                f"{argument}[{name!r}]: no trainable parameter of that name; expected names among "
                f"{few(params)}"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{argument}[{name!r}] is {shown(value)}: expected a tensor of the parameter's "
                f"shape"
            )
        if params is not None and value.is_complex() and not params[name].is_complex():
            raise TypeError(
                f"{argument}[{name!r}] is complex: expected real numbers, as the parameter's are"
            )
        if params is not None and value.shape != params[name].shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {tuple(value.shape)}: expected the parameter's "
                f"shape {tuple(params[name].shape)}"
            )


def seed_from(generator: torch.Generator | None) -> int:
    """An integer drawn from ``generator``, or 0 without one, so that calls are reproducible."""
    check_generator(generator)
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def random_vector(params: Vector, seed: int) -> dict[str, Tensor]:
    """Independent standard normal entries, drawn per name.

    Each tensor comes from a CPU generator seeded by (seed, name): the draw does not depend on the
    order of the parameters or their device, and leaves the global random state unchanged.
    """
    return {name: _normal(name, tensor, seed) for name, tensor in params.items()}


def random_signs(params: Vector, seed: int) -> dict[str, Tensor]:
    """Independent entries of 1 or -1 (Rademacher), drawn per name like :func:`random_vector`."""
    return {name: _signs(name, tensor, seed) for name, tensor in params.items()}


def _normal(name: str, like: Tensor, seed: int) -> Tensor:
    generator = _generator(name, seed)
    draw = torch.randn(real(like).shape, generator=generator, dtype=torch.float32, device="cpu")
    return _drawn(draw, like)


def _signs(name: str, like: Tensor, seed: int) -> Tensor:
    generator = _generator(name, seed)
    bits = torch.randint(2, real(like).shape, generator=generator, dtype=torch.int8, device="cpu")
    return _drawn((2 * bits - 1).to(torch.float32), like)


def _drawn(numbers: Tensor, like: Tensor) -> Tensor:
    drawn = as_complex(numbers) if like.is_complex() else numbers
    return drawn.to(device=like.device, dtype=working_dtype(like.dtype))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which vectors are computed: float64 for float64, float32 for narrower types.

    For complex types the corresponding complex type.
    """
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return wide.to_complex() if dtype.is_complex else wide


def to_double(tensor: Tensor) -> Tensor:
    """``tensor`` in float64 or complex128."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def flat_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of one flat tensor of all ``tensors``: float64 if any needs it, else float32."""
    wide = any(working_dtype(tensor.dtype).to_real() == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class Layout:
    """Converts between vectors and flat real tensors: all parameters' entries, concatenated."""

    def __init__(self, params: Vector) -> None:
        self._complex = {name for name, tensor in params.items() if tensor.is_complex()}
        self.shapes = {name: real(tensor.detach()).shape for name, tensor in params.items()}
        self.sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.size = sum(self.sizes.values())
        first = next(iter(params.values()))
        self.device = first.device
        self.dtype = flat_dtype(params.values())

    def flatten(self, vector: Mapping[str, Tensor | float]) -> Tensor:
        """``vector`` as a tensor of shape ``(size,)``; a number means a constant tensor.

        The entry of a complex parameter may be a real tensor with a last dimension of size 2.
        """
        check_mapping("", "vector", vector, "a mapping from parameter name to tensor")
        unknown = vector.keys() - self.shapes.keys()
        if unknown:
            raise ValueError(
                f"vector names {sorted(map(str, unknown))} that the parameters do not have: "
                f"expected names among {few(self.shapes)}"
            )
        if len(vector) == len(self.shapes):  # one copy instead of zeros and a copy each
            given = [vector[name] for name in self.shapes]
            pieces = [real(piece.detach()) for piece in given if isinstance(piece, Tensor)]
            if len(pieces) == len(given) and all(
                piece.shape == shape and piece.dtype == self.dtype and piece.device == self.device
                for piece, shape in zip(pieces, self.shapes.values(), strict=True)
            ):
                return torch.cat([piece.reshape(-1) for piece in pieces])
        flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for name, piece in zip(
            self.sizes, torch.split(flat, list(self.sizes.values())), strict=True
        ):
            if name not in vector:
                continue
            value = vector[name]
            if not isinstance(value, Tensor):
                piece.fill_(value)
                continue
            if real(value).shape != self.shapes[name]:
                raise ValueError(
                    f"vector[{name!r}] has shape {tuple(value.shape)}: expected the parameter's "
                    f"shape {tuple(self.shapes[name][: -1 if name in self._complex else None])}"
                )
            piece.copy_(real(value.detach()).reshape(-1))
        return flat

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view of ``flat`` in the parameter's shape; a copy for complex parameters."""
        pieces = torch.split(flat, list(self.sizes.values()))
        views = {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return {n: as_complex(v) if n in self._complex else v for n, v in views.items()}
