"""Files beside the logs, and loggers that fail."""

from __future__ import annotations

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_landscape import HessianMonitor
from tests.runs import MemoryLogger, train
from tests.small import Linear, Quartic, ones, regression


def test_a_layout_of_the_user_is_left_alone(tmp_path):
    class Own(Linear):
        def on_fit_start(self):
            self.logger.experiment.add_custom_scalars({"mine": {"a": ["Multiline", ["loss"]]}})

    logger = TensorBoardLogger(tmp_path, name="tb")
    monitor = HessianMonitor(max_overhead=None)
    with pytest.warns(match="custom-scalars layout already"):
        train(Own, regression, [monitor], tmp_path, logger=logger)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    layouts = events.Tensors("custom_scalars__config__")
    assert len(layouts) == 1
    assert b"mine" in layouts[0].tensor_proto.string_val[0]


def test_a_failing_logger_does_not_fail_the_run(tmp_path):
    class Broken(MemoryLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("hessian/") for key in metrics):
                raise OSError("disk full")

    monitor = HessianMonitor(every_n_train_steps=5, max_overhead=None, probe_samples=4)
    with pytest.warns(match="Broken could not be written .OSError: disk full") as caught:
        train(Quartic, ones, [monitor], tmp_path, logger=Broken())
    assert len([w for w in caught if "disk full" in str(w.message)]) == 1
    assert len(monitor.history) == 4
