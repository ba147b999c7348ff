import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices on many threads spend their time waiting for each other when tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
