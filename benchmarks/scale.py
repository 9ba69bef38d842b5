"""How the cost scales with the network: from 10^4 to 10^8 parameters.

    make bench-scale

For each network, on one thread (or on a GPU where there is one): the time of a Hessian-vector
product in gradients of the same probe, ours and by torch alone, the share of a top eigenvalue's
time that is the solver's own arithmetic and not products, and the peak of memory beside that of a
gradient, which is what a training step takes.  Prints a markdown table and the growth law, fitted
to it.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocations import peak_bytes
from benchmarks.networks import ResNet20, language_model
from benchmarks.runs import mlp
from lightning_landscape.geometry import Objective, top_eigenvalues
from lightning_landscape.geometry.vectors import Vector

Problem = tuple[nn.Module, Callable[[], Tensor]]


def _classifier(widths: tuple[int, ...], examples: int) -> Problem:
    net, x = mlp(widths, nn.ReLU), torch.randn(examples, widths[0])
    y = torch.randint(0, widths[-1], (examples,))
    return net, lambda: nn.functional.cross_entropy(net(x), y)


def _language_model(width: int, depth: int, vocabulary: int, length: int, examples: int) -> Problem:
    net = language_model(vocabulary, width, max(width // 64, 1), depth, length)
    tokens = torch.randint(0, vocabulary, (examples, length + 1))
    loss = nn.functional.cross_entropy
    return net, lambda: loss(net(tokens[:, :-1]), tokens[:, 1:])


def _gpt2(length: int, examples: int, **size: int) -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **size)
    net = GPT2LMHeadModel(config)
    tokens = torch.randint(0, config.vocab_size, (examples, length))
    return net, lambda: net(input_ids=tokens, labels=tokens).loss


def _resnet(side: int, examples: int) -> Problem:
    net, x = ResNet20(channels=3), torch.randn(examples, 3, side, side)
    y = torch.randint(0, 10, (examples,))
    return net, lambda: nn.functional.cross_entropy(net(x), y)


NETWORKS: dict[str, Callable[[], Problem]] = {
    "MLP 10^4": lambda: _classifier((64, 96, 32, 10), 512),
    "MLP 10^5": lambda: _classifier((64, 256, 256, 10), 512),
    "MLP 10^6": lambda: _classifier((64, 960, 960, 10), 512),
    "MLP 10^7": lambda: _classifier((64, 3120, 3120, 10), 512),
    "transformer 10^5": lambda: _language_model(64, 2, 64, 32, 32),
    "transformer 10^6": lambda: _language_model(128, 4, 1024, 64, 16),
    "transformer 10^7": lambda: _language_model(384, 5, 2048, 64, 8),
    "GPT-2 small, 1.2 10^8": lambda: _gpt2(64, 2),
}
# With as many examples as a training batch has there.
ON_A_GPU: dict[str, Callable[[], Problem]] = {
    "ResNet-20, 512 images of 64 x 64, 10^5": lambda: _resnet(64, 512),
    "GPT-2 small, 8 x 512 tokens, 1.2 10^8": lambda: _gpt2(512, 8),
    "GPT-2 large, 2 x 256 tokens, 7.7 10^8": lambda: _gpt2(
        256, 2, n_embd=1280, n_layer=36, n_head=20
    ),
}


def measure(name: str, products: int) -> dict[str, Any]:
    """One network on one thread, or on the GPU."""
    torch.manual_seed(0)
    net, loss = (NETWORKS | ON_A_GPU)[name]()
    net.train()
    params = dict(net.named_parameters())
    held = list(params.values())
    repeats = 3 if sum(p.numel() for p in held) > 5 * 10**6 else 9

    def objective() -> Objective:
        return Objective(loss, params, check_deterministic=False)

    def gradient() -> object:
        return torch.autograd.grad(loss(), held)

    kept = objective()
    start = kept.gradient()
    kept.hvp(start)  # builds the graph
    top_eigenvalues(objective(), max_hvps=2)  # loads what the solver needs
    pairs = [(_seconds(gradient), _seconds(lambda: kept.hvp(start))) for _ in range(repeats)]
    kept.release()
    by_torch = _torchs_product(loss, held, list(start.values()))
    alone = [(_seconds(gradient), _seconds(by_torch)) for _ in range(repeats)]
    del by_torch
    total, own = _solved(objective(), products)
    return {
        "parameters": sum(p.numel() for p in held),
        "gradient": statistics.median(one for one, _ in pairs),
        "hvp": statistics.median(two / one for one, two in pairs),
        "torch": statistics.median(two / one for one, two in alone),
        "own": own,
        "share": own / total,
        "step": peak_bytes(gradient),
        "product": peak_bytes(lambda: objective().hvp(start)),
        "peak": peak_bytes(lambda: top_eigenvalues(objective(), tol=1e-9, max_hvps=products)),
    }


def _torchs_product(
    loss: Callable[[], Tensor], params: list[Tensor], along: list[Tensor]
) -> Callable[[], object]:
    """As in torch's examples, on a retained graph; fused attention has no second derivative."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), params, create_graph=True)

    def product() -> object:
        return torch.autograd.grad(gradient, params, along, retain_graph=True)

    product()
    return product


