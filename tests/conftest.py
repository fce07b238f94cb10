"""What holds for all tests."""

import pytest
import torch

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def own_threads() -> None:
    """Commands that tests and fixtures call in this process set its number of threads, which later tests would inherit."""
    torch.set_num_threads(THREADS)
