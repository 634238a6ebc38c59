"""A new speaker from a space of voices: learned from few sentences, or predicted from sound alone, against a voice of
one's own.

    manyvoice bench space base=MODEL                  100 training speakers make the space, 65 others are enrolled
    manyvoice bench space base=MODEL on=choose prior=0.3
                                                      settings are chosen on the 25 speakers that choose
    manyvoice bench space base=MODEL people=FOLDER    the synthetic people of `manyvoice bench people`, 96 others for
                                                      the space; FOLDER is the `people` of its work folder, or a new
                                                      one, where those are spoken that it lacks; on=choose as above
    adapt=1,4 space=0 refine=0 own=0                  so many sentences only; without the arms in the space, without
                                                      refining, without voices of their own

MODEL comes from ``manyvoice bench sentences`` and has heard the 100 speakers, not the others. Each of the others has
ten sentences that report, two that choose (for a voice of its own alone), and eight to learn from, of which the first
are taken. ``mean`` is the space without anything known of the speaker; ``learned`` begins where the sound puts them;
``refined`` goes on with all weights of the learned voices, a round chosen by those that choose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from people import split_of, spoken

from manyvoice.data.collate import HeldFeatures
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import resampled_sums
from manyvoice.errors import UsageError
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.space import Difference, Learning, Space, SpaceTraining, read_report, speaker_sums, train_space
from manyvoice.recipes.speakers import Speaker, Split, split_speakers
from manyvoice.submodels.bank import Bank
from manyvoice.train.owners import Schedule, Speech
from submodels import SPLIT, counts

CHOOSING_SPEAKERS, SEED, MARGIN = 25, 0, 0.05
# voices of one's own, as they were chosen: for the sentences, and for commands
OWN = {"method": "adapter", "rank": 8, "rounds": 30, "lr": 2e-4}
PEOPLE_OWN = {"method": "scale", "rank": 0, "rounds": 60, "lr": 1e-2}
SENTENCES, HEARD = (1, 2, 4, 8), (1, 2, 3, 4)
LEARNED, THEIRS, PREDICTED = 4, 8, 4  # sentences that the aims speak of


def run(bench: Bench) -> None:
    """Make the space if it is not there, enrol, then the aims from the newest rows."""
    base = toy_base(bench) if bench.toy else bench.option("base", "")
    if not base:
        raise UsageError("base= is missing: give the model folder that `manyvoice bench sentences` has trained")
    space = Space.load(base, made(bench, base))
    which = asked(bench)
    corpus = enrolled(bench, which)
    split = split_of(which) if bench.option("people", "") else SPLIT
    split = replace(split, choose=1, test=1) if bench.toy else split
    speakers, _ = split_speakers(corpus, "speaker", split)
    bench.watcher.note(f"{which}: {len(speakers)} speakers to enrol")
    few = [k for k in counts(bench, SENTENCES) if k <= min(len(s.adapt) for s in speakers)]
    if bench.option("space", "1") == "1":
        in_space(bench, space, corpus, speakers, few)
    if bench.option("own", "1") == "1":
        for k in few:
            own(bench, base, corpus, speakers, replace(split, adapt=k))
    aims(bench)


def asked(bench: Bench) -> str:
    """Who is to be enrolled."""
    return bench.option("on", "report" if bench.option("people", "") else "dev")


def about(bench: Bench) -> str:
    """Whom a row is about."""
    return f"people, {asked(bench)}" if bench.option("people", "") else asked(bench)


def parts(bench: Bench) -> dict[str, Corpus]:
    """The 100 speakers that train and the 25 that choose; or those of the synthetic people."""
    if people := bench.option("people", ""):
        tokenizer = Recogniser.load(bench.option("base", "")).tokenizer
        return {
            part: open_corpus(spoken(bench, name, Path(people))).where(lambda u: not tokenizer.unknown(u.text))
            for part, name in (("train", "space"), ("choose", "choose"), ("report", "report"))
        }
    rows = open_corpus(bench.data / "accented-english" / "train.jsonl")
    share = CHOOSING_SPEAKERS / 125
    return rows.split(by="speaker", shares={"train": 1 - share, "choose": share}, seed=SEED)


def enrolled(bench: Bench, which: str) -> Corpus:
    """Speech of those who are new."""
    if which not in ("dev", "choose", "report"):
        raise UsageError(f"on={which}: must be dev, choose, or report of synthetic people")
    dev = which == "dev"
    corpus = open_corpus(bench.data / "accented-english" / "dev.jsonl") if dev else parts(bench)[which]
    return few_of(corpus, 3, 4) if bench.toy else corpus


def few_of(corpus: Corpus, speakers: int, each: int) -> Corpus:
    """The first utterances of the first speakers, for a toy run."""
    names = corpus.speakers()[:speakers]
    rows = [[i for i, u in enumerate(corpus) if u.speaker == name][:each] for name in names]
    return corpus.subset([i for found in rows for i in found])


def toy_base(bench: Bench) -> str:
    """A model that knows nothing."""
    folder = bench.work / "base"
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["it's abcdefghijklmnopqrstuvwxyz"], "characters")
        settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "subsampling_conv_channels": 8}
        model, family = build_model("tiny", settings, vocabulary=len(tokenizer), blank=tokenizer.blank)
        Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model))).save(folder)
    return str(folder)


def made(bench: Bench, base: str) -> Path:
    """The folder of the space, trained if these settings have none yet; a row of what it is worth."""
    wanted = SpaceTraining(
        method=bench.option("method", "generated"), seed=SEED,
        settings=dict(_setting(one) for one in bench.option("set", "").split("+") if one),
        split=Split(choose=1, test=1) if bench.toy else Split(choose=2, test=2),
        schedule=Schedule(
            rounds=int(bench.option("rounds", "2" if bench.toy else "60")), lr=float(bench.option("lr", "1e-2")),
            shared_lr=float(bench.option("shared_lr", "1e-3")), every=5, patience=3,
        ),
    )  # fmt: skip
    corpus = few_of(parts(bench)["train"], 5, 4) if bench.toy else parts(bench)["train"]
    fingerprint = Recogniser.load(base).fingerprint()
    output = bench.work / "spaces" / _digest(f"{wanted} {fingerprint} {corpus.fingerprint}")
    if not (output / "report.json").exists():
        started = time.perf_counter()
        train_space(base, corpus, output, wanted, bench.watcher)
        found = read_report(output)
        bench.row(
            seed=SEED, kind="space", space=output.name, base=fingerprint, minutes=_minutes(started),
            **{k: found[k] for k in ("settings", "choose_nats", "measured", "predictor", "spread")},
            training_speakers=len(found["speakers"]),
        )  # fmt: skip
    return output


def in_space(bench: Bench, space: Space, corpus: Corpus, speakers: Sequence[Speaker], few: Sequence[int]) -> None:
    """Rows of the base, of the mean, of what is predicted from 1 to 4 sentences, and of what few sentences teach."""
    log_mel = space.variant.recogniser.log_mel
    said = bench.watcher.progress
    features = HeldFeatures(corpus, log_mel, range(len(corpus)), lambda done, n: said("listening", done, n))
    learning = Learning(
        rounds=int(bench.option("enrol_rounds", "2" if bench.toy else "60")),
        prior=float(bench.option("prior", str(Learning().prior))),
        lr=float(bench.option("enrol_lr", "0.1")),
    )  # fmt: skip
    names = [s.name for s in speakers]
    bank = space.bank(names)
    for arm, rows in (("base", [0] * len(names)), ("mean", list(range(1, len(names) + 1)))):
        arm_row(bench, arm, 0, tested(space, corpus, features, bank, speakers, rows), names)
    for k in [k for k in HEARD if k <= max(few)]:
        started = time.perf_counter()
        for row, s in enumerate(speakers, start=1):
            space.generator.place(bank, row, space.predict([features.of(i, 0) for i in s.adapt[:k]]))
        minutes = _minutes(started)
        sums = tested(space, corpus, features, bank, speakers, list(range(1, len(names) + 1)))
        arm_row(bench, "predicted", k, sums, names, minutes=minutes)
    for k in few:
        speech = {s.name: s.adapt[:k] for s in speakers}
        for arm, starts in (("learned", space.starts(corpus, features, speech)), ("learned from the mean", None)):
            started = time.perf_counter()
            found = space.learn(
                corpus, features, speech, learning, lambda done, n, _: said("learning", done, n), starts=starts
            )
            minutes = _minutes(started)
            sums = tested(space, corpus, features, found, speakers, list(range(1, len(names) + 1)))
            arm_row(bench, arm, k, sums, names, minutes=minutes, prior=learning.prior, rounds=learning.rounds,
                    from_the_prediction=len(starts or {}))  # fmt: skip
            if arm == "learned" and k == max(few) and bench.option("refine", "1") == "1":
                refined(bench, space, corpus, features, speakers, found, k)


def refined(
    bench: Bench, space: Space, corpus: Corpus, features: HeldFeatures, speakers: Sequence[Speaker], learned: Bank,
    k: int,
) -> None:  # fmt: skip
    """A row of the learned voices after all of their weights have gone on to learn, the round chosen by more speech."""
    started, names = time.perf_counter(), [s.name for s in speakers]
    voices = {name: space.generator.voice(learned, row, {}) for row, name in enumerate(names, start=1)}
    speech = [Speech(adapt=s.adapt[:k], choose=s.choose) for s in speakers]
    rounds, lr = int(bench.option("refine_rounds", "2" if bench.toy else "60")), bench.option("refine_lr", "1e-3")
    bank, best = space.refine(
        corpus, features, voices, speech, Schedule(rounds=rounds, lr=float(lr)), Learning(),
        lambda done, n, _: bench.watcher.progress("refining", done, n),
    )  # fmt: skip
    minutes = _minutes(started)
    sums = tested(space, corpus, features, bank, speakers, list(range(1, len(names) + 1)))
    arm_row(bench, "refined", k, sums, names, minutes=minutes, lr=float(lr), rounds=rounds,
            kept=sum(b.round > 0 for b in best))  # fmt: skip


def tested(
    space: Space, corpus: Corpus, features: HeldFeatures, bank: Bank, speakers: Sequence[Speaker], rows: Sequence[int]
) -> np.ndarray:
    """S 3: nats, character errors and characters of each speaker's sentences that report, with these rows."""
    which = [(s.name, i, row) for s, row in zip(speakers, rows, strict=True) for i in s.test]
    found = space.evaluate(corpus, features, bank, [i for _, i, _ in which], [row for _, _, row in which])
    return speaker_sums(found, [s.name for s in speakers], [name for name, _, _ in which])


