"""A corpus through a recogniser: hypotheses, error rates with intervals, loss per token and per character.

B  utterances   T  encoder frames
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from manyvoice.data.collate import Collator, Features, LiveFeatures
from manyvoice.data.manifest import Corpus
from manyvoice.data.utterance import Utterance
from manyvoice.decode.beam import BeamDecoder
from manyvoice.decode.greedy import greedy
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import Score, score
from manyvoice.errors import DecodeError
from manyvoice.types import Batch, Padded, Seconds

# log-probabilities B T V with lengths -> a text for each utterance
Decoder = Callable[[Padded], list[str]]


@final
@dataclass(frozen=True, kw_only=True)
class Owned:
    """Utterances that run with submodels of their own.

    Args: owners: a row of a bank for every utterance of the corpus.  scorer: a batch with ``owner_B`` to
        log-probabilities.
    """

    owners: Sequence[int]
    scorer: Callable[[Batch], Padded]


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a recogniser did on a corpus.

    Args:
        words, characters: scores with counts of every utterance.
        loss: nats per label token.  loss_per_character: nats per character of the reference, spaces included.
        seconds: of audio.  nats, tokens: of each utterance.
    """

    words: Score
    characters: Score
    loss: float
    loss_per_character: float
    seconds: Seconds
    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    def as_dict(self, *, interval: bool = True) -> dict[str, Any]:
        """The totals as JSON."""
        found: dict[str, Any] = {
            "utterances": len(self.words.ids),
            "seconds": round(self.seconds, 3),
            "normaliser": self.words.normaliser,
            "wer": self.words.rate,
            "cer": self.characters.rate,
            "loss": self.loss,
            "loss_per_character": self.loss_per_character,
            "word_counts": self.words.total.as_dict(),
            "character_counts": self.characters.total.as_dict(),
        }
        if interval and len(self.words.ids) > 1:
            found["wer_interval"] = list(self.words.interval())
            found["cer_interval"] = list(self.characters.interval())
        return found

    def write_hypotheses(self, path: Path) -> None:
        """JSON lines of id, reference and hypothesis as they were compared."""
        rows = zip(self.words.ids, self.words.references, self.words.hypotheses, strict=True)
        lines = [json.dumps({"id": i, "text": r, "hypothesis": h}, ensure_ascii=False) + "\n" for i, r, h in rows]
        try:
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise DecodeError(f"{path}: cannot be written ({error}); choose another file") from error


def group_of(utterance: Utterance, field: str) -> str | None:
    """Speaker, label, language, or another field of an utterance's row, as text; None where the row lacks it."""
    value = getattr(utterance, field) if field in ("speaker", "label", "language") else utterance.extra.get(field)
    return None if value is None else str(value)


def beam_to_texts(beam: BeamDecoder) -> Decoder:
    """The best hypothesis of a beam search."""
    return lambda logp: [found[0].text for found in beam.decode(logp.x, logp.len_B)]


def greedy_decoder(recogniser: Recogniser) -> Decoder:
    """Best path, then the tokenizer's text."""

    def decode(logp: Padded) -> list[str]:
        blank = recogniser.family.blank(recogniser.model)
        return [recogniser.tokenizer.decode(t) for t in greedy(logp.x, logp.len_B, blank)]

    return decode


def batches_by_length(durations_N: Sequence[float] | np.ndarray, seconds: Seconds) -> Iterator[np.ndarray]:
    """Indices of all utterances, longest first, in batches of at most so many padded seconds."""
    durations = np.asarray(durations_N)
    order = np.argsort(-durations, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, int(seconds / max(float(durations[order[start]]), 1e-3)))
        yield order[start : start + size]
        start += size


def evaluate(
    recogniser: Recogniser,
    corpus: Corpus,
    *,
    decoder: Decoder | None = None,
    features: Features | None = None,
    normaliser: str = "basic",
    batch_seconds: Seconds = Seconds(120.0),
    owned: Owned | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Error rates of a corpus with texts.

    Args: decoder: greedy if not given.  features: where a cache of this corpus exists.
        owned: with which submodel each utterance runs, instead of the recogniser alone.
    Raises: DecodeError for an empty corpus; AudioError for sound that cannot be read.
    """
    if len(corpus) == 0:
        raise DecodeError("there is nothing to evaluate: the corpus is empty; check the manifest")
    decoder = decoder or greedy_decoder(recogniser)
    source = features or LiveFeatures(corpus, recogniser.log_mel)
    texts = corpus.texts()
    tokens = [recogniser.tokenizer.encode(t) for t in texts]
    collator = Collator(corpus, source, tokens, owners=owned.owners if owned else None)
    hypotheses = [""] * len(corpus)
    nats_N = np.zeros(len(corpus))
    done = 0
    for indices in batches_by_length(corpus.durations_N, batch_seconds):
        batch = collator(indices)
        logp = recogniser.logp(batch.features_BTF, batch.len_B) if owned is None else owned.scorer(batch)
        for i, text in zip(indices, decoder(logp), strict=True):
            hypotheses[int(i)] = text
        nats_N[indices] = _nats(recogniser, batch, logp).cpu().numpy()
        done += len(indices)
        if progress is not None:
            progress(done, len(corpus))
    ids, speakers = [u.id for u in corpus], [u.speaker for u in corpus]
    sides = (texts, hypotheses)
    characters = score(*sides, ids=ids, speakers=speakers, normaliser=normaliser, unit="char")
    return Evaluation(
        words=score(*sides, ids=ids, speakers=speakers, normaliser=normaliser),
        characters=characters,
        loss=float(nats_N.sum()) / max(1, sum(map(len, tokens))),
        loss_per_character=float(nats_N.sum()) / max(1, sum(len(recogniser.tokenizer.normalise(t)) for t in texts)),
        seconds=Seconds(math.fsum(corpus.durations_N)),
        nats=tuple(nats_N.tolist()),
        tokens=tuple(map(len, tokens)),
    )


def _nats(recogniser: Recogniser, batch: Batch, logp: Padded) -> Tensor:
    """-log p(text) of each utterance, B; infinite alignments count as nothing, as in training."""
    device = logp.x.device
    return torch.nn.functional.ctc_loss(
        logp.x.transpose(0, 1).to(torch.promote_types(logp.x.dtype, torch.float32)),
        batch.tokens_BU.to(device),
        logp.len_B,
        batch.token_len_B.to(device),
        blank=recogniser.family.blank(recogniser.model),
        reduction="none",
        zero_infinity=True,
    )
