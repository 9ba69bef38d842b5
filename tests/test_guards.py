"""That ``make mutations`` will find what it takes out: told in a second, not at the end of CI."""

from tests.guards import GUARDS
from tests.mutations import PACKAGE, ROOT


def test_each_guard_stands_in_the_code_once():
    sources = {g.file: (ROOT / PACKAGE / g.file).read_text(encoding="utf-8") for g in GUARDS}
    assert [g.what for g in GUARDS if sources[g.file].count(g.old) != 1] == []
