"""Which objects the walk over a module's state enters, and which not.

Not entered, and so neither compared nor restored: data sets and what they hold, but for their
numbers and random generators; modules, and classes and functions of installed packages; the
Trainer, strategies and connectors of Lightning; objects with a thread or a process; what belongs to
the interpreter, to compilers and to loggers (the packages below).
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import sys
import sysconfig
import threading
import types
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_landscape.training.lightning_packages import DATA_MODULES

# Values without state.
ATOMIC = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis)),
        *(types.ModuleType, types.CodeType, types.GetSetDescriptorType),
        *(types.WrapperDescriptorType, types.MethodDescriptorType, types.MemberDescriptorType),
        *(re.Pattern, decimal.Decimal, fractions.Fraction, memoryview),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, np.ufunc),
    }
)
_ATOMIC_BASES = (enum.Enum, pathlib.PurePath, np.generic, np.dtype, BaseException)

# Packages and modules whose objects are not entered.
_NOT_ENTERED = frozenset(
    {
        *("logging", "threading", "_thread", "multiprocessing", "concurrent", "asyncio", "socket"),
        *("ssl", "selectors", "subprocess", "importlib", "_frozen_importlib", "inspect", "typing"),
        *("_frozen_importlib_external", "abc", "_abc", "ast", "ctypes", "_ctypes", "mmap"),
        *("sqlite3", "http", "urllib", "signal", "warnings", "traceback", "tempfile", "zipfile"),
        *("tarfile", "io", "_io", "os", "sys", "codecs", "contextvars", "csv", "_csv", "json"),
        *("pickle", "unittest", "pdb", "code", "tokenize", "linecache", "pytest", "_pytest"),
        *("lightning_landscape", "pytorch_lightning", "lightning", "lightning_fabric"),
        *("wandb", "mlflow", "comet_ml", "neptune", "aim", "tensorboard", "tensorboardX"),
        *("trackio", "litlogger"),
        *("rich", "tqdm", "matplotlib", "PIL", "pandas", "pyarrow", "datasets", "tokenizers"),
        *("h5py", "zarr", "ray", "dask", "jax", "tensorflow", "triton", "IPython", "hypothesis"),
    }
)
# A class of the user's own may derive from those of Lightning, and of these modules.
_NOT_ENTERED_AS_BASES = _NOT_ENTERED - {
    *("abc", "typing", "_abc", "pytorch_lightning", "lightning", "lightning_fabric"),
}
_NOT_ENTERED_OF_TORCH = (
    *("torch._dynamo", "torch._inductor", "torch._functorch", "torch._C", "torch._ops"),
    *("torch._subclasses", "torch.fx", "torch.distributed", "torch.cuda", "torch.autograd"),
    *("torch.profiler", "torch.utils.hooks", "torch.utils.tensorboard", "torch.package"),
    *("torch.export", "torch.onnx", "torch.multiprocessing", "torch.storage", "torch.backends"),
    *("torch.jit", "torch.library", "torch._library", "torch.overrides", "torch.random"),
)
_INSTALLED = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def is_atomic(value: object) -> bool:
    """Whether ``value`` has no state."""
    return type(value) in ATOMIC or isinstance(value, _ATOMIC_BASES)


@functools.cache
def is_user_code(module: str) -> bool:
    """Whether a module belongs to the user's own code and not to an installed package."""
    if module.partition(".")[0] in _NOT_ENTERED:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if module in sys.builtin_module_names or module == "builtins":
        return False
    return file is None or not (file.startswith(_INSTALLED) or "-packages" in file)


@functools.cache
def _enters_type(kind: Any) -> bool:
    if issubclass(kind, (nn.Module, threading.local, *DATA_MODULES)):
        return True
    if any(base.__module__.partition(".")[0] in _NOT_ENTERED_AS_BASES for base in kind.__mro__):
        return False
    module = kind.__module__
    if module.startswith("torch."):
        return not module.startswith(_NOT_ENTERED_OF_TORCH)
    if issubclass(kind, (dict, list)):  # such as Lightning's hyperparameters
        return True
    return module.partition(".")[0] not in _NOT_ENTERED


def enters(value: object) -> bool:
    """Whether the attributes of ``value`` are state of the run."""
    kind: Any = type(value)
    if not _enters_type(kind):
        return False
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or isinstance(value, nn.Module):
        return True
    return not any(_runs_beside(item) for item in attributes.values())


# Of processes, pools and executors.
_RUNNING = (
    *("multiprocessing.context", "multiprocessing.process", "multiprocessing.pool"),
    *("multiprocessing.managers", "concurrent.futures", "subprocess"),
)


def _runs_beside(item: Any) -> bool:
    """Whether it is a thread or a process, which may write to the object at any time."""
    if isinstance(item, threading.Thread):
        return True
    return type(item).__module__.startswith(_RUNNING)
