"""Splits of speakers: by utterance id alone, disjoint, and nobody is left out without a reason."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.utterance import ArrayAudio, Utterance
from manyvoice.errors import CorpusError, UsageError
from manyvoice.recipes.speakers import Speaker, Split, split_speakers, split_text
from manyvoice.types import Seconds


def corpus_of(*counts: int, parts: Sequence[str] | None = None) -> Corpus:
    """Speakers a, b, ... with so many utterances; ``parts`` of each one's, in turn."""
    audio = ArrayAudio(np.zeros(1600, np.float32), 16_000)
    return open_corpus(
        [
            Utterance(
                id=f"{name}{k}", audio=audio, duration=Seconds(0.1), text="x", speaker=name, where=f"row {k}",
                extra={"part": parts[k % len(parts)]} if parts else {},
            )
            for name, count in zip("abcdefgh", counts, strict=False)
            for k in range(count)
        ]
    )  # fmt: skip


def ids(corpus: Corpus, speaker: Speaker) -> list[set[str]]:
    return [{corpus[i].id for i in rows} for rows in (speaker.adapt, speaker.choose, speaker.test)]


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    choose=st.one_of(st.floats(0.01, 0.9), st.integers(1, 4)),
    test=st.one_of(st.floats(0.01, 0.9), st.integers(1, 4)),
    adapt=st.one_of(st.none(), st.integers(1, 5)),
    order=st.randoms(),
)
def test_parts_are_disjoint_and_follow_from_ids_alone(
    counts: list[int], choose: float, test: float, adapt: int | None, order: random.Random
) -> None:
    assume(max(choose, test) >= 1 or choose + test < 0.99)
    corpus, split = corpus_of(*counts), Split(choose=choose, test=test, adapt=adapt, seed=3)
    speakers, left_out = split_speakers(corpus, "speaker", split)
    assert sorted([s.name for s in speakers] + list(left_out)) == corpus.speakers()
    for speaker in speakers:
        count = counts["abcdefgh".index(speaker.name)]
        assert len(set(speaker.rows())) == len(speaker.rows()) <= count
        assert all(corpus[i].speaker == speaker.name for i in speaker.rows())
        assert len(speaker.test) == (int(test) if test >= 1 else max(1, round(test * count)))
        assert len(speaker.choose) == (int(choose) if choose >= 1 else max(1, round(choose * count)))
        rest = count - len(speaker.test) - len(speaker.choose)
        assert len(speaker.adapt) == (rest if adapt is None else min(rest, adapt)) >= 1
    places = list(range(len(corpus)))
    order.shuffle(places)
    shuffled = corpus.subset(places)
    again, _ = split_speakers(shuffled, "speaker", split)
    assert [ids(shuffled, s) for s in again] == [ids(corpus, s) for s in speakers]
    assert split_text(shuffled, again) == split_text(corpus, speakers)


def test_company_does_not_matter_but_the_seed_does() -> None:
    many, one = corpus_of(9, 9), corpus_of(9)
    found = [ids(c, split_speakers(c, "speaker", Split(seed=0))[0][0]) for c in (many, one)]
    assert found[0] == found[1]
    assert ids(one, split_speakers(one, "speaker", Split(seed=1))[0][0]) != found[0]


def test_the_default_shares() -> None:
    (speaker,), _ = split_speakers(corpus_of(20), "speaker", Split())
    assert [len(part) for part in (speaker.adapt, speaker.choose, speaker.test)] == [11, 3, 6]


def test_too_few_utterances_are_left_out_with_a_reason() -> None:
    speakers, left_out = split_speakers(corpus_of(1, 2, 3), "speaker", Split())
    assert [s.name for s in speakers] == ["c"]
    assert left_out["a"] == "1 utterance: too few to learn from, to choose by and to report on"
    assert left_out["b"].startswith("2 utterances: too few")


def test_the_manifest_may_say_the_parts() -> None:
    corpus = corpus_of(6, 2, parts=["adapt", "choose", "test"])
    speakers, left_out = split_speakers(corpus, "speaker", Split(field="part"))
    assert ids(corpus, speakers[0]) == [{"a0", "a3"}, {"a1", "a4"}, {"a2", "a5"}] and list(left_out) == ["b"]
    written = json.loads(split_text(corpus, speakers))
    assert written == {"a": {"adapt": ["a0", "a3"], "choose": ["a1", "a4"], "test": ["a2", "a5"]}}
    with pytest.raises(CorpusError, match="utterance a1: part is 'dev'; it must be adapt, choose, test"):
        split_speakers(corpus_of(3, parts=["adapt", "dev", "test"]), "speaker", Split(field="part"))
    with pytest.raises(CorpusError, match="utterance a0: part is None"):
        split_speakers(corpus_of(3), "speaker", Split(field="part"))


def test_any_field_may_tell_speakers_apart() -> None:
    corpus = corpus_of(6, parts=["north", "south"])
    speakers, _ = split_speakers(corpus, "part", Split())
    assert [s.name for s in speakers] == ["north", "south"]


def test_a_manifest_without_speakers_is_refused() -> None:
    bare = open_corpus([replace(u, speaker=None) for u in corpus_of(4)])
    with pytest.raises(CorpusError, match="no row of the manifest has 'speaker'.* --by"):
        split_speakers(bare, "speaker", Split())


@pytest.mark.parametrize("wrong", [{"choose": 0}, {"test": 1.5}, {"test": -1}, {"adapt": 0}])
def test_numbers_that_cannot_be(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"split.{name} = .*: must be"):
        Split(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shares", [(0.6, 0.6), (0.7, 0.3)])
def test_shares_that_leave_nothing_to_learn_from_are_refused(shares: tuple[float, float]) -> None:
    choose, test = shares
    with pytest.raises(UsageError, match=f"{choose} and split.test = {test}: shares that add up to 1 or more"):
        Split(choose=choose, test=test)
    assert Split(choose=choose, test=test, field="part").field == "part", "where the manifest says it, shares do not"
