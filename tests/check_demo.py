"""Read the files of the demo and fail if something is missing or wrong.

python tests/check_demo.py runs/digits
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import Slice

SCALARS = (
    *(f"hessian/{key}" for key in ("top_eigenvalue", "residual", "hvps", "edge", "edge_ratio")),
    *(f"sharpness/{key}" for key in ("sam", "gradient_norm", "gradient_curvature")),
)
IMAGES = ("landscape/line", "landscape/plane", "landscape/top/line", "landscape/top/plane")


def check(condition: bool, message: str) -> None:
    """Print one line; exit at the first failure."""
    print(("ok    " if condition else "FAILED ") + message)
    if not condition:
        raise SystemExit(1)


def latest(logdir: Path, run: str) -> Path:
    """The newest version of a run."""
    return max((logdir / run).glob("version_*"), key=lambda path: path.stat().st_mtime)


def main(logdir: Path) -> None:
    folder = latest(logdir, "watch")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    for key in SCALARS:
        count = len(events.Scalars(key)) if key in tags["scalars"] else 0
        check(count == 101, f"{key}: {count} values")
    for tag in IMAGES:
        count = len(events.Images(tag)) if tag in tags["images"] else 0
        check(count == 6, f"{tag}: {count} images")
    check("custom_scalars__config__" in tags["tensors"], "a custom-scalars layout")

    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    ratios = [row["hessian/edge_ratio"] for row in rows if "hessian/edge_ratio" in row]
    late = ratios[int(0.6 * len(ratios)) :]
    mean = sum(late) / len(late)
    check(0.97 <= mean <= 1.07, f"mean edge ratio of the last 40 %: {mean:.3f}")
    check(ratios[0] < 0.3, f"edge ratio at the start: {ratios[0]:.3f}")

    planes = [Slice.load(path) for path in (folder / "landscape").glob("landscape-plane-*.npz")]
    check(len(planes) == 6, f"{len(planes)} planes saved")
    centred = all(
        s.losses[len(s.losses) // 2][s.losses.shape[1] // 2] == s.center_loss for s in planes
    )
    check(centred, "the loss at the centre of each plane is the loss at the weights")

    stopped = latest(logdir, "stop") / "history.jsonl"
    last = json.loads(stopped.read_text().splitlines()[-1])
    check(last["step"] < 2000, f"the second run ended at step {last['step']}")
    check(
        last["hessian/edge_ratio"] > 0.9, f"with an edge ratio of {last['hessian/edge_ratio']:.3f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
