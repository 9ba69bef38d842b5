"""Wrong uses of files: missing, damaged, or of another kind."""

from __future__ import annotations

import json
import pickle

import numpy as np
import torch
from torch import nn

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping, Slice, compare, read_history
from lightning_landscape.geometry import SpectralDensity
from lightning_landscape.measure import measure
from lightning_landscape.report import write_report
from tests.bad_input.of_slices import DENSITY, HERE, LINE
from tests.bad_input.rows import Call, wrong
from tests.small import Linear, regression


class Boom:
    """Its pickle runs code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def _write_files():
    """Write files with every kind of damage; return their folder."""
    LINE.save(HERE / "line.npz")
    DENSITY.save(HERE / "density.npz")
    whole = (HERE / "line.npz").read_bytes()
    (HERE / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (HERE / "text.npz").write_text("no archive")
    (HERE / "empty.npz").write_bytes(b"")
    np.savez(HERE / "pickles.npz", losses=np.array([Boom()], dtype=object))
    np.savez(HERE / "fields.npz", other=np.zeros(3))
    facts = {"center_loss": np.float64(0), "metadata": np.array("{}")}
    np.savez(HERE / "shapes.npz", x=np.zeros(3), losses=np.zeros(2), **facts)
    np.savez(HERE / "strings.npz", x=np.zeros(2), losses=np.array(["a", "b"]), **facts)
    np.savez(HERE / "facts.npz", x=np.zeros(2), losses=np.zeros(2), center_loss=0.0, metadata="[1]")
    (HERE / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": Boom()}))
    torch.save({"state_dict": Linear().state_dict()}, HERE / "weights.ckpt")
    torch.save([1, 2], HERE / "list.ckpt")
    torch.save({"a": Boom()}, HERE / "boom.ckpt")
    whole = (HERE / "weights.ckpt").read_bytes()
    (HERE / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    (HERE / "text.ckpt").write_text("no checkpoint")
    for run in ("one", "two"):
        (HERE / "runs" / run).mkdir(parents=True)
        row = {"step": 1, "monitor": "hessian", "hessian/top_eigenvalue": 3.0}
        (HERE / "runs" / run / "history.jsonl").write_text(json.dumps(row) + "\n")
    (HERE / "nothing").mkdir()
    return HERE


_write_files()


def _at(*names):
    return tuple(HERE / name for name in names)


LOAD = Call("Slice.load", Slice.load, lambda: {"path": HERE / "line.npz"})
LOAD_DENSITY = Call(
    "SpectralDensity.load", SpectralDensity.load, lambda: {"path": HERE / "density.npz"}
)
HISTORY = Call("read_history", read_history, lambda: {"path": HERE / "runs/one/history.jsonl"})
REPORT = Call("write_report", write_report, lambda: {"log_dir": HERE / "runs/one"})
COMPARE = Call("compare", compare, lambda: {"runs": _at("runs/one", "runs/two")})
MEASURE = Call(
    "measure",
    measure,
    lambda: {
        "module": Linear(),
        "data": regression(),
        "callbacks": [HessianMonitor(max_overhead=None)],
        "logdir": HERE / "logs",
        "progress": False,
    },
)

ROWS = [
    wrong((LOAD, LOAD_DENSITY), "path", (HERE / "gone.npz",), FileNotFoundError,
          "no such file; expected one that .*save wrote", names="gone.npz"),
    wrong(LOAD, "path", _at("torn.npz", "text.npz", "empty.npz", "pickles.npz", "fields.npz",
          "shapes.npz", "strings.npz", "facts.npz", "density.npz", "nothing"), ValueError,
          "not a saved Slice .*; expected what Slice.save wrote", names=str(HERE)),
    wrong(LOAD_DENSITY, "path", _at("torn.npz", "text.npz", "pickles.npz", "fields.npz", "line.npz",
          "nothing"), ValueError,
          "not a saved SpectralDensity .*; expected what SpectralDensity.save", names=str(HERE)),
    wrong((LOAD, LOAD_DENSITY, HISTORY), "path", (None, 3, ["a"]), TypeError, "expected the path "),
    wrong(HISTORY, "path", (HERE / "gone.jsonl",), FileNotFoundError, "expected the history.jsonl",
          names="gone.jsonl"),
    wrong(HISTORY, "path", (HERE / "runs",), FileNotFoundError, "a directory; pass the history.jso",
          names="runs"),
    # The report.
    wrong(REPORT, "log_dir", _at("gone",), FileNotFoundError, "no such directory; p", names="gone"),
    wrong(REPORT, "log_dir", _at("nothing",), FileNotFoundError, "expected the log directory of a ",
          names="nothing"),
    wrong(REPORT, "log_dir", _at("runs",), ValueError, "choose one of them", names="2 runs"),
    wrong(REPORT, "log_dir", (3, None, ["a"]), TypeError, "expected the log directory of a run"),
    wrong(REPORT, "path", (3, ["a"], True), TypeError, "expected a name for the page, or None"),
    wrong(REPORT, "path", _at("nothing",), ValueError, "is a directory; pass the name of a file",
          names="nothing"),
    # Comparing runs.
    wrong(COMPARE, "runs", ("runs/one", HERE), TypeError, "expected several log", names="runs='"),
    wrong(COMPARE, "runs", (3, None, len), TypeError, "expected several log directories"),
    wrong(COMPARE, "runs", ([3], {"a": None}), TypeError, "expected the log directory of a run",
          names="runs="),
    wrong(COMPARE, "runs", ([], {}), ValueError, "expected at least one log directory"),
    wrong(COMPARE, "runs", ([HERE / "gone"], [HERE / "nothing"]), FileNotFoundError,
          "pass a directory that holds history.jsonl", names=str(HERE)),
    wrong(COMPARE, "runs", ([HERE / "runs"],), ValueError, "choose one of them", names="2 runs"),
    wrong(COMPARE, "runs", (_at("runs/one", "runs/one"),), ValueError, "pass each run once",
          names="given 2 times"),
    wrong(COMPARE, "out", (3, ["a"], True), TypeError, "expected a name for the page, or None"),
    wrong(COMPARE, "out", _at("nothing",), ValueError, "is a directory; pass the name of a file",
          names="nothing"),
    wrong(COMPARE, "keys", (["hessian/edge"], "loss", ["x*"]), ValueError,
          "no run has .*; there are|no run has .*; name one of", names="no run has"),
    wrong(COMPARE, "keys", (3, [3], [None]), TypeError, "expected names of scalars or patterns"),
    wrong(COMPARE, "groups", ({}, {"one": "a"}), ValueError, "name the group of every run",
          names="lacks the run"),
    wrong(COMPARE, "groups", ({"one": "a", "two": "a", "three": "b"},), ValueError, "the runs are",
          names="there is no run 'three'"),
    wrong(COMPARE, "groups", (3, "seed", ["a"]), TypeError, "expected a mapping from run to group"),
    wrong(COMPARE, "groups", ({"one": "a", "two": "a"},), ValueError, "expected one of the two",
          group_by="/", names="groups="),
    wrong(COMPARE, "group_by", ("",), ValueError, "expected the separator behind the group"),
    wrong(COMPARE, "group_by", (3, True, ["/"]), TypeError, "expected the separator behind the"),
    wrong(COMPARE, "points", ([("a", "b")],), ValueError, "no run has", names="'a'"),
    wrong(COMPARE, "points", (3, "ab", ["a"], [("a", "b", "c")], [(1, 2)]), TypeError,
          r"expected pairs of keys \(x, y\)"),
    # Measuring a finished model.
    wrong(MEASURE, "module", (3, None, nn.Linear(2, 1), nn.Linear, "Net"), TypeError,
          "expected a LightningModule or its class"),
    wrong(MEASURE, "data", (3, "train", {"x": 1}, (1, 2), torch.ones(3)), TypeError,
          "expected a DataLoader, a list of batches, a LightningDataModule"),
    wrong(MEASURE, "data", (regression().dataset,), TypeError, "expected a DataLoader"),
    wrong(MEASURE, "data", ([],), ValueError, "holds no batch; pass", names="measure(data=[]"),
    wrong(MEASURE, "checkpoint", _at("gone.ckpt",), FileNotFoundError, "expected a checkpoint",
          names="gone.ckpt"),
    wrong(MEASURE, "checkpoint", _at("torn.ckpt", "text.ckpt", "pickle.ckpt", "boom.ckpt"),
          ValueError, "cannot be read safely .* pass", names=str(HERE)),
    wrong(MEASURE, "checkpoint", _at("weights.ckpt", "list.ckpt"), ValueError,
          "not a checkpoint of a Trainer, .* pass the module", names=str(HERE)),
    wrong(MEASURE, "checkpoint", (3, ["a"], {"state_dict": {}}), TypeError, "expected the path of"),
    wrong(MEASURE, "callbacks", ([], [3], [SharpnessEarlyStopping("a", 1.0)], 3, "all"), TypeError,
          "expected measuring callbacks, e.g"),
    wrong(MEASURE, "loss_fn", (print,), TypeError, "pass loss_fn to the", names="loss_fn="),
    wrong(MEASURE, "loss_fn", (3, "mse"), TypeError, r"expected a function \(pl_module, batch\)",
          callbacks=None),
    wrong(MEASURE, "probe_samples", (0, -1, 2.5, True, "512", None), ValueError, "an integer >= 1"),
    wrong(MEASURE, "logdir", (3, None, ["a"]), TypeError, "expected a directory"),
    wrong(MEASURE, "init", ({"width": 3},), TypeError, "only used if module is a class"),
    wrong(MEASURE, "init", (3, "width=3", [1]), TypeError, "expected a mapping from argument to v"),
    wrong(MEASURE, "report", (1, "yes", None), TypeError, "expected True or False"),
    wrong(MEASURE, "progress", (1, "no", None), TypeError, "expected True or False"),
    wrong(MEASURE, "max_epochs", (3,), TypeError, "nothing is trained; leave it ou",
          names="max_epochs="),
    wrong(MEASURE, "precison", ("16-mixed",), TypeError, "expected an argument of the Trainer"),
]  # fmt: skip

# Command lines: the tool, its arguments, what is printed.
_ONE, _TWO = str(HERE / "runs/one"), str(HERE / "runs/two")
COMMANDS = [
    ("report", [], r"the following arguments are required: logdir"),
    ("report", [str(HERE / "gone")], "no such directory; pass"),
    ("report", [str(HERE / "nothing")], "expected the log directory of a run"),
    ("report", [str(HERE / "runs")], "holds 2 runs; choose one of them"),
    ("report", [_ONE, "--output", str(HERE / "nothing")], "is a directory; pass the name of a fil"),
    ("report", [_ONE, "--outptu", "x"], "unrecognized arguments: --outptu"),
    ("compare", [], "the following arguments are required: RUN"),
    ("compare", [str(HERE / "gone")], "no such directory; pass"),
    ("compare", [_ONE, _ONE], "is given 2 times; pass each run once"),
    ("compare", [_ONE, _TWO, "--names", "a"], "--names: got 1 name for 2 runs; pass one a run"),
    ("compare", [_ONE, _TWO, "--names", "a", "a"], "--names: got 'a' 2 times; pass another name"),
    ("compare", [_ONE, _TWO, "--keys", "los"], "no run has 'los'"),
    ("compare", [_ONE, _TWO, "--points", "a", "b"], "no run has 'a'"),
    ("compare", [_ONE, _TWO, "--group-by", ""], "expected the separator behind the group"),
    ("compare", [_ONE, _TWO, "--out", str(HERE / "nothing")], "pass the name of a file"),
    ("measure", [], "the following arguments are required: --module"),
    ("measure", ["--module", "Net"], "--module 'Net': expected package.module:object"),
    ("measure", ["--module", "no.such:Net"], "--module 'no.such:Net': it cannot be imported"),
    ("measure", ["--module", "tests.small:Nte"], "--module 'tests.small:Nte': it cannot be import"),
    ("measure", ["--module", "torch.nn:Linear"], "expected a LightningModule or its class"),
    (
        "measure",
        [
            "--module",
            "tests.small:Linear",
            "--data",
            "tests.small:regression",
            "--probe-samples",
            "0",
        ],
        r"probe_samples=0\): expected an integer >= 1",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--data", "tests.small:Quartic"],
        "expected a DataLoader, a list of batches",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--data", "tests.small:regression", "--init", "lr"],
        "--init 'lr': expected NAME=VALUE, e.g. width=64",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--data", "tests.small:regression", "--init", "rl=1"],
        r"rl.*pass init=\{\.\.\.\} \(--init name=value\)",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--data", "tests.small:regression", "--trainer", "x=1"],
        "expected an argument of the Trainer",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--callbacks", "torch:float32"],
        "--callbacks 'torch:float32': expected a callback, a list or a function",
    ),
    (
        "measure",
        ["--module", "tests.small:Linear", "--checkpoint", str(HERE / "text.ckpt")],
        "cannot be read safely",
    ),
]
