"""N-gram language models over words or tokens: train, read and write ARPA, score with back-off.

One model serves both uses: a token-level model is an n-gram whose "words" are token strings.
All logarithms here are natural; ARPA files hold base ten and are converted at the door.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from manyvoice.decode.arpa import Entry, read_entries, write_entries
from manyvoice.errors import DecodeError

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
RESERVED = frozenset({BOS, EOS, UNK})
LOG_10 = math.log(10.0)
# What KenLM gives a word that is not in a model without <unk> (lm/config.cc, unknown_missing_logprob).
MISSING_UNK = -100.0 * LOG_10
# What ARPA files by convention write for the probability of <s>, which is never predicted.
NEVER = -99.0

Context = tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class NGram:
    """A back-off model. Katz 1987.

        log p(w | c) = follow[c][w]                        where it is stored
                       backoff[c] + log p(w | c[1:])       otherwise; a missing back-off is 0

    Args:
        order: the longest n-gram.
        follow: context -> word -> log-probability; the empty context holds the unigrams.
        backoff: context -> log back-off weight.
    """

    order: int
    follow: Mapping[Context, Mapping[str, float]]
    backoff: Mapping[Context, float]

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every word that the model can predict: with ``</s>`` and ``<unk>``, without ``<s>``."""
        return frozenset(self.follow[()]) - {BOS}

    def start(self) -> Context:
        """The context at the beginning of a sentence."""
        return self._known((BOS,))

    def advance(self, context: Context, word: str) -> Context:
        """The context after one more word, cut to what can still change a score."""
        if self.order == 1:
            return ()
        word = word if word in self.follow[()] else UNK
        return self._known((*context, word)[1 - self.order :])

    def score(self, context: Context, word: str) -> float:
        """log p(word | context); an unknown word scores as ``<unk>``, or -230.3 where the model has none."""
        unigrams = self.follow[()]
        if word not in unigrams:
            if UNK not in unigrams:
                return MISSING_UNK
            word = UNK
        paid = 0.0
        while word not in self.follow.get(context, {}):
            paid += self.backoff.get(context, 0.0)
            context = context[1:]
        return paid + self.follow[context][word]

    def sentence(self, words: Sequence[str]) -> float:
        """log p of a whole sentence, ``</s>`` included, starting after ``<s>``."""
        context, total = self.start(), 0.0
        for word in words:
            total += self.score(context, word)
            context = self.advance(context, word)
        return total + self.finish(context)

    def finish(self, context: Context) -> float:
        """log p(</s> | context); 0 where the model knows no sentence end."""
        return self.score(context, EOS) if EOS in self.follow[()] else 0.0

    @staticmethod
    def read_arpa(path: Path | str) -> NGram:
        """A model from an ARPA file, plain or ``.gz``, UTF-8.

        Raises: DecodeError with file:line if the file is not well formed.
        """
        follow: dict[Context, dict[str, float]] = {(): {}}
        backoff: dict[Context, float] = {}
        order = 0
        for entry in read_entries(Path(path)):
            *context, word = (UNK if word == "<UNK>" else word for word in entry.words)
            order = max(order, len(entry.words))
            follow.setdefault(tuple(context), {})[word] = entry.log10 * LOG_10
            if entry.backoff10 != 0.0:
                backoff[(*context, word)] = entry.backoff10 * LOG_10
        return NGram(order=order, follow=follow, backoff=backoff)

    def write_arpa(self, path: Path | str) -> None:
        """Write the model as plain ARPA text; `read_arpa` gives it back to nine digits."""
        sections: list[list[Entry]] = [[] for _ in range(self.order)]
        for context, words in self.follow.items():
            for word, logp in words.items():
                key = (*context, word)
                backoff10 = self.backoff.get(key, 0.0) / LOG_10
                sections[len(context)].append(Entry(words=key, log10=logp / LOG_10, backoff10=backoff10))
        for section in sections:
            section.sort(key=lambda entry: entry.words)
        write_entries(Path(path), sections)

    def _known(self, context: Context) -> Context:
        """The longest end of the context after which something is stored: exact, because the rest scores the same."""
        while context and context not in self.follow and context not in self.backoff:
            context = context[1:]
        return context


def train_ngram(sentences: Iterable[str], order: int) -> NGram:
    """An interpolated Witten-Bell model. Witten and Bell 1991, as in Chen and Goodman, TR-10-98, section 2.6.

        p(w | c) = (count(c w) + types(c) p(w | c[1:])) / (count(c) + types(c))

    ``types(c)`` is the number of different words seen after c. The unigrams are mixed in the same way with the uniform
    distribution over the vocabulary, ``</s>`` and ``<unk>``, so every distribution sums to one and ``<unk>`` has its
    share. The back-off weight that makes this an ARPA model is types(c) / (count(c) + types(c)).

    Args: sentences: words (or tokens) parted by white space; empty ones are skipped.  order: 1 or more.
    Raises: DecodeError if there is no sentence, or if one holds a reserved word.
    """
    if order < 1:
        raise DecodeError(f"order must be 1 or more, but is {order}")
    counts = _counts(sentences, order)
    vocabulary = [*counts[()], UNK]
    follow: dict[Context, dict[str, float]] = {}
    backoff: dict[Context, float] = {}
    # Short contexts first: a longer one is mixed with the one that drops its oldest word.
    for context in sorted(counts, key=len):
        seen = counts[context]
        total = seen.total() + len(seen)
        share = len(seen) / total
        if context == ():
            lower = dict.fromkeys(vocabulary, 1.0 / len(vocabulary))
            follow[()] = {w: math.log(seen[w] / total + share * lower[w]) for w in vocabulary}
            continue
        lower = follow[context[1:]]
        # Stored one order down, always: whatever follows c in the text also follows c[1:].
        follow[context] = {w: math.log(n / total + share * math.exp(lower[w])) for w, n in seen.items()}
        backoff[context] = math.log(share)
    follow[()][BOS] = NEVER * LOG_10
    return NGram(order=order, follow=follow, backoff=backoff)


def _counts(sentences: Iterable[str], order: int) -> dict[Context, Counter[str]]:
    """Context -> how often each word follows it; contexts reach back to one ``<s>`` and no further."""
    counts: defaultdict[Context, Counter[str]] = defaultdict(Counter)
    for number, sentence in enumerate(sentences, start=1):
        words = sentence.split()
        if reserved := RESERVED.intersection(words):
            raise DecodeError(
                f"sentence {number} holds {min(reserved)!r}, which is reserved for the model; remove it from the text"
            )
        padded = [BOS, *words, EOS] if words else []
        for end in range(1, len(padded)):
            for size in range(min(order, end + 1)):
                counts[tuple(padded[end - size : end])][padded[end]] += 1
    if not counts:
        raise DecodeError("no sentence to train a language model on; every line is empty")
    return dict(counts)
