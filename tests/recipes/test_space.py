"""Speakers who whistle words each in a key of their own: a space of them holds speakers that it has never heard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyvoice.cli.space import _text
from manyvoice.data.collate import Collator, HeldFeatures
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import ArrayAudio, Corpus, Utterance, open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import UsageError, VoiceError, WorkError
from manyvoice.models.batchnorm import recalibrate
from manyvoice.models.load import build_model
from manyvoice.recipes import space as recipe
from manyvoice.recipes.enrol import Enrolled, Enrolment, enrol
from manyvoice.recipes.space import Difference, Learning, Space, SpaceTraining, read_report, train_space
from manyvoice.recipes.speakers import Split
from manyvoice.recipes.transcribe import Recording
from manyvoice.recipes.variant import owned_by, whole_variant
from manyvoice.recipes.voices import remove_voices
from manyvoice.recipes.watch import Silent
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.generator import Generator, own_of
from manyvoice.submodels.store import Store
from manyvoice.train.halfway import Halfway
from manyvoice.train.objective import ctc, scores_of
from manyvoice.train.owners import Schedule
from manyvoice.types import Seconds

RATE = 16_000
TONES = {"low": 300.0, "mid": 900.0, "high": 2400.0}
KEYS = [-0.5, -0.4, -0.3, -0.15, 0.15, 0.25, 0.35, 0.5]  # octaves
LEARNING = Learning(rounds=20, masks=False)


def whistled(speaker: str, key: float, count: int, seed: int) -> list[Utterance]:
    """Utterances of two words, each a tone, ``key`` octaves higher than the base knows them."""
    rng = np.random.default_rng(seed)
    t_N = np.arange(3200) / RATE
    found = []
    for i in range(count):
        words = [str(w) for w in rng.choice(list(TONES), size=2)]
        tones = [0.3 * np.sin(2 * np.pi * TONES[w] * 2**key * t_N) * np.hanning(len(t_N)) for w in words]
        samples_N = np.concatenate([np.concatenate([tone, np.zeros(1600)]) for tone in tones])
        samples_N += rng.normal(0, 0.003, len(samples_N))
        audio = ArrayAudio(samples_N.astype(np.float32), RATE)
        seconds = Seconds(len(samples_N) / RATE)
        found.append(
            Utterance(id=f"{speaker}-{i}", audio=audio, duration=seconds, text=" ".join(words), speaker=speaker)
        )
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, int]) -> Path:
    """A recogniser of the words as they are, and little else."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(TONES, "words")
        model, family = build_model("tiny", tiny_settings, vocabulary=len(tokenizer), blank=tokenizer.blank)
        recogniser = Recogniser(model, family, tokenizer, LogMel.build(family.features(model)))
        corpus = open_corpus([u for k in range(5) for u in whistled(f"b{k}", 0.06 * (k - 2), 8, k)])
        held = HeldFeatures(corpus, recogniser.log_mel, range(len(corpus)))
        collate = Collator(corpus, held, [tokenizer.encode(t) for t in corpus.texts()])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        model.train()
        for step in range(40):
            loss = ctc(model, collate(np.random.default_rng(step).choice(len(corpus), 12, replace=False)))
            (loss.total / loss.weight).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        recalibrate(model, iter([lambda: scores_of(model, collate(range(len(corpus))))]))
    folder = tmp_path_factory.mktemp("whistles") / "base"
    recogniser.save(folder)
    return folder


