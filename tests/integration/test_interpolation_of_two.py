"""Two processes: one reference, one series, and the same weights as without callbacks."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_landscape import InterpolationMonitor
from tests.integration.members import Conv, Mlp, end_of, fsdp2, plain
from tests.integration.processes import both, forks, on_two
from tests.runs import differences

pytestmark = [forks, pytest.mark.slow]
EVERY = {"every_n_train_steps": 2, "max_overhead": None}


def data(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return Mlp().examples(count)


def loss_on_the_way(start, now, t: float) -> float:
    """Of an explicit copy, on the same examples."""
    made = Mlp().net.double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            a, b = (weights[f"net.{name}"].double() for weights in (start, now))
            p.copy_((1 - t) * a + t * b)
        x, y = data()
        return float(nn.functional.cross_entropy(made(x.double()), y))


def test_ddp_equals_one_process(tmp_path):
    """Each process measures its half of the probe; the values are those of all of it."""
    x, y = data()

    def work(rank):
        probe = (x[rank::2], y[rank::2])
        starts, live = [], InterpolationMonitor(
            probe=probe, other_probes={"same": probe}, resolution=3, blocks=True, **EVERY
        )  # fmt: skip

        def make():
            made = Mlp(noisy=False)
            starts.append(plain(dict(made.state_dict())))
            return made

        def run(callbacks):
            return end_of(make, callbacks, tmp_path / str(len(callbacks)), strategy="ddp",
                          devices=2)  # fmt: skip

        return run([]), run([live]), starts[-1], live.history

    for without, with_ours, start, rows in both(work):
        assert differences(without, with_ours) == []
        last = rows[-1]
        assert last["step"] == 8
        now = with_ours["parameters"]
        losses = [loss_on_the_way(start, now, t) for t in (0.0, 0.5, 1.0)]
        assert last["interpolation/reference_loss"] == pytest.approx(losses[0], rel=2e-6)
        assert last["interpolation/same_loss"] == pytest.approx(losses[-1], rel=2e-6)
        barrier = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
        assert last["interpolation/barrier"] == pytest.approx(barrier, abs=2e-6)
        far = math.sqrt(sum(float((now[n] - start[n]).square().sum()) for n in now))
        assert last["interpolation/distance"] == pytest.approx(far, rel=1e-5)


def test_ddp_with_re_estimated_statistics(tmp_path):
    def work(rank):
        def run(callbacks):
            return end_of(Conv, callbacks, tmp_path / str(len(callbacks)), strategy="ddp",
                          devices=2)  # fmt: skip

        live = InterpolationMonitor(probe_mode="eval", resolution=3, **EVERY)
        return run([]), run([live]), live.history

    (without, with_ours, rows), (without_1, with_ours_1, rows_1) = both(work)
    assert differences(without, with_ours) == []
    assert differences(without_1, with_ours_1) == []
    assert len(rows) >= 2
    assert rows == rows_1
    assert all(math.isfinite(row["interpolation/barrier"]) for row in rows)


def test_ddp_resumes_from_one_file(tmp_path):
    """Only rank zero writes the reference; both read it."""

    def work(rank):
        def run(epochs, root, callbacks, **settings):
            end_of(lambda: Mlp(noisy=False), callbacks, tmp_path / root, strategy="ddp", devices=2,
                   max_epochs=epochs, **settings)  # fmt: skip
            return callbacks[0].history

        def monitor():
            return InterpolationMonitor(probe=data(), resolution=2, **EVERY)

        whole = run(4, "whole", [monitor()])
        saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        run(2, "a", [monitor(), saver], enable_checkpointing=True)
        last = tmp_path / "checkpoints" / "last.ckpt"
        return whole, run(4, "b", [monitor()], ckpt_path=last)

    for whole, resumed in both(work):
        known = {row["step"]: row for row in whole}
        assert resumed[0]["step"] > 8
        for row in resumed:
            for key in ("distance", "reference_loss", "barrier"):
                name = f"interpolation/{key}"
                assert row[name] == pytest.approx(known[row["step"]][name], rel=1e-6, abs=1e-9)
    files = sorted(path.name for path in (tmp_path / "a" / "landscape").glob("*reference*"))
    assert files == ["interpolation-reference.pt"]


def test_reference_that_one_process_cannot_read_raises_on_both(tmp_path):
    given = tmp_path / "given.pt"
    torch.save(Mlp().state_dict(), given)

    def work(rank):
        own = tmp_path / f"rank{rank}.pt"
        torch.save(torch.load(given) if rank == 0 else {"else": torch.ones(1)}, own)
        monitor = InterpolationMonitor(third=own, probe=data(), **EVERY)
        end_of(Mlp, [monitor], tmp_path, strategy="ddp", devices=2)

    first, second = on_two(work)
    assert isinstance(first, RuntimeError)
    assert "could not be read on another process" in str(first)
    assert isinstance(second, ValueError)
    assert "third=...) holds no parameter 'net.0.weight'" in str(second)


def test_fsdp2(tmp_path):
    """No copy of sharded weights is kept, with a warning; a given state dict is used."""
    torch.manual_seed(5)
    given = copy.deepcopy(Mlp(noisy=False).state_dict())

    def work(rank):
        live = [
            InterpolationMonitor(name=name, reference=reference, probe=data(), resolution=3,
                                 **EVERY)
            for name, reference in (("a", "initial"), ("b", "last_epoch"), ("c", given))
        ]  # fmt: skip

        def run(callbacks):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state = end_of_with_warnings(callbacks, tmp_path / str(len(callbacks)))
            return state, [str(w.message) for w in caught]

        without, _ = run([])
        with_ours, messages = run(live)
        return without, with_ours, messages, [m.history for m in live]

    found = both(work)
    messages = found[0][2]
    for name, reference in (("a", "initial"), ("b", "last_epoch")):
        message = (
            f"interpolation/{name}: nothing is measured, there is no reference={reference!r}: "
            f"under FSDP2 no copy of the weights is kept; pass a checkpoint file or a state dict"
        )
        assert messages.count(message) == 1
    parts = [f["parameters"] for _, f, _, _ in found]
    # FSDP2 cuts along the first dimension.
    now = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for without, with_ours, _, histories in found:
        assert differences(without, with_ours) == []
        assert [len(rows) for rows in histories[:2]] == [0, 0]
        last = histories[2][-1]
        losses = [loss_on_the_way(given, now, t) for t in (0.0, 0.5, 1.0)]
        assert last["interpolation/c/reference_loss"] == pytest.approx(losses[0], rel=2e-6)
        barrier = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
        assert last["interpolation/c/barrier"] == pytest.approx(barrier, abs=2e-6)


def end_of_with_warnings(callbacks, root):
    """Like ``end_of``, without suppressing warnings."""
    from tests.runs import train

    run = train(lambda: Mlp(noisy=False), None, callbacks, root, strategy=fsdp2(), devices=2,
                max_epochs=2)  # fmt: skip
    assert not [c.prefix for c in callbacks if c.failed]
    return plain(run.state)
