"""Support for both Lightning packages, ``pytorch_lightning`` and ``lightning.pytorch``.

They contain the same code twice, with separate classes: a Trainer or a LightningCLI accepts only
callbacks of its own package.  This file holds all that depends on their classes; the rest of this
package uses functions of ``pytorch_lightning`` that work for both.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero

_NAMES = ("pytorch_lightning", "lightning.pytorch")
# Set by each package when it is imported: the logger of its messages and the category of its
# deprecation warnings.
_RANK_ZERO_SETTINGS = ("log", "rank_zero_deprecation_category")


def _import_packages() -> list[ModuleType]:
    """The installed packages; the one that was imported first keeps its rank-zero settings."""
    first, second = sorted(_NAMES, key=lambda name: name not in sys.modules)
    packages = [_import(first)]
    settings = {name: getattr(rank_zero, name) for name in _RANK_ZERO_SETTINGS}
    packages.append(_import(second))
    vars(rank_zero).update(settings)
    return [package for package in packages if package is not None]


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (
        Exception
    ) as error:  # an incomplete installation, or one that is incompatible with this torch
        if name == "pytorch_lightning":
            raise
        if not isinstance(error, ModuleNotFoundError) or error.name not in ("lightning", name):
            warnings.warn(
                f"{name} is installed but cannot be imported ({type(error).__name__}: {error}): "
                f"its Trainer will not accept the callbacks of lightning_landscape; repair or "
                f"uninstall it",
                stacklevel=2,
            )
        return None


PACKAGES = _import_packages()
CALLBACKS: tuple[type, ...] = tuple(package.Callback for package in PACKAGES)
DATA_MODULES: tuple[type, ...] = tuple(package.LightningDataModule for package in PACKAGES)

MISCONFIGURATIONS: tuple[type[Exception], ...] = tuple(
    package.utilities.exceptions.MisconfigurationException for package in PACKAGES
)

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback

    class Callback(_Callback, Any):  # type: ignore[misc]  # a subclass of the other one too
        _origin: str
else:

    class Callback(*CALLBACKS):
        """Base of our callbacks, for the Trainer and the LightningCLI of both packages."""

        _origin = ""  # in the state keys of those that an environment variable has added


class StateKey(property):
    """A property; read from a class, which is what a Trainer does with one, it names the remedy."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None and owner is not None:
            raise AttributeError(
                f"{owner.__name__} is a class: pass an instance, callbacks=[{owner.__name__}(...)]"
            )
        return super().__get__(instance, owner)


def package_of(thing: object) -> Any:
    """The package that defines the class of a Trainer or a module, or one of its bases."""
    for kind in type(thing).__mro__:
        for package in PACKAGES:
            if kind.__module__.startswith(f"{package.__name__}."):
                return package
    return PACKAGES[0]


def misconfiguration(trainer: object, message: str) -> Exception:
    """A ``MisconfigurationException`` of the Trainer's own package."""
    error: Exception = package_of(trainer).utilities.exceptions.MisconfigurationException(message)
    return error
