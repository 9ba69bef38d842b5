"""What a measurement costs, in gradients of the same probe, along a real training run.

    make bench

Digits, a ReLU network of 85 thousand parameters, minibatch SGD with momentum; every 25 steps the
top eigenvalue on a fixed probe of 512 examples.  All times are taken side by side in one run, so
only the ratios mean something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_landscape import (
    Objective,
    curvature_along,
    plane_slice,
    random_direction,
    sam_sharpness,
    top_eigenvalues,
)

MEASUREMENTS = 41


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32)
    inputs, targets = inputs - inputs.mean(0), torch.tensor(labels)
    inputs = inputs / inputs.std()
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    params = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    probe = slice(0, 512)

    def objective() -> Objective:
        loss = lambda: nn.functional.cross_entropy(net(inputs[probe]), targets[probe])  # noqa: E731
        return Objective(loss, params, check_deterministic=False)

    seeds = torch.Generator().manual_seed(0)
    plane = [random_direction(params, generator=seeds) for _ in range(2)]
    costs: dict[str, list[float]] = {}
    products: dict[str, list[int]] = {"warm Lanczos": [], "power iteration": []}
    errors: list[float] = []
    last = None
    for _ in range(MEASUREMENTS):
        for _ in range(25):
            batch = torch.randint(0, len(inputs), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        gradient = statistics.median(seconds(lambda: objective().gradient()) for _ in range(5))
        forward = statistics.median(seconds(lambda: objective().loss()) for _ in range(5))

        def warm() -> None:
            nonlocal last
            last = top_eigenvalues(objective(), init=last)

        def power() -> None:
            result = top_eigenvalues(objective(), method="power", max_hvps=100)
            products["power iteration"].append(result.hvps)

        def sharpness() -> None:
            one = objective()
            curvature_along(one, one.gradient())
            sam_sharpness(one)

        for name, function, unit in (
            ("warm Lanczos", warm, gradient),
            ("power iteration", power, gradient),
            ("SAM sharpness and curvature", sharpness, gradient),
            (
                "plane of 21 x 21, per point, in forwards",
                lambda: plane_slice(objective(), *plane, resolution=21),
                441 * forward,
            ),
        ):
            costs.setdefault(name, []).append(seconds(function) / unit)
        assert last is not None
        products["warm Lanczos"].append(last.hvps)
        exact = top_eigenvalues(objective(), tol=1e-6, max_hvps=200)
        errors.append(abs(float(last.eigenvalues[0] / exact.eigenvalues[0]) - 1))

    print(f"{MEASUREMENTS} measurements, {sum(p.numel() for p in params.values())} parameters\n")
    print(f"{'cost in gradients of the probe':44}{'median':>8}{'worst':>8}")
    for name, values in costs.items():
        print(f"{name:44}{statistics.median(values):8.2f}{max(values):8.2f}")
    print()
    for name, counts in products.items():
        print(f"{name + ': products':44}{statistics.median(counts):8.0f}{max(counts):8d}")
    print(f"{'warm Lanczos: relative error':44}{statistics.median(errors):8.1e}{max(errors):8.1e}")


if __name__ == "__main__":
    main()
