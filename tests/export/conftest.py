"""A small base, and voices of it that say something at every site."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from manyvoice.data.features import LogMel
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.models.load import build_model
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.voice import Voice

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
         "subsampling_conv_channels": 8}  # fmt: skip
MakeVoice = Callable[..., Voice]


@pytest.fixture(scope="module")
def base() -> Recogniser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["turn on the light", "what time is it"], "characters")
        model, family = build_model("tiny", SMALL, vocabulary=len(tokenizer), blank=tokenizer.blank)
        model.ctc_head.weight.data *= 10  # so that random weights write something
    return Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model)))


@pytest.fixture(scope="session")
def make_voice() -> MakeVoice:
    """``make_voice(recogniser, "lora", seed, rank=4)``."""

    def make(recogniser: Recogniser, name: str, seed: int = 0, **settings: object) -> Voice:
        anatomy = recogniser.family.anatomy(recogniser.model)
        bank = Bank(anatomy, make_method(name, settings), ["one"], seed=seed, dtype=recogniser.model.dtype)
        gen = torch.Generator().manual_seed(seed)
        tensors = {
            where: t + 0.1 * torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.dtype)
            for where, t in bank.take(1).items()
        }
        return Voice(
            method=bank.method, tensors=tensors, base=recogniser.fingerprint(),
            tokenizer=recogniser.tokenizer.fingerprint(), card={"speaker": f"s{seed}"},
        )  # fmt: skip

    return make
