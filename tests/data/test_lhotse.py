"""What lhotse itself writes, cuts and Shar, opens with the same ids, texts, speakers and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, Recording, SupervisionSegment

from manyvoice.data.manifest import open_corpus


@pytest.fixture
def cuts(tmp_path: Path, speak_tones: Callable[[Path, int, int], Path]) -> CutSet:
    """Whole recordings and one segment of a recording."""
    corpus = open_corpus(speak_tones(tmp_path / "tones", 5, 0))
    made = []
    for i, utterance in enumerate(corpus):
        recording = Recording.from_file(tmp_path / "tones" / f"{i}.wav", recording_id=f"r{i}")
        said = SupervisionSegment(f"s{i}", f"r{i}", 0.0, recording.duration, text=utterance.text, speaker=f"who{i % 2}")
        made.append(recording.to_cut())
        made[-1].supervisions = [said]
    made.append(made[0].truncate(offset=0.1, duration=0.2, preserve_id=False).with_id("part"))
    return CutSet.from_cuts(made)


def test_cuts_in_a_file(cuts: CutSet, tmp_path: Path) -> None:
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        cuts.to_file(tmp_path / name)
        compare(cuts, tmp_path / name)


def test_shar(cuts: CutSet, tmp_path: Path) -> None:
    folder = tmp_path / "shar"
    folder.mkdir()
    cuts.to_shar(folder, fields={"recording": "wav"}, shard_size=3, warn_unused_fields=False)
    compare(cuts, folder)


def compare(cuts: CutSet, path: Path) -> None:
    corpus = open_corpus(path)
    assert len(corpus) == len(cuts) == 6
    for ours, theirs in zip(corpus, cuts, strict=True):
        supervision = theirs.supervisions[0]
        assert (ours.id, ours.text, ours.speaker) == (theirs.id, supervision.text, supervision.speaker)
        assert ours.duration == pytest.approx(theirs.duration, abs=1e-3)
        np.testing.assert_allclose(ours.audio.read(16_000), theirs.load_audio()[0], atol=1e-4)
