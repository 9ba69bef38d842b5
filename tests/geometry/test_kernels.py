"""Kernels that are replaced while a loss is evaluated: same function, correct Hessian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as checkpointing

from lightning_landscape.geometry.eigen import top_eigenvalues
from lightning_landscape.geometry.kernels import full_float32, plain_kernels, saved_dtypes
from lightning_landscape.geometry.objective import Objective
from lightning_landscape.geometry.sam import sam_sharpness
from lightning_landscape.geometry.slices import line_slice
from lightning_landscape.geometry.vectors import random_vector
from tests.oracles import F64, flat, named, normal

# -- activation checkpoints -----------------------------------------------------------------------


class Blocks(nn.Module):
    """Two residual blocks with dropout between two layers; checkpointed or not."""

    def __init__(self, reentrant: bool | None, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 5, dtype=F64)
        blocks = [nn.Sequential(nn.Linear(5, 5, dtype=F64), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.outer = nn.Linear(5, 3, dtype=F64)
        self.reentrant, self.first = reentrant, first
        self.x, self.y = normal(12, 4, seed=1), torch.arange(12) % 3

    def _run(self, block, h):
        if self.reentrant is None:
            return block(h)
        return checkpointing.checkpoint(block, h, use_reentrant=self.reentrant)

    def loss(self):
        torch.manual_seed(3)  # of the dropout, which a checkpoint must repeat
        h = self._run(self.inner, self.x) if self.first else self.inner(self.x)
        for block in self.blocks:
            h = h + F.dropout(self._run(block, h), 0.3)
        return F.cross_entropy(self.outer(h), self.y)


def dense(module: nn.Module) -> torch.Tensor:
    """The Hessian by two derivatives of a function of flat weights: no checkpoint, no Objective."""
    params = dict(module.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(w):
        pieces = zip(params.items(), w.split(sizes), strict=True)
        named = {name: piece.view(p.shape) for (name, p), piece in pieces}
        return torch.func.functional_call(Caller(module), {f"of.{n}": t for n, t in named.items()})

    start = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.autograd.functional.hessian(loss, start)


class Caller(nn.Module):
    """``functional_call`` wants a forward."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self):
        return self.of.loss()


@pytest.mark.parametrize("reentrant", [True, False])
def test_products_through_checkpoints(reentrant):
    plain, checked = Blocks(None), Blocks(reentrant)
    matrix = dense(plain)
    objective = Objective(checked.loss, dict(checked.named_parameters()))
    for seed in range(3):
        v = normal(len(matrix), seed=seed)
        product = flat(objective.hvp(named(v, objective.params)))
        torch.testing.assert_close(product, matrix @ v, rtol=1e-10, atol=1e-12)
    expected = torch.linalg.eigvalsh(matrix)[-1]
    found = top_eigenvalues(objective, tol=1e-6)
    assert float(found.eigenvalues[0]) == pytest.approx(float(expected), rel=1e-9)
    assert objective.engine_used == "double_backward"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoint_of_the_data_has_no_gradient():
    """Torch warns and computes no gradient for the first layer; the measurement agrees."""
    module = Blocks(True, first=True)
    module.loss().backward()
    assert module.inner.weight.grad is None
    gradient = Objective(module.loss, dict(module.named_parameters())).gradient()
    for name, parameter in module.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-12, atol=1e-14)


# -- half precision -------------------------------------------------------------------------------


