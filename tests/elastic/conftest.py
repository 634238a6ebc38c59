"""A model small enough for double precision, and a ragged batch for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from manyvoice.models.batchnorm import masked_norms
from manyvoice.models.load import build_model
from manyvoice.types import Batch

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "subsampling_conv_channels": 8,
}


def _small(**more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model, _ = build_model("tiny", SMALL | more, vocabulary=9, blank=8)
    for p in model.parameters():  # biases that are zero would hide mistakes
        torch.nn.init.normal_(p, std=0.3)
    for norm in masked_norms(model):
        assert norm.running_mean is not None and norm.running_var is not None
        torch.nn.init.normal_(norm.running_mean, std=0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.double().eval()


@pytest.fixture(scope="session")
def small() -> Callable[..., PreTrainedModel]:
    """Builds one, with settings changed: ``small(activation_dropout=0.1)``."""
    return _small


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One in evaluation mode."""
    return _small()


@pytest.fixture(scope="session")
def batch(ragged: Callable[..., Batch]) -> Batch:
    """Three utterances of unequal length, in double precision."""
    return ragged([50, 37, 44], [[1, 2, 3], [4, 5], [6]])
