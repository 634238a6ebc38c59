"""Voices trained together: what a step costs, how many voices an hour gives, and how much they help whom.

    manyvoice bench submodels part=throughput     a step of 128 owners against 128 utterances of one, and voices an hour
    manyvoice bench submodels part=segments       an edit by gathered rows against one product for each owner
    manyvoice bench submodels part=hours base=MODEL
                                                  whole jobs, start-up included: one for all speakers, one for each;
                                                  of the accented speakers, or manifest=FILE, adapt=8 utterances each
    manyvoice bench submodels part=digits         a voice for each digit speaker that its base has never heard
    manyvoice bench submodels part=sentences base=MODEL
                                                  65 speakers, 2, 4 and 8 sentences; MODEL from `bench sentences`

The bases of the digits are those of `manyvoice bench digits arms=leave-out`, whose work folder is ``digits=FOLDER``.
Settings were chosen on other utterances than these report on: on clips of a digit speaker's training part that are not
used here, and on the 25 choosing speakers of the sentences. Whether digit speakers learn from masked speech is chosen
here, for all of them together, by the strings that choose.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyvoice.data.join import join_clips
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.compare import Arm, compare
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import resampled_sums
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.personal_report import Measured, Outcome
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.speakers import Split
from manyvoice.submodels.bank import Bank, edited
from manyvoice.submodels.method import make_method
from manyvoice.submodels.optim import RowAdamW, per_owner
from manyvoice.train.objective import ctc_per_utterance, scores_of
from manyvoice.train.owners import Schedule
from manyvoice.types import Batch

RATIO, LESS_DIGITS, LESS_SENTENCES = 1.1, 0.75, 0.30
# A digit speaker's clips: to learn from and to choose by, under a minute together, and strings joined out of them.
ADAPT_CLIPS, CHOOSE_CLIPS, ADAPT_STRINGS, CHOOSE_STRINGS = 75, 22, 160, 30
SPLIT = Split(choose=2, test=10, seed=0)
SENTENCES = (2, 4, 8)
ADULT = 16


def run(bench: Bench) -> None:
    """The part asked for, then the aims from the newest rows."""
    parts: dict[str, Callable[[Bench], None]] = {
        "throughput": throughput, "segments": segments, "hours": hours, "digits": digits,
        "sentences": sentences,
    }  # fmt: skip
    wanted = bench.option("part", "throughput")
    for name in wanted.split(","):
        if name in parts:
            parts[name](bench)
    aims(bench)


# -- what a step costs -------------------------------------------------------------------------------------------------


def throughput(bench: Bench) -> None:
    """Steps of many owners against steps of one, taking turns in one process; then whole jobs."""
    rows, repeats = (8, 1) if bench.toy else (int(bench.option("rows", "128")), int(bench.option("repeats", "5")))
    lengths = [1.0] if bench.toy else [float(s) for s in bench.option("seconds", "1,2,4").split(",")]
    settings = {"num_hidden_layers": 1, "hidden_size": 16} if bench.toy else {}
    model, _ = build_model("tiny", settings, vocabulary=257, blank=256)
    for p in model.parameters():
        p.requires_grad_(False)
    model.eval()
    for name in bench.option("methods", "adapter,lora").split(","):
        for seconds in lengths:
            found = step_times(model, name, rows, seconds, repeats, banks=(rows, 8 * rows))
            one = min(found["one owner, a bank of one"], found["one owner, plain"])
            for arm, taken in found.items():
                bench.row(
                    seed=0, kind="step", method=name, utterances=rows, seconds_each=seconds, arm=arm,
                    seconds=round(taken, 4), against_one_owner=round(taken / one, 4),
                )  # fmt: skip


def step_times(
    model: Any, method_name: str, rows: int, seconds: float, repeats: int, *, banks: tuple[int, int]
) -> dict[str, float]:
    """Median seconds of a training step for each arm; "single steps" is all owners one after the other."""
    method, anatomy, family = make_method(method_name), anatomy_of(model), family_of(model)
    frames, U = round(100 * seconds), max(1, round(3 * seconds))
    gen = torch.Generator().manual_seed(0)
    column = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        ids=("noise",) * rows, features_BTF=torch.randn(rows, frames, 80, generator=gen), len_B=column + frames,
        tokens_BU=(torch.arange(U) % 2 + 1).repeat(rows, 1), token_len_B=column + U, owner_B=column, label_B=column - 1,
        seconds_B=column.double() + seconds,
    )  # fmt: skip
    everyone = torch.arange(1, rows + 1)
    small, large = (Bank(anatomy, method, [str(k) for k in range(n)]) for n in banks)
    alone = Bank(anatomy, method, ["x"])
    optimizers = {id(b): RowAdamW(b.parameters(), 1e-3) for b in (small, large, alone)}

    def loss(batch: Batch) -> torch.Tensor:
        return ctc_per_utterance(scores_of(model, batch), batch.tokens_BU, batch.token_len_B, family.blank(model))

    def step(bank: Bank, rows_P: torch.Tensor, owner_B: torch.Tensor, part: Batch) -> None:
        few = bank.leaves(rows_P)
        with few.on(model, owner_B):
            loss_B = loss(part)
        per_owner(loss_B, owner_B).backward()
        grads = [p.grad[1:] for p in few.parameters() if p.grad is not None]
        optimizers[id(bank)].step_rows(rows_P, grads)

    def plain() -> None:
        """One submodel for the whole batch, without gathering rows: what a job of one speaker would write."""
        own = {where: torch.nn.Parameter(p.detach()[1]) for where, p in alone.tensors.items()}

        def tensors(key: str) -> dict[str, torch.Tensor]:
            return {n: t.expand(rows, *t.shape) for (k, n), t in own.items() if k == key}

        with edited(model, method, alone.sites, tensors):
            loss_B = loss(batch)
        loss_B.mean().backward()
        one = torch.tensor([1])
        optimizers[id(alone)].step_rows(one, [p.grad[None] for p in own.values() if p.grad is not None])

    def singles() -> None:
        for k in range(rows):
            step(small, everyone[k : k + 1], torch.tensor([1]), batch.rows(k, k + 1))

    arms: dict[str, Callable[[], None]] = {
        "one owner, plain": plain,
        "one owner, a bank of one": lambda: step(alone, torch.tensor([1]), column + 1, batch),
        f"{banks[0]} owners": lambda: step(small, everyone, everyone, batch),
        f"{rows} owners of a bank of {banks[1]}": lambda: step(large, everyone * (banks[1] // rows), everyone, batch),
        f"{rows} single steps": singles,
    }
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for k in range(repeats + 1):
        for arm, work in arms.items():
            started = time.perf_counter()
            work()
            if k:  # the first of each warms up
                taken[arm].append(time.perf_counter() - started)
    return {arm: float(np.median(times)) if times else 0.0 for arm, times in taken.items()}


def segments(bench: Bench) -> None:
    """Forward and backward of one site's edit: rows gathered and multiplied in a batch, or owner by owner.

    The second copies no weights, and an owner's utterances make one larger product; but each owner is a call.
    """
    rows, repeats = (8, 2) if bench.toy else (128, 15)
    model, _ = build_model("tiny", {}, vocabulary=257, blank=256)
    gen = torch.Generator().manual_seed(0)
    for name in bench.option("methods", "adapter,lora").split(","):
        method = make_method(name)
        for owners in [2, 8] if bench.toy else [1, 8, 32, 128]:
            bank = Bank(anatomy_of(model), method, [str(k) for k in range(owners)])
            key, site = next((k, s) for k, s in bank.sites.items())
            tensors = {part: p for (where, part), p in bank.tensors.items() if where == key}
            owner_B = torch.arange(rows) % owners + 1
            for seconds in [0.5] if bench.toy else [2.0, 8.0]:
                T = round(seconds * 100 / model.config.encoder_config.subsampling_factor)
                x_BTI, y_BTO = (
                    torch.randn(rows, T, width, generator=gen) for width in (site.width_in, site.width_out)
                )  # fmt: skip
                taken: dict[str, list[float]] = {"gathered": [], "owner by owner": []}
                found: dict[str, torch.Tensor] = {}
                for turn in range(repeats + 2):
                    for arm in taken:
                        started = time.perf_counter()
                        found[arm] = _edited(arm, method, tensors, owner_B, x_BTI, y_BTO)
                        found[arm].square().sum().backward()
                        if turn > 1:  # the first ones warm up
                            taken[arm].append(time.perf_counter() - started)
                torch.testing.assert_close(found["gathered"], found["owner by owner"], rtol=1e-4, atol=1e-4)
                gathered, apart = (float(np.median(times)) for times in taken.values())
                bench.row(
                    seed=0, kind="segments", method=name, utterances=rows, owners=owners, seconds_each=seconds,
                    gathered_ms=round(1000 * gathered, 3), owner_by_owner_ms=round(1000 * apart, 3),
                    times_as_long=round(apart / gathered, 3),
                )  # fmt: skip


def _edited(
    arm: str, method: Any, tensors: dict[str, torch.Tensor], owner_B: torch.Tensor, x_BTI: torch.Tensor,
    y_BTO: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    if arm == "gathered":
        return torch.as_tensor(method.edit({n: t[owner_B] for n, t in tensors.items()}, x_BTI, y_BTO))
    out_BTO = torch.empty_like(y_BTO)
    for owner in owner_B.unique().tolist():
        mine = owner_B == owner
        x, y = (a[mine].flatten(0, 1)[None] for a in (x_BTI, y_BTO))
        edited_1 = method.edit({n: t[owner : owner + 1] for n, t in tensors.items()}, x, y)
        out_BTO[mine] = edited_1.unflatten(1, (-1, y_BTO.shape[1]))[0]
    return out_BTO


def hours(bench: Bench) -> None:
    """`manyvoice personalize` as a process of its own: once for all speakers, and once for each of three.

    Of these three, what both give them: the same, if company changes nothing.
    """
    manifest = bench.option("manifest", str(bench.data / "accented-english" / "dev.jsonl"))
    base, adapt = bench.option("base", ""), int(bench.option("adapt", "8"))
    tokenizer = Recogniser.load(base).tokenizer
    corpus = open_corpus(manifest).where(lambda u: not tokenizer.unknown(u.text))
    wanted, rounds = int(bench.option("speakers", "65")), int(bench.option("rounds", "20"))
    speakers = corpus.speakers()[:wanted]
    taken = {}
    for name, jobs in (("one job for all", [speakers]), ("one job for each", [[s] for s in speakers[:3]])):
        spent, found = [], []
        for number, mine in enumerate(jobs):
            place = bench.work / "hours" / f"{len(mine)}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            corpus.where(lambda u, mine=mine: u.speaker in mine).write(place / "speakers.jsonl")
            words = ["personalize", base, str(place / "speakers.jsonl"), "-o", str(place / "run"), "--json"]
            words += ["--rounds", str(rounds), "--choose", "2", "--test", "10", "--adapt", str(adapt)]
            started = time.perf_counter()
            code = "from manyvoice.cli import main; main()"
            command = [sys.executable, "-c", code, *words]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            spent.append(time.perf_counter() - started)
            found += [row for row in json.loads(done.stdout)["speakers"] if row["speaker"] in speakers[:3]]
        each = sum(spent) / sum(map(len, jobs))
        taken[name] = 3600 / each
        # rounded: sums over a batch differ in their last bits with who else is in it
        told = {r["speaker"]: [r["kept"], round(r["wer_after"], 4), round(r["loss_after"], 4)] for r in found}
        bench.row(
            seed=0, kind="hours", arm=name, speakers=sum(map(len, jobs)), rounds=rounds, adapt=adapt,
            hours_of=Path(manifest).parent.name, seconds=round(sum(spent), 1),
            voices_an_hour=round(3600 / each, 1), of_three=told,
        )  # fmt: skip


# -- whom it helps -----------------------------------------------------------------------------------------------------


def digits(bench: Bench) -> None:
    """Each of the four speakers on the base that was trained without them, with draws of clips to learn from."""
    folder = Path(bench.option("digits", str(bench.work.parent / "digits")))
    wanted = bench.option("speakers", "george,jackson,nicolas,theo").split(",")
    draws = map(int, bench.option("draws", "0,1,2").split(","))
    for draw, speaker, masks in product(draws, wanted, (True, False)):
        base = folder / f"without-{speaker}" / "run" / "model"
        corpus = digit_corpus(bench, speaker, folder, draw)
        wish = digit_wish(bench, masks=masks)
        started = time.perf_counter()
        output = fresh(bench, f"digits-{speaker}-{draw}", wish)
        begun_before = output.exists()
        (outcome,) = personalize(base, corpus, output, wish, watcher=bench.watcher).outcomes
        bench.row(
            seed=0, kind="digits", speaker=speaker, draw=draw, method=wish.method, settings=wish.settings,
            rounds=wish.schedule.rounds, lr=wish.schedule.lr,
            masks=masks, minutes=None if begun_before else round((time.perf_counter() - started) / 60, 2),
            choose_nats=outcome.choose_nats[1], **unique_seconds(bench, speaker, draw), **rates(outcome),
        )  # fmt: skip


def digit_wish(bench: Bench, *, masks: bool) -> Personalisation:
    """What is done for a digit speaker."""
    rounds, lr = int(bench.option("rounds", "240")), float(bench.option("lr", "1e-3"))
    return Personalisation(
        settings={"rank": int(bench.option("rank", "64"))}, split=Split(field="part"),
        schedule=Schedule(rounds=rounds, utterances=8, lr=lr, every=20, patience=9),
        masks=masks, licence="CC-BY-SA-4.0",
    )  # fmt: skip


def digit_clips(bench: Bench, speaker: str, draw: int) -> tuple[Corpus, Corpus]:
    """Clips that a voice learns from, and others that choose."""
    clips = open_corpus(bench.data / "digits" / "train.jsonl").where(lambda u: u.speaker == speaker)
    order = sorted(range(len(clips)), key=lambda i: blake2b(f"{draw or ''}{clips[i].id}".encode()).digest())
    return clips.subset(order[:ADAPT_CLIPS]), clips.subset(order[ADAPT_CLIPS : ADAPT_CLIPS + CHOOSE_CLIPS])


def unique_seconds(bench: Bench, speaker: str, draw: int) -> dict[str, float]:
    """Of speech, however often it was joined."""
    adapt, choose = digit_clips(bench, speaker, draw)
    parts = {"adapt_speech": adapt, "choose_speech": choose}
    return {name: round(float(part.durations_N.sum()), 1) for name, part in parts.items()}


def digit_corpus(bench: Bench, speaker: str, bases: Path, draw: int) -> Corpus:
    """Strings to learn from, to choose by and to report on, each row with its part."""
    place = bench.work / f"digits-{speaker}-{draw}"
    manifest = place / "all.jsonl"
    if not manifest.exists():
        adapt, choose = digit_clips(bench, speaker, draw)
        parts = {
            "adapt": join_clips(adapt, place / "adapt", strings=ADAPT_STRINGS, clips=(1, 6), seed=1),
            "choose": join_clips(choose, place / "choose", strings=CHOOSE_STRINGS, clips=4, seed=2),
            "test": bases / f"without-{speaker}" / "test" / "manifest.jsonl",
        }
        lines = []
        for part, path in parts.items():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                row["audio_filepath"] = str((path.parent / row["audio_filepath"]).resolve())
                row |= {"part": part, "speaker": speaker, "id": f"{part}-{len(lines)}"}
                lines.append(json.dumps(row) + "\n")
        manifest.write_text("".join(lines), encoding="utf-8")
    return open_corpus(manifest)


def sentences(bench: Bench) -> None:
    """The reporting speakers of the sentences by one bank for each number of sentences."""
    which = bench.option("on", "dev")
    corpus = open_corpus(bench.data / "accented-english" / "dev.jsonl" if which == "dev" else which)
    adults = {str(u.speaker) for u in corpus if float(u.extra.get("age", 0)) >= ADULT}
    for count in counts(bench, SENTENCES):
        wish = few_wish(bench, replace(SPLIT, adapt=count), rounds=60, licence="Apache-2.0")
        found, minutes = job(bench, f"sentences-{Path(which).stem}-{count}", corpus, wish)
        bench_groups(bench, found, {"adults": adults, "children": set(corpus.speakers()) - adults}, kind="sentences",
                     on=Path(which).stem, adapt=count, minutes=minutes, **told(wish))  # fmt: skip


def counts(bench: Bench, usual: tuple[int, ...]) -> list[int]:
    """How many utterances a voice learns from."""
    return [int(k) for k in bench.option("adapt", ",".join(map(str, usual))).split(",")]


def few_wish(bench: Bench, split: Split, *, rounds: int, licence: str) -> Personalisation:
    """What is done for speakers with a few utterances."""
    rounds, lr = int(bench.option("rounds", str(rounds))), float(bench.option("lr", "1e-3"))
    method = bench.option("method", "adapter")
    return Personalisation(
        method=method, settings={} if method == "scale" else {"rank": int(bench.option("rank", "16"))}, split=split,
        schedule=Schedule(rounds=rounds, utterances=4, lr=lr, every=5, patience=3), licence=licence,
        masks=bench.option("masks", "1") == "1",
    )  # fmt: skip


def told(wish: Personalisation) -> dict[str, Any]:
    """Settings in a row."""
    return {
        "rounds": wish.schedule.rounds, "lr": wish.schedule.lr, "masks": wish.masks, "method": wish.method,
        "settings": wish.settings,
    }  # fmt: skip


def job(bench: Bench, name: str, corpus: Corpus, wish: Personalisation) -> tuple[list[Outcome], float]:
    """One job's outcomes, and its minutes."""
    started = time.perf_counter()
    found = personalize(
        bench.option("base", ""), corpus, fresh(bench, name, wish), wish, watcher=bench.watcher
    ).outcomes
    return list(found), round((time.perf_counter() - started) / 60, 2)


