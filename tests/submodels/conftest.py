"""A frozen base in double precision, and a ragged batch for it."""

from __future__ import annotations

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
def batch() -> Batch:
    gen = torch.Generator().manual_seed(1)
    len_B = torch.tensor([60, 44, 52])
    x_BTF = torch.randn(3, 60, 80, generator=gen, dtype=torch.float64)
    x_BTF *= torch.arange(60)[None, :, None] < len_B[:, None, None]
    zeros = torch.zeros(3, dtype=torch.int64)
    return Batch(
        ids=("a", "b", "c"), features_BTF=x_BTF, len_B=len_B, tokens_BU=torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]),
        token_len_B=torch.tensor([3, 2, 1]), owner_B=zeros, label_B=zeros, seconds_B=len_B / 100,
    )  # fmt: skip
