"""Voices for synthetic people, half of them simulated atypical speakers, and on every size of a supernet.

    manyvoice bench people base=MODEL             64 speakers that MODEL has not heard: voices from 2, 8 and 24 commands
                                                  in one job; for 8 of them also in a job each, and all of MODEL tuned
                                                  on their 24 commands, a model each
    manyvoice bench people part=sizes base=MODEL  the 32 atypical ones: voices trained across a supernet's sizes,
                                                  against voices of the whole model and of each size alone
    manyvoice bench people on=choose jobs=0 adapt=24 method=lora lr=1e-3 base=MODEL
                                                  16 other speakers, by whom settings are chosen

MODEL has learned commands, as those of ``manyvoice bench supernet corpus=commands`` have. What voices were trained with
stands in every row; the newest rows of the speakers that report make the aims.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from manyvoice.config import make_run
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.synth import SynthSpec, synthesise
from manyvoice.decode.compare import Arm, Comparison, compare
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import Score
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.personal_report import Outcome
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.speakers import Speaker, Split, split_speakers
from manyvoice.recipes.train import train
from manyvoice.recipes.variant import Variant, all_variants, load_variant, owned_by
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.store import Store
from submodels import bench_groups, counts, few_wish, fresh, job, told

# (seed, speakers, utterances of each); half of them are simulated atypical speakers. None is among the voices that
# bases have heard, whose seed is 0. A command is two seconds and six words: 32 atypical speakers report on over 20,000.
PEOPLE = {"space": (11, 96, 14), "choose": (12, 16, 64), "report": (13, 64, 136)}
SPLIT = Split(choose=8, test=32, seed=0)
TESTED = {"report": 104}
COMMANDS = (2, 8, 24)
IN_A_JOB_EACH = 8
MARGIN = 0.05
TUNED = "all weights, a model each"
_KEPT = ("difference", "upper", "interval", "verdict")  # of a comparison, in a row


def run(bench: Bench) -> None:
    """The part asked for, then the aims from the newest rows."""
    (sizes if bench.option("part", "people") == "sizes" else people)(bench)
    aims(bench)


def people(bench: Bench) -> None:
    """Everybody by one bank for each number of commands; some by themselves."""
    which = bench.option("on", "report")
    base = Recogniser.load(bench.option("base", ""))
    corpus = people_of(bench, which, base)
    atypical = {str(u.speaker) for u in corpus if u.extra.get("simulated")}
    alone = set(sorted(corpus.speakers())[:: max(1, len(corpus.speakers()) // (2 if bench.toy else IN_A_JOB_EACH))])
    groups = {"atypical": atypical, "typical": set(corpus.speakers()) - atypical, "in a job each": alone}
    for count in counts(bench, COMMANDS):
        wish = wished(bench, which, count)
        found, minutes = job(bench, f"{which}-{count}", corpus, wish)
        row = {"kind": "people", "on": which, "adapt": count, "base": base.fingerprint()[:12], **told(wish)}
        bench_groups(bench, found, groups, synthetic=True, arm="one job for all", minutes=minutes, **row)
        if count == max(counts(bench, COMMANDS)) and bench.option("jobs", "1") == "1":
            in_a_job_each(bench, which, corpus, wish, found, alone, row)
            tuned(bench, corpus, wish, found, alone, row)


def in_a_job_each(
    bench: Bench, which: str, corpus: Corpus, wish: Personalisation, found: list[Outcome], alone: set[str],
    row: dict[str, Any],
) -> None:  # fmt: skip
    """A row of what these speakers get in jobs of their own, and on how many utterances that differs."""
    each = [
        job(bench, f"{which}-{wish.split.adapt}-{name}", corpus.where(lambda u, name=name: u.speaker == name), wish)
        for name in sorted(alone)
    ]
    outcomes = {outcome.speaker: outcome for mine, _ in each for outcome in mine}
    together = {o.speaker: o for o in found if o.speaker in alone}
    heard = [(a, b) for name, o in outcomes.items()
             for a, b in zip(o.served.errors, together[name].served.errors, strict=True)]  # fmt: skip
    bench_groups(
        bench, list(outcomes.values()), {"in a job each": alone}, synthetic=True, arm="a job each",
        minutes=round(sum(taken for _, taken in each), 2), utterances=len(heard),
        utterances_that_differ=sum(a != b for a, b in heard), **row,
    )  # fmt: skip


def tuned(
    bench: Bench, corpus: Corpus, wish: Personalisation, found: list[Outcome], alone: set[str], row: dict[str, Any]
) -> None:
    """A row of tuning all weights on the same utterances, with as many steps of as many utterances, a model each.

    The utterances that choose choose a checkpoint here too, but no model is refused for being worse than the base.
    """
    started, errors, words, characters = time.perf_counter(), [], [], []
    speakers = [s for s in split_speakers(corpus, "speaker", wish.split)[0] if s.name in alone]
    for speaker in speakers:
        model = _tuned_for(bench, speaker, corpus, wish, row["on"])
        score = evaluate(Recogniser.load(model), corpus.subset(list(speaker.test)))
        errors += [c.errors for c in score.words.counts]
        words += [c.reference for c in score.words.counts]
        characters.append((score.characters.total.errors, score.characters.total.reference))
    mine = {o.speaker: o for o in found}
    voices = [x for s in speakers for x in mine[s.name].served.errors]
    arms = [Arm(n, np.asarray([e]), np.asarray(words)) for n, e in (("voices", voices), (TUNED, errors))]
    said = compare(arms[0], arms[1], synthetic=True)
    wrong, all_of_them = np.sum(characters, axis=0)
    bench.row(
        seed=0, group="in a job each", arm=TUNED, minutes=round((time.perf_counter() - started) / 60, 2),
        speakers=len(speakers), wer_after=arms[1].rate, cer_after=float(wrong / all_of_them),
        wer_of_voices=arms[0].rate, voices_against_it=said.as_dict(), tuned_lr=float(tuned_lr(bench)), **row,
    )  # fmt: skip


def tuned_lr(bench: Bench) -> str:
    """The rate at which all weights are tuned."""
    return bench.option("tuned_lr", "3e-4")


def _tuned_for(bench: Bench, speaker: Speaker, corpus: Corpus, wish: Personalisation, which: str) -> Path:
    lr = tuned_lr(bench)
    folder = bench.work / "tuned" / f"{which}-{len(speaker.adapt)}-{lr}-{speaker.name}"
    parts = {"train": speaker.adapt, "dev": speaker.choose}
    for part, rows in parts.items():
        path = folder / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            corpus.subset(list(rows)).write(path)
    seconds = wish.schedule.utterances * float(corpus.durations_N[list(speaker.adapt)].mean())
    epochs = max(1, round(wish.schedule.rounds * wish.schedule.utterances / len(speaker.adapt)))
    config = make_run(
        {
            "output": str(folder / "run"),
            "corpus": {part: str(folder / f"{part}.jsonl") for part in parts} | {"licence": wish.licence},
            "model": {"base": bench.option("base", "")},
            "augment": {"freq_masks": 2, "time_masks": 2} if wish.masks else {},
            "batch": {"seconds": round(max(seconds, 1.0), 1), "updates": 1},
            "optimizer": {"lr": float(lr)},
            "train": {"epochs": 1 if bench.toy else epochs, "threads": 1},
        }
    )
    return train(config, watcher=bench.watcher, command="manyvoice bench people")


def sizes(bench: Bench) -> None:
    """The atypical ones of the synthetic people on every size of a supernet, errors paired by utterance.

    Voices trained across the sizes, voices of the whole alone, and for each size voices of that size alone. Who is not
    helped stays on the base there too. All make as many steps; one across sizes is two passes, of the whole model and
    of one size, each at half weight, so it takes longer than any other but not as long as one for each size.
    """
    which, base = bench.option("on", "report"), bench.option("base", "")
    whole = Recogniser.load(base)
    corpus = people_of(bench, which, whole).where(lambda u: bool(u.extra.get("simulated")))
    wish = wished(bench, which, max(counts(bench, COMMANDS)))
    speakers, _ = split_speakers(corpus, "speaker", wish.split)
    test = corpus.subset([i for s in speakers for i in s.test])
    everywhere = {
        "across sizes": personal(bench, f"sizes-{which}", base, corpus, replace(wish, sizes=True)),
        "the whole alone": personal(bench, f"sizes-{which}", base, corpus, wish),
    }
    for variant in all_variants(whole):
        folder = bench.work / "sizes" / str(variant.size)
        if not folder.exists():
            variant.recogniser.save(folder)
        alone = personal(bench, f"sizes-{which}-{variant.size}", folder, corpus, wish)
        found = {"base": evaluate(variant.recogniser, test).words}
        found |= {arm: with_voices(variant, store, test) for arm, store in everywhere.items()}
        found["this size alone"] = with_voices(load_variant(folder), alone, test)
        arms = {arm: Arm.of(arm, [score]) for arm, score in found.items()}
        for arm, score in found.items():
            beside = {other: compare(arms[arm], arms[other], synthetic=True) for other in arms if other != arm}
            bench.row(
                seed=0, kind="sizes", on=which, size=variant.size, arm=arm, adapt=wish.split.adapt, **told(wish),
                base=whole.fingerprint()[:12], speakers=len(speakers), words=score.total.reference, wer=score.rate,
                against={other: _short(said) for other, said in beside.items()},
                survives=(found["base"].rate - score.rate)
                / max(1e-9, found["base"].rate - found["this size alone"].rate),
            )  # fmt: skip


def _short(said: Comparison) -> dict[str, Any]:
    """What a row keeps of a comparison."""
    return {
        "difference": said.difference,
        "upper": said.upper,
        "interval": list(said.interval),
        "verdict": said.verdict,
    }


def personal(bench: Bench, name: str, base: str | Path, corpus: Corpus, wish: Personalisation) -> Store:
    """The voices of one job."""
    output = fresh(bench, name, wish)
    personalize(base, corpus, output, wish, watcher=bench.watcher)
    return Store(output / "voices")


def with_voices(variant: Variant, store: Store, test: Corpus) -> Score:
    """Everybody's utterances with their own voices, where they have one."""
    kept = [entry.name for entry in store.entries()]
    bank: Bank | None = None
    for row, name in enumerate(kept, start=1):
        voice = variant.check(store.get(name))
        bank = bank or Bank(variant.anatomy, voice.method, kept, empty=True)
        bank.put(row, voice.tensors)
    if bank is None:
        return evaluate(variant.recogniser, test).words
    owners = [1 + kept.index(str(u.speaker)) if u.speaker in kept else 0 for u in test]
    return evaluate(variant.recogniser, test, owned=owned_by(variant, bank, owners)).words


