"""What training_step reaches through its Trainer."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytorch_lightning as pl
import torch

from tests.constructs.base import Construct


class LearningRate(Construct):
    """the learning rate in param_groups"""

    def factor(self, batch):
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.999
        return 1.0


class WeightDecay(Construct):
    """a key that is added to param_groups"""

    def factor(self, batch):
        group = self.trainer.optimizers[0].param_groups[0]
        group["calls"] = group.get("calls", 0) + 1
        return 1 / (1 + 0.001 * group["calls"])


class Momentum(Construct):
    """momentum that is damped in place"""

    def factor(self, batch):
        for state in self.trainer.optimizers[0].state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(0.99)
        return 1.0


class Schedulers(Construct):
    """self.lr_schedulers().step()"""

    def factor(self, batch):
        self.lr_schedulers().step()
        return 1.0

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "epoch"}
        ]


class Ticker(pl.Callback):
    def __init__(self):
        self.ticks = 0
        self.rows = []


class OfCallback(Construct):
    """a counter on a callback"""

    @staticmethod
    def callbacks():
        return [Ticker()]

    def factor(self, batch):
        ticker = next(c for c in self.trainer.callbacks if isinstance(c, Ticker))
        ticker.ticks += 1
        ticker.rows.append(ticker.ticks)
        return 1 / (1 + 0.001 * ticker.ticks)


class EarlyStopping(Construct):
    """an attribute of Lightning's EarlyStopping"""

    @staticmethod
    def callbacks():
        return [pl.callbacks.EarlyStopping("train_loss", patience=1000)]

    def factor(self, batch):
        stopping = next(
            c for c in self.trainer.callbacks if isinstance(c, pl.callbacks.EarlyStopping)
        )
        stopping.wait_count += 1
        return 1 / (1 + 0.001 * stopping.wait_count)


class ShouldStop(Construct):
    """should_stop, which the step after a measurement sets"""

    def start(self):
        self.steps = 0

    def factor(self, batch):
        self.steps += 1
        if self.steps == 16:
            self.trainer.should_stop = True
        return 1 + 0.1 * float(self.trainer.should_stop)


class FitLoop(Construct):
    """a counter of the fit loop"""

    def factor(self, batch):
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        progress.total.started += 1
        return 1 / (1 + 0.001 * progress.total.started)

    def seen(self):
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.started


class Attached(Construct):
    """an attribute of one's own on the Trainer"""

    def on_fit_start(self):
        self.trainer.seen_batches = 0

    def factor(self, batch):
        self.trainer.seen_batches += 1
        return 1 / (1 + 0.001 * self.trainer.seen_batches)

    def seen(self):
        return self.trainer.seen_batches


class Logged(Construct):
    """values that are logged and read again"""

    def factor(self, batch):
        self.log("factor", 0.999 * float(self.trainer.callback_metrics.get("factor", 1.0)))
        return float(self.trainer.callback_metrics.get("factor", 1.0))


class Progress(Construct):
    """the number of the step and of the epoch"""

    def factor(self, batch):
        return 1 / (1 + 0.01 * self.global_step + 0.1 * self.current_epoch)


class LogDirectory(Construct):
    """a folder below the logger's version"""

    def factor(self, batch):
        version = int(self.logger.version)
        os.makedirs(os.path.join(self.trainer.default_root_dir, f"v{version}"), exist_ok=True)
        return 1.0

    def seen(self):
        names = os.listdir(self.trainer.default_root_dir)
        return sorted(name for name in names if name.startswith("v"))


class LoggerMetrics(Construct):
    """self.logger.log_metrics"""

    def factor(self, batch):
        self.logger.log_metrics({"labels": float(batch[1].sum())}, step=self.global_step)
        return 1.0


class KeptLogger(Construct):
    """a logger that the module keeps"""

    attributes = False

    def on_fit_start(self):
        self.own = self.trainer.logger
        self.own.log_metrics = Mock(wraps=self.own.log_metrics)  # isolation leaves mocks alone

    def factor(self, batch):
        self.own.log_metrics({"labels": float(batch[1].sum())}, step=self.global_step)
        return 1.0

    def seen(self):
        return sum("labels" in str(call) for call in self.own.log_metrics.call_args_list)
