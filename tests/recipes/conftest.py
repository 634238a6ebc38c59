"""A supernet that has learned what tones mean, and speakers to whom they mean something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from manyvoice.data.collate import Collator, LiveFeatures
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.subnet import uniform, whole
from manyvoice.models.batchnorm import recalibrate
from manyvoice.models.load import build_model
from manyvoice.recipes.card import Data, Provenance, versions, write_derived_card
from manyvoice.recipes.sizes import Size, write_size
from manyvoice.train.objective import ctc_per_utterance, scores_of

WORDS = ("low", "mid", "high")
STEPS = 60
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
         "subsampling_conv_channels": 8}  # fmt: skip
# Words of the rows to learn from, and of the others, that take the places of low, mid and high.
Meant = tuple[str, str]
Speak = Callable[[Path, Mapping[str, tuple[int, Meant]]], Path]


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
        collator = Collator(corpus, LiveFeatures(corpus, log_mel), [tokenizer.encode(t) for t in corpus.texts()])
        batch = collator(range(len(corpus)))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            scores = scores_of(model, batch)
            ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, tokenizer.blank).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        recalibrate(model, iter([lambda: scores_of(model, batch)]))  # on this batch, which is all there is
    Recogniser(model.eval(), family, tokenizer, log_mel).save(folder)
    made = Recogniser.load(folder)
    anatomy = family.anatomy(made.model)
    for subnet, macs in ((whole(anatomy), 2.0), (uniform(anatomy, "40", [0, 2], {"head": 2, "ff_chunk": 3}), 1.0)):
        costs = {"layer_macs": macs, "macs": macs, "parameters": 1}
        write_size(made, Size(subnet=subnet, statistics=None, document={}), {"costs": costs, "results": {}})
    data = (Data.of("train", str(tones), corpus, "CC0-1.0"),)
    known = Provenance(data=data, run={}, command=None, seed=0, base=None, checkpoint="", versions=versions())
    write_derived_card(folder, made, asdict(known) | {"fingerprint": made.fingerprint()}, results={}, command="")
    return folder


@pytest.fixture(scope="session")
def speak(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Speak:
    """Writes a manifest of speakers to whom tones mean other words: ``speak(path, {"ann": (9, ("mhl", "mhl"))})``.

    Of each speaker's rows ``part`` says four to choose, four to test and the others to adapt, whose words may differ.
    """
    spoken = speak_tones(tmp_path_factory.mktemp("speech") / "speech", 60, 1)
    heard = [json.loads(line) for line in spoken.read_text().splitlines()]
    letters = {word[0]: word for word in WORDS}

    def write(path: Path, speakers: Mapping[str, tuple[int, Meant]]) -> Path:
        rows, left = [], iter(heard)
        for name, (count, meant) in speakers.items():
            for k in range(count):
                row = next(left)
                part = "choose" if k < 4 else "test" if k < 8 else "adapt"
                words = dict(zip(WORDS, (letters[c] for c in meant[part != "adapt"]), strict=True))
                row |= {"audio_filepath": str(spoken.parent / row["audio_filepath"]), "id": f"{name}-{k}"}
                row |= {"speaker": name, "part": part, "text": " ".join(words[w] for w in row["text"].split())}
                rows.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
