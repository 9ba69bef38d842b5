"""Truncated, altered and foreign files and states: read correctly, or rejected with a message."""

from __future__ import annotations

import json
import math
import pickle
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_landscape import (
    GeneralizationMonitor,
    HessianMonitor,
    InterpolationMonitor,
    LandscapeMonitor,
    Probe,
    SharpnessEarlyStopping,
    Slice,
    read_history,
)
from lightning_landscape.training.data.stored import StoredProbe
from lightning_landscape.training.probes import _start_new_series
from tests.fuzz import profile
from tests.runs import differences, train
from tests.small import Quartic, ones

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NUMBERS = st.floats(width=64)


@st.composite
def slices(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    axes = tuple(np.array(draw(st.lists(NUMBERS, min_size=n, max_size=n))) for n in sizes)
    count = math.prod(sizes)
    losses = np.array(draw(st.lists(NUMBERS, min_size=count, max_size=count)))
    metadata = draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
    return Slice(axes, losses.reshape(sizes[::-1]), draw(NUMBERS), metadata)


def alter(whole: bytes, cut: int | None, flips: list[tuple[int, int]], tail: bytes) -> bytes:
    damaged = bytearray(whole[: cut % len(whole)] if cut is not None else whole)
    for position, bit in flips:
        if damaged:
            damaged[position % len(damaged)] ^= 1 << bit
    return bytes(damaged) + tail


ALTERED = st.builds(
    lambda cut, flips, tail: lambda whole: alter(whole, cut, flips, tail),
    st.one_of(st.none(), st.integers(0, 2**16)),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7)), max_size=3),
    st.one_of(st.just(b""), st.binary(max_size=8)),
)


def same(a: Slice, b: Slice) -> bool:
    return differences(vars(a), vars(b)) == []


@given(slice_=slices())
@profile(100)
def test_slices_come_back_bit_for_bit(slice_, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "slice.npz"
    slice_.save(path)
    assert same(Slice.load(path), slice_)


@given(slice_=slices(), altered=ALTERED)
@profile(200)
def test_altered_slices(slice_, altered, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered.npz"
    slice_.save(path)
    path.write_bytes(altered(path.read_bytes()))
    found, told = None, ""
    try:
        found = Slice.load(path)
    except ValueError as error:
        told = str(error)
    assert "altered.npz': not a saved Slice" in told if found is None else same(found, slice_)


@pytest.mark.parametrize(
    "content", [{"metadata": np.array("[1]")}, {"x": np.zeros((2, 2))}, {"x": np.zeros((2, 0))}]
)
def test_foreign_arrays_are_rejected(content, tmp_path):
    """Found by altering files: these were loaded as slices that could not be drawn."""
    path = tmp_path / "foreign.npz"
    whole = {"x": np.zeros(2), "losses": np.zeros(2), "center_loss": 0.0, "metadata": "{}"}
    np.savez(path, **{**whole, **content})
    with pytest.raises(ValueError, match=r"foreign.npz': not a saved Slice"):
        Slice.load(path)


# -- history.jsonl ---------------------------------------------------------------------------------

ROWS = st.lists(
    st.fixed_dictionaries({"step": st.integers(0, 99), "a/x": st.floats(allow_nan=False)}),
    max_size=4,
    unique_by=lambda row: row["step"],
)


@given(
    rows=ROWS,
    lines=st.lists(st.one_of(st.binary(max_size=12), JSON.map(lambda v: json.dumps(v).encode()))),
)
@profile(150)
def test_rows_among_foreign_lines(rows, lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "history.jsonl"
    text = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines, b"", *text]))
    found = read_history(path)
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    mine = [row for row in found if row.keys() == {"step", "a/x"}]
    assert mine == sorted(rows, key=lambda row: row["step"])


