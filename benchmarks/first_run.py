"""Values and overhead of a first run with all defaults.

    make bench-first-run

Four networks, each trained for 200 steps, for 1,500 steps and for three minutes with the usual
callbacks: how many values and the longest gap between two, the planes and their resolution, what a
value takes, and the time added to the same training without callbacks (two processes that run by
turns, each on one thread), compared with the documented limit:
``max(max_overhead * T, min(max(T, 10 s), grace_seconds))``.
Logged eigenvalues, 20 of them at most, are then measured again, at ``tol=1e-4`` on the same probe
and weights: runs with callbacks have the same weights, so a third run writes a checkpoint at each
of these steps.

The last column compares the probe, 512 examples, with 2,048 examples of the same data in batches of
the same size: the median of the ratios of their eigenvalues at the first, a middle and the last
step.

    python -m benchmarks.first_run --trainings mlp --lengths 200

``--no-grace 3`` instead runs three pairs of each with ``grace_seconds=0``, in which 5 % are the
limit, and prints the time added to each and the median.  ``--quick`` runs the shortest one, as a
test.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trainings import TRAININGS, loader_of
from benchmarks.turns import Finished, Turns, run_alone, run_by_turns

_MINUTES = 3
_WIDE = 2048  # examples
_COMPARED = 20  # values of a run
_LENGTHS = ("200", "1500", "minutes")


def train(name: str, steps: int, folder: str, kind: str, turns: Turns) -> None:
    """Train in this process, and print the results for the parent process as one line of JSON.

    ``kind``: "plain", "measured", "no grace" (measured as well), or "kept" with the steps of
    checkpoints in ``folder/steps.json``.
    """
    import pytorch_lightning as pl
    import torch
    from torch import nn

    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.steps = set(json.loads(Path(folder, "steps.json").read_text()))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in self.steps:
                trainer.save_checkpoint(Path(folder, f"{trainer.global_step}.ckpt"))

    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    net, data, size = TRAININGS[name]()
    module = Module(net)
    callbacks: list[Any] = [Keep()] if kind == "kept" else []
    if kind in ("measured", "no grace"):
        from lightning_landscape import landscape_callbacks

        callbacks = landscape_callbacks(**({"grace_seconds": 0.0} if kind == "no grace" else {}))
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = loader_of(data, size, turns)
    started = time.perf_counter()
    trainer.fit(module, loader)
    result: dict[str, Any] = {"seconds": time.perf_counter() - started}
    result["waited"] = turns.waited
    if kind == "measured":
        hessian, sharpness, landscape = callbacks
        result["rows"] = hessian.history
        result["values"] = [len(hessian.history), len(sharpness.history)]
        result["pictures"] = [row["step"] for row in landscape.history]
        spent = hessian.seconds_spent + sharpness.seconds_spent
        result["cost"] = spent / max(len(hessian.history), 1)
    if kind == "kept":
        (file,) = Path(folder).rglob("training-examples-*-rank0.pt")
        probe = [entry["batch"] for entry in torch.load(file, weights_only=True)]
        steps_kept = sorted(int(path.stem) for path in Path(folder).glob("*.ckpt"))
        result["exact"] = _exact(module, loader, Path(folder), probe, steps_kept)
        some = {steps_kept[index] for index in (0, len(steps_kept) // 2, -1)}
        wide = list(itertools.islice(loader, _WIDE // size))
        result["wide"] = _exact(module, loader, Path(folder), wide, sorted(some))
    print(json.dumps(result))


def _exact(
    module: Any, loader: Any, folder: Path, batches: list[Any], steps: list[int]
) -> dict[int, float]:
    """Step -> the eigenvalue at ``tol=1e-4`` on these batches, from its checkpoint."""
    from lightning_landscape import HessianMonitor
    from lightning_landscape.measure import measure

    found = {}
    for step in steps:
        exact = HessianMonitor(tol=1e-4, rtol=0.0, max_hvps=400, max_overhead=None, probe=batches)
        measured = measure(
            module,
            loader,
            checkpoint=folder / f"{step}.ckpt",
            callbacks=[exact],
            logdir=folder / "exact",
            accelerator="cpu",
            report=False,
        )
        found[step] = measured.values["hessian/top_eigenvalue"]
    return found


def _command(name: str, steps: int, folder: str, kind: str) -> list[str]:
    return ["-m", "benchmarks.first_run", "--run", name, str(steps), folder, kind]


def _pair(name: str, steps: int, folder: str, kind: str) -> list[Finished]:
    """Without and with callbacks, by turns."""
    pair = run_by_turns(*(_command(name, steps, folder, each) for each in ("plain", kind)))
    for line in pair[1].messages.splitlines():
        if line.startswith("lightning_landscape: measured hessian"):
            print(f"{name}, {steps:,} steps: {line}", file=sys.stderr, flush=True)
    return pair


def row_of(name: str, length: str) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps_of(name, length, folder)
        plain, ours = _pair(name, steps, folder, "measured")
        measured = ours.result
        labels = [row["step"] for row in measured["rows"]]
        compared = _evenly(measured["rows"], _COMPARED)
        Path(folder, "steps.json").write_text(json.dumps([row["step"] for row in compared]))
        kept = run_alone(_command(name, steps, folder, "kept")).result
        errors = sorted(
            abs(row["hessian/top_eigenvalue"] / kept["exact"][str(row["step"])] - 1)
            for row in compared
        )
        biases = [wide / kept["exact"][step] for step, wide in kept["wide"].items()]
        sizes = _plane_sizes(Path(folder))
    gaps = [b - a for a, b in zip([0, *labels], [*labels, steps], strict=True)]
    trained = plain.result["seconds"]
    limit = max(0.05 * trained, min(max(trained, 10.0), 30.0))
    return [
        name,
        f"{steps:,}",
        "{} + {}".format(*measured["values"]),
        f"{max(gaps) / steps:.0%}",
        f"{len(sizes)} {', '.join(sorted({f'{x} x {y}' for x, y in sizes}))}",
        f"{measured['cost']:.2f} s",
        f"{ours.seconds - plain.seconds:.1f} of {limit:.0f} s",
        f"{statistics.median(errors):.1%}" if errors else "",
        f"{errors[int(0.95 * (len(errors) - 1))]:.1%}" if errors else "",
        f"{statistics.median(biases):.2f}" if biases else "",
    ]


def _steps_of(name: str, length: str, folder: str) -> int:
    if length != "minutes":
        return int(length)
    tried = run_alone(_command(name, 300, folder, "plain"))
    return max(int(300 * 60 * _MINUTES / tried.result["seconds"]), 300)


def _evenly(rows: list[Any], most: int) -> list[Any]:
    """At most ``most`` of the rows, with the first and the last."""
    number = min(most, len(rows))
    return [rows[round(i * (len(rows) - 1) / max(number - 1, 1))] for i in range(number)]


def pairs_of(name: str, length: str, pairs: int) -> list[str]:
    """One row of the table without a grace."""
    added = []
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps_of(name, length, folder)
        for _ in range(pairs):
            plain, ours = _pair(name, steps, folder, "no grace")
            added.append(ours.seconds / plain.seconds - 1)
    each = ", ".join(f"{share:.1%}" for share in added)
    return [name, f"{steps:,}", each, f"{statistics.median(added):.1%}"]


def _plane_sizes(folder: Path) -> list[tuple[int, int]]:
    import numpy as np

    shapes = [np.load(file)["losses"].shape for file in folder.rglob("landscape-plane-*.npz")]
    return [(x, y) for x, y in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--lengths", nargs="+", choices=_LENGTHS, default=_LENGTHS)
    parser.add_argument("--no-grace", type=int, metavar="PAIRS", help="with grace_seconds=0")
    parser.add_argument("--quick", action="store_true", help="the shortest one")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        name, steps, folder, kind, *descriptor = chosen.run
        train(name, int(steps), folder, kind, Turns(*map(int, descriptor)))
        return
    if chosen.quick:
        chosen.trainings, chosen.lengths = ["mlp"], ["200"]
    columns = ["training", "steps", "values (Hessian + SAM)", "longest gap", "planes", "a value"]
    columns += ["added, of the limit", "error, median", "95 %", "2,048 examples"]
    row = row_of
    if chosen.no_grace:
        columns = ["training", "steps", "added, without a grace", "median"]
        row = partial(pairs_of, pairs=chosen.no_grace)
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for length in chosen.lengths:
        for name in chosen.trainings:
            print("| " + " | ".join(row(name, length)) + " |", flush=True)


if __name__ == "__main__":
    main()
