"""A resumed run continues the series of the run that was interrupted."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_landscape import (
    HessianMonitor,
    LandscapeMonitor,
    SharpnessEarlyStopping,
    SharpnessMonitor,
    Slice,
)
from tests.runs import train
from tests.small import Linear, regression


class Network(Linear):
    """A curved one: with dropout, so that the probe's random numbers matter too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def callbacks():
    common = {"every_n_train_steps": 4, "max_overhead": None, "probe_samples": 40}
    return [
        HessianMonitor(**common),
        SharpnessMonitor(**common),
        LandscapeMonitor(resolution=3, line_resolution=3, **common),
        SharpnessEarlyStopping("hessian/edge_ratio", 1e9),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of six epochs, and one stopped after three and resumed in another folder."""
    whole = tmp_path_factory.mktemp("whole")
    uninterrupted = callbacks()
    train(Network, regression, uninterrupted, whole, max_epochs=6)
    begun = tmp_path_factory.mktemp("begun")
    saver = ModelCheckpoint(begun / "checkpoints", save_last=True)
    first = callbacks()
    train(Network, regression, [*first, saver], begun, max_epochs=3, enable_checkpointing=True)
    resumed = callbacks()
    later = tmp_path_factory.mktemp("later")
    resume(begun / "checkpoints" / "last.ckpt", resumed, later)
    return uninterrupted, first, resumed, (whole, begun, later)


def resume(checkpoint, resumed, root, make_module=Network):
    """Train on to epoch 6; whatever random state the new process starts with does not matter."""
    pl.seed_everything(99, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=6,
        logger=False,
        callbacks=resumed,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(root),
    )
    trainer.fit(make_module(), regression(), ckpt_path=checkpoint)


def test_the_schedule_goes_on(runs):
    uninterrupted, first, resumed, _ = runs
    whole = [row["step"] for row in uninterrupted[0].history]
    parts = [row["step"] for row in first[0].history] + [row["step"] for row in resumed[0].history]
    assert parts == whole == [2, 6, 10, 14, 18]


def test_same_probe_and_directions_and_scale(runs):
    uninterrupted, first, resumed, _ = runs
    assert resumed[0].probe_in_use.fingerprint() == first[0].probe_in_use.fingerprint()
    assert resumed[2]._scales == first[2]._scales == uninterrupted[2]._scales
    assert resumed[0].measured == uninterrupted[0].measured


def test_values_at_the_same_weights_are_the_same(tmp_path):
    """Without dropout in training both runs pass through the same weights: bitwise equal rows."""
    whole, resumed = callbacks(), callbacks()
    train(Linear, regression, whole, tmp_path / "whole", max_epochs=6)
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(
        Linear, regression, [*callbacks(), saver], tmp_path / "a", max_epochs=3,
        enable_checkpointing=True,
    )  # fmt: skip
    resume(tmp_path / "checkpoints" / "last.ckpt", resumed, tmp_path / "b", Linear)
    after = {row["step"]: row for row in whole[1].history}
    assert len(resumed[1].history) >= 2
    for row in resumed[1].history:
        for key in ("sharpness/sam", "sharpness/gradient_norm"):
            assert row[key] == after[row["step"]][key]
    eigen = {row["step"]: row for row in whole[0].history}
    for row in resumed[0].history:
        other = eigen[row["step"]]
        bound = row["hessian/residual"] + other["hessian/residual"] + 1e-6
        assert abs(row["hessian/top_eigenvalue"] - other["hessian/top_eigenvalue"]) <= bound
    name = "landscape-plane-step00000014.npz"
    a = Slice.load(tmp_path / "whole" / "landscape" / name)
    b = Slice.load(tmp_path / "b" / "landscape" / name)
    assert (a.losses == b.losses).all()


def test_the_checkpoint_is_small_and_plain(runs):
    _, _, _, (_, begun, _) = runs
    checkpoint = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    ours = {k: v for k, v in checkpoint["callbacks"].items() if "Checkpoint" not in k}
    assert len(ours) == 4
    assert len(repr(ours)) < 2000
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves(ours))


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def test_a_missing_probe_starts_a_new_series_and_says_so(runs, tmp_path):
    _, _, _, (_, begun, _) = runs
    kept = begun / "landscape"
    hidden = begun / "elsewhere"
    kept.rename(hidden)
    try:
        fresh = callbacks()
        with pytest.warns(match="its file is missing .*a new series starts on a new probe"):
            resume(begun / "checkpoints" / "last.ckpt", fresh, tmp_path)
    finally:
        hidden.rename(kept)
    assert fresh[0].history[0]["step"] == 11  # 40 examples after two more batches


def test_an_altered_probe_is_noticed(runs, tmp_path):
    _, _, _, (_, begun, _) = runs
    path = next((begun / "landscape").glob("probe-*.pt"))
    content = path.read_bytes()
    rows = torch.load(path, weights_only=True)
    rows[0]["batch"][0][0, 0] += 1.0
    torch.save(rows, path)
    try:
        with pytest.warns(match="its file holds other data"):
            resume(begun / "checkpoints" / "last.ckpt", callbacks(), tmp_path)
        path.write_bytes(b"garbage")
        with pytest.warns(match="its file cannot be read"):
            resume(begun / "checkpoints" / "last.ckpt", callbacks(), tmp_path)
    finally:
        path.write_bytes(content)
