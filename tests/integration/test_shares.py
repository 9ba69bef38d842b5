"""Two processes with a share of the probe each give the values of one process with all of it."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl

from lightning_landscape import HessianMonitor, LandscapeMonitor, SharpnessMonitor, read_history
from lightning_landscape.training.monitor import Monitor
from tests.integration.members import MEMBERS, end_of, fsdp2
from tests.integration.processes import both, forks

pytestmark = forks

# Batches by their sizes, for rank 0 and for rank 1.
HALVES = ([10, 10], [10, 10])
UNEQUAL = ([8, 3, 9], [20])

STRATEGIES = {"ddp": lambda: "ddp", "fsdp2": fsdp2}
SUMS = {  # figure -> how far two ways of adding up may lie apart
    "hessian/top_eigenvalue": 1e-6,
    "hessian/edge_ratio": 1e-6,
    "hessian/update_curvature": 1e-5,
    "sharpness/gradient_norm": 1e-6,
    "sharpness/sam": 1e-5,
    "sharpness/worst_case": 1e-5,
    "sharpness/critical": 1e-5,
    "probe_samples": 0.0,
}
DIFFERENCES = {"sharpness/sam", "sharpness/worst_case"}


def batches(kind, sizes, begin):
    tensors = kind(noisy=False).examples(40)
    ends = [begin + sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        tuple(t[end - size : end] for t in tensors) for size, end in zip(sizes, ends, strict=True)
    ]


def measured(kind, probe, root, **settings):
    """Figure -> its values in a short run that is equal on one and on two processes."""
    common = {"every_n_train_steps": 3, "max_overhead": None, "probe": probe}
    monitors: list[pl.Callback] = [
        # So exact that it does not matter when each looks at the residual and stops.
        HessianMonitor(**common, update_curvature=True, tol=1e-5, rtol=0.0, max_hvps=300),
        SharpnessMonitor(**common, worst_case=True, worst_case_steps=4, critical=True),
        LandscapeMonitor(**common, resolution=3, line_resolution=5),
    ]
    root.mkdir(parents=True, exist_ok=True)
    # Each process trains on the same batches, so that their mean gradient is that of one.
    end_of(
        lambda: kind(noisy=False), monitors, root, use_distributed_sampler=False,
        max_epochs=1, limit_train_batches=4, limit_val_batches=0, **settings,
    )  # fmt: skip


def read(root):
    rows = read_history(root / "history.jsonl")
    found = {key: [row[key] for row in rows if key in row] for key in SUMS}
    for path in sorted((root / "landscape").glob("*.npz")):
        with np.load(path) as file:
            found[path.stem] = file["losses"].reshape(-1).tolist()
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("joined", [False, True], ids=["batches", "joined"])
@pytest.mark.parametrize("kind", MEMBERS)
def test_figures(kind, joined, tmp_path, side_by_side, monkeypatch):
    """Batch by batch, and with the batches of each process taken as one."""
    if not joined:
        monkeypatch.setattr(Monitor, "allows_concat", False)
        monkeypatch.setattr(SharpnessMonitor, "allows_concat", False)
    runs = [("ddp", HALVES), ("ddp", UNEQUAL), ("fsdp2", UNEQUAL)]

    def work(rank):
        for name, shares in runs:
            begin = sum(shares[0]) if rank else 0
            settings = {"strategy": STRATEGIES[name](), "devices": 2}
            probe = batches(kind, shares[rank], begin)
            measured(kind, probe, tmp_path / name / str(shares), **settings)

    both(work)
    for name, shares in runs:
        alone = tmp_path / "alone" / str(shares)
        if not alone.exists():
            measured(kind, batches(kind, shares[0] + shares[1], 0), alone)
        one, two = read(alone), read(tmp_path / name / str(shares))
        assert one.keys() == two.keys()
        assert len(one["hessian/top_eigenvalue"]) == 2
        assert any("plane" in key for key in one)
        what = f"{kind.__name__}, {name} {shares[0]} + {shares[1]}"
        for key in one:
            # One mean over many examples is rounded in float32, those of batches are summed in
            # float64: a difference of losses then carries two roundings of a loss of about 2.
            rounding = 2 * 2.4e-7 if joined and key in DIFFERENCES else 0.0
            # Adam's preconditioner is the probe's gradient where the second moment is much smaller.
            # An entry of 5e-5 beside others of 0.0125 is rounded to 1.5e-5 of itself in one mean.
            shared = 1e-5 if joined and key == "hessian/edge_ratio" else SUMS.get(key, 1e-5)
            close = pytest.approx(one[key], rel=shared, abs=rounding or None, nan_ok=True)
            assert two[key] == close, (what, key)
        what += ", joined" if joined else ""
        for key in ("hessian/top_eigenvalue", "sharpness/sam"):
            side_by_side(what, key, one[key][-1], two[key][-1])
        last = [key for key in one if "plane" in key][-1]
        worst = max(range(len(one[last])), key=lambda i: abs(two[last][i] / one[last][i] - 1))
        side_by_side(what, "plane, worst of its losses", one[last][worst], two[last][worst])
    # Each example counts the same, in whatever batch it is: as one batch of all of them.
    measured(kind, batches(kind, [40], 0), tmp_path / "at once")
    one = read(tmp_path / "at once")
    for key in ("hessian/top_eigenvalue", "sharpness/gradient_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
        at_once = f"{kind.__name__}, fsdp2 against one batch of 40{', joined' if joined else ''}"
        side_by_side(at_once, key, one[key][-1], two[key][-1])
