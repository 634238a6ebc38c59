"""A frozen base in double precision, and a ragged batch for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from manyvoice.models.load import build_model
from manyvoice.types import Batch

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
         "subsampling_conv_channels": 8}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    torch.manual_seed(0)
    model, _ = build_model("tiny", SMALL, vocabulary=9, blank=8)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
        p.requires_grad_(False)
    return model.double().eval()


@pytest.fixture(scope="session")
def batch(ragged: Callable[..., Batch]) -> Batch:
    """Three utterances of unequal length, in double precision."""
    return ragged([60, 44, 52], [[1, 2, 3], [4, 5], [6]])
