"""Checks that ``make mutations`` can apply every guard, without running it."""

import ast
import builtins

import pytest

from tests.guards import GUARDS
from tests.mutations import PACKAGE, ROOT, Guard


def test_each_guard_occurs_once_in_the_source():
    for guard in GUARDS:
        source = (ROOT / PACKAGE / guard.file).read_text(encoding="utf-8")
        assert guard.removed_from(source) != source


def test_mutated_source_has_no_undefined_names():
    def names(source):
        return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}

    for guard in GUARDS:
        source = (ROOT / PACKAGE / guard.file).read_text(encoding="utf-8")
        known = names(source) | set(dir(builtins))
        assert names(guard.removed_from(source)) <= known, guard.what


def test_test_files_of_each_guard_exist():
    for guard in GUARDS:
        assert guard.test_files
        for path in guard.test_files:
            assert (ROOT / path).is_file(), f"{guard.what}: {path}"


def test_descriptions_are_unique():
    assert len({guard.what for guard in GUARDS}) == len(GUARDS)


def test_guard_within_a_function():
    source = "def f():\n    check()\n\nclass A:\n    def g(self):\n        check()\n"
    inside = Guard("it", "file.py", "check()", "pass", "", within="A.g")
    assert inside.removed_from(source) == source[:-8] + "pass\n"
    with pytest.raises(
        ValueError, match=r"file.py holds 2 times 'check\(\)': expected exactly one"
    ):
        Guard("it", "file.py", "check()", "pass", "").removed_from(source)
    with pytest.raises(ValueError, match=r"A\.h: expected one definition of h, found 0"):
        Guard("it", "file.py", "check()", "pass", "", within="A.h").removed_from(source)
