"""A frozen base in double precision, and a ragged batch for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from manyvoice.types import Batch


@pytest.fixture(scope="module")
def base(frozen_base: Callable[[int, int], PreTrainedModel]) -> PreTrainedModel:
    """Three layers."""
    return frozen_base(3, 0)


@pytest.fixture(scope="session")
def batch(ragged: Callable[..., Batch]) -> Batch:
    """Three utterances of unequal length, in double precision."""
    return ragged([60, 44, 52], [[1, 2, 3], [4, 5], [6]])
