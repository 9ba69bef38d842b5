"""How much longer a run takes with the callbacks than without, compared with ``max_overhead``.

    make bench-overhead

Four trainings with a real Trainer, each in its own process: without callbacks, with them,
without, with them, ..., the same seed and the same number of steps, one thread.  What is added is
one with callbacks over the mean of its two neighbours without; noise is how far neighbours without
callbacks differ.  The limit is on wall time; processor time (user and system, of the process) is
less affected by the load of the machine.  The runs must end in the same weights, bit by bit.

All of it takes 4 trainings x 3 limits x 3 pairs x 2 minutes; in parts:

    python benchmarks/overhead.py --trainings mlp cnn --overheads 0.01 --pairs 2 --seconds 60

``--quick`` runs one pair of 100 steps of the first training, as a test.
``--device cuda`` trains on a GPU, with deterministic kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OVERHEADS = (0.01, 0.05, 0.2)
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}

# -- the process that trains; without callbacks it never imports this package ---------------------


def mlp() -> tuple[Any, Any, int]:
    """Digits, 64-64-10, 32 examples a step: Lightning itself is most of a step."""
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), _digits(), 32


def cnn() -> tuple[Any, Any, int]:
    """Digits as images, three convolutions with BatchNorm, 128 examples a step."""
    from torch import nn

    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10)), _digits(), 128


def transformer() -> tuple[Any, Any, int]:
    """MNIST-1D in ten patches, two encoder layers with dropout, 64 examples a step."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.embed = nn.Linear(4, 64)
            self.places = nn.Parameter(0.02 * torch.randn(10, 64))
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(self.embed(x.unflatten(1, (10, 4))) + self.places).mean(1))

    return Encoder(), _mnist1d(), 64


def lstm() -> tuple[Any, Any, int]:
    """MNIST-1D as a sequence of 40, one layer of 64, 64 examples a step."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 64, batch_first=True)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])

    return Recurrent(), _mnist1d(), 64


TRAININGS: dict[str, Callable[[], tuple[Any, Any, int]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "lstm": lstm,
}


def _digits() -> Any:
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import TensorDataset

    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))


def _mnist1d() -> Any:
    import torch
    from mnist1d.data import get_dataset_args, make_dataset
    from torch.utils.data import TensorDataset

    made = make_dataset(get_dataset_args())
    return TensorDataset(torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"]))


def train(name: str, steps: int, overhead: float | None, device: str) -> None:
    """Train in this process; print the results for the parent process as one line of JSON."""
    import pytorch_lightning as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

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
        trainer.fit(module, DataLoader(data, batch_size=batch_size, shuffle=True))
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    line = next((message for message in messages if message.startswith("lightning_landscape")), "")
    result = {"fit": time.perf_counter() - begun, "weights": digest.hexdigest(), "line": line}
    print(json.dumps(result))


# -- the process that measures --------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One process from its start to its end."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    fit: float  # seconds inside Trainer.fit
    weights: str  # a hash
    line: str  # the closing line

    @property
    def claimed(self) -> float:
        """The share of time in the closing line."""
        found = re.search(r"([\d.]+) % of the", self.line)
        return float(found[1]) / 100 if found else 0.0

    @property
    def measured(self) -> str:
        """The counts of the closing line."""
        found = re.search(r"measured (.+) times", self.line)
        return found[1] if found else ""


def run(name: str, steps: int, overhead: float | None, device: str) -> Run:
    """Train in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--train", name, "--steps", str(steps)]
    command += ["--device", device]
    if overhead is not None:
        command += ["--overheads", str(overhead)]
    begun = time.perf_counter()
    child = subprocess.Popen(
        command,
        env={**os.environ, **_ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    found = json.loads(printed.splitlines()[-1])
    return Run(wall, used.ru_utime + used.ru_stime, **found)


def steps_for(name: str, seconds: float, device: str) -> int:
    """As many steps as the run without callbacks makes in about ``seconds``."""
    few = 200
    begin = run(name, 1, None, device).fit
    pace = (run(name, few, None, device).fit - begin) / few
    if pace < 5e-3:
        pace = (run(name, 5 * few, None, device).fit - begin) / (5 * few)
    return max(int(seconds / pace), few)


def compare(
    name: str, overheads: Sequence[float], pairs: int, steps: int, device: str
) -> list[str]:
    """The rows of one training."""
    without = [run(name, steps, None, device)]
    added: dict[float, list[tuple[float, float, Run]]] = {limit: [] for limit in overheads}
    for _ in range(pairs):
        for limit in overheads:
            ours = run(name, steps, limit, device)
            without.append(run(name, steps, None, device))
            before, after = without[-2:]
            if ours.weights != after.weights:
                raise AssertionError(f"{name}, max_overhead={limit}: other weights")
            wall = ours.wall / ((before.wall + after.wall) / 2) - 1
            cpu = ours.cpu / ((before.cpu + after.cpu) / 2) - 1
            added[limit].append((wall, cpu, ours))
    noise = [_noise([getattr(one, kind) for one in without]) for kind in ("wall", "cpu")]
    rows = []
    for limit, found in added.items():
        shares = [[pair[kind] for pair in found] for kind in (0, 1)]
        holds = [
            statistics.median(share) <= limit + n for share, n in zip(shares, noise, strict=True)
        ]
        last = found[-1][2]
        cells = [
            f"{name}, {steps} steps, {statistics.median(one.wall for one in without):.0f} s",
            f"{limit}",
            *(_spread(share) for share in shares),
            " / ".join(f"{n:.2%}" for n in noise),
            f"{statistics.median(one.claimed for _, _, one in found):.1%}",
            last.measured,
            " / ".join("yes" if yes else "NO" for yes in holds),
        ]
        rows.append("| " + " | ".join(cells) + " |")
        if not all(holds):
            print(f"    {last.line}", file=sys.stderr)
    return rows


def _noise(times: Sequence[float]) -> float:
    """How far two runs without callbacks differ, at most, of those made one after the other."""
    return max(abs(a / b - 1) for a, b in itertools.pairwise(times))


def _spread(shares: Sequence[float]) -> str:
    text = f"{statistics.median(shares):.2%}"
    return text + (f" ({min(shares):.2%} to {max(shares):.2%})" if len(shares) > 1 else "")


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
    parser.add_argument("--overheads", nargs="+", type=float)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run without callbacks")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="100 steps: to see that it runs")
    parser.add_argument("--train", choices=TRAININGS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        overhead = given.overheads[0] if given.overheads else None
        train(given.train, given.steps, overhead, given.device)
        return
    imports = import_seconds(1 if given.quick else 7)
    print(f"import lightning_landscape: {imports:.3f} s above pytorch_lightning's own\n")
    print(
        "| training | max_overhead | added, wall time | added, processor time | noise, wall / "
        "processor | closing line says | measured (last) | holds, wall / processor |"
    )
    print("|" + "---|" * 8, flush=True)
    if given.quick:
        given.trainings, given.overheads, given.pairs = given.trainings[:1], [OVERHEADS[-1]], 1
    for name in given.trainings:
        limits = given.overheads or OVERHEADS
        steps = 100 if given.quick else steps_for(name, given.seconds, given.device)
        for row in compare(name, limits, given.pairs, steps, given.device):
            print(row, flush=True)


if __name__ == "__main__":
    main()