def own(bench: Bench, base: str, corpus: Corpus, speakers: Sequence[Speaker], split: Split) -> None:
    """A row of voices of their own, trained on so many sentences; who has none gets the base, as they would."""
    usual = PEOPLE_OWN if bench.option("people", "") else OWN
    method, rank, rounds, lr = (bench.option(f"own_{name}", str(value)) for name, value in usual.items())
    wish = Personalisation(
        method=method, settings={} if method == "scale" else {"rank": int(rank)}, split=split,
        schedule=Schedule(rounds=2 if bench.toy else int(rounds), lr=float(lr), every=5),
    )  # fmt: skip
    output = bench.work / "own" / _digest(f"{wish} {base} {corpus.fingerprint}")
    started = time.perf_counter()
    outcomes = {o.speaker: o for o in personalize(base, corpus, output, wish, watcher=bench.watcher).outcomes}
    minutes, kept = _minutes(started), sum(o.kept for o in outcomes.values())
    # a voice of the space passes no gate, so one's own is compared without it; and as it would be served
    for arm, side in (("own", lambda o: o.after), ("own, gated", lambda o: o.served)):
        found = [side(outcomes[s.name]) for s in speakers]
        sums = np.asarray([[sum(m.nats), sum(m.character_errors), sum(m.characters)] for m in found], dtype=np.float64)
        arm_row(bench, arm, split.adapt or 0, sums, [s.name for s in speakers], minutes=minutes, kept=kept,
                method=method, lr=float(lr), rounds=int(rounds))  # fmt: skip


