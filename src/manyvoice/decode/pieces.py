"""From token strings to words, by one rule that beam search, alignment and hotwords share.

``prefix``: a piece that starts with U+2581 opens a word (sentencepiece; characters with U+2581 as the space).
``every``: every token is a word.
The first piece of an utterance opens a word either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from manyvoice.errors import DecodeError

WordBoundary = Literal["prefix", "every"]
WORD_START = "\u2581"


def opens_word(piece: str, boundary: WordBoundary) -> bool:
    """Whether the piece begins a new word, wherever it stands."""
    return boundary == "every" or piece.startswith(WORD_START)


def letters(piece: str, boundary: WordBoundary) -> str:
    """The piece without its word mark."""
    return piece if boundary == "every" else piece.lstrip(WORD_START)


def spell(tokens: Iterable[int], strings: Sequence[str], boundary: WordBoundary) -> str:
    """Token ids as text, words parted by one space."""
    pieces = [strings[token] for token in tokens]
    if boundary == "every":
        return " ".join(pieces)
    return " ".join("".join(pieces).replace(WORD_START, " ").split())


def check_boundary(strings: Sequence[str], boundary: WordBoundary) -> None:
    """Raises: DecodeError if the rule is unknown, or if a piece holds a word mark anywhere but at its start."""
    if boundary not in ("prefix", "every"):
        raise DecodeError(f"word_boundary is {boundary!r}, but must be 'prefix' or 'every'")
    if boundary == "every":
        return
    for token, piece in enumerate(strings):
        if WORD_START in letters(piece, boundary):
            raise DecodeError(
                f"tokens[{token}] is {piece!r}: with word_boundary='prefix' U+2581 may only start a piece;"
                " train the tokenizer with split_by_whitespace and the mark as a prefix"
            )
