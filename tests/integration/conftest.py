import pytest
import torch

FIGURES = pytest.StashKey[list[tuple[str, ...]]]()
_TITLES = ("network, batches of rank 0 + rank 1", "figure", "one process", "two", "relative")


@pytest.fixture
def one_thread():
    """Small kernels spend most of their time waiting for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def side_by_side(request):
    """``side_by_side(what, figure, one, two)``: a row of the table in the summary."""
    rows = request.config.stash.setdefault(FIGURES, [])

    def add(what: str, figure: str, one: float, two: float) -> None:
        gap = abs(two - one) / abs(one) if one else abs(two)
        rows.append((what, figure, f"{one:.9g}", f"{two:.9g}", f"{gap:.1e}"))

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(FIGURES, [])
    if not rows:
        return
    terminalreporter.section("one process against two")
    table = [_TITLES, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_TITLES))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
