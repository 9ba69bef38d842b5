"""The exchange of status between two processes; the other process is simulated."""

from __future__ import annotations

import types

import pytest
import torch
from torch import distributed as dist

from lightning_landscape.geometry.errors import OtherRankError
from lightning_landscape.training.processes import Processes, SyncError


class Other:
    """Replaces ``all_reduce``: reduces each tensor with the next one of the other process."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.sent = list(answers), []
        monkeypatch.setattr(dist, "all_reduce", self)

    def __call__(self, tensor, op=dist.ReduceOp.SUM):
        self.sent.append(tensor.tolist())
        answer = torch.tensor(self.answers.pop(0), dtype=tensor.dtype)
        tensor.copy_(torch.maximum(tensor, answer) if op == dist.ReduceOp.MAX else tensor + answer)


def processes(count=2, rank=0):
    strategy = types.SimpleNamespace(root_device=torch.device("cpu"))
    return Processes(types.SimpleNamespace(world_size=count, global_rank=rank, strategy=strategy))


# failed, done, -done, size, -size: the largest of each over the processes.
FINE, FAILED, DONE = [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, -1, 0, 0]


def of_size(size):
    return [0, 0, 0, size, -size]


def test_single_process_does_not_communicate(monkeypatch):
    Other(monkeypatch)
    alone = processes(count=1)
    vector = torch.ones(3)
    assert alone.sum(vector) is vector
    assert alone.gathered(vector) == [vector]
    assert alone.total(7) == 7
    assert alone.run_on_all_ranks(lambda: 5) == 5
    alone.sync_status(failed=True)
    with pytest.raises(KeyError):
        alone.run_on_all_ranks(lambda: {}["gone"])


def test_sum_and_gather(monkeypatch):
    own = torch.tensor([1.0, 2.0])
    Other(monkeypatch, of_size(2), [10.0, 20.0])
    assert processes().sum(own).tolist() == [11.0, 22.0]
    assert own.tolist() == [1.0, 2.0]
    Other(monkeypatch, of_size(1), 4)
    assert processes().total(3) == 7
    Other(monkeypatch, of_size(4), [[0.0, 0.0], [5.0, 6.0]])
    first, second = processes().gathered(own)
    assert (first.tolist(), second.tolist()) == ([1.0, 2.0], [5.0, 6.0])


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (FAILED, "it failed on another process"),
        (of_size(3), "the processes took different branches"),
        (DONE, "the processes took different branches"),
    ],
)
def test_data_are_sent_only_if_all_processes_send(status, reason, monkeypatch):
    other = Other(monkeypatch, status)
    with pytest.raises(SyncError, match=reason):
        processes().sum(torch.ones(2))
    assert len(other.sent) == 1
    assert issubclass(SyncError, OtherRankError)


def test_run_on_all_ranks(monkeypatch):
    Other(monkeypatch, DONE)
    assert processes().run_on_all_ranks(lambda: 5) == 5
    Other(monkeypatch, FAILED)
    with pytest.raises(SyncError, match="it failed on another process"):
        processes().run_on_all_ranks(lambda: 5)


def test_failure_is_sent_to_the_other_processes(monkeypatch):
    other = Other(monkeypatch, of_size(2))  # about to send their data
    with pytest.raises(KeyError):
        processes().run_on_all_ranks(lambda: {}["gone"])
    assert other.sent == [FAILED]


def test_received_failure_is_not_sent_again(monkeypatch):
    """All processes know of a failure after an exchange of status: no second one is made."""
    other = Other(monkeypatch, FAILED)
    found = processes()
    with pytest.raises(SyncError):
        found.run_on_all_ranks(lambda: found.sum(torch.ones(2)))
    assert len(other.sent) == 1


def test_interrupt_does_not_communicate(monkeypatch):
    other = Other(monkeypatch)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes().run_on_all_ranks(interrupted)
    assert other.sent == []
