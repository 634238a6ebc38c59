"""What text adds to the acoustic score while it is being spelled: language model, word score, hotwords.

Every part sees a hypothesis as a state and answers, for all tokens at once, what appending each would add; so beam
search asks once for each new prefix instead of once for each prefix and token. A part's score depends on the prefix
only, never on its alignment.

    V vocabulary, blank included
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from manyvoice.decode.lm import Context, NGram
from manyvoice.decode.pieces import WORD_START, WordBoundary, letters, opens_word
from manyvoice.errors import DecodeError

Row = NDArray[np.float64]
# Rows are V numbers each: 4096 of them are 32 MiB at 1024 tokens.
ROWS_KEPT = 4096


class Part(ABC):
    """One additive part of the score; its states are hashable and its weights are already multiplied in."""

    @abstractmethod
    def start(self) -> Any:
        """The state of the empty prefix."""

    @abstractmethod
    def row_V(self, state: Any) -> Row:
        """What appending each token adds; the entry of the blank means nothing."""

    @abstractmethod
    def step(self, state: Any, token: int) -> Any:
        """The state after one more token."""

    @abstractmethod
    def close(self, state: Any) -> float:
        """What the end of the utterance adds."""


@final
class Fusion(Part):
    """The sum of its parts."""

    def __init__(self, parts: Sequence[Part], V: int):
        self.parts = tuple(parts)
        self._zeros_V = np.zeros(V)
        self._row_V = lru_cache(ROWS_KEPT)(self._sum_V)

    def start(self) -> tuple[Hashable, ...]:
        return tuple(part.start() for part in self.parts)

    def row_V(self, state: tuple[Hashable, ...]) -> Row:
        return self._row_V(state)

    def step(self, state: tuple[Hashable, ...], token: int) -> tuple[Hashable, ...]:
        return tuple(part.step(s, token) for part, s in zip(self.parts, state, strict=True))

    def close(self, state: tuple[Hashable, ...]) -> float:
        return sum(part.close(s) for part, s in zip(self.parts, state, strict=True))

    def _sum_V(self, state: tuple[Hashable, ...]) -> Row:
        row_V = self._zeros_V
        for part, s in zip(self.parts, state, strict=True):
            row_V = row_V + part.row_V(s)
        return row_V


@final
class TokenModel(Part):
    """weight * log p(token | tokens before); the state is the model's context."""

    def __init__(self, lm: NGram, weight: float, strings: Sequence[str]):
        self._lm, self._weight, self._strings = lm, weight, tuple(strings)
        self._ids: dict[str, list[int]] = {}
        for token, string in enumerate(self._strings):
            self._ids.setdefault(string, []).append(token)
        self._row_V = lru_cache(ROWS_KEPT)(self._backed_off_V)

    def start(self) -> Context:
        return self._lm.start()

    def row_V(self, state: Context) -> Row:
        return self._row_V(state)

    def step(self, state: Context, token: int) -> Context:
        return self._lm.advance(state, self._strings[token])

    def close(self, state: Context) -> float:
        return self._weight * self._lm.finish(state)

    def _backed_off_V(self, context: Context) -> Row:
        if context == ():
            return np.array([self._weight * self._lm.score((), string) for string in self._strings])
        row_V = self._row_V(context[1:]) + self._weight * self._lm.backoff.get(context, 0.0)
        for word in self._lm.follow.get(context, {}):
            for token in self._ids.get(word, ()):
                row_V[token] = self._weight * self._lm.score(context, word)
        unknown = [token for token, string in enumerate(self._strings) if string not in self._lm.follow[()]]
        if unknown:
            row_V[unknown] = self._weight * self._lm.score(context, self._strings[unknown[0]])
        return row_V


@final
class WordModel(Part):
    """weight * log p(word | words before), paid when the next word opens or the utterance ends.

    The state is the model's context and the letters of the word that is still being spelled.
    """

    def __init__(self, lm: NGram, weight: float, strings: Sequence[str]):
        self._lm, self._weight = lm, weight
        self._opens_V = np.array([opens_word(string, "prefix") for string in strings])
        self._letters = [letters(string, "prefix") for string in strings]

    def start(self) -> tuple[Context, str]:
        return self._lm.start(), ""

    def row_V(self, state: tuple[Context, str]) -> Row:
        context, word = state
        paid = self._weight * self._lm.score(context, word) if word else 0.0
        return np.where(self._opens_V, paid, 0.0)

    def step(self, state: tuple[Context, str], token: int) -> tuple[Context, str]:
        context, word = state
        if not self._opens_V[token]:
            return context, word + self._letters[token]
        return (self._lm.advance(context, word) if word else context), self._letters[token]

    def close(self, state: tuple[Context, str]) -> float:
        context, word = state
        if not word:
            return self._weight * self._lm.finish(context)
        return self._weight * (self._lm.score(context, word) + self._lm.finish(self._lm.advance(context, word)))


