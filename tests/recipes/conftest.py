"""A supernet that has learned what tones mean, and speakers to whom they mean something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from manyvoice.data.collate import Collator, LiveFeatures
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.subnet import uniform, whole
from manyvoice.models.batchnorm import masked_norms
from manyvoice.models.load import build_model
from manyvoice.recipes.sizes import Size, write_size
from manyvoice.train.objective import ctc_per_utterance, scores_of

WORDS = ("low", "mid", "high")
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
         "subsampling_conv_channels": 8}  # fmt: skip
# Speakers, utterances of each: what each calls the three tones.
Meant = Mapping[str, Sequence[str]]
Speak = Callable[..., Path]


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Path:
    """A manifest of 20 utterances."""
    return speak_tones(tmp_path_factory.mktemp("tones") / "tones", 20, 0)


@pytest.fixture(scope="session")
def base(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that knows its tones, with sizes 100 and 40 beside it; size 40 lacks the second layer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    corpus = open_corpus(tones)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(WORDS, "words")
        model, family = build_model("tiny", SMALL, vocabulary=len(tokenizer), blank=tokenizer.blank)
        log_mel = LogMel.build(family.features(model))
        batch = Collator(corpus, LiveFeatures(corpus, log_mel), [tokenizer.encode(t) for t in corpus.texts()])(
            range(len(corpus))
        )
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(STEPS):
            optimizer.zero_grad()
            scores = scores_of(model.train(), batch)
            loss = ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, tokenizer.blank).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            print(float(loss.detach()))
        for norm in masked_norms(model):
            norm.momentum = 1.0
        with torch.no_grad():
            scores_of(model, batch)
    Recogniser(model.eval(), family, tokenizer, log_mel).save(folder)
    made = Recogniser.load(folder)
    anatomy = family.anatomy(made.model)
    for subnet, macs in ((whole(anatomy), 2.0), (uniform(anatomy, "40", [0, 2], {"head": 2, "ff_chunk": 3}), 1.0)):
        costs = {"layer_macs": macs, "macs": macs, "parameters": 1}
        write_size(made, Size(subnet=subnet, statistics=None, document={}), {"costs": costs, "results": {}})
    return folder


STEPS = 66