@pytest.fixture(scope="module")
def space(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a space of eight speakers."""
    corpus = open_corpus([u for k, key in enumerate(KEYS) for u in whistled(f"s{k}", key, 8, 100 + k)])
    wanted = SpaceTraining(
        settings={"dim": 3, "rank": 4}, split=Split(choose=1, test=1), masks=False,
        schedule=Schedule(rounds=30, utterances=4, seconds=Seconds(10.0), lr=2e-2, shared_lr=1e-2, every=10),
    )  # fmt: skip
    return train_space(base, corpus, tmp_path_factory.mktemp("space"), wanted).parent


def stranger(key: float = 0.3, count: int = 6) -> Corpus:
    """Somebody between the speakers of the space."""
    return open_corpus(whistled("new", key, count, 777))


def run(base: Path, space: Path, corpus: Corpus | list[Recording], place: Path, **wanted: Any) -> Enrolled:
    chosen = replace(Enrolment(learning=LEARNING), **wanted)
    return enrol(base, space, "new", corpus, store=Store(place), wanted=chosen)


def nats(base: Path, corpus: Corpus, place: Path) -> tuple[float, float]:
    """Of fresh utterances on the base, and with the voice that the store has."""
    variant = whole_variant(Recogniser.load(base))
    voice = variant.check(Store(place).get("new"))
    bank = Bank(variant.anatomy, voice.method, ["new"], empty=True)
    bank.put(1, voice.tensors)
    before, after = (
        evaluate(variant.recogniser, corpus, owned=owned_by(variant, bank, [row] * len(corpus))) for row in (0, 1)
    )
    return sum(before.nats), sum(after.nats)


def test_a_space_says_what_it_is_worth(space: Path) -> None:
    report, generator = read_report(space), Generator.read(space)
    assert report["hash"] == generator.hash and report["speakers"] == [f"s{k}" for k in range(8)]
    assert report["measured"]["interval_over_speakers"][1] < 0, "its own speakers gain"
    assert report["choose_nats"][-1][1] < report["choose_nats"][0][1]
    assert report["predictor"]["speakers"] == 8 and report["predictor"]["r2"] > 0.2
    assert generator.card["speakers"] == 8 and report["numbers_per_voice"] == len(generator.mean) == 4


def test_a_space_that_was_stopped_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "Halfway", partial(Halfway, pause=Seconds(0.0)))
    corpus = open_corpus([u for k, key in enumerate(KEYS[:4]) for u in whistled(f"s{k}", key, 5, 100 + k)])
    wanted = SpaceTraining(
        settings={"dim": 2, "rank": 2}, split=Split(choose=1, test=1), schedule=Schedule(rounds=6, lr=2e-2, every=2)
    )

    class Watch(Silent):
        def __init__(self, stop: int) -> None:
            self.stop, self.rounds = stop, list[int]()

        def progress(self, stage: str, done: int, total: int) -> None:
            if stage == "training":
                self.rounds.append(done)
                if done == self.stop:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_space(base, corpus, tmp_path / "stopped", wanted, Watch(5))
    last = Watch(-1)
    again = train_space(base, corpus, tmp_path / "stopped", wanted, last)
    assert last.rounds == [6]
    assert Generator.read(again).hash == Generator.read(train_space(base, corpus, tmp_path / "whole", wanted)).hash
    assert sorted(p.name for p in again.parent.iterdir()) == ["report.json", "space.safetensors"]
    still = Watch(-1)
    assert train_space(base, corpus, again.parent, wanted, still) == again and still.rounds == [], "it is finished"
    again.unlink()  # as if killed between the report and the space
    assert train_space(base, corpus, again.parent, wanted, still) == again and still.rounds[-1] == 6
    with pytest.raises(UsageError, match="is a space of other settings, base or speech; choose another --output"):
        train_space(base, corpus, again.parent, replace(wanted, seed=1), Silent())
    told = [replace(u, extra={"who": u.speaker}) for u in corpus]
    by = replace(wanted, by="who")
    train_space(base, open_corpus(told), tmp_path / "by", by)
    told[0], told[-1] = replace(told[0], extra=told[-1].extra), replace(told[-1], extra=told[0].extra)
    with pytest.raises(UsageError, match="is a space of other settings, base or speech"):
        train_space(base, open_corpus(told), tmp_path / "by", by)


@pytest.mark.parametrize("how", ["predict", "learn"])
def test_a_speaker_nobody_has_heard_gets_a_voice(how: str, base: Path, space: Path, tmp_path: Path) -> None:
    found = run(base, space, stranger(), tmp_path, how=how)
    assert found.voice is not None and found.verified is not None and found.verified.relative < -0.2
    before, after = nats(base, open_corpus(whistled("new", 0.3, 6, 4321)), tmp_path)
    assert after < 0.8 * before
    card = Store(tmp_path).get("new").card
    assert card["made_by"] == {"predict": "embedding predicted", "learn": "embedding learned"}[how]
    assert card["space"] == Generator.read(space).hash and card["shared"] is True and card["speaker"] == "new"
    assert card["seconds"] == pytest.approx(3.6) and card["verified"]["relative_nats"] == found.verified.relative
    (removed,) = remove_voices(Store(tmp_path), ["new"], "default")
    assert removed["gone"] and "does not unlearn" in removed["note"]


def test_prediction_tells_speakers_apart(base: Path, space: Path) -> None:
    """The mean voice is better than the base for all of them; one's own place is better still."""
    loaded = Space.load(base, space)
    people = {"low": stranger(-0.45), "high": stranger(0.45)}
    bank = loaded.bank(["mean", *people])
    own, losses = {}, {}
    for row, (name, corpus) in enumerate(people.items(), start=2):
        features = HeldFeatures(corpus, loaded.variant.recogniser.log_mel, range(len(corpus)))
        own[name] = loaded.predict([features.of(i, 0) for i in range(3)])
        loaded.generator.place(bank, row, own[name])
        rest = [3, 4, 5]
        losses[name] = [sum(loaded.evaluate(corpus, features, bank, rest, [r] * 3).nats) for r in (0, 1, row)]
    assert not np.allclose(own["low"], own["high"], atol=0.1 * loaded.generator.spread)
    base_nats, mean_nats, own_nats = np.sum(list(losses.values()), axis=0)
    assert own_nats < mean_nats < base_nats


@pytest.mark.parametrize(
    ("r2", "words"),
    [(-0.3, "explains nothing yet"), (-0.001, "more speakers"), (0.049, "nothing"), (0.05, "explains 5%")],
)
def test_a_prediction_worth_nothing_says_so(r2: float, words: str) -> None:
    report = {
        "speakers": ["a"],
        "numbers_per_voice": 8,
        "predictor": {"r2": r2},
        "left_out": {f"s{k}": "1 utterance" for k in range(7)},
        "measured": {"relative_nats": -0.1, "interval_over_speakers": [-0.2, 0.0], "cer": [0.2, 0.1]},
    }
    told = _text(Path("space"), report)
    assert "left out: 's4', 1 utterance\nand 2 more, in report.json" in told
    assert words in told and "-0%" not in told and "-30%" not in told


def test_sound_alone_is_enough_and_verifies_nothing(base: Path, space: Path, tmp_path: Path) -> None:
    samples_N = np.concatenate([u.audio.read(RATE) for u in stranger(count=8)])
    found = run(base, space, [Recording("ann.wav", lambda rate: samples_N)], tmp_path)
    assert found.made_by == "embedding predicted" and found.verified is None
    assert "nothing was verified" in found.text() and Store(tmp_path).get("new").card["verified"] is None
    before, after = nats(base, stranger(), tmp_path)
    assert after < before
    with pytest.raises(UsageError, match=r"0\.6 s of sound; a voice is predicted from 2 s or more"):
        run(base, space, [Recording("ann.wav", lambda rate: samples_N[:9600])], tmp_path / "other")
    with pytest.raises(UsageError, match="sound alone cannot be learned from"):
        run(base, space, [Recording("ann.wav", lambda rate: samples_N)], tmp_path / "other", refine=True)


def misled(space: Path, folder: Path) -> Path:
    """The space with a predictor that sends everybody to one far place."""
    read = Generator.read(space)
    assert read.predictor is not None
    far = read.mean - 40 * read.spread
    predictor = replace(read.predictor, weights=np.zeros_like(read.predictor.weights), mean=far)
    return replace(read, predictor=predictor).write(folder).parent


def test_a_prediction_that_does_not_help_gives_way_to_learning(base: Path, space: Path, tmp_path: Path) -> None:
    wrong = misled(space, tmp_path / "wrong")
    found = run(base, wrong, stranger(), tmp_path / "a")
    assert found.predicted is not None and found.predicted.relative > 0 and found.made_by == "embedding learned"
    assert any("learned instead" in line for line in found.said) and found.voice is not None
    assert "learning begins at the mean of the space's speakers" in found.said
    refused = run(base, wrong, stranger(), tmp_path / "b", how="predict")
    assert refused.voice is None and "nothing was stored" in refused.text()
    assert not (tmp_path / "b").exists()


def test_who_made_the_space_verifies_nothing(base: Path, space: Path, tmp_path: Path) -> None:
    known = open_corpus(whistled("s3", KEYS[3], 6, 777))
    found = run(base, space, known, tmp_path / "a")
    assert found.verified is None and found.voice is not None and "the space has learned from s3" in found.text()
    assert Store(tmp_path / "a").get("new").card["verified"] is None
    travelled = tmp_path / "travelled"
    travelled.mkdir()
    shutil.copy(space / "space.safetensors", travelled)
    assert run(base, travelled, known, tmp_path / "b").verified is not None, "who made it is not in its file"


def test_a_space_that_learned_nothing_is_none(base: Path, tmp_path: Path) -> None:
    corpus = open_corpus([u for k, key in enumerate(KEYS[:4]) for u in whistled(f"s{k}", key, 4, 100 + k)])
    still = Schedule(rounds=2, lr=0.0, shared_lr=0.0, every=1)
    wanted = SpaceTraining(settings={"dim": 2, "rank": 2}, split=Split(choose=1, test=1), schedule=still)
    with pytest.raises(WorkError, match="nothing was learned in 2 rounds"):
        train_space(base, corpus, tmp_path / "space", wanted)
    assert not (tmp_path / "space" / "space.safetensors").exists()
    for make in (lambda: SpaceTraining(schedule=Schedule(rounds=0)), lambda: Learning(rounds=-4)):
        with pytest.raises(UsageError, match="must be 1 or more"):
            make()


def test_one_utterance_is_enough_to_learn_from(base: Path, space: Path, tmp_path: Path) -> None:
    found = run(base, space, stranger(count=1), tmp_path, refine=False)
    assert found.made_by == "embedding learned" and found.verified is None and found.voice is not None
    assert "nothing was verified" in found.text()
    before, after = nats(base, open_corpus(whistled("new", 0.3, 6, 4321)), tmp_path)
    assert after < before, "the prior holds one utterance back"
    with pytest.raises(UsageError, match="two to refine"):
        run(base, space, stranger(count=1), tmp_path / "other", refine=True)


def test_a_refined_voice_starts_from_the_space(base: Path, space: Path, tmp_path: Path) -> None:
    """Of somebody far out, whom the space does not hold well."""
    far, refining = stranger(0.65, count=8), Schedule(rounds=10, lr=1e-2, every=5)
    found = run(base, space, far, tmp_path, refine=True, refining=refining)
    assert found.refined is not None and found.refined < 0
    card = Store(tmp_path).get("new").card
    assert card["refined"] is True and card["refined_rounds"] in (5, 10) and card["shared"] is True
    # what was measured is not what is stored
    assert found.measured is not None and found.verified is None and card["verified"] is None
    assert card["verified_before_refining"]["relative_nats"] == found.measured.relative
    assert "the refined voice is unverified" in found.text() and "stored unverified as new" in found.text()
    assert found.as_dict()["verified"] is None
    still = run(base, space, far, tmp_path / "still", refine=True, refining=replace(refining, lr=0.0))
    assert "stays as it was" in still.text() and still.voice != found.voice
    card = Store(tmp_path / "still").get("new").card
    assert not card.get("refined") and card["verified"] is not None and still.verified is not None


def test_an_unverified_voice_takes_no_name(base: Path, space: Path, tmp_path: Path) -> None:
    """Said before anything is computed; with ``replace`` it may, and what it replaced is told."""
    samples_N = np.concatenate([u.audio.read(RATE) for u in stranger(count=8)])
    sound = [Recording("new.wav", lambda rate: samples_N)]
    first = run(base, space, stranger(), tmp_path)
    assert first.verified is not None and first.replaced is None and "stored as new" in first.text()
    for speech, wanted in ((sound, {}), (stranger(count=1), {}), (stranger(), {"refine": True})):
        with pytest.raises(UsageError, match=rf"voice of that name \({first.voice[:12]}\).* unverified: .* --replace"):
            run(Path("nowhere"), space, speech, tmp_path, **wanted)
    assert Store(tmp_path).resolve("new") == first.voice
    second = run(base, space, sound, tmp_path, replace=True)
    assert second.replaced == first.voice and second.as_dict()["replaced"] == first.voice
    assert f"in place of {first.voice[:12]}" in second.text() and "stored unverified" in second.text()
    # a verified one needs no leave
    assert run(base, space, stranger(), tmp_path).replaced == second.voice
    # other tenants' names, and beginnings of hashes, are not this name
    assert run(base, space, sound, tmp_path, tenant="clinic").replaced is None
    short = Store(tmp_path).resolve("new")[:10]
    assert enrol(base, space, short, sound, store=Store(tmp_path)).replaced is None


def test_little_that_was_measured_verifies_nothing(base: Path, space: Path, tmp_path: Path) -> None:
    """A comparison on a few utterances takes nobody's name, nor does a prediction from one, labelled or not."""
    first = run(base, space, stranger(), tmp_path)
    few = run(base, space, stranger(count=3), tmp_path, how="learn")
    assert few.measured is not None and few.measured.units == 3 and few.measured.relative < 0
    assert few.verified is None and few.voice is None and "give --replace" in few.text()
    assert "over 5 utterances or more, so it verifies nothing" in few.text()
    assert Store(tmp_path).resolve("new") == first.voice
    with pytest.raises(UsageError, match=r"voice of that name .* unverified: there is nothing to verify it on"):
        run(base, space, stranger(count=1), tmp_path, how="predict")
    kept = run(base, space, stranger(count=3), tmp_path, how="learn", replace=True)
    assert kept.replaced == first.voice and Store(tmp_path).get("new").card["verified"] is None
    with pytest.raises(UsageError, match=r"0\.6 s of sound; a voice is predicted from 2 s or more"):
        run(base, space, stranger(count=1), tmp_path / "other", how="predict")


def test_one_voice_is_of_one_speaker(base: Path, space: Path, tmp_path: Path) -> None:
    two = stranger() + open_corpus(whistled("other", 0.1, 3, 5))
    with pytest.raises(UsageError, match=r"2 speakers \(new, other\).* `manyvoice personalize`"):
        run(base, space, two, tmp_path)
    assert not list(tmp_path.iterdir())
    unnamed = open_corpus([replace(u, speaker=None) if k else u for k, u in enumerate(stranger())])
    assert run(base, space, unnamed, tmp_path).utterances == 6


@pytest.fixture
def double(base: Path, space: Path) -> Space:
    """In double precision, so that equal is equal."""
    recogniser = Recogniser.load(base, dtype=torch.float64)
    variant = whole_variant(recogniser)
    return Space(variant, replace(Generator.read(space), base=variant.base))


def test_a_learned_voice_that_is_stored_is_the_live_one(double: Space) -> None:
    corpus = stranger()
    features = HeldFeatures(corpus, double.variant.recogniser.log_mel, range(len(corpus)))
    bank = double.learn(corpus, features, {"new": [0, 1, 2]}, LEARNING)
    assert all(torch.equal(p, double.generator.shared[w].double()) for w, p in bank.shared.items())
    voice = double.generator.voice(bank, 1, {})
    alone = Bank(double.variant.anatomy, voice.method, ["new"], empty=True, dtype=torch.float64)
    alone.put(1, voice.tensors)
    rows = [3, 4, 5]
    live, stored, bare = (
        double.evaluate(corpus, features, one, rows, [row] * 3).nats for one, row in ((bank, 1), (alone, 1), (bank, 0))
    )
    np.testing.assert_allclose(live, stored, rtol=1e-9)
    assert not np.allclose(live, bare, rtol=1e-3)


def test_speakers_learn_together_as_alone(double: Space) -> None:
    corpus = stranger() + open_corpus(whistled("other", -0.2, 3, 5))
    features = HeldFeatures(corpus, double.variant.recogniser.log_mel, range(len(corpus)))
    speech = {"new": [0, 1, 2], "other": [6, 7, 8]}
    few = replace(LEARNING, rounds=6)
    together = own_of(double.learn(corpus, features, speech, few))
    for row, (name, rows) in enumerate(speech.items()):
        alone = own_of(double.learn(corpus, features, {name: rows}, few))[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_prior_draws_to_the_mean(double: Space) -> None:
    corpus = stranger()
    features = HeldFeatures(corpus, double.variant.recogniser.log_mel, range(len(corpus)))
    moved = []
    for prior in (0.0, 1.0, 1e6):
        bank = double.learn(corpus, features, {"new": [0]}, replace(LEARNING, prior=prior))
        moved.append(float(np.linalg.norm(own_of(bank).detach().numpy()[0] - double.generator.mean)))
    assert moved[0] > moved[1] > 10 * moved[2]


def test_learning_begins_where_the_sound_says(double: Space) -> None:
    """And is drawn there, each speaker to a start of their own."""
    corpus = stranger() + open_corpus(whistled("other", -0.2, 3, 5))
    features = HeldFeatures(corpus, double.variant.recogniser.log_mel, range(len(corpus)))
    speech = {"new": [0, 1], "other": [6, 7]}
    starts = {name: double.generator.mean + way for name, way in (("new", 0.3), ("other", -0.3))}
    few = replace(LEARNING, rounds=6)
    near, free = (
        own_of(double.learn(corpus, features, speech, replace(few, prior=prior), starts=starts)).detach().numpy()
        for prior in (1e6, 0.0)
    )
    for row, start in enumerate(starts.values()):
        assert np.linalg.norm(free[row] - start) > 10 * np.linalg.norm(near[row] - start)
    # one speaker may have a start and the other none
    mixed = double.learn(corpus, features, speech, few, starts={"other": starts["other"]})
    alone = double.learn(corpus, features, {"new": speech["new"]}, few)
    torch.testing.assert_close(own_of(mixed)[0], own_of(alone)[0], rtol=1e-8, atol=1e-10)


def test_a_prediction_is_a_start_only_where_it_explains_the_texts(double: Space) -> None:
    corpus = stranger() + open_corpus(whistled("other", -0.2, 3, 5))
    features = HeldFeatures(corpus, double.variant.recogniser.log_mel, range(len(corpus)))
    predictor, speech = double.generator.predictor, {"new": [0, 1], "again": [2, 3, 4], "other": [6]}
    assert predictor is not None
    good = own_of(double.learn(corpus, features, {"new": [0, 1, 2, 3, 4]}, LEARNING)).detach().numpy()[0]
    for place, worth_it in ((good, {"new", "again"}), (double.generator.mean + 30.0, set())):
        constant = replace(predictor, weights=np.zeros_like(predictor.weights), mean=place)
        space = Space(double.variant, replace(double.generator, predictor=constant))
        starts = space.starts(corpus, features, speech)
        assert set(starts) - {"other"} == worth_it
        assert all(np.array_equal(start, place) for start in starts.values())
        bank = space.bank(["predicted", "mean"])
        space.generator.place(bank, 1, place)
        predicted, mean = (space.evaluate(corpus, features, bank, [6], [row]).nats[0] for row in (1, 2))
        assert ("other" in starts) == (predicted < mean)
    assert Space(double.variant, replace(double.generator, predictor=None)).starts(corpus, features, speech) == {}


def test_an_interval_is_of_pairs() -> None:
    base = np.asarray([5.0, 50.0, 500.0, 20.0, 90.0, 10.0])
    same = Difference.of(base, base)
    assert same.relative == 0 and same.interval == (0, 0) and not same.better
    better = Difference.of(0.9 * base, base)
    assert better.relative == pytest.approx(-0.1) and better.interval == pytest.approx((-0.1, -0.1)) and better.better
    assert not Difference.of(0.9 * base[:4], base[:4]).better, "four may all be better by luck"
    mixed = Difference.of(base * [0.5, 1.4, 1, 0.7, 1.2, 0.8], base)
    assert mixed.interval[0] < mixed.relative < mixed.interval[1] and not mixed.better


def test_what_cannot_be_a_space_is_refused(base: Path, space: Path, tmp_path: Path) -> None:
    few = open_corpus([u for k in range(3) for u in whistled(f"s{k}", 0.0, 4, k)])
    with pytest.raises(UsageError, match="3 speakers with three utterances or more: a space wants 4"):
        train_space(base, few, tmp_path)
    with pytest.raises(UsageError, match="share nothing"):
        train_space(base, few, tmp_path, SpaceTraining(method="adapter"))
    read = Generator.read(space)
    with pytest.raises(VoiceError, match="was made for the base"):
        Space(whole_variant(Recogniser.load(base)), replace(read, base="0" * 64))
    with pytest.raises(UsageError, match="has no predictor"):
        Space(whole_variant(Recogniser.load(base)), replace(read, predictor=None)).predict([torch.zeros(50, 80)])


@pytest.mark.slow
def test_two_processes_make_one_space(base: Path, tmp_path: Path) -> None:
    """Each has half of the speakers; what is shared, and all speakers' numbers, are in the one file."""
    rows = open_corpus([u for k, key in enumerate(KEYS[::2] + KEYS[1:2]) for u in whistled(f"s{k}", key, 5, k)])
    rows.write(tmp_path / "all.jsonl", audio_folder=tmp_path / "sound")
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        Path(__file__).with_name("launch.py"),
    ]
    words = ["space", base, tmp_path / "all.jsonl", "-o", tmp_path / "two", "--rounds", "4", "--set", "dim=2", "--json"]
    done = subprocess.run(
        [sys.executable, *map(str, [*launcher, *words])], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report, two = read_report(tmp_path / "two"), Generator.read(tmp_path / "two")
    assert report["speakers"] == [f"s{k}" for k in range(5)] and two.card["speakers"] == 5
    settings = SpaceTraining(settings={"dim": 2}, schedule=Schedule(rounds=4, lr=1e-2))
    one = Generator.read(train_space(base, open_corpus(tmp_path / "all.jsonl"), tmp_path / "one", settings))
    assert two.predictor is not None and two.predictor.speakers == 5
    assert two.card == one.card and two.base == one.base
    assert json.loads(done.stdout)["hash"] == two.hash, "one of them speaks for both"
    # the step of what is shared is the mean over all speakers, wherever they are
    born = Bank(whole_variant(Recogniser.load(base)).anatomy, two.method, ["x"], seed=0)
    for where, start in born.shared.items():
        way = (one.shared[where] - start).norm()
        assert way > 0 and (two.shared[where] - one.shared[where]).norm() < 1e-2 * way, where
