"""Two processes end in bitwise the same weights with callbacks as without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_landscape import SharpnessEarlyStopping, read_history
from tests.integration.members import MEMBERS, Mlp, Quartet, Save, end_of, fsdp2, ours
from tests.integration.processes import LIMIT, both, forks
from tests.runs import differences

pytestmark = forks


def measured(folder: Path) -> int:
    """Rows of all histories below."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("history*.jsonl"))


@pytest.mark.slow
def test_ddp(tmp_path):
    """Started as a script, which Lightning runs again for the second process."""
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "tests.integration.members", str(tmp_path)],
        check=True, timeout=LIMIT, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for rank in range(2):
        ends = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for kind in MEMBERS:
            without, with_ours = (ends[kind.__name__, name] for name in ("without", "with"))
            assert differences(without, with_ours) == [], kind
    assert measured(tmp_path) >= 4 * 6


@pytest.mark.slow
def test_ddp_fork_and_ddp_spawn(tmp_path):
    ends = {}
    for strategy, callbacks in (("ddp_fork", []), ("ddp_fork", ours()), ("ddp_spawn", ours())):
        folder = tmp_path / f"{strategy} {len(callbacks)}"
        folder.mkdir()
        settings = {"strategy": strategy, "devices": 2, "max_epochs": 1}
        end_of(Quartet, [*callbacks, Save(folder)], folder, **settings)
        ends[folder.name] = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
        assert measured(folder) >= 2 * len(callbacks) - 1
        # The callbacks of the main process, which has not trained, have the measured rows.
        for callback in callbacks:
            rows = [
                r for r in read_history(folder / "history.jsonl") if r["monitor"] in callback.prefix
            ]
            assert len(callback.history) >= 2
            assert callback.history == rows
    without, fork, spawn = ends.values()
    assert differences(without, fork) == []
    assert differences(without, spawn) == []  # independent of how the processes are started


@pytest.mark.parametrize(
    "kind", [MEMBERS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in MEMBERS[1:])]
)
def test_fsdp2(kind, tmp_path):
    def work(rank):
        def run(callbacks):
            return end_of(kind, callbacks, tmp_path, strategy=fsdp2(), devices=2)

        return run([]), run(ours())

    for without, with_ours in both(work):
        assert differences(without, with_ours) == []
    assert measured(tmp_path) >= 4


@pytest.mark.slow
def test_fsdp2_in_mixed_precision(tmp_path):
    def work(rank):
        def run(callbacks):
            make = lambda: Mlp(mp_dtype=torch.bfloat16)  # noqa: E731
            return end_of(make, callbacks, tmp_path, strategy=fsdp2(), devices=2)

        return run([]), run(ours())

    for without, with_ours in both(work):
        assert differences(without, with_ours) == []
    assert measured(tmp_path) >= 4


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_early_stopping_stops_both(name, tmp_path):
    def work(rank):
        stopper = SharpnessEarlyStopping("sharpness/gradient_norm", 0.0, patience=2)
        strategy = fsdp2() if name == "fsdp2" else name
        callbacks = [stopper, *ours(probe_samples=16, every_n_train_steps=3)[1:2]]
        end_of(Mlp, callbacks, tmp_path, strategy=strategy, devices=2, max_epochs=50)
        return stopper.stopped_step

    assert both(work) == [3, 3]  # measured at 1 and 3
