"""The table of published figures against the models."""

import functools
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.layers import attention_backend
from effbackbones.models._zoo import ZOO


@functools.lru_cache(maxsize=1)
def skeleton(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name).eval().requires_grad_(False)


@pytest.mark.parametrize("row", ZOO, ids=lambda row: f"{row.model}-{row.size}")
def test_row_has_the_parameters_and_multiply_adds_of_its_model(row):
    model = skeleton(row.model)
    assert sum(p.numel() for p in model.parameters()) == row.params
    counter = FlopCounterMode(display=False)
    with attention_backend("plain"), counter:
        model(torch.empty(1, 3, row.size, row.size, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(row.gmacs, rel=0.02)


def test_rows_are_distinct():
    rows = [(row.model, row.size) for row in ZOO]
    assert len(set(rows)) == len(rows)


def test_published_accuracies_are_percent_and_sourced():
    assert [row for row in ZOO if row.top1 is not None and not (50 < row.top1 < 100 and row.source)] == []
