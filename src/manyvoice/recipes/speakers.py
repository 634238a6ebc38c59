"""Who is to be personalised, and with which of their utterances: to learn from, to choose by, to report on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import final

from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import group_of
from manyvoice.errors import CorpusError, UsageError
from manyvoice.submodels.names import quote

PARTS = ("adapt", "choose", "test")


@final
@dataclass(frozen=True, kw_only=True)
class Split:
    """Of each speaker's utterances, how many choose and how many report; the others, or ``adapt``, are learned from.

    Numbers below 1 are shares, at least one utterance each; whole numbers are counts. Which utterances they are follows
    from (seed, utterance id) alone. With ``field`` the manifest says it: adapt, choose or test.
    """

    choose: float = 0.15
    test: float = 0.3
    adapt: int | None = None
    field: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("choose", self.choose), ("test", self.test)):
            if not 0 < value < float("inf") or (value > 1 and value != int(value)):
                raise UsageError(f"split.{name} = {value}: must be a share between 0 and 1, or a number of utterances")
        if self.field is None and self.choose < 1 and self.test < 1 and self.choose + self.test > 1 - 1e-9:
            raise UsageError(
                f"split.choose = {self.choose} and split.test = {self.test}: shares that add up to 1 or more leave "
                "nothing to learn from; lower one of them"
            )
        if self.adapt is not None and self.adapt < 1:
            raise UsageError(f"split.adapt = {self.adapt}: must be 1 or more utterances; leave it away to take all")


@final
@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One speaker's rows of the corpus."""

    name: str
    adapt: tuple[int, ...]
    choose: tuple[int, ...]
    test: tuple[int, ...]

    def rows(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.adapt, *self.choose, *self.test)


def split_speakers(corpus: Corpus, by: str, split: Split) -> tuple[list[Speaker], dict[str, str]]:
    """Speakers with enough utterances, sorted by name, and why others are left out.

    Raises: CorpusError if no row has the field ``by``, or none says its part.
    """
    rows: dict[str, list[int]] = {}
    for i, utterance in enumerate(corpus):
        name = group_of(utterance, by)
        if name is not None:
            rows.setdefault(name, []).append(i)
    if not rows:
        raise CorpusError(
            f"no row of the manifest has {by!r}, so there is nobody to personalise for; name the field that tells the "
            "speakers apart with --by"
        )
    speakers, left_out = [], {}
    for name, mine in sorted(rows.items()):
        speaker = _by_field(corpus, name, mine, split) if split.field else _by_hash(corpus, name, mine, split)
        try:
            quote(name)
        except UsageError as error:
            left_out[name.encode(errors="replace").decode()] = f"no voice can be kept under that name: {error}"
            continue
        if all((speaker.adapt, speaker.choose, speaker.test)):
            speakers.append(speaker)
        else:
            count = "1 utterance" if len(mine) == 1 else f"{len(mine)} utterances"
            left_out[name] = f"{count}: too few to learn from, to choose by and to report on"
    return speakers, left_out


def _by_field(corpus: Corpus, name: str, mine: Sequence[int], split: Split) -> Speaker:
    assert split.field is not None
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for i in mine:
        part = group_of(corpus[i], split.field)
        if part not in parts:
            raise CorpusError(f"utterance {corpus[i].id}: {split.field} is {part!r}; it must be {', '.join(PARTS)}")
        parts[part].append(i)
    return Speaker(name=name, **{part: tuple(found) for part, found in parts.items()})


def _by_hash(corpus: Corpus, name: str, mine: Sequence[int], split: Split) -> Speaker:
    def place(i: int) -> bytes:
        return blake2b(f"{split.seed} {corpus[i].id}".encode(), digest_size=8, person=b"split.v1").digest()

    order = sorted(mine, key=place)
    tests, chooses = (_count(value, len(order)) for value in (split.test, split.choose))
    test, rest = order[:tests], order[tests:]
    choose, adapt = rest[:chooses], rest[chooses:]
    return Speaker(name=name, adapt=tuple(adapt[: split.adapt]), choose=tuple(choose), test=tuple(test))


def _count(value: float, n: int) -> int:
    return int(value) if value >= 1 else max(1, round(value * n))


def split_text(corpus: Corpus, speakers: Sequence[Speaker]) -> str:
    """Utterance ids of every speaker's parts, as JSON."""
    document = {s.name: {part: [corpus[i].id for i in getattr(s, part)] for part in PARTS} for s in speakers}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"
