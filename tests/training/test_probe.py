"""The fingerprint of a probe."""

from __future__ import annotations

import pytest
import torch

from lightning_landscape import Probe


class Graphs:
    """A batch as graph libraries make it: an object that holds tensors."""

    def __init__(self, values, name="a"):
        self.x, self.name = values, name


@pytest.mark.parametrize(
    "other",
    [
        Graphs(torch.tensor([1.0, 3.0])),
        Graphs(torch.tensor([1.0, 2.0]).double()),
        Graphs(torch.tensor([[1.0, 2.0]])),
        Graphs(torch.tensor([1.0, 2.0]), "b"),
    ],
    ids=["values", "type", "shape", "name"],
)
def test_fingerprint_covers_attributes_of_objects(other, tmp_path):
    def fingerprint(batch):
        probe = Probe()
        probe.offer(batch, 0, lambda _: 512)
        return probe.fingerprint()

    batch = Graphs(torch.tensor([1.0, 2.0]))
    torch.save(batch, tmp_path / "batch.pt")
    again = torch.load(tmp_path / "batch.pt", weights_only=False)
    assert fingerprint(batch) == fingerprint(again) != fingerprint(other)
