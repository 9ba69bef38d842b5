"""What ``self.logger`` is while measuring: it knows where the logs are, and writes nothing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

_PLAIN = (str, int, float, bool, type(None), Path)


def silent_logger(logger: Any) -> Any:
    """A logger of the same class and attributes, whose methods write nothing."""
    kind: Any = type(logger)
    silent: Any = object.__new__(_silent_class(kind))
    silent.__dict__.update(vars(logger))
    return silent


@functools.cache
def _silent_class(kind: Any) -> Any:
    def get(self: Any, name: str) -> Any:
        if name == "experiment" or name == "run":
            known = [v for k, v in vars(self).items() if k in ("_experiment", "_run")]
            return SilentExperiment(known[0] if known else None)
        if name.startswith("__") or name in ("log_dir", "log_graph_dir"):
            return kind.__getattribute__(self, name)
        if name.startswith(("log_", "add_")) or name in _WRITING:
            return _nothing
        return kind.__getattribute__(self, name)

    methods = {"__getattribute__": get, "__del__": _nothing, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), methods)


# Methods of loggers that write, besides log_metrics and its kin.
_WRITING = ("save", "finalize", "watch", "after_save_checkpoint", "use_artifact", "unwatch")


class SilentExperiment:
    """Takes the place of ``self.logger.experiment``: its methods do nothing."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experiment, name, None)
        if isinstance(value, _PLAIN) and value is not None:
            return value
        return _nothing

    def __getitem__(self, index: int) -> Any:
        return self  # rank_zero_experiment on other processes

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a method that writes."""