def bench_groups(
    bench: Bench, outcomes: list[Outcome], groups: dict[str, set[str]], *, synthetic: bool = False, **row: Any
) -> None:
    """A row for all, and one for each group that has somebody in it and not everybody."""
    parts = {"all": outcomes} if len(outcomes) > len(groups.get("in a job each", ())) else {}
    parts |= {name: [o for o in outcomes if o.speaker in members] for name, members in groups.items()}
    for name, chosen in parts.items():
        if chosen:
            bench.row(seed=0, group=name, **row, **pooled(chosen, synthetic=synthetic))


def fresh(bench: Bench, name: str, wish: Personalisation) -> Path:
    """A folder of its own for these settings, so that a run that was cut off goes on."""
    digest = blake2b(repr(wish).encode(), digest_size=4).hexdigest()
    return bench.work / "jobs" / f"{name}-{digest}"


def rates(outcome: Outcome) -> dict[str, Any]:
    """Before and after, kept or not."""
    before, after = outcome.before, outcome.after
    return {
        "kept": outcome.kept, "wer_before": before.wer, "wer_after": after.wer,
        "relative": 1 - outcome.served.wer / max(before.wer, 1e-9), "words": sum(before.words), "round": outcome.round,
    }  # fmt: skip


def pooled(outcomes: list[Outcome], *, synthetic: bool) -> dict[str, Any]:
    """All speakers together, paired; what a speaker gets is the voice where it was kept.

    Verdicts are the project's rule, by utterances; intervals "over speakers" draw speakers.
    """
    found: dict[str, Any] = {"speakers": len(outcomes), "kept": sum(o.kept for o in outcomes)}
    for unit, errors, total in (("wer", "errors", "words"), ("cer", "character_errors", "characters")):
        sides = [[x for o in outcomes for x in getattr(side(o), errors)] for side in (_served, _before)]
        words = np.asarray([x for o in outcomes for x in getattr(o.before, total)])
        arms = [Arm(n, np.asarray([e]), words) for n, e in zip(("voices", "base"), sides, strict=True)]
        compared = compare(arms[0], arms[1], synthetic=synthetic)
        found |= {
            f"{unit}_before": compared.base_rate, f"{unit}_after": compared.new_rate,
            f"{unit}_change": compared.difference, f"{unit}_interval": list(compared.interval),
            f"{unit}_verdict": compared.verdict, f"{unit}_over_speakers": over_speakers(outcomes, errors),
        }  # fmt: skip
        everyone = sum(sum(getattr(o.after, errors)) for o in outcomes) / max(1, int(words.sum()))
        found[f"{unit}_if_all_kept"] = everyone
    for name, side in (("before", _before), ("after", _served)):
        found[f"nats_per_character_{name}"] = _loss([side(o) for o in outcomes])
    found["nats_per_character_if_all_kept"] = _loss([o.after for o in outcomes])
    return found | {"nats_over_speakers": over_speakers(outcomes, "nats")}


