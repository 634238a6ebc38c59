"""What each technique of a supernet is worth: the whole method without one thing, or with one thing more.

    manyvoice bench ablation                                   every arm at three learning rates
    manyvoice bench ablation "arms=supernet|KL" lrs=0.02       some of it; what is there is not made again
    manyvoice bench ablation arms=none                         the comparison anew, from the rows that are there
    manyvoice bench ablation corpus=digits-2000 epochs=1 seconds=15
                                                               on real digits, whose few clips prove little

Each arm trains once at each rate, on the same corpus, seed and batches. The development part chooses an arm's rate; the
test part is looked at by that one run alone. The corpus, digit strings by 60 synthetic voices in loud noise and rooms,
is one that a small model learns in two minutes and errs on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from supernet import ARMS, STRINGS, budget, corpora, row, trained

from manyvoice.data.collate import HeldFeatures
from manyvoice.data.manifest import open_corpus
from manyvoice.decode.compare import COMPARISON_CORPUS, Arm, compare
from manyvoice.decode.recogniser import Recogniser
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.sizes import load_size, read_sizes

SEED = 0
WHOLE, GROWN = "supernet", "only the largest once grown"
Row = dict[str, Any]


def run(bench: Bench) -> None:
    """Train and choose what is not there yet, arm by arm, then compare."""
    bench.options = {"epochs": "1", "seconds": "15", **bench.options}
    name = bench.option("corpus", f"strings-{STRINGS}")
    asked = bench.option("arms", "|".join(ARMS))
    for arm in [] if asked == "none" else asked.split("|"):
        for lr in map(float, bench.option("lrs", "0.02,0.04,0.08").split(",")):
            tried(bench, name, arm, lr)
        tested(bench, name, arm)
    aims(bench)


def tried(bench: Bench, name: str, arm: str, lr: float) -> None:
    """One row: what an arm at that rate does on the development part, size by size."""
    same = {"kind": "tried", "corpus": name, "arm": arm, "seed": SEED, "lr": lr, **budget(bench)}
    if bench.find(**same):
        return
    model, told = trained(bench, name, arm, SEED, lr)
    dev = {s.subnet.name: s.document["results"]["dev"]["wer"] for s in read_sizes(model, Recogniser.load(model))}
    bench.row(**same, dev_wer=dev, **told)


def tested(bench: Bench, name: str, arm: str) -> None:
    """A row for each size of an arm, on the test part, at the rate that the development part prefers."""
    tries = bench.find(kind="tried", corpus=name, arm=arm, **budget(bench))
    lr = min(tries, key=lambda r: sum(r["dev_wer"][size] for size in sizes_of(arm, r)))["lr"]
    same = {"kind": "size", "corpus": name, "arm": arm, "seed": SEED, "lr": lr, **budget(bench)}
    left = [size for size in sizes_of(arm, tries[0]) if not bench.find(**same, size=size)]
    if not left:
        return
    model, _ = trained(bench, name, arm, SEED, lr)
    test = open_corpus(corpora(bench, name)[2])
    features = HeldFeatures(test, Recogniser.load(model).log_mel, range(len(test)))
    for size in left:
        row(bench, load_size(model, size), same, features=features, size=size, rates=sorted(r["lr"] for r in tries))


def sizes_of(arm: str, found: Row) -> list[str]:
    """Sizes that an arm is judged by: all, but of a model that only grew the largest."""
    return ["100"] if arm == GROWN else list(found["dev_wer"])


def aims(bench: Bench) -> None:
    """The whole method against each arm, errors of all sizes together, paired by utterance."""
    bench.aims = []
    for name in dict.fromkeys(r["corpus"] for r in bench.find(kind="size")):
        newest: dict[str, dict[str, Row]] = {}
        for r in bench.find(kind="size", corpus=name):
            newest.setdefault(r["arm"], {})[r["size"]] = r
        whole = newest.pop(WHOLE, {})
        bench.aims += [_aim(name, arm, whole, found) for arm, found in newest.items() if set(found) <= set(whole)]


def _aim(name: str, arm: str, whole: dict[str, Row], without: dict[str, Row]) -> Aim:
    """By the project's rule; what is void was not measured."""
    sides, rates, count = [], [], len(without)
    for called, found in (("the whole method", whole), (arm, without)):
        rows = [found[size] for size in without]
        # an utterance is drawn with what every size made of it, so its words count once and its errors of all sizes
        sides.append(Arm(called, np.sum([r["errors"] for r in rows], axis=0)[None], np.asarray(rows[0]["words"])))
        rates.append(f"{called} {sides[-1].rate / count:.2%} at {rows[0]['lr']:g}, one of {rows[0]['rates']}")
    low, high = (count * end for end in COMPARISON_CORPUS)
    said = compare(sides[0], sides[1], synthetic=not name.startswith("digits"), void_outside=(low, high))
    void = said.verdict == "void"
    return Aim(
        name=f"{name}: the whole method is better than {arm}: upper bound of its errors, relative",
        sense="below", limit=0.0, unit="relative", measured=None if void else round(said.upper, 4),
        interval=None if void else said.interval,
        why=f"{'; '.join(rates)}; {said.difference:+.1%}: " + ("void, a floor or a ceiling" if void else said.verdict),
    )  # fmt: skip
