"""What all tests share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported, which comes later


def pytest_configure() -> None:
    # Small models on one thread: workers side by side do not slow each other down, and sums have one order.
    # In the environment it is for the processes that tests start, and for Lightning, which counts the cores otherwise.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
