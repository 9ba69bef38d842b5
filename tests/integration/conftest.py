import pytest
import torch


@pytest.fixture
def one_thread():
    """Small kernels spend most of their time waiting for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