def people_of(bench: Bench, which: str, base: Recogniser) -> Corpus:
    """Synthetic people, without the utterances that the base has no labels for."""
    return open_corpus(spoken(bench, which)).where(lambda u: not base.tokenizer.unknown(u.text))


def split_of(which: str) -> Split:
    """How many utterances of each of them choose and report."""
    return replace(SPLIT, test=TESTED.get(which, SPLIT.test))


def wished(bench: Bench, which: str, count: int) -> Personalisation:
    """What is done for synthetic people with so many commands."""
    split = replace(split_of(which), adapt=count)
    split = replace(split, choose=1, test=1) if bench.toy else split
    return few_wish(bench, split, rounds=60, licence="CC-BY-SA-4.0")


def spoken(bench: Bench, which: str, people: Path | None = None) -> Path:
    """Manifest of synthetic people in a folder of theirs (WORK/people if none is named), spoken if it is not there."""
    seed, speakers, each = (PEOPLE[which][0], 4, 5) if bench.toy else PEOPLE[which]
    folder = (people or bench.work / "people") / which
    if (folder / "manifest.jsonl").exists():
        return folder / "manifest.jsonl"
    spec = SynthSpec(
        utterances=speakers * each, speakers=speakers, atypical=speakers // 2, noise=0.5, room=0.5, snr_db=(10, 25),
        seed=seed,
    )  # fmt: skip
    return synthesise(spec, folder, progress=lambda done, n: bench.watcher.progress("speaking", done, n))