def over_speakers(outcomes: list[Outcome], what: str) -> list[float]:
    """The 95 % interval of the relative change of errors or nats, speakers drawn with both of their sides."""
    sums_S2 = np.array([[sum(getattr(side, what)) for side in (o.served, o.before)] for o in outcomes], np.float64)
    drawn_M2 = resampled_sums(sums_S2, 10_000, np.random.default_rng(0))
    low, high = np.quantile(drawn_M2[:, 0] / np.maximum(drawn_M2[:, 1], 1e-9) - 1, [0.025, 0.975])
    return [float(low), float(high)]


def _before(outcome: Outcome) -> Measured:
    return outcome.before


def _served(outcome: Outcome) -> Measured:
    return outcome.served


def _seconds(rows: list[dict[str, Any]]) -> str:
    spoken = [r["adapt_speech"] + r["choose_speech"] for r in rows]
    return f"{min(spoken):.0f} to {max(spoken):.0f} s"


def _loss(found: list[Measured]) -> float:
    return sum(sum(m.nats) for m in found) / max(1, sum(sum(m.characters) for m in found))


def _digits_aim(bench: Bench) -> None:
    """Masks or none, by the strings that choose; what that gives by the strings that report."""
    newest: dict[bool, dict[tuple[str, int], dict[str, Any]]] = {True: {}, False: {}}
    for row in bench.find(kind="digits"):
        if "choose_nats" in row:
            newest[row["masks"]][row["speaker"], row["draw"]] = row
    both = newest[True].keys() & newest[False].keys()
    if not both:
        return
    masks = min((True, False), key=lambda masks: sum(newest[masks][one]["choose_nats"] for one in both))
    rows, others = ([side[one] for one in sorted(both)] for side in (newest[masks], newest[not masks]))
    relative, other = (float(np.mean([r["relative"] for r in side])) for side in (rows, others))
    told = {}
    for speaker in sorted({speaker for speaker, _ in both}):
        mine = [r for r in rows if r["speaker"] == speaker]
        told[speaker] = f"{mine[0]['wer_before']:.1%} to " + " ".join(f"{r['wer_after']:.1%}" for r in mine)
    bench.aims.append(
        Aim(name=f"digits: relative reduction of WER from {_seconds(rows)} of speech, mean over speakers and draws",
            sense="at least", limit=LESS_DIGITS, unit="relative", measured=relative,
            why=", ".join(f"{speaker} {text}" for speaker, text in told.items())
                + f": {relative:.1%} less; {'masked' if masks else 'plain'} speech to learn from, as the strings that "
                f"choose say; {'plain' if masks else 'masked'}, {other:.1%}")
    )  # fmt: skip