@final
class WordScore(Part):
    """A constant for each word, given with its first letter; the state is whether a word is being spelled."""

    def __init__(self, score: float, strings: Sequence[str], boundary: WordBoundary):
        self._opens_V = np.array([opens_word(string, boundary) for string in strings])
        self._spells_V = np.array([letters(string, boundary) != "" for string in strings])
        self._between_V = np.where(self._spells_V, score, 0.0)
        self._inside_V = np.where(self._spells_V & self._opens_V, score, 0.0)

    def start(self) -> bool:
        return False

    def row_V(self, state: bool) -> Row:
        return self._inside_V if state else self._between_V

    def step(self, state: bool, token: int) -> bool:
        return bool(self._spells_V[token]) or (state and not self._opens_V[token])

    def close(self, state: bool) -> float:
        return 0.0


@final
class Hotwords(Part):
    """A bonus for given words and phrases, whole words only, spelled exactly.

    The automaton of Aho and Corasick, CACM 1975, over characters, each phrase between two spaces. While a phrase is
    being spelled a hypothesis is lent ``weight * spelled / length`` (the largest such share if several are open), so
    that it survives until the phrase is complete; then the whole weight is its own. A phrase that breaks off pays
    the loan back. So a finished hypothesis has the sum of the weights of the phrases in it and nothing else.

    Raises: DecodeError if a phrase is empty, holds a character that no token spells, or has a weight that is not a
        positive number.
    """

    def __init__(self, weights: Mapping[str, float], strings: Sequence[str], boundary: WordBoundary):
        self._texts = [" " + string if boundary == "every" else string.replace(WORD_START, " ") for string in strings]
        check_hotwords(weights, set("".join(self._texts)))
        self._next: list[dict[str, int]] = [{}]
        self._spaced = [False]
        self._fail = [0]
        self._earned = [0.0]
        self._lent = [0.0]
        for phrase, weight in weights.items():
            self._add(f" {' '.join(phrase.split())} ", weight)
        self._link()
        self._start = self._next[0][" "]
        self._table = lru_cache(ROWS_KEPT)(self._walk_all)

    def start(self) -> int:
        return self._start

    def row_V(self, state: int) -> Row:
        return self._table(state)[1]

    def step(self, state: int, token: int) -> int:
        return self._table(state)[0][token]

    def close(self, state: int) -> float:
        return self._walk(state, " ")[1] - self._lent[state]

    def _add(self, text: str, weight: float) -> None:
        node = 0
        for spelled, character in enumerate(text):
            self._lent[node] = max(self._lent[node], weight * max(0, spelled - 1) / (len(text) - 1))
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._spaced.append(character == " ")
                self._fail.append(0)
                self._earned.append(0.0)
                self._lent.append(0.0)
            node = self._next[node][character]
        self._earned[node] += weight

    def _link(self) -> None:
        queue = list(self._next[0].values())
        for node in queue:
            fail = self._fail[node]
            self._earned[node] += self._earned[fail]
            self._lent[node] = max(self._lent[node], self._lent[fail])
            for character, child in self._next[node].items():
                self._fail[child] = self._follow(fail, character)
                queue.append(child)

    def _follow(self, node: int, character: str) -> int:
        while character not in self._next[node] and node != 0:
            node = self._fail[node]
        return self._next[node].get(character, 0)

    def _walk(self, node: int, text: str) -> tuple[int, float]:
        """The node after the text, and what was earned on the way."""
        earned = 0.0
        for character in text:
            # Two spaces are one: a lone word mark may be followed by a piece that has its own.
            if character == " " and self._spaced[node]:
                continue
            node = self._follow(node, character)
            earned += self._earned[node]
        return node, earned

    def _walk_all(self, node: int) -> tuple[list[int], Row]:
        walks = [self._walk(node, text) for text in self._texts]
        gained_V = np.array([earned + self._lent[after] for after, earned in walks]) - self._lent[node]
        return [after for after, _ in walks], gained_V


def check_hotwords(weights: Mapping[str, float], alphabet: set[str]) -> None:
    """Raises: DecodeError naming the phrase that cannot be boosted, and why."""
    for phrase, weight in weights.items():
        if not phrase.split():
            raise DecodeError(f"hotwords hold {phrase!r}, which has no letters; remove it")
        if not (math.isfinite(weight) and weight > 0):
            raise DecodeError(f"hotwords[{phrase!r}] is {weight}, but a weight must be a positive number (in nats)")
        if foreign := set("".join(phrase.split())) - alphabet:
            raise DecodeError(
                f"hotwords hold {phrase!r}, but no token spells {''.join(sorted(foreign))!r};"
                " write the phrase as the tokenizer does (case, accents, digits)"
            )
