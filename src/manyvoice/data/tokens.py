"""Words, characters or sentencepiece units, as a tokenizer that stock Transformers loads from the model folder.

``<unk>`` is index 0 and the CTC blank, called ``<pad>`` by Transformers, the last index.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, final

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import ParakeetTokenizer, PreTrainedTokenizerFast

from manyvoice.errors import ModelError

TokenizerKind = Literal["words", "characters", "sentencepiece"]
UNKNOWN, BLANK, WORD_START = "<unk>", "<pad>", "▁"


@final
class Tokenizer:
    """Text to label tokens and back; wraps the tokenizer that lives in the model folder.

    ``strings`` are the vocabulary in order; a word starts at a token with ``▁`` in front (boundary ``prefix``) or
    at every token (``every``).
    """

    def __init__(self, stock: PreTrainedTokenizerFast) -> None:
        self.stock = stock
        backend = stock.backend_tokenizer
        self.strings: list[str] = [backend.id_to_token(i) or "" for i in range(backend.get_vocab_size())]
        if stock.pad_token_id is None:
            raise ModelError("the tokenizer names no padding token, which is the CTC blank; set pad_token")
        self.blank: int = int(stock.pad_token_id)
        prefixed = any(s.startswith(WORD_START) for s in self.strings)
        self.boundary: Literal["prefix", "every"] = "prefix" if prefixed else "every"

    def __len__(self) -> int:
        return len(self.strings)

    def encode(self, text: str) -> list[int]:
        """Label tokens of a text; what the vocabulary lacks becomes ``<unk>``."""
        ids: list[int] = self.stock.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of label tokens that hold no blanks and whose repeats are meant."""
        text: str = self.stock.backend_tokenizer.decode([t for t in tokens if t != self.blank])
        return text.strip()

    def normalise(self, text: str) -> str:
        """The text as the tokenizer sees it: what a perfect recogniser could at best return."""
        normalizer = self.stock.backend_tokenizer.normalizer
        return str(normalizer.normalize_str(text)) if normalizer is not None else text

    def unknown(self, text: str) -> set[str]:
        """The pieces of the text that the vocabulary lacks: words for a word tokenizer, else characters."""
        backend = self.stock.backend_tokenizer
        unknown = backend.token_to_id(UNKNOWN)
        if unknown is None:
            return set()
        encoding = backend.encode(text, add_special_tokens=False)
        # offsets count in the text as it was given, before normalisation
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return {text[start:stop].strip() for i, (start, stop) in pairs if i == unknown}

    def fingerprint(self) -> str:
        """sha256 over the pieces in their order: what scores mean."""
        return hashlib.sha256("\n".join(self.strings).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        self.stock.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a model folder. ModelError if there is none that fits."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} holds no tokenizer.json; a model folder written by `manyvoice train` has one")
        try:
            return cls(ParakeetTokenizer.from_pretrained(str(folder), local_files_only=True))
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: not a tokenizer that Transformers reads ({error})") from error


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, *, size: int = 256, normalise: bool = True) -> Tokenizer:
    """Learn a vocabulary from a corpus; deterministic.

    Args:
        kind: ``words`` (each word one token), ``characters``, or ``sentencepiece`` (Kudo & Richardson,
            arXiv:1808.06226; unigram pieces, Kudo, arXiv:1804.10959).
        size: the most pieces or words; a small corpus gives fewer. Characters are all kept.
        normalise: Unicode NFKC, lower case, punctuation but apostrophes removed; part of the saved tokenizer.

    Raises: ModelError if the corpus holds no text, or more characters than ``size``.
    """
    normalizer = _normalizer() if normalise else None
    lines = [_squeezed(normalizer.normalize_str(t) if normalizer else t) for t in texts]
    lines = [line for line in lines if line]
    if not lines:
        raise ModelError("a tokenizer needs text, and the corpus has none; check its `text` fields")
    if kind == "words":
        backend = _words(lines, size)
    elif kind == "characters":
        backend = _characters(lines)
    else:
        backend = _sentencepiece(lines, size)
    if normalizer is not None:
        backend.normalizer = normalizer
    stock = ParakeetTokenizer(tokenizer_object=backend, pad_token=BLANK, unk_token=UNKNOWN)
    return Tokenizer(stock)


def _normalizer() -> normalizers.Normalizer:
    # An apostrophe inside a word is part of it (it's, o'clock); everything else that is not a letter, a mark or a
    # digit in any script becomes a space.
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("\u2019", "'"),
            normalizers.Replace(tokenizers.Regex(r"[^\p{L}\p{M}\p{N}' ]+"), " "),
            normalizers.Replace(tokenizers.Regex(r"(?<![\p{L}\p{N}])'|'(?![\p{L}\p{N}])"), " "),
            normalizers.Replace(tokenizers.Regex(r" {2,}"), " "),
            normalizers.Strip(),
        ]
    )


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _words(lines: Sequence[str], size: int) -> tokenizers.Tokenizer:
    counts = Counter(word for line in lines for word in line.split())
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, *sorted(kept), BLANK])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _characters(lines: Sequence[str]) -> tokenizers.Tokenizer:
    letters = sorted({c for line in lines for c in line if not c.isspace()})
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, WORD_START, *letters, BLANK])}
    # byte pairs without a single merge: one token a character
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    return _with_metaspace(backend)


def _sentencepiece(lines: Sequence[str], size: int) -> tokenizers.Tokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size - 1,  # the blank is the last one
            model_type="unigram",
            normalization_rule_name="identity",
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            hard_vocab_limit=False,  # a small corpus has fewer pieces than were asked for
            num_threads=1,  # more threads sum in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ModelError(f"tokenizer.size = {size}: sentencepiece says {error}; choose another size") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scored = [(pieces.IdToPiece(i), pieces.GetScore(i)) for i in range(pieces.GetPieceSize())]
    unk = pieces.unk_id()
    backend = tokenizers.Tokenizer(models.Unigram([*scored, (BLANK, 0.0)], unk_id=unk, byte_fallback=False))
    return _with_metaspace(backend)


def _with_metaspace(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    return backend