def arm_row(bench: Bench, arm: str, sentences: int, sums: np.ndarray, names: Sequence[str], **more: Any) -> None:
    """What all speakers got from one arm, each speaker's nats and errors beside."""
    nats, errors, characters = (sums[:, k] for k in range(3))
    bench.row(
        seed=SEED, kind="arm", on=about(bench), arm=arm, sentences=sentences, speakers=len(names),
        cer=float(errors.sum() / characters.sum()), nats_per_character=float(nats.sum() / characters.sum()),
        nats=nats.round(3).tolist(), errors=errors.tolist(), characters=characters.tolist(), **more,
    )  # fmt: skip


def aims(bench: Bench) -> None:
    """Of everybody who reported, from the newest row of each arm; those who choose are told of only."""
    bench.aims = []
    for whose in dict.fromkeys(r["on"] for r in bench.find(kind="arm")):
        rows = {(r["arm"], r["sentences"]): r for r in bench.find(kind="arm", on=whose)}
        if not whose.endswith("choose"):
            bench.aims += _aims(whose, rows)
        for (arm, k), row in rows.items():
            gained = Difference.of(row["nats"], rows["base", 0]["nats"])
            bench.watcher.note(f"{whose}: {arm} {k}: CER {row['cer']:.2%}, {gained.sentence('speakers')} to the base")