# -- the aims ----------------------------------------------------------------------------------------------------------


def aims(bench: Bench) -> None:
    """From the newest rows of the speakers that report."""
    bench.aims = []
    rows = bench.find(kind="people", on="report")
    for r in [r for r in rows if r["arm"] == "one job for all" and r["group"] == "atypical"][-1:]:
        bench.aims.append(
            Aim(name=f"atypical speakers, {r['adapt']} commands each, one job: WER with voices against the base",
                sense="below", limit=0.0, unit="relative, upper end of the interval", measured=r["wer_interval"][1],
                interval=(r["wer_interval"][0], r["wer_interval"][1]),
                why=f"{r['kept']} of {r['speakers']} kept, {r['wer_before']:.1%} to {r['wer_after']:.1%}, by the rule "
                    f"{r['wer_verdict']}; {r['method']} {r['settings']}")
        )  # fmt: skip
    for r in [r for r in rows if r["arm"] == "a job each"][-1:]:
        bench.aims.append(
            Aim(name="utterances on which one job for all and a job each differ in errors", sense="equal", limit=0,
                unit="utterances", measured=float(r["utterances_that_differ"]),
                why=f"of {r['utterances']}, {r['speakers']} speakers")
        )  # fmt: skip
    for r in [r for r in rows if r["arm"] == TUNED][-1:]:
        found = r["voices_against_it"]
        bench.aims.append(
            Aim(name="WER with voices against all weights tuned, a model each: upper bound", sense="at most",
                limit=MARGIN, unit="relative", measured=found["upper"],
                why=f"{r['speakers']} speakers, {found['words']} words, {r['wer_of_voices']:.1%} against "
                    f"{r['wer_after']:.1%}: by the rule {found['verdict']}, {found['reason']}")
        )  # fmt: skip
    across = {r["size"]: r for r in bench.find(kind="sizes", on="report", arm="across sizes")}
    if across:
        beside = {size: r["against"]["this size alone"] for size, r in across.items()}
        bench.aims.append(
            Aim(name="sizes at which voices trained across sizes are not inferior to voices of that size alone",
                sense="equal", limit=len(across), unit="sizes",
                measured=float(sum(said["verdict"] in ("better", "not inferior") for said in beside.values())),
                why="; ".join(
                    f"{size}: {said['difference']:+.1%}, upper bound {said['upper']:+.1%}, {said['verdict']}, "
                    f"{across[size]['survives']:.0%} of the gain survives" for size, said in beside.items()))
        )  # fmt: skip