def _hours_aim(bench: Bench) -> None:
    """Whole jobs, if the newest of both kinds tell what three speakers got."""
    name = "voices an hour by one job, in those of a job each, start-up included"
    jobs = {r["arm"]: r for r in bench.find(kind="hours") if "of_three" in r}
    if len(jobs) < 2:
        if bench.find(kind="hours"):
            bench.aims.append(Aim(name=name, sense="at least", limit=1.0, unit="times", measured=None,
                                  why="the rows do not tell whether both gave the same; run part=hours"))  # fmt: skip
        return
    one, each = (jobs[arm] for arm in ("one job for all", "one job for each"))
    same = sum(one["of_three"][name] == got for name, got in each["of_three"].items())
    bench.aims.append(
        Aim(name=name, sense="at least", limit=1.0, unit="times",
            measured=round(one["voices_an_hour"] / each["voices_an_hour"], 3),
            why=f"{one['voices_an_hour']:g} against {each['voices_an_hour']:g}; {same} of {len(each['of_three'])} "
                "speakers get the very same")
    )  # fmt: skip


# -- the aims ----------------------------------------------------------------------------------------------------------


def aims(bench: Bench) -> None:
    """From the newest rows."""
    steps = {(r["method"], r["seconds_each"], r["arm"]): r for r in bench.find(kind="step")}
    bench.aims = []
    for (method, seconds, arm), row in steps.items():
        if "owners" in arm and seconds >= 2:
            bench.aims.append(
                Aim(name=f"{method}, {seconds:g} s: {arm} against as many utterances of one", sense="at most",
                    limit=RATIO, unit="times", measured=row["against_one_owner"])
            )  # fmt: skip
        if "single steps" in arm and seconds >= 2:
            bench.aims.append(
                Aim(name=f"{method}, {seconds:g} s: {arm} against as many utterances of one owner", sense="at least",
                    limit=1.0, unit="times", measured=row["against_one_owner"])
            )  # fmt: skip
    _hours_aim(bench)
    _digits_aim(bench)
    eight = [r for r in bench.find(kind="sentences", adapt=8, group="all") if r["on"] == "dev"]
    # by the base that understands them best, which is the one that the choosing speakers prefer
    for row in sorted(eight, key=lambda r: (r["wer_before"], r["date"]))[:1]:
        bench.aims.append(
            Aim(name="sentences: relative reduction of CER from 8 sentences, the base being above 60 % WER",
                sense="at least", limit=LESS_SENTENCES, unit="relative", measured=-row["cer_change"],
                interval=(-row["cer_interval"][1], -row["cer_interval"][0]),
                why=f"CER {row['cer_before']:.1%} to {row['cer_after']:.1%}, WER {row['wer_before']:.1%} to "
                    f"{row['wer_after']:.1%}; {row['kept']} of {row['speakers']} voices kept")
        )  # fmt: skip