def _aims(whose: str, rows: dict[tuple[str, int], dict[str, Any]]) -> Iterator[Aim]:
    base, learned, theirs = rows["base", 0], rows.get(("learned", LEARNED)), rows.get(("own", THEIRS))
    name = (
        f"{whose}: of what a voice of one's own gains from {THEIRS} sentences, {LEARNED} gain in the space: lower bound"
    )
    if learned is None or theirs is None:
        yield Aim(name=name, sense="at least", limit=1 - MARGIN, unit="of it", measured=None, why="not measured")
    else:
        share, low, interval = share_of_gain(base["nats"], learned["nats"], theirs["nats"])
        yield Aim(
            name=name, sense="at least", limit=1 - MARGIN, unit="of it", measured=low, interval=interval,
            why=f"{share:.2f} of it; nats {Difference.of(learned['nats'], base['nats']).relative:+.1%} against "
                f"{Difference.of(theirs['nats'], base['nats']).relative:+.1%}, CER {base['cer']:.2%} to "
                f"{learned['cer']:.2%} and {theirs['cer']:.2%}",
        )  # fmt: skip
    predicted = rows.get(("predicted", PREDICTED)) or rows["predicted", 1]
    found, mean = Difference.of(predicted["nats"], base["nats"]), rows["mean", 0]
    beside = Difference.of(predicted["nats"], mean["nats"])
    yield Aim(
        name=f"{whose}: predicted from sound, {predicted['sentences']} sentences, better than the base: upper end",
        sense="below", limit=0.0, unit="relative, nats", measured=found.interval[1], interval=found.interval,
        why=f"{found.sentence('speakers')}, CER {base['cer']:.2%} to {predicted['cer']:.2%}; against the mean voice, "
            f"which knows nothing of the speaker, {beside.sentence('speakers')}",
    )  # fmt: skip


def share_of_gain(
    base_S: Sequence[float], new_S: Sequence[float], whole_S: Sequence[float]
) -> tuple[float, float, tuple[float, float]]:
    """How much of one voice's gain over the base another has, its one-sided 95 % lower bound, and its interval.

    (sum base - sum new) / (sum base - sum whole), speakers drawn with all their three. Where the whole gains nothing
    there is no share: it counts as none.
    """
    sides_S3 = np.stack([base_S, new_S, whole_S], axis=1)
    drawn_M3 = resampled_sums(sides_S3, 10_000, np.random.default_rng(SEED))

    def share(sums_M3: np.ndarray) -> np.ndarray:
        gain_M = sums_M3[:, 0] - sums_M3[:, 2]
        return np.where(gain_M > 0, (sums_M3[:, 0] - sums_M3[:, 1]) / np.where(gain_M > 0, gain_M, 1.0), 0.0)

    low, least, most = np.quantile(share(drawn_M3), [0.05, 0.025, 0.975])
    return float(share(sides_S3.sum(0)[None])[0]), float(low), (float(least), float(most))


def _setting(one: str) -> tuple[str, int]:
    name, _, value = one.partition(":")
    return name, int(value)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=4).hexdigest()


def _minutes(started: float) -> float:
    return round((time.perf_counter() - started) / 60, 2)
