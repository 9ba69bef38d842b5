"""An exception of a signal handler during a measurement ends the run, with restored weights."""

from __future__ import annotations

import functools
import os
import signal
import time

import pytest
import torch

from lightning_landscape import Measured, Monitor, SharpnessMonitor
from tests.runs import MemoryLogger, train
from tests.small import Linear, regression


class TimeLimit(Exception):
    """The exception of a job scheduler's handler."""


def by_function(number, frame):
    raise TimeLimit("the job ends")


class Handlers:
    def __call__(self, number, frame):
        raise TimeLimit("the job ends")

    def method(self, number, frame):
        raise TimeLimit("the job ends")


class Inherited(Handlers):
    """Its ``__call__`` is that of the class above."""


HANDLERS = {
    "function": by_function,
    "object": Handlers(),
    "object of a subclass": Inherited(),
    "method": Handlers().method,
    "partial": functools.partial(by_function),
}


@pytest.fixture
def sigusr1():
    before = signal.getsignal(signal.SIGUSR1)
    yield functools.partial(signal.signal, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


class Limited(Monitor):
    """Receives the signal while the weights are perturbed."""

    kind = "limited"

    def measure(self, this_round):
        objective = this_round.objective(self)
        layer = this_round.pl_module.layer
        hook = layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        try:
            away = {name: torch.ones_like(p) for name, p in objective.params.items()}
            objective.loss_at(away)
        finally:
            hook.remove()
        return Measured()


class Quiet(Linear):
    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        if self.log.__name__ == "log":  # not while measured
            Quiet.kept = {n: p.detach().clone() for n, p in self.named_parameters()}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", HANDLERS)
def test_interrupt_during_a_measurement(kind, sigusr1, tmp_path):
    sigusr1(HANDLERS[kind])
    modules = []

    def module():
        modules.append(Quiet())
        return modules[-1]

    monitor = Limited(every_n_train_steps=1, max_overhead=None)
    with pytest.raises(TimeLimit, match="the job ends"):
        train(module, regression, [monitor], tmp_path)
    assert monitor.failed == 0
    before, now = Quiet.kept, dict(modules[-1].named_parameters())
    moved = [float((now[name].detach() - before[name]).abs().max()) for name in now]
    assert 0 < max(moved) < 0.5  # one step of training, and not the 1 of the measurement


@pytest.mark.parametrize("name", ["log_metrics", "save_dir"])
def test_interrupt_while_results_are_written(name, sigusr1, tmp_path):
    """An error of a logger does not end the run; an exception of a signal handler does."""

    class Slow(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if name == "log_metrics" and any("sharpness" in key for key in metrics):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0)
            super().log_metrics(metrics, step)

        @property
        def save_dir(self):
            if name == "save_dir":
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0)
            return str(tmp_path)

    sigusr1(by_function)
    monitor = SharpnessMonitor(every_n_train_steps=1, max_overhead=None)
    with pytest.raises(TimeLimit, match="the job ends"):
        train(Linear, regression, [monitor], tmp_path, logger=Slow())
