"""How much longer a run takes with the callbacks than without, compared with ``max_overhead``.

    make bench-overhead

Four trainings with a real Trainer: two processes, one with the callbacks and one without, run by
turns, on one thread each, with the same seed and number of steps.  The time is that of the whole
process.  Noise is how far two runs without callbacks differ.  The runs must end in the same
weights, bit by bit.

All of it takes 4 trainings x (3 limits x 3 pairs + 1) x 2 minutes; in parts:

    python -m benchmarks.overhead --trainings mlp cnn --overheads 0.01 --pairs 2 --seconds 60

``--quick`` runs one pair of 100 steps of the first training, as a test.
``--device cuda`` trains on a GPU, with deterministic kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.trainings import TRAININGS, loader_of
from benchmarks.turns import Finished, Turns, run_alone, run_by_turns

OVERHEADS = (0.01, 0.05, 0.2)

# -- the process that trains; without callbacks it never imports this package ---------------------


def train(name: str, steps: int, overhead: float | None, device: str, turns: Turns) -> None:
    """Train in this process; print the results for the parent process as one line of JSON."""
    import pytorch_lightning as pl
    import torch
    from torch import nn

    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    callbacks: list[pl.Callback] = []
    if overhead is not None:
        from lightning_landscape import landscape_callbacks

        callbacks = landscape_callbacks(max_overhead=overhead, grace_seconds=0.0)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addHandler(handler)
    warnings.filterwarnings("ignore")
    pl.seed_everything(0, verbose=False)
    net, data, batch_size = TRAININGS[name]()
    pl.seed_everything(0, verbose=False)  # mnist1d sets its own seed
    module = Module(net)
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            deterministic=device == "cuda",  # otherwise two runs without callbacks differ
            max_epochs=-1,
            max_steps=steps,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        begun = time.perf_counter()
        trainer.fit(module, loader_of(data, batch_size, turns))
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    lines = [message for message in messages if message.startswith("lightning_landscape: measured")]
    result = {"fit": time.perf_counter() - begun, "weights": digest.hexdigest(), "lines": lines}
    print(json.dumps({**result, "waited": turns.waited}))


# -- the process that measures --------------------------------------------------------------------


def _command(name: str, steps: int, overhead: float | None, device: str) -> list[str]:
    return ["-m", "benchmarks.overhead", "--train", name, str(steps), str(overhead), device]


def steps_for(name: str, seconds: float, device: str) -> int:
    """As many steps as the run without callbacks makes in about ``seconds``."""
    few = 500
    begin, end = (run_alone(_command(name, n, None, device)).result["fit"] for n in (1, few))
    return max(int(seconds * few / (end - begin)), few)


def _added(pair: Sequence[Finished]) -> float:
    plain, ours = pair
    if ours.result["weights"] != plain.result["weights"]:
        raise AssertionError(f"other weights: {ours.result['lines']}")
    return ours.seconds / plain.seconds - 1


def rows_of(
    name: str, overheads: Sequence[float], pairs: int, steps: int, device: str
) -> Iterator[str]:
    """The rows of one training."""
    plain = _command(name, steps, None, device)
    noise = abs(_added(run_by_turns(plain, plain)))
    for limit in overheads:
        command = _command(name, steps, limit, device)
        found = [run_by_turns(plain, command) for _ in range(pairs)]
        added = [_added(pair) for pair in found]
        (line,) = found[-1][1].result["lines"]
        claimed = re.search(r"[\d.]+ % of the", line)
        measured = re.search(r"measured (.+) times", line)
        cells = [
            f"{name}, {steps:,} steps, {found[-1][0].seconds:.0f} s",
            f"{limit}",
            _spread(added),
            f"{noise:.1%}",
            claimed[0].removesuffix(" of the") if claimed else "",
            measured[1] if measured else "",
            "yes" if statistics.median(added) <= limit + noise else "NO",
        ]
        yield "| " + " | ".join(cells) + " |"


def _spread(shares: Sequence[float]) -> str:
    text = f"{statistics.median(shares):.1%}"
    return text + (f" ({min(shares):.1%} to {max(shares):.1%})" if len(shares) > 1 else "")


def import_seconds(times: int) -> float:
    """Median time of ``import lightning_landscape`` after Lightning has been imported."""
    code = (
        "import pytorch_lightning, time; begun = time.perf_counter(); import lightning_landscape; "
        "print(time.perf_counter() - begun)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--overheads", nargs="+", type=float, default=OVERHEADS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run without callbacks")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="100 steps: to see that it runs")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        name, steps, overhead, device, *descriptor = given.train
        limit = None if overhead == "None" else float(overhead)
        train(name, int(steps), limit, device, Turns(*map(int, descriptor)))
        return
    imports = import_seconds(1 if given.quick else 7)
    print(f"import lightning_landscape: {imports:.3f} s above pytorch_lightning's own\n")
    columns = ["training", "max_overhead", "added", "noise", "closing line", "measured (last)"]
    print("| " + " | ".join([*columns, "holds"]) + " |")
    print("|" + "---|" * 7, flush=True)
    if given.quick:
        given.trainings, given.overheads, given.pairs = given.trainings[:1], [OVERHEADS[-1]], 1
    for name in given.trainings:
        steps = 100 if given.quick else steps_for(name, given.seconds, given.device)
        for row in rows_of(name, given.overheads, given.pairs, steps, given.device):
            print(row, flush=True)


if __name__ == "__main__":
    main()
