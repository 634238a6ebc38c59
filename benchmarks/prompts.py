"""Which of 100 prompts was it? A base and its voices where error rates are too high to compare.

    manyvoice bench prompts base=MODEL run=FOLDER       what `manyvoice bench submodels part=sentences` has personalised

Every sentence that a speaker reports with is scored against its own text and 99 other texts of the corpus, drawn by the
sentence's id: -log p(text | sound) by the base and by what the speaker is served. Right is the text that is likeliest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manyvoice.data.collate import HeldFeatures
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.wer import resampled_sums
from manyvoice.errors import UsageError
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.personal_report import Outcome
from manyvoice.recipes.variant import Variant, load_variant
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.store import Store
from manyvoice.train.objective import ctc_per_utterance
from manyvoice.types import Padded

PROMPTS, RESAMPLES = 100, 10_000


def run(bench: Bench) -> None:
    """Both arms, then the aim."""
    folder = Path(bench.option("run", ""))
    if not bench.option("base", "") or not (folder / "split.json").is_file():
        raise UsageError("base= and run= are needed: a model folder, and what `manyvoice personalize` has written")
    variant = load_variant(bench.option("base", ""))
    corpus = open_corpus(bench.option("on", str(bench.data / "accented-english" / "dev.jsonl")))
    split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    lines = (folder / "speakers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [o for o in map(Outcome.from_json, lines) if o.kept and o.voice]
    rows = {o.speaker: row for row, o in enumerate(kept, start=1)}
    bank, store = None, Store(folder / "voices")
    for o in kept:
        voice = variant.check(store.load(str(o.voice)))
        bank = bank or Bank(variant.anatomy, voice.method, list(rows), empty=True)
        bank.put(rows[o.speaker], voice.tensors)
    place = {u.id: i for i, u in enumerate(corpus)}
    tests = [(speaker, place[name]) for speaker, parts in split.items() for name in parts["test"]]
    right = {arm: np.zeros(len(split)) for arm in ("base", "voices")}
    features = HeldFeatures(corpus, variant.recogniser.log_mel, [i for _, i in tests])
    speakers = list(split)
    for done, (speaker, i) in enumerate(tests, start=1):
        texts = candidates(corpus, i, int(bench.option("prompts", "5" if bench.toy else str(PROMPTS))))
        for arm, row in (("base", 0), ("voices", rows.get(speaker, 0))):
            scores = likelihoods(variant, bank, row, features.of(i, 0), texts)
            right[arm][speakers.index(speaker)] += int(scores.argmin()) == 0
        bench.watcher.progress("picking", done, len(tests))
    each = np.asarray([len(split[s]["test"]) for s in speakers], dtype=float)
    sums_M3 = resampled_sums(np.stack([*right.values(), each], axis=1), RESAMPLES, np.random.default_rng(0))
    gain_M = (sums_M3[:, 1] - sums_M3[:, 0]) / sums_M3[:, 2]
    bench.row(
        seed=0, kind="prompts", prompts=len(texts), speakers=len(speakers), sentences=len(tests), kept=len(kept),
        base=float(right["base"].sum() / each.sum()), voices=float(right["voices"].sum() / each.sum()),
        gain=float((right["voices"] - right["base"]).sum() / each.sum()),
        gain_interval=[float(q) for q in np.quantile(gain_M, (0.025, 0.975))],
    )  # fmt: skip
    aims(bench)


def aims(bench: Bench) -> None:
    """By the base that understands these speakers best."""
    found = max(bench.find(kind="prompts"), key=lambda row: (row["base"], row["date"]))
    bench.aims = [
        Aim(name=f"the right prompt of {found['prompts']} is picked more often with voices: lower end of the gain",
            sense="at least", limit=0.0, unit="of the sentences", measured=found["gain_interval"][0],
            interval=(found["gain_interval"][0], found["gain_interval"][1]),
            why=f"{found['base']:.1%} to {found['voices']:.1%}, {found['speakers']} speakers drawn")
    ]  # fmt: skip


def candidates(corpus: Corpus, i: int, count: int) -> list[str]:
    """The utterance's text, then ``count - 1`` other texts, by a hash of both."""
    mine = corpus[i]
    others = {u.text for u in corpus} - {mine.text}
    order = sorted(others, key=lambda text: blake2b(f"{mine.id} {text}".encode(), digest_size=8).digest())
    return [mine.text, *order[: count - 1]]


def likelihoods(variant: Variant, bank: Bank | None, row: int, features_TF: Tensor, texts: Sequence[str]) -> Tensor:
    """-log p of each text given the sound under a row of the bank; infinite where it does not fit the frames."""
    length = torch.tensor([len(features_TF)])
    with torch.no_grad():
        if bank is None or row == 0:
            logp = variant.recogniser.logp(features_TF[None], length)
        else:
            logp = variant.logp(bank, torch.tensor([row]), features_TF[None], length)
    tokens = [variant.recogniser.tokenizer.encode(text) for text in texts]
    U = max(map(len, tokens))
    tokens_BU = torch.tensor([[*t, *[0] * (U - len(t))] for t in tokens])
    B, token_len_B = len(texts), torch.tensor([len(t) for t in tokens])
    scores = Padded(x=logp.x.expand(B, -1, -1), len_B=logp.len_B.expand(B))
    family = variant.recogniser.family
    found_B = ctc_per_utterance(scores, tokens_BU, token_len_B, family.blank(variant.recogniser.model))
    return found_B.masked_fill(found_B == 0, float("inf"))
