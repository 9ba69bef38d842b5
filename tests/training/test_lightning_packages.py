"""Which packages of Lightning are installed, and which of them a Trainer or module is from."""

from __future__ import annotations

import sys
import types

import pytest
from lightning_utilities.core import rank_zero

from lightning_landscape import HessianMonitor, SharpnessEarlyStopping
from lightning_landscape.measure.offline import Offline
from lightning_landscape.training import lightning_packages as namespaces
from lightning_landscape.training.lightning_packages import misconfiguration, package_of
from lightning_landscape.training.monitor import Monitor

NAMES = ("pytorch_lightning", "lightning.pytorch")


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_of_each_package(name):
    package = pytest.importorskip(name)
    for kind in (Monitor, HessianMonitor, SharpnessEarlyStopping, Offline):
        assert issubclass(kind, package.Callback)

    class Own(package.LightningModule):
        pass

    assert package_of(Own()) is package
    trainer = package.Trainer(logger=False, enable_checkpointing=False)
    assert package_of(trainer) is package
    exceptions = sys.modules[f"{name}.utilities.exceptions"]
    assert type(misconfiguration(trainer, "so")) is exceptions.MisconfigurationException


def test_settings_changed_by_the_second_import_are_restored(monkeypatch):
    def imports(name):
        rank_zero.log = name
        return types.ModuleType(name)

    monkeypatch.setattr(namespaces.importlib, "import_module", imports)
    monkeypatch.setattr(rank_zero, "log", rank_zero.log)
    for first, second in (NAMES, NAMES[::-1]):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, first, None)
            patch.delitem(sys.modules, second, raising=False)
            packages = namespaces._import_packages()
        assert [package.__name__ for package in packages] == [first, second]
        assert rank_zero.log == first


def failing(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(namespaces.importlib, "import_module", fails)


def test_broken_second_package_warns_and_is_ignored(monkeypatch):
    failing(monkeypatch, ModuleNotFoundError("No module named 'torch.gone'", name="torch.gone"))
    with pytest.warns(UserWarning, match=r"lightning.pytorch is installed but.*'torch.gone'"):
        assert namespaces._import("lightning.pytorch") is None
    with pytest.raises(ModuleNotFoundError):  # this one has to be there
        namespaces._import("pytorch_lightning")


def test_missing_second_package_does_not_warn(monkeypatch, recwarn):
    failing(monkeypatch, ModuleNotFoundError("No module named 'lightning'", name="lightning"))
    assert namespaces._import("lightning.pytorch") is None
    assert not recwarn.list