def half(dtype: torch.dtype):
    """A trained tanh network of Xs, its loss in ``dtype``, and its Hessian in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(128, 10), torch.randint(0, 4, (128,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def loss():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return F.cross_entropy(net(x), y)

    exact = Objective(lambda: F.cross_entropy(net(x), y), dict(net.named_parameters()))
    return net, loss, top_eigenvalues(exact, tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("engine", "rtol"), [("double_backward", 0.02), ("finite_difference", 0.05)]
)
def test_top_eigenvalue_under_autocast(dtype, engine, rtol):
    net, loss, exact = half(dtype)
    objective = Objective(loss, dict(net.named_parameters()), engine=engine)
    product = objective.hvp(exact.eigenvectors[0])
    error = flat(product) - exact.eigenvalues[0] * flat(exact.eigenvectors[0])
    assert float(error.norm()) < rtol * float(exact.eigenvalues[0])
    found = top_eigenvalues(objective, max_hvps=15)
    assert float(found.eigenvalues[0]) == pytest.approx(float(exact.eigenvalues[0]), rel=rtol)


def test_saved_dtypes_under_autocast():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, loss, _ = half(dtype)
        assert dtype in saved_dtypes(loss)


# -- float32 with fewer bits ----------------------------------------------------------------------


BACKENDS = torch.backends
PRECISIONS = [
    BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn,
]  # fmt: skip


def read(setting):
    """A setting of torch, or "refused" if older and newer switches contradict each other."""
    try:
        return setting()
    except RuntimeError:
        return "refused"


def precisions():
    return [
        *(place.fp32_precision for place in PRECISIONS),
        read(torch.get_float32_matmul_precision),
        read(lambda: BACKENDS.cuda.matmul.allow_tf32),
        read(lambda: BACKENDS.cudnn.allow_tf32),
        BACKENDS.fp32_precision,
    ]


@pytest.fixture
def any_precision():
    before, tf32 = [place.fp32_precision for place in PRECISIONS], BACKENDS.cudnn.allow_tf32
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = tf32
    for place, precision in zip(PRECISIONS, before, strict=True):
        place.fp32_precision = precision


# What users set: the place and its attribute, or a function, and the value.
SETTINGS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul, older": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "images, older": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "images": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "on the CPU": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "everywhere": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_full_float32_and_back(setting, any_precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    SETTINGS[setting]()
    before = precisions()
    inside = []
    try:
        with full_float32():
            inside += precisions()
            with full_float32():
                assert precisions() == inside
            # A module may use this context manager, which reads the older switch.
            if "refused" not in before:
                with BACKENDS.cudnn.flags(enabled=False):
                    pass
            raise ArithmeticError
    except ArithmeticError:
        pass
    assert {*inside[: len(PRECISIONS)]} <= {"ieee", "none"}
    assert inside[len(PRECISIONS)] == "highest"
    assert precisions() == before


def test_differences_of_losses_are_as_precise_as_float32(any_precision):
    """With bfloat16 inside (8 bits), where the CPU has it, a small rise was off by 5 %."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )
    x, y = torch.randn(256, 32), torch.arange(256) % 4
    seen = []

    def loss():
        seen.append(torch.get_float32_matmul_precision())
        return F.cross_entropy(net(x), y)

    params = dict(net.named_parameters())
    direction = {n: 1e-2 * v for n, v in random_vector(params, 0).items()}

    def measured(products):
        objective = Objective(loss, params)
        if products:
            objective.hvp(direction)  # the loss that its graph ends in is not used
        rises = [sam_sharpness(objective, rho).value for rho in (1e-3, 0.05)]
        sloped = Objective(loss, params, engine="finite_difference").hvp(direction)
        line = line_slice(objective, direction, resolution=3).losses
        return torch.tensor([*rises, *line, *flat(sloped)[:20]]).double()

    expected = measured(products=False)
    torch.set_float32_matmul_precision("medium")
    seen.clear()
    torch.testing.assert_close(measured(products=False), expected, rtol=0, atol=0)
    assert seen.count("medium") == 1  # to see what types the loss is computed in
    found = measured(products=True)
    # The direction of the ascent comes from the graph, in which products are as training has them.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    assert torch.get_float32_matmul_precision() == "medium"


def test_known_loss_is_reused_only_in_full_float32(any_precision):
    """The graph of a product ends in the loss, which is reused if it is in full float32."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(8, 4)
    params, evaluated = dict(net.named_parameters()), []

    def loss():
        evaluated.append(torch.get_float32_matmul_precision())
        return net(x).pow(4).mean()

    for precision, again in (("highest", []), ("medium", ["highest"])):
        torch.set_float32_matmul_precision(precision)
        objective = Objective(loss, params, check_deterministic=False)
        objective.hvp({"bias": torch.ones(3)})
        evaluated.clear()
        objective.loss()
        assert evaluated == again


def test_solver_rotates_its_vectors_in_full_float32(any_precision):
    """Independent of the precision of training.  Visible only if the CPU has bfloat16."""
    spectrum = torch.cat([torch.tensor([5.0, 4.0, 3.0, -4.5]), torch.linspace(-1, 1, 4092)])
    w = nn.Parameter(torch.zeros(4096))

    def found():
        objective = Objective(lambda: (spectrum * w.square()).sum() / 2, {"w": w})
        return top_eigenvalues(objective, 3, tol=1e-5, max_basis=10)

    expected = found()
    torch.set_float32_matmul_precision("medium")
    result = found()
    assert result.hvps == expected.hvps
    assert torch.equal(result.eigenvalues, expected.eigenvalues)
    vectors = torch.stack([v["w"] for v in result.eigenvectors])
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-5)


# -- recurrent layers ------------------------------------------------------------------------------


class OnGpu:
    is_cuda = True


@pytest.mark.parametrize(
    ("before_weights", "dropout", "training", "on_gpu", "draws"),
    [
        (2, 0.3, True, True, True),
        (3, 0.3, True, True, True),  # of a packed sequence
        (2, 0.3, False, True, False),
        (2, 0.0, True, True, False),
        (2, 0.3, True, False, False),
    ],
)
def test_cudnns_own_random_numbers(before_weights, dropout, training, on_gpu, draws, monkeypatch):
    """Only torch's four functions request dropout between layers from cuDNN."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen = []
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        monkeypatch.setattr(
            torch._VF, name, lambda *args: seen.append(torch.backends.cudnn.enabled), raising=False
        )
    x = OnGpu() if on_gpu else torch.zeros(1)
    args = [x, *[None] * (before_weights - 1), ["weights"], True, 2, dropout, training, False]
    with plain_kernels():
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            getattr(torch._VF, name)(*args)
    assert seen == [not draws] * 4
    assert torch.backends.cudnn.enabled


# -- kernels are restored ------------------------------------------------------------------------


def sdpa_flags():
    cuda = torch.backends.cuda
    return [
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]


def test_plain_kernels_restores_everything_after_an_error():
    def state():
        return (
            sdpa_flags(),
            torch.backends.mha.get_fastpath_enabled(),
            torch._weight_norm,
            checkpointing.CheckpointFunction,
            torch.backends.cudnn.enabled,
        )

    before = state()
    try:
        with plain_kernels(cudnn=False):
            assert sum(sdpa_flags()) == 1  # the math kernel alone
            assert all(a != b for a, b in zip(before, state(), strict=True))
            raise ArithmeticError
    except ArithmeticError:
        pass
    assert state() == before
