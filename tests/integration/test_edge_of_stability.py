"""The edge ratio of full-batch training converges to about 1, as theory predicts per optimizer.

The ranges were measured in plain torch, over five seeds; here a Trainer trains and
``HessianMonitor`` measures.
"""

import pytest
from torch.optim import SGD

from benchmarks.runs import EDGE_ROWS, edge_ratios, late_mean

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SEEDS = (0, 1, 2)
ROUNDING = 0.01  # the table holds five seeds on one machine; seeds differ by about .005


@pytest.mark.parametrize("row", EDGE_ROWS, ids=lambda row: row.name)
def test_training_settles_at_the_edge(row, record_property):
    means = [late_mean(edge_ratios(row.make_optimizer, row.steps, s), row.steps) for s in SEEDS]
    figures = f"{row.name}: {[round(mean, 4) for mean in means]}, table {row.low}-{row.high}"
    print(figures)
    record_property("mean edge ratios", figures)
    within = [row.low - ROUNDING <= mean <= row.high + ROUNDING for mean in means]
    assert all(within), figures


def test_small_learning_rate_is_far_from_the_edge(record_property):
    ratios = edge_ratios(lambda p: SGD(p, lr=0.05), 1500, seed=0)
    assert len(ratios) == 76
    figures = f"SGD lr .05: largest ratio {max(ratios.values()):.3f}, table below .21"
    print(figures)
    record_property("largest edge ratio", figures)
    assert 0 < min(ratios.values()) <= max(ratios.values()) < 0.3, figures
