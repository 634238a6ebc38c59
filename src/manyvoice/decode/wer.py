"""Word and character error rates, kept as counts of each utterance so that they can be resampled and compared.

Dimension letters of this file: N utterances (or speakers) that are resampled, C columns that are summed,
M bootstrap draws.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from manyvoice.errors import DecodeError, UsageError

Unit = Literal["word", "char"]
Kind = Literal["hit", "substitution", "deletion", "insertion"]

KIND_OF_TAG: dict[str, Kind] = {
    "equal": "hit",
    "replace": "substitution",
    "delete": "deletion",
    "insert": "insertion",
}
LETTER = {"hit": "", "substitution": "S", "deletion": "D", "insertion": "I"}
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07", "'"))
CELLS_AT_ONCE = 4_000_000  # numbers of a resampling held in memory at once: 32 MB


@dataclass(frozen=True)
class Counts:
    """What an alignment found; counts of several utterances add up.

    ``rate = (substitutions + deletions + insertions) / (hits + substitutions + deletions)``. An empty reference
    has no rate of its own: 0 without insertions, infinite with them; in a sum its insertions count like any others.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def reference(self) -> int:
        """Words (or characters) of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each reference word; may exceed 1."""
        if self.reference == 0:
            return math.inf if self.errors else 0.0
        return self.errors / self.reference

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON; a rate that is infinite becomes null."""
        return {
            "reference": self.reference,
            "errors": self.errors,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "rate": self.rate if math.isfinite(self.rate) else None,
        }


@dataclass(frozen=True)
class Op:
    """One step of an alignment; the side that has no word is the empty string."""

    kind: Kind
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Confusion:
    """An error and how often it was made; an empty side is a deletion or an insertion."""

    reference: str
    hypothesis: str
    count: int


def units_of(text: str, unit: Unit) -> list[str]:
    """The words of a text, or its characters with the spaces between words, as is usual for character error rates.

    Raises: DecodeError if the unit is neither.
    """
    if unit == "word":
        return text.split()
    if unit == "char":
        return list(" ".join(text.split()))
    raise DecodeError(f"unit = {unit!r}: error rates are counted in 'word' or 'char'; use one of the two")


def _counts(reference: Sequence[str], hypothesis: Sequence[str]) -> Counts:
    found: Counter[Kind] = Counter()
    for block in Levenshtein.opcodes(reference, hypothesis):
        found[KIND_OF_TAG[block.tag]] += max(block.src_end - block.src_start, block.dest_end - block.dest_start)
    return Counts(found["hit"], found["substitution"], found["deletion"], found["insertion"])


def align_words(reference: str, hypothesis: str) -> Counts:
    """Counts of a least-cost word alignment; all three errors cost 1 (Levenshtein 1966). Texts as they stand."""
    return _counts(units_of(reference, "word"), units_of(hypothesis, "word"))


def align_chars(reference: str, hypothesis: str) -> Counts:
    """Counts of a least-cost character alignment, spaces between words included. Texts as they stand."""
    return _counts(units_of(reference, "char"), units_of(hypothesis, "char"))


def alignment(reference: str, hypothesis: str, unit: Unit = "word") -> list[Op]:
    """One least-cost alignment, step by step.

    Several alignments may cost the same; the number of errors does not depend on which one this is, but how they
    are split into substitutions, deletions and insertions may.
    """
    ref, hyp = units_of(reference, unit), units_of(hypothesis, unit)
    ops: list[Op] = []
    for block in Levenshtein.opcodes(ref, hyp):
        said, heard = ref[block.src_start : block.src_end], hyp[block.dest_start : block.dest_end]
        pairs = zip_longest(said, heard, fillvalue="")  # a block of one kind has equal sides, or one empty side
        ops.extend(Op(KIND_OF_TAG[block.tag], one, other) for one, other in pairs)
    return ops


def show(ops: Sequence[Op]) -> str:
    """An alignment as three lines of text: reference, hypothesis, and S, D or I under each error."""
    columns = [(op.reference or "*", op.hypothesis or "*", LETTER[op.kind]) for op in ops]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for n, head in enumerate(("REF: ", "HYP: ", "     ")):
        cells = (column[n].ljust(width) for column, width in zip(columns, widths, strict=True))
        lines.append((head + " ".join(cells)).rstrip())
    return "\n".join(lines)


def basic(text: str) -> str:
    """Unicode NFKC, case-folded, punctuation and symbols to spaces, whitespace squeezed.

    An apostrophe between two letters or digits stays, and the typographic ones become ``'``. Punctuation becomes a
    space so that it never joins two words: ``well-known`` is two words and so is ``1,000``. Invisible format
    characters (soft hyphen, zero-width joiner) are dropped.
    """
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").translate(APOSTROPHES)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(APOSTROPHES)
    kept = [unicodedata.category(c)[0] not in "PSZC" for c in text]
    inner = [False, *kept, False]
    chars = (
        c if kept[n] or (c == "'" and inner[n] and inner[n + 2]) else " "  # inner is shifted by one
        for n, c in enumerate(text)
    )
    return " ".join("".join(chars).split())


def whisper_english(spellings: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """The English normaliser of Whisper (Radford et al., arXiv:2212.04356, appendix C), as Transformers carries it.

    Args: spellings: British to American, the ``normalizer.json`` of a Whisper model folder. Without it spellings
        stay as they are, which is what ``NORMALISERS["whisper_english"]`` does: such figures are not those of a
        leaderboard that unifies spellings. For those put ``whisper_english(table)`` into `NORMALISERS` by a name.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalise = EnglishTextNormalizer(dict(spellings or {}))
    return lambda text: str(normalise(text)).strip()