@given(rows=ROWS, altered=ALTERED)
@profile(100)
def test_altered_history(rows, altered, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "history.jsonl"
    path.write_bytes(altered("".join(json.dumps(row) + "\n" for row in rows).encode() or b"\n"))
    for row in read_history(path):
        assert isinstance(row["step"], (int, float))
        assert math.isfinite(row["step"])


def test_too_deeply_nested_line_is_skipped(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 2}\n')
    assert read_history(path) == [{"step": 1}, {"step": 2}]


# -- the saved probe -------------------------------------------------------------------------------


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def read_back(folder: Path, entry: dict) -> tuple[Probe, str]:
    kept, probe = StoredProbe("training"), Probe()
    kept.entry = entry
    trainer = types.SimpleNamespace(
        global_rank=0,
        ckpt_path=None,
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
    )
    problem = kept.read(probe, types.SimpleNamespace(folder=folder), trainer)
    return probe, problem


@given(altered=ALTERED)
@profile(100)
def test_altered_probe_files(altered, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    path, probe = folder / "probe-4-rank0.pt", Probe()
    probe.offer((torch.arange(4.0), {"names": ["a"]}), 0, lambda _: 4)
    probe.save(path)
    path.write_bytes(altered(path.read_bytes()))
    found, problem = read_back(folder, {"file": str(path), "hash": probe.fingerprint()})
    if problem:
        assert "looked for probe-4-rank0.pt" in problem
        assert "\n" not in problem
        assert "weights_only" not in problem
        assert not found.batches
        assert not found.complete
    else:
        assert differences(vars(found.batches[0]), vars(probe.batches[0])) == []


def test_altered_name_in_a_saved_probe(tmp_path):
    """Found by flipping bits: the hash is of the tensors, and torch does not check a checksum."""
    path, probe = tmp_path / "probe-4-rank0.pt", Probe()
    probe.offer((torch.arange(4.0), {"names": ["a"]}), 0, lambda _: 4)
    probe.save(path)
    path.write_bytes(path.read_bytes().replace(b"names", b"oames"))
    found, problem = read_back(tmp_path, {"file": str(path), "hash": probe.fingerprint()})
    assert problem.startswith("its file cannot be read (")
    assert not found.batches


@pytest.mark.parametrize("content", [Boom(), {}, [1], [{"batch": 1}], [], torch.zeros(2)])
def test_foreign_probe_files(content, tmp_path):
    path = tmp_path / "probe-4-rank0.pt"
    with path.open("wb") as file:
        torch.save(content, file, pickle_module=pickle)
    found, problem = read_back(tmp_path, {"file": str(path), "hash": "0"})
    assert problem.startswith(("its file cannot be read", "its file holds other data"))
    assert not found.batches
    assert not found.complete


def test_probe_that_another_process_lacks_is_saved_again(tmp_path):
    """This process has read its share for nothing; the next capture has its own file."""
    path, probe = tmp_path / "a" / "probe-4-rank0.pt", Probe(samples=4)
    path.parent.mkdir()
    probe.offer((torch.arange(4.0),), 0, lambda _: 4)
    probe.save(path)
    read, problem = read_back(tmp_path, {"file": str(path), "hash": probe.fingerprint()})
    assert (problem, read.file) == ("", str(path))
    monitor, kept = HessianMonitor(), StoredProbe("training")
    with pytest.warns(match="another process has none; a new series starts"):
        _start_new_series(monitor, read, kept, "another process has none")
    read.offer((torch.arange(4.0) + 1,), 0, lambda _: 4)
    folder = tmp_path / "b"
    folder.mkdir()
    recorder = types.SimpleNamespace(
        folder=folder, file_on_this_rank=lambda name, save: save(folder / name)
    )
    kept.write(read, recorder, types.SimpleNamespace(global_rank=0))
    assert kept.holds(read)
    again, problem = read_back(folder, kept.entry)
    assert problem == ""
    assert torch.equal(again.batches[0].batch[0], torch.arange(4.0) + 1)
    assert Path(again.file).parent == folder


# -- the states in checkpoints ---------------------------------------------------------------------


def callbacks():
    common = {"every_n_train_steps": 10, "max_overhead": None, "probe_samples": 8}
    return [
        HessianMonitor(**common, max_hvps=3),
        LandscapeMonitor(**common, resolution=2, line_resolution=2),
        GeneralizationMonitor(**common, validation_probe=ones(8)),
        InterpolationMonitor(**common, resolution=2),
        SharpnessEarlyStopping("hessian/top_eigenvalue", 1e9),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a run with all callbacks, and the final state when resumed without them."""
    root = tmp_path_factory.mktemp("whole")
    saver = ModelCheckpoint(root, "half", save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(Quartic, ones(), [*callbacks(), saver], root, max_epochs=1, enable_checkpointing=True)
        content = torch.load(root / "half.ckpt", weights_only=True)
        plain = train(Quartic, ones(), [], root, ckpt_path=root / "half.ckpt")
    return content, plain.state["parameters"]


JUNK = st.one_of(
    JSON,
    st.sampled_from(
        [{"file": 3, "hash": "x"}, {"file": "x"}, {"file": "x", "hash": "y"}, math.nan]
    ),
    st.just({"landscape/line": {"low": "x"}}),
    st.just({"landscape/line": 3}),
)


@pytest.mark.slow
@given(data=st.data())
@profile(10, phases=[Phase.generate])  # each a training: none to spare for shrinking
def test_altered_states(checkpoint, tmp_path_factory, data):
    """A foreign state is told of, and training goes on bit for bit as without us."""
    content, expected = checkpoint
    states = {key: dict(v) for key, v in content["callbacks"].items() if "ModelCheck" not in key}
    assert len(states) == 5
    for key, state in states.items():
        for name in list(state):
            fate = data.draw(st.sampled_from(["kept", "kept", "gone", "junk"]), f"{key} {name}")
            if fate == "gone":
                del state[name]
            elif fate == "junk":
                state[name] = data.draw(JUNK)
    root = tmp_path_factory.mktemp("altered")
    torch.save({**content, "callbacks": states}, root / "half.ckpt")
    ours = callbacks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = train(Quartic, ones(), ours, root, ckpt_path=root / "half.ckpt")
    assert differences(expected, end.state["parameters"]) == []
    assert [m.failed for m in ours[:4]] == [0] * 4
    assert all(row["step"] > 10 for row in ours[0].history)
    assert ours[0].history


@dataclass
class Record:
    x: torch.Tensor


def test_probe_of_a_custom_class(tmp_path):
    """It cannot be saved; the reason is one line, without torch's advice to unpickle."""
    probe = Probe()
    probe.offer(Record(torch.ones(4)), 0, lambda _: 4)
    with pytest.raises(ValueError, match=r"GLOBAL tests.training.test_altered.Record") as caught:
        probe.save(tmp_path / "probe.pt")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not list(tmp_path.iterdir())
