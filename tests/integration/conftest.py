import pytest
import torch

from tests.conftest import TABLES


@pytest.fixture
def one_thread():
    """Use one thread: small kernels would spend most of their time on synchronization."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def side_by_side(request):
    """``side_by_side(what, figure, one, two)``: a row of the table in the summary."""
    rows = request.config.stash[TABLES]["one process against two"]

    def add(what: str, figure: str, one: float, two: float) -> None:
        gap = abs(two - one) / abs(one) if one else abs(two)
        rows.append(
            {
                "network, batches of rank 0 + rank 1": what,
                "figure": figure,
                "one process": f"{one:.9g}",
                "two": f"{two:.9g}",
                "relative": f"{gap:.1e}",
            }
        )

    return add