@functools.cache
def _whisper_english_without_spellings() -> Callable[[str], str]:
    return whisper_english()


NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "basic": basic,
    "whisper_english": lambda text: _whisper_english_without_spellings()(text),  # loaded when first asked for
}


def normaliser_named(name: str) -> Callable[[str], str]:
    """Raises: UsageError, with the names there are, if there is none of this name."""
    if name not in NORMALISERS:
        names = ", ".join(sorted(NORMALISERS))
        raise UsageError(f"normaliser = {name!r}: there is no normaliser of this name; use one of {names}")
    return NORMALISERS[name]


def resampled_sums(values_NC: NDArray[np.number], samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sums of the columns over bootstrap draws of the rows: M C. Efron 1979.

    Each draw takes N rows with replacement. Equal rows are drawn together (a multinomial over the distinct rows), so
    the time depends on how many distinct rows there are, and the order of the rows has no influence at all.
    """
    rows, counts = np.unique(values_NC, axis=0, return_counts=True)
    shares = counts / counts.sum()
    step = max(1, CELLS_AT_ONCE // len(rows))
    parts = []
    for start in range(0, samples, step):
        drawn = rng.multinomial(len(values_NC), shares, size=min(step, samples - start))
        parts.append(drawn.astype(np.float64) @ rows.astype(np.float64))
    return np.concatenate(parts)


@dataclass(frozen=True)
class GroupScore:
    """The score of the utterances that belong together; `group` is None for those that belong nowhere."""

    group: str | None
    utterances: int
    counts: Counts

    def as_dict(self) -> dict[str, object]:
        """A row of a table, for JSON."""
        return {"group": self.group, "utterances": self.utterances, **self.counts.as_dict()}


@dataclass(frozen=True, kw_only=True)
class Score:
    """An error rate together with everything it was computed from. `score` makes it.

    ``rate = sum of errors / sum of reference words`` over all utterances; an utterance with an empty reference
    adds its insertions to the first sum and nothing to the second.

    Args: references, hypotheses: the texts after normalisation.
    """

    ids: tuple[str, ...]
    speakers: tuple[str | None, ...] | None
    references: tuple[str, ...]
    hypotheses: tuple[str, ...]
    counts: tuple[Counts, ...]
    normaliser: str
    unit: Unit

    @property
    def total(self) -> Counts:
        """The counts of all utterances together."""
        return sum(self.counts, Counts())

    @property
    def rate(self) -> float:
        """The error rate as a fraction: 0.05 is 5 %."""
        return self.total.rate

    def interval(
        self,
        level: float = 0.95,
        samples: int = 10_000,
        seed: int = 0,
        by: Literal["utterance", "speaker"] = "utterance",
    ) -> tuple[float, float]:
        """Percentile bootstrap interval of the rate, resampling utterances or whole speakers.

        Bisani and Ney, ICASSP 2004. By utterance it speaks of other sentences of these speakers; by speaker of other
        speakers, and with fewer than about twenty speakers it is too narrow.

        Raises: DecodeError for a level outside 0..1, fewer than 1 sample, or an utterance whose speaker is unknown.
        """
        check_level(level)
        if samples < 1:
            raise DecodeError(f"samples = {samples}: an interval needs at least 1 bootstrap draw; use 10000")
        values_NC = np.array([(c.errors, c.reference) for c in self._clusters(by)], dtype=np.int64)
        sums_MC = resampled_sums(values_NC, samples, np.random.default_rng(seed))
        # A draw of empty references only has no rate; one word keeps it finite and on the wide side.
        rates_M = sums_MC[:, 0] / np.maximum(sums_MC[:, 1], 1.0)
        low, high = np.quantile(rates_M, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _clusters(self, by: str) -> Iterable[Counts]:
        if by == "utterance":
            return self.counts
        if by != "speaker":
            raise DecodeError(f"by = {by!r}: intervals resample by 'utterance' or 'speaker'; use one of the two")
        if self.speakers is None or None in self.speakers:
            unknown = len(self.ids) if self.speakers is None else self.speakers.count(None)
            raise DecodeError(
                f"speakers: {unknown} of {len(self.ids)} utterances have no speaker, and an interval by speaker "
                "needs one for each; name the speakers or resample by 'utterance'"
            )
        return [row.counts for row in self.by_speaker()]

    def by_speaker(self) -> list[GroupScore]:
        """One row for each speaker, sorted by name, utterances of unknown speakers last."""
        return self.by_group(self.speakers if self.speakers is not None else [None] * len(self.ids))

    def by_group(self, groups: Sequence[str | None]) -> list[GroupScore]:
        """One row for each group, sorted by name, None last. Args: groups: the group of each utterance.

        Raises: DecodeError if there is not one group for each utterance.
        """
        _check_length("groups", len(groups), len(self.ids))
        members: dict[str | None, list[Counts]] = {}
        for group, counts in zip(groups, self.counts, strict=True):
            members.setdefault(group, []).append(counts)
        names = sorted(members, key=lambda name: (name is None, name or ""))
        return [GroupScore(name, len(members[name]), sum(members[name], Counts())) for name in names]

    def confusions(self, limit: int = 20) -> list[Confusion]:
        """The most frequent errors, most frequent first, then in alphabetical order."""
        found: Counter[tuple[str, str]] = Counter()
        for reference, hypothesis in zip(self.references, self.hypotheses, strict=True):
            ops = alignment(reference, hypothesis, self.unit)
            found.update((op.reference, op.hypothesis) for op in ops if op.kind != "hit")
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        return [Confusion(ref, hyp, count) for (ref, hyp), count in ranked[:limit]]

    def as_dict(self) -> dict[str, object]:
        """The total, for JSON; rows of utterances and speakers are asked for separately."""
        return {
            "unit": self.unit,
            "normaliser": self.normaliser,
            "utterances": len(self.ids),
            **self.total.as_dict(),
        }


def check_level(level: float) -> None:
    """Raises: DecodeError unless the confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise DecodeError(f"level = {level}: a confidence level lies between 0 and 1; use 0.95 for 95 %")


def _check_length(field: str, length: int, utterances: int) -> None:
    if length != utterances:
        raise DecodeError(
            f"{field}: {length} for {utterances} references; there must be one for each, in the same order; "
            "was one of the lists filtered without the others?"
        )


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    ids: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    normaliser: str = "basic",
    unit: Unit = "word",
) -> Score:
    """Compare what was said with what was recognised, both normalised in the same way.

    Raises: DecodeError if lists differ in length, an id occurs twice or no reference holds a word; UsageError for an
        unknown normaliser.
    """
    normalise = normaliser_named(normaliser)
    _check_length("hypotheses", len(hypotheses), len(references))
    _check_length("ids", len(ids), len(references))
    if speakers is not None:
        _check_length("speakers", len(speakers), len(references))
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise DecodeError(f"ids: {twice[0]!r} occurs more than once; every utterance is scored once; rename or drop it")
    refs, hyps = tuple(map(normalise, references)), tuple(map(normalise, hypotheses))
    align = functools.partial(units_of, unit=unit)
    counts = tuple(_counts(align(ref), align(hyp)) for ref, hyp in zip(refs, hyps, strict=True))
    if not any(c.reference for c in counts):
        raise DecodeError(
            f"references: none of {len(refs)} holds a {unit} after the normaliser {normaliser!r}; an error rate is "
            "errors for each reference word; check the texts of the manifest"
        )
    return Score(
        ids=tuple(ids),
        speakers=None if speakers is None else tuple(speakers),
        references=refs,
        hypotheses=hyps,
        counts=counts,
        normaliser=normaliser,
        unit=unit,
    )