def _solved(objective: Objective, products: int) -> tuple[float, float]:
    """Seconds of an eigenvalue, in all and outside the products."""
    timed = _Timed(objective)
    total = _seconds(lambda: top_eigenvalues(timed, tol=1e-9, max_hvps=products))
    return total, total - timed.spent


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(function: Callable[[], object]) -> float:
    started = _clock()
    function()
    return _clock() - started


class _Timed:
    """An objective whose products are timed."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.params, self.spent = objective, objective.params, 0.0

    def hvp(self, vector: Vector) -> dict[str, Tensor]:
        started = _clock()
        product = self.objective.hvp(vector)
        self.spent += _clock() - started
        return product


def _exponent(rows: list[dict[str, Any]], key: str) -> float:
    """The slope of log(value) over log(parameters), by least squares."""
    x = [math.log(row["parameters"]) for row in rows]
    y = [math.log(row[key]) for row in rows]
    slope, _ = statistics.linear_regression(x, y)
    return slope


def _size(name: str) -> float:
    """``GPT-2 small, 1.2 10^8``: that number."""
    found = re.fullmatch(r".*? ([\d.]*) ?10\^(\d+)", name)
    assert found is not None
    return float(found[1] or 1) * 10.0 ** int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=int, default=10, help="of the eigenvalue solver")
    parser.add_argument("--only", default="", help="networks with this in their names")
    parser.add_argument("--largest", type=float, default=2e9, help="skip larger networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    head = ("network", "parameters", "gradient, s", "HVP, gradients", "by torch alone")
    head += ("solver's own time",)
    head += ("memory of a gradient", "of a product", "ratio", "of an eigenvalue: vectors more")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    rows = []
    for name in [*NETWORKS, *(ON_A_GPU if torch.cuda.is_available() else ())]:
        if _size(name) > options.largest or options.only not in name:
            continue
        row = measure(name, options.products)
        rows.append(row)
        cells = (
            name,
            f"{row['parameters']:,}",
            f"{row['gradient']:.4g}",
            f"{row['hvp']:.2f}",
            f"{row['torch']:.2f}",
            f"{row['share']:.1%}",
            f"{row['step'] / 1e6:.1f} MB",
            f"{row['product'] / 1e6:.1f} MB",
            f"{row['product'] / row['step']:.1f}",
            f"{(row['peak'] - row['product']) / (4 * row['parameters']):.0f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
    if len({row["parameters"] for row in rows}) < 2:
        return  # no law
    ratios = [row["hvp"] for row in rows]
    print(
        f"\n{options.products} products an eigenvalue, {torch.get_default_device().type}.  With n "
        f"parameters an HVP costs {min(ratios):.1f} to {max(ratios):.1f} gradients, growing as "
        f"n^{_exponent(rows, 'hvp'):.2f}; the solver's own seconds grow as "
        f"n^{_exponent(rows, 'own'):.2f}."
    )


if __name__ == "__main__":
    main()
