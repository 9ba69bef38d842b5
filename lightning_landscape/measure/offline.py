"""A callback that makes a fit restore everything and measure once, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lightning_landscape.geometry.progress import progress_bar
from lightning_landscape.measure.checkpoint import is_complete, step_of
from lightning_landscape.training.data.batch import batch_size
from lightning_landscape.training.lightning_packages import Callback, package_of
from lightning_landscape.training.monitor import session_of


class Offline(Callback):
    """Measures once, without training; to be placed before our callbacks in the Trainer's list.

    Args:
        checkpoint: the content of the file; None: measure the module with its current weights.
        progress: show a progress bar.
        source: the argument with the data, for messages.
    """

    def __init__(
        self, checkpoint: Mapping[str, Any] | None, *, progress: bool, source: str
    ) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._source = source
        self._training: list[Any] = []
        self._validation: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the session and read the data; module and callbacks have been restored."""
        session = session_of(trainer)
        session.stop_training()
        for monitor in session.quantities:
            monitor._bookkeeping.measured = 0  # the state has those of the run before
            monitor._bookkeeping.skipped = 0
        if self._checkpoint is not None and not is_complete(self._checkpoint):
            rank_zero_warn(
                "the checkpoint has no optimizer state: edges are those of the learning rates that "
                "configure_optimizers sets; save it with save_weights_only=False for others"
            )
            pl_module.on_load_checkpoint(dict(self._checkpoint))
            strict = pl_module.strict_loading
            trainer.strategy.load_model_state_dict(self._checkpoint, strict=strict)
            trainer.fit_loop.load_state_dict(self._checkpoint["loops"]["fit_loop"])
        self._read_batches(trainer, session.probes.missing_examples())

    def _read_batches(self, trainer: Trainer, missing: tuple[int, int]) -> None:
        """Read the first batches of the loaders; at least one training batch."""
        training, validation = missing
        combined = package_of(trainer).utilities.CombinedLoader
        source = trainer.fit_loop._data_source
        if source.is_defined():
            least = max(training, 1)
            self._training = _first(combined, source.dataloader(), "max_size_cycle", least)
        if training and not self._training:
            raise ValueError(f"{self._source}: it holds no batch; pass at least one")
        if validation and trainer.enable_validation:
            source = trainer.fit_loop.epoch_loop.val_loop._data_source
            self._validation = _first(combined, source.dataloader(), "sequential", validation)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit before its first batch, with the counters of the checkpoint."""
        trainer.should_stop = True
        if self._checkpoint is not None:
            loop = trainer.fit_loop
            # When resuming, Lightning advances both to the next batch.
            loop.epoch_loop._batches_that_stepped = step_of(self._checkpoint, pl_module)
            loop.epoch_progress.current.completed = int(self._checkpoint["epoch"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure: the module's ``on_train_start`` has been called by now, as in training."""
        session = session_of(trainer)
        total = sum(quantity.forwards for quantity in session.quantities)
        with progress_bar(total, lambda: session.work, show=self._progress):
            session.measure_now(trainer, pl_module, self._training, self._validation)


def _first(kind: Any, loader: Any, mode: Any, samples: int) -> list[Any]:
    """Batches with at least ``samples`` examples; of several validation loaders, the first."""
    combined = loader if isinstance(loader, kind) else kind(loader, mode)
    taken: list[Any] = []
    size = 0
    for batch, _, which in combined:
        if which > 0:
            break
        taken.append(batch)
        size += batch_size(batch)
        if size >= samples:
            break
    combined.reset()  # shuts down its workers
    return taken
