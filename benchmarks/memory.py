"""Memory of measuring: the peak relative to a training step, and over 1,000 measurements.

    make bench-memory
    python -m benchmarks.memory --quick      a small part of each, as a test

Peaks are bytes of tensors, from torch's allocator (``benchmarks/allocations.py``): exact, whatever
else the machine does.  "Bounded" is the case in which the amount of free memory is unknown: then
only one of the probe's four batches has a graph at a time.  The memory over measurements is that
of the process, as reported by the operating system.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.allocations import peak_bytes
from benchmarks.networks import ResNet20, language_model
from benchmarks.runs import mlp
from lightning_landscape.geometry import Objective, batches, top_eigenvalues
from lightning_landscape.geometry.memory import GraphMemory

MEASUREMENTS = 1000
Loss = Callable[[slice], Tensor]


def networks() -> dict[str, tuple[nn.Module, int, Loss]]:
    """Name -> network, training batch, loss on some of 4 batches."""
    torch.manual_seed(0)
    small, x, y = (
        mlp([64, 256, 256, 10], nn.ReLU),
        torch.randn(2048, 64),
        torch.randint(0, 10, (2048,)),
    )
    cnn, images, labels = (
        ResNet20(channels=3),
        torch.randn(512, 3, 32, 32),
        torch.randint(0, 10, (512,)),
    )
    model, tokens = language_model(), torch.randint(0, 64, (128, 33))
    return {
        "MLP, 512 examples": (small, 512, lambda s: F.cross_entropy(small(x[s]), y[s])),
        "ResNet-20, 128 images": (cnn, 128, lambda s: F.cross_entropy(cnn(images[s]), labels[s])),
        "transformer, 32 x 32 tokens": (
            model,
            32,
            lambda s: F.cross_entropy(model(tokens[s, :-1]), tokens[s, 1:]),
        ),
    }


def peaks(count: int | None = None) -> None:
    """The table of peaks, each in units of a training step's on one batch."""
    head = ("network", "training step", "HVP", "top eigenvalue", "its vectors")
    head += ("probe of 4 batches, all kept", "bounded")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, network in list(networks().items())[:count]:
        print("| " + " | ".join([name, *_peaks_of(*network)]) + " |", flush=True)


def _peaks_of(net: nn.Module, size: int, loss: Loss) -> list[str]:
    params = dict(net.named_parameters())
    held = list(params.values())
    vector = {name: torch.randn_like(p) for name, p in params.items()}
    parts = [slice(i * size, (i + 1) * size) for i in range(4)]
    terms = [(float(size), partial(loss, part)) for part in parts]

    def objective(count: int) -> Objective:
        memory = GraphMemory(size)
        return Objective(terms[:count], params, check_deterministic=False, memory=memory)

    def products(count: int) -> None:
        whole = objective(count)
        for _ in range(2):
            whole.hvp(vector)

    step = peak_bytes(lambda: torch.autograd.grad(loss(parts[0]), held))
    one = peak_bytes(lambda: products(1))
    solved = peak_bytes(lambda: top_eigenvalues(objective(1)))
    with mock.patch.object(batches, "free_memory", return_value=2**62):
        kept = peak_bytes(lambda: products(4))
    with mock.patch.object(batches, "free_memory", return_value=None):
        bounded = peak_bytes(lambda: products(4))
    vectors = (solved - one) / sum(4 * p.numel() for p in held)
    ratios = [f"{peak / step:.1f}" for peak in (one, solved, kept, bounded)]
    return [f"{step / 1e6:.1f} MB", *ratios[:2], f"{vectors:.0f}", *ratios[2:]]


def over_time(measurements: int) -> None:
    """The process's memory while a network trains and is measured again and again."""
    torch.manual_seed(0)
    net, x, y = mlp([16, 32, 10], nn.ReLU), torch.randn(64, 16), torch.randint(0, 10, (64,))
    params = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    last = None
    print("measurements  resident memory  live tensors")
    for count in range(1, measurements + 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        objective = Objective(lambda: F.cross_entropy(net(x), y), params)
        last = top_eigenvalues(objective, init=last)
        objective.loss_at(last.eigenvectors[0])
        if count % (measurements // 10) == 0:
            tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
            print(f"{count:12d}  {resident() / 1e6:12.1f} MB  {tensors:12d}", flush=True)


def resident() -> int:
    """Resident memory of the process in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a little of each")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # First: the events from which peaks are read take gigabytes.
    over_time(20 if quick else MEASUREMENTS)
    print()
    peaks(1 if quick else None)


if __name__ == "__main__":
    main()
