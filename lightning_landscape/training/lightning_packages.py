"""Lightning under its two names, ``pytorch_lightning`` and ``lightning.pytorch``: what differs.

They are the same code twice, with classes of their own: a Trainer, and a LightningCLI, know
callbacks of the same package only.  What is asked for by its class is here; the rest of this
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
# What each package sets for its own sake when it is imported: where its messages go, and of which
# category its deprecations are.
_SPOKEN_AS = ("log", "rank_zero_deprecation_category")


def _imported() -> list[ModuleType]:
    """Those that are installed, first the one that was imported before: it goes on speaking."""
    first, second = sorted(_NAMES, key=lambda name: name not in sys.modules)
    packages = [_import(first)]
    spoken_as = {name: getattr(rank_zero, name) for name in _SPOKEN_AS}
    packages.append(_import(second))
    vars(rank_zero).update(spoken_as)
    return [package for package in packages if package is not None]


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception as error:  # half an installation, or one that does not suit this torch
        if name == "pytorch_lightning":
            raise
        if not isinstance(error, ModuleNotFoundError) or error.name not in ("lightning", name):
            warnings.warn(
                f"{name} is installed but cannot be imported ({type(error).__name__}: {error}): "
                f"its Trainer will not take the callbacks of lightning_landscape",
                stacklevel=2,
            )
        return None


PACKAGES = _imported()
CALLBACKS: tuple[type, ...] = tuple(package.Callback for package in PACKAGES)
DATA_MODULES: tuple[type, ...] = tuple(package.LightningDataModule for package in PACKAGES)

MISCONFIGURATIONS: tuple[type[Exception], ...] = tuple(
    package.utilities.exceptions.MisconfigurationException for package in PACKAGES
)

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback

    class Callback(_Callback, Any):  # type: ignore[misc]  # and so one of the other package too
        pass
else:

    class Callback(*CALLBACKS):
        """Base of our callbacks: one to every Trainer and every LightningCLI."""


def package_of(thing: object) -> Any:
    """The package that a Trainer or a module is from, or inherits from."""
    for kind in type(thing).__mro__:
        for package in PACKAGES:
            if kind.__module__.startswith(f"{package.__name__}."):
                return package
    return PACKAGES[0]


def misconfiguration(trainer: object, message: str) -> Exception:
    """A ``MisconfigurationException`` of the Trainer's own package."""
    error: Exception = package_of(trainer).utilities.exceptions.MisconfigurationException(message)
    return error
