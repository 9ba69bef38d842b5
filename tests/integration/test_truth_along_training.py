"""Along a real minibatch run the reported eigenvalue is ARPACK's at the same weights.

One measurement is easy; a warm start must not stay with a vector whose eigenvalue has been
overtaken, and only a run with crossings shows that.
"""

import statistics

import pytest

from benchmarks.runs import along_training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dataset", ["digits", "mnist1d"])
def test_the_eigenvalue_is_true_all_along(dataset, record_property):
    series = along_training(dataset)
    figures = f"{dataset}, {series}"
    print(figures)
    record_property("against ARPACK", figures)
    assert statistics.median(series.errors) < 0.01, figures
    assert max(series.errors) < 0.05, figures
    assert statistics.median(series.hvps) <= 6, figures
