"""Both packages of Lightning in the environment that the tests run in."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.environments import checks

pytestmark = pytest.mark.slow  # make check-environments runs them in new environments

NAMES = ("pytorch_lightning", "lightning.pytorch")


@pytest.fixture(params=NAMES)
def package(request) -> ModuleType:
    return pytest.importorskip(request.param)


@pytest.mark.pictures
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_environment(check, package, tmp_path):
    check(package, tmp_path)


@pytest.mark.pictures
@pytest.mark.parametrize("name", NAMES)
def test_loggers_of_the_other_package(name, tmp_path):
    package, other = (pytest.importorskip(each) for each in sorted(NAMES, key=name.__ne__))
    checks.check_logs(package, tmp_path, other.loggers)


def test_both_packages_measure_the_same(tmp_path):
    for name in NAMES:
        pytest.importorskip(name)
    first, second = (
        checks.check_training_is_bitwise_equal(importlib.import_module(name), tmp_path)
        for name in NAMES
    )
    assert all(first)
    assert repr(first) == repr(second)  # as strings, because NaN != NaN
