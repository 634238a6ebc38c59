"""What a corpus amounts to: hours, speakers, words, durations, tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from manyvoice.data.utterance import Utterance

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """Totals and spread of a corpus.

    Args:
        speakers: different names; utterances without one count in ``without_speaker``.
        duration_quantiles: seconds, by probability.
        unit: what tokens are: "labels" of the encoder that was passed in, "characters" without one.
        tokens_per_second: over the whole corpus.
    """

    utterances: int
    hours: float
    speakers: int
    without_speaker: int
    words: int
    duration_quantiles: Mapping[float, float]
    unit: str
    tokens: int
    tokens_per_second: float

    def json(self) -> dict[str, object]:
        """The same as plain data."""
        quantiles = {f"{p:g}": seconds for p, seconds in self.duration_quantiles.items()}
        return {**asdict(self), "duration_quantiles": quantiles}

    def text(self) -> str:
        """The same in words."""
        spread = ", ".join(f"{p:.0%} {seconds:.2f} s" for p, seconds in self.duration_quantiles.items())
        nameless = f" ({self.without_speaker} utterances without one)" if self.without_speaker else ""
        return (
            f"{self.utterances} utterances, {self.hours:.2f} h, {self.speakers} speakers{nameless}, "
            f"{self.words} words, {self.tokens_per_second:.1f} {self.unit}/s\ndurations: {spread or 'none'}"
        )


def measure(utterances: Iterable[Utterance], encode: Callable[[str], Sequence[int]] | None = None) -> CorpusStats:
    """One pass over the rows. Raises: CorpusError at a malformed row."""
    speakers: set[str] = set()
    durations: list[float] = []
    words = tokens = nameless = 0
    for utterance in utterances:
        durations.append(utterance.duration)
        words += len(utterance.text.split())
        tokens += len(utterance.text if encode is None else encode(utterance.text))
        if utterance.speaker is None:
            nameless += 1
        else:
            speakers.add(utterance.speaker)
    seconds = float(np.sum(durations))
    spread = np.quantile(durations, QUANTILES) if durations else ()
    return CorpusStats(
        utterances=len(durations),
        hours=seconds / 3600.0,
        speakers=len(speakers),
        without_speaker=nameless,
        words=words,
        duration_quantiles={p: float(q) for p, q in zip(QUANTILES, spread, strict=False)},
        unit="characters" if encode is None else "labels",
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
    )
