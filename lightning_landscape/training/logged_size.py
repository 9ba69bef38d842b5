"""The number of examples that a module gives as ``self.log(..., batch_size=...)``."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer


class LoggedSize:
    """Reads ``batch_size`` from the calls of ``self.log`` during a training or validation step."""

    def __init__(self) -> None:
        self._results: Any = None
        self._size: int | None = None

    def watch(self, trainer: Trainer, *, validation: bool = False) -> None:
        """Until :meth:`stop`; what is logged stays as it is."""
        self.stop()
        loop: Any = trainer.fit_loop.epoch_loop
        self._results = results = (loop.val_loop if validation else loop)._results
        log = type(results).log

        def watched(*args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
            if is_size(batch_size):
                self._size = batch_size
            log(results, *args, batch_size=batch_size, **kwargs)

        vars(results)["log"] = watched

    def stop(self) -> int | None:
        """The size that was given since :meth:`watch`; None where there was none."""
        if self._results is not None:
            vars(self._results).pop("log", None)
        size, self._size, self._results = self._size, None, None
        return size


def is_size(value: object) -> bool:
    """Whether it is an integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
