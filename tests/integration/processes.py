"""Run a function in two processes, with a time limit in case of a deadlock."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

LIMIT = 120.0  # seconds, after which waiting processes are killed

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def on_two(work: Callable[[int], Any], limit: float = LIMIT) -> list[Any]:
    """``[work(0), work(1)]``, each in its own process; an exception is returned, not raised.

    A Trainer made in ``work`` with ``strategy="ddp", devices=2`` takes its place in the pair, as if
    Lightning had launched it.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    # This process keeps the rendezvous port open, as torchrun does: another test could take a port
    # that is closed here and opened by one of the processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank: int) -> None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
        )
        torch.set_num_threads(1)
        try:
            answer = work(rank)
        except BaseException as error:
            traceback.print_exc()
            answer = error
        try:  # tensors by value: by reference they would go with this process
            packed = pickle.dumps(answer)
        except Exception:
            packed = pickle.dumps(RuntimeError(repr(answer)))
        answers.put((rank, packed))
        answers.close()
        answers.join_thread()
        os._exit(0)  # at once: a process group whose peer has died may hang at exit

    pair = [context.Process(target=body, args=(rank,)) for rank in range(2)]
    for process in pair:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + limit
    try:
        while len(found) < 2:
            rank, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.01))
            found[rank] = pickle.loads(answer)
    except queue.Empty:
        waiting = [rank for rank in range(2) if rank not in found]
        pytest.fail(f"after {limit:.0f} s no answer from rank {waiting}; the others: {found}")
    finally:
        for process in pair:
            process.kill()
            process.join()
    return [found[0], found[1]]


def both(work: Callable[[int], Any]) -> list[Any]:
    """Like :func:`on_two`, but raises the exception of either process."""
    answers = on_two(work)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
