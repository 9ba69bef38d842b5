"""Turns a fit into a measurement: everything is restored, nothing is trained."""

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
    """Stands before our callbacks in the Trainer's list.

    Args:
        checkpoint: what the file holds; None: the module is measured as it is.
        progress: show a progress bar.
        source: how messages name the data.
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
        """The module and the callbacks are restored; loaders are still at their beginning."""
        session = session_of(trainer)
        session.stop_training()
        for monitor in session.quantities:
            monitor._bookkeeping.measured = monitor._bookkeeping.skipped = (
                0  # here, not in the run before
            )
        if self._checkpoint is not None and not is_complete(self._checkpoint):
            rank_zero_warn(
                "the checkpoint holds no optimizer state: edges are those of the learning rates "
                "that configure_optimizers sets"
            )
            pl_module.on_load_checkpoint(dict(self._checkpoint))
            strict = pl_module.strict_loading
            trainer.strategy.load_model_state_dict(self._checkpoint, strict=strict)
            trainer.fit_loop.load_state_dict(self._checkpoint["loops"]["fit_loop"])
        self._read(trainer, session.probes.wanted_examples())

    def _read(self, trainer: Trainer, wanted: tuple[int, int]) -> None:
        """The first batches, as the loaders give them; of training batches one at least."""
        training, validation = wanted
        combined = package_of(trainer).utilities.CombinedLoader
        source = trainer.fit_loop._data_source
        if source.is_defined():
            least = max(training, 1)
            self._training = _first(combined, source.dataloader(), "max_size_cycle", least)
        if training and not self._training:
            raise ValueError(f"{self._source}: it holds no batch; pass one at least")
        if validation and trainer.enable_validation:
            source = trainer.fit_loop.epoch_loop.val_loop._data_source
            self._validation = _first(combined, source.dataloader(), "sequential", validation)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is restored: end the fit before its first batch, with the counters as they were."""
        trainer.should_stop = True
        if self._checkpoint is not None:
            loop = trainer.fit_loop
            # Both are moved on by Lightning when it resumes, to where the next batch belongs.
            loop.epoch_loop._batches_that_stepped = step_of(self._checkpoint, pl_module)
            loop.epoch_progress.current.completed = int(self._checkpoint["epoch"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here the module's own ``on_train_start`` has been called, as in training."""
        session = session_of(trainer)
        total = sum(quantity.forwards for quantity in session.quantities)
        with progress_bar(total, lambda: session.work, show=self._progress):
            session.measure_now(trainer, pl_module, self._training, self._validation)


def _first(kind: Any, loader: Any, mode: Any, samples: int) -> list[Any]:
    """Batches until there are ``samples`` examples; of several validation loaders the first."""
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
    combined.reset()  # ends its workers
    return taken
