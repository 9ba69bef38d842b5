"""During minibatch training the logged eigenvalue is ARPACK's at the same weights.

One measurement is easy; a warm start must not stay with a vector whose eigenvalue has been
overtaken, and only a run with crossings shows that.
"""

import functools
import statistics

import pytest

from benchmarks.runs import along_training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


DATASETS = ["digits", "mnist1d"]
series_of = functools.cache(along_training)


@pytest.mark.parametrize("dataset", DATASETS)
def test_eigenvalue_during_training(dataset, record_property):
    series = series_of(dataset)
    figures = f"{dataset}, {series}"
    print(figures)
    record_property("against ARPACK", figures)
    assert statistics.median(series.errors) < 0.01, figures
    assert max(series.errors) < 0.05, figures


_MORE = pytest.mark.xfail(strict=False, reason="7 products on a processor without AVX-512")


@pytest.mark.parametrize("dataset", ["digits", pytest.param("mnist1d", marks=_MORE)])
def test_median_number_of_products(dataset):
    assert statistics.median(series_of(dataset).hvps) <= 6, series_of(dataset)


def test_median_number_of_products_of_both_runs():
    hvps = [count for dataset in DATASETS for count in series_of(dataset).hvps]
    assert statistics.median(hvps) <= 6, [series_of(dataset) for dataset in DATASETS]
