"""Answers with voices: whose they are, one receipt each, and nobody gets the base under a voice's name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch

from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import UsageError, VoiceError
from manyvoice.recipes.transcribe import Recording, Transcript, transcribe_all, transcribe_samples
from manyvoice.recipes.voiced import load_voiced, serve_speakers, with_receipts
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice
from manyvoice.types import Seconds


@pytest.fixture(scope="module")
def recogniser(base: Path) -> Recogniser:
    return Recogniser.load(base)


@pytest.fixture(scope="module")
def voices(recogniser: Recogniser) -> dict[str, Voice]:
    """Of two of the corpus's three speakers, with something to say at every site."""
    anatomy = recogniser.family.anatomy(recogniser.model)
    found = {}
    for seed, name in enumerate(("s0", "s1")):
        bank = Bank(anatomy, make_method("adapter", {"rank": 4}), [name])
        gen = torch.Generator().manual_seed(seed)
        tensors = {where: t + 0.3 * torch.randn(t.shape, generator=gen) for where, t in bank.take(1).items()}
        found[name] = Voice(
            method=bank.method, tensors=tensors, base=recogniser.fingerprint(),
            tokenizer=recogniser.tokenizer.fingerprint(), card={"speaker": name},
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def corpus(tones: Path) -> Corpus:
    rows = list(open_corpus(tones))
    return open_corpus([replace(u, speaker="s2") if k % 5 == 0 else u for k, u in enumerate(rows)])


@pytest.fixture
def store(voices: dict[str, Voice], tmp_path: Path) -> str:
    opened = Store(tmp_path / "store")
    opened.add_many(voices.items())
    return str(tmp_path / "store")


def test_each_speaker_has_a_voice_of_their_own(base: Path, corpus: Corpus, store: str, recogniser: Recogniser) -> None:
    """In mixed batches as each alone; those who have none run on the base."""
    served = serve_speakers(base, corpus, size=None, voice=None, store=store, tenant="default")
    mixed = evaluate(recogniser, corpus, owned=served.owned)
    for name in ("s0", "s1", "s2"):
        rows = [i for i, u in enumerate(corpus) if u.speaker == name]
        part, owned = corpus.subset(rows), None
        if name != "s2":
            owned = serve_speakers(base, part, size=None, voice=name, store=store, tenant="default").owned
        alone = evaluate(recogniser, part, owned=owned)
        assert [mixed.nats[i] for i in rows] == pytest.approx(alone.nats, rel=1e-4, abs=1e-4)
        assert [mixed.words.hypotheses[i] for i in rows] == list(alone.words.hypotheses)
    counts = {name: sum(u.speaker == name for u in corpus) for name in ("s0", "s1", "s2")}
    said = served.as_dict()
    assert said["base"] == counts["s2"] == 4
    assert {name: entry["utterances"] for name, entry in said["voices"].items()} == {n: counts[n] for n in ("s0", "s1")}
    assert said["voices"]["s1"]["hash"] == Store(store).resolve("s1")
    assert served.text() == "16 utterances with 2 voices of their speakers, 4 with the bare base"


def test_figures_of_two_voices_under_one_name_are_an_error(
    base: Path, corpus: Corpus, store: str, voices: dict[str, Voice], recogniser: Recogniser
) -> None:
    served = serve_speakers(base, corpus, size=None, voice=None, store=store, tenant="default")
    evaluate(recogniser, corpus, owned=served.owned)
    Store(store).add(voices["s1"], "s0")
    evaluate(recogniser, corpus, owned=served.owned)
    with pytest.raises(VoiceError, match="the voice 's0' was replaced in the store while this was evaluated"):
        served.as_dict()


def test_a_store_far_away_is_read_from_the_disk_the_second_time(
    base: Path, corpus: Corpus, voices: dict[str, Voice], recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("MANYVOICE_CACHE", str(tmp_path / "cache"))
    far = f"memory://{uuid4().hex}"
    Store(far).add_many(voices.items())
    loads: list[str] = []
    load = Store.load
    monkeypatch.setattr(Store, "load", lambda self, hash, tenant: loads.append(hash) or load(self, hash, tenant))
    for _ in range(2):
        served = serve_speakers(base, corpus, size=None, voice=None, store=far, tenant="default")
        evaluate(recogniser, corpus, owned=served.owned)
    assert sorted(loads) == sorted(voices[name].hash for name in ("s0", "s1"))
    copies = [path.stem for path in (tmp_path / "cache" / "voices").rglob("*.safetensors")]
    assert sorted(copies) == sorted(loads)
    Store(far).remove("s0")
    assert [path.stem for path in (tmp_path / "cache" / "voices").rglob("*.safetensors")] == [voices["s1"].hash]


def test_a_store_with_none_of_the_speakers(base: Path, corpus: Corpus, store: str) -> None:
    strangers = open_corpus([replace(u, speaker="x") for u in corpus])
    with pytest.raises(UsageError, match="nobody in the corpus's field 'label' has a voice there"):
        serve_speakers(base, corpus, size=None, voice=None, store=store, tenant="default", by="label")
    with pytest.raises(UsageError, match="nobody in the corpus's field 'speaker' has a voice there; it has s0, s1"):
        serve_speakers(base, strangers, size=None, voice=None, store=store, tenant="default")
    with pytest.raises(UsageError, match="it has nobody"):
        serve_speakers(base, corpus, size=None, voice=None, store=store, tenant="clinic")


def test_the_same_file_elsewhere_leaves_the_same_receipt(
    base: Path, voices: dict[str, Voice], store: str, tmp_path: Path
) -> None:
    samples_N = tone(0.7)
    nameless = replace(voices["s0"], card={"speaker": 3})
    for voice, name in ((voices["s0"], "s0"), (nameless, nameless.hash)):
        path = voice.write(tmp_path / "a" / "one.safetensors")
        (tmp_path / "b").mkdir(exist_ok=True)
        copied = Path(shutil.copy(path, tmp_path / "b" / "other"))
        found = [transcribed(base, samples_N, voice=str(p)) for p in (path, copied)]
        assert found[0] == found[1]
        assert found[0].receipt is not None
        assert (found[0].receipt["voice"], found[0].receipt["hash"]) == (name, voice.hash)
    assert (
        transcribed(base, samples_N, voice="s0", store=store).receipt
        == transcribed(base, samples_N, voice=str(voices["s0"].write(tmp_path / "v"))).receipt
    )


def test_one_receipt_for_a_recording_in_pieces_or_without_speech(base: Path, store: str) -> None:
    long = transcribed(base, np.concatenate([tone(0.7), np.zeros(8000, np.float32)] * 3), voice="s0", store=store)
    silent = transcribed(base, np.zeros(16_000, np.float32), voice="s0", store=store)
    assert long.receipt == silent.receipt and silent.receipt is not None
    assert (silent.receipt["size"], silent.receipt["sites_dropped"]) == (None, [])
    assert silent.receipt["sites_ran"] == ["0.block", "1.block", "2.block"]
    # too short to run anything: there is nothing to sign
    assert transcribed(base, tone(0.05), voice="s0", store=store).receipt is None


def test_a_voice_replaced_within_a_recording_is_an_error(base: Path, store: str, voices: dict[str, Voice]) -> None:
    voiced, name = load_voiced(base, voice="s0", store=store)
    recogniser = voiced.recogniser(name)

    def transcripts() -> Iterator[Transcript]:
        transcribe_samples(recogniser, tone(0.5), name="half")
        Store(store).add(voices["s1"], "s0")
        yield transcribe_samples(recogniser, tone(0.5), name="talk.wav")

    with pytest.raises(VoiceError, match=r"talk.wav: the voice 's0' was replaced .* run it again"):
        list(with_receipts(voiced, transcripts()))


def test_what_cannot_answer_is_said_before_anything_runs(
    base: Path, store: str, voices: dict[str, Voice], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is it 's0'"):
        load_voiced(base, voice="s00", store=store)
    with pytest.raises(UsageError, match="--voice s0: is no file; give a voice file, or a name with --voices STORE"):
        load_voiced(base, voice="s0")
    Store(store).add(replace(voices["s0"], base="0" * 64), "foreign")
    with pytest.raises(VoiceError, match="was made for the base 000000000000"):
        load_voiced(base, voice="foreign", store=store)
    Store(store).add(replace(voices["s0"], tokenizer="0" * 64), "letters")
    with pytest.raises(VoiceError, match="was made for the tokenizer 000000000000"):
        load_voiced(base, voice="letters", store=store)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(voices["s0"].data[:-100])
    with pytest.raises(VoiceError, match=r"cut.safetensors: is no voice"):
        load_voiced(base, voice=str(cut))


def tone(seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * 900 * t)).astype(np.float32)


def transcribed(base: Path, samples_N: np.ndarray, *, voice: str, store: str | None = None) -> Transcript:
    """Of a recording that is cut into pieces of a second at most."""
    voiced, name = load_voiced(base, voice=voice, store=store)
    recordings = [Recording("talk", lambda rate: samples_N)]
    (found,) = with_receipts(voiced, transcribe_all(voiced.recogniser(name), recordings, longest=Seconds(1.0)))
    return found
