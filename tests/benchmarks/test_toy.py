"""Benchmarks that train run to their end on real speech, made small; what they find there means nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manyvoice.data.features import LogMel
from manyvoice.data.manifest import open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.subnet import uniform
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import module_of, run_question
from manyvoice.recipes.sizes import Size, write_size
from manyvoice.recipes.speakers import split_speakers, split_text
from manyvoice.recipes.watch import Silent

FOLDER = Path(__file__).parents[2] / "benchmarks"


def toy(question: str, work: Path, *options: str) -> dict[str, Any]:
    """The document of a toy run, which is kept in the scratch folder and not among the results."""
    kept = FOLDER / "results" / f"{question}.json"
    before = kept.read_bytes() if kept.exists() else None
    document = run_question(question, ["toy=1", *options], Silent(), work=work, folder=FOLDER)
    assert (kept.read_bytes() if kept.exists() else None) == before
    assert json.loads((work / f"{question}.json").read_text(encoding="utf-8")) == json.loads(json.dumps(document))
    return document


@pytest.mark.slow
def test_digits(data: Path, tmp_path: Path) -> None:
    found = toy("digits", tmp_path)
    (row,) = found["rows"]
    assert row["arm"] == "seen"
    assert 0 <= row["interval"][0] <= row["wer"] <= row["interval"][1]
    assert row["words"] == 24 * 4
    assert [aim["measured"] for aim in found["aims"]] == [row["wer"], row["minutes"]]
    assert "toy=1" in row["command"] and row["machine"]


@pytest.mark.slow
def test_kills(data: Path, tmp_path: Path) -> None:
    found = toy("kills", tmp_path)
    (row,) = found["rows"]
    assert row["kills"] == row["identical"] == 3
    assert found["aims"][0]["holds"]


@pytest.mark.slow
def test_batch_training(data: Path, tmp_path: Path) -> None:
    found = toy("batch_training", tmp_path)
    rows = {row["arm"]: row for row in found["rows"] if row["kind"] == "training"}
    assert set(rows) == {"careless", "neighbourhood", "bins"}
    assert rows["bins"]["frames_padded"] < rows["careless"]["frames_padded"]
    assert {len(row["errors"]) for row in found["rows"]} == {24}


@pytest.mark.slow
def test_batching(data: Path, tmp_path: Path) -> None:
    found = toy("batching", tmp_path)
    rows = [row for row in found["rows"] if row.get("corpus") == "long-tailed pairs"]
    padded = {row["batching"]: row["frames_padded"] for row in rows}
    assert padded["neighbourhood"] < padded["random"] and padded["2-D"] < padded["random"]


@pytest.mark.slow
def test_batch_search(tmp_path: Path) -> None:
    found = toy("batch_search", tmp_path)
    (cell,) = [row for row in found["rows"] if row["kind"] == "cell"]
    assert 0 < cell["found"] <= 2 * cell["fits"] and cell["peak_of_limit"] > 0.3
    assert found["aims"][1]["measured"] >= 0


@pytest.mark.slow
def test_supernet(data: Path, tmp_path: Path) -> None:
    found = toy("supernet", tmp_path)
    rows = {(row["arm"], row["size"]): row for row in found["rows"]}
    assert set(rows) == {(arm, size) for arm in ("supernet", "alone") for size in ("100", "25")}
    for size in ("100", "25"):
        assert rows["supernet", size]["layer_macs"] == rows["alone", size]["layer_macs"]
    assert rows["alone", "25"]["layer_macs"] < 0.3 * rows["alone", "100"]["layer_macs"]
    assert {len(row["errors"]) for row in rows.values()} == {8}
    sizes, time = found["aims"]
    assert not sizes["holds"] and sizes["why"].startswith("void: the largest alone is at "), "it has learned nothing"
    assert time["measured"] is None and time["why"].startswith("not timed")
    for row in rows.values():
        assert (row["trained_by"], row["trained_lr"]) == ("scaledadam", 0.02) and row["dev_wer"] > 0
    again = toy("supernet", tmp_path)
    assert again["rows"] == found["rows"] and again["aims"] == found["aims"]
    timed = toy("supernet", tmp_path, "part=time")
    assert [(row["arm"], row["size"]) for row in timed["rows"][-3:]] == [
        ("supernet", "all"), ("alone", "100"), ("alone", "25")]  # fmt: skip
    largest, took = timed["rows"][-2]["seconds_per_step"], timed["rows"][-3]["seconds_per_step"]
    assert timed["aims"][1]["measured"] == pytest.approx(took / largest, abs=1e-3)
    assert timed["aims"][1]["why"].startswith("median steps, timed in turn; the 2 alone take ")
    base = tmp_path / "runs" / "digits-supernet-0-0.02" / "model"
    searched = toy("supernet", tmp_path, "part=search", f"base={base}", "budgets=0.6")["rows"][-3:]
    assert [(row["how"], row["tried"]) for row in searched] == [("uniform", 1), ("random search", 2), ("size 25", 1)]
    assert all(row["share"] <= 0.6 for row in searched)
    angles = toy("supernet", tmp_path, "part=gradients", f"base={base}")["rows"][-3:]
    assert [row["loss"] for row in angles] == ["labels", "alpha", "kl"]
    assert all(-1 <= row["cosine_with_the_largest"] <= 1 and row["length_to_the_largest"] > 0 for row in angles)


@pytest.mark.slow
def test_ablation(tmp_path: Path) -> None:
    arms = "supernet", "AdamW", "only the largest once grown"
    found = toy("ablation", tmp_path, f"arms={'|'.join(arms)}", "lrs=0.01,0.03")
    tried, tested = ([r for r in found["rows"] if r["kind"] == kind] for kind in ("tried", "size"))
    assert [(r["arm"], r["lr"]) for r in tried] == [(arm, lr) for arm in arms for lr in (0.01, 0.03)]
    assert [r["trained_lr"] / r["lr"] for r in tried] == pytest.approx([1, 1, 1 / 25, 1 / 25, 1, 1])
    assert [(r["arm"], r["size"]) for r in tested] == [(a, s) for a in arms[:2] for s in ("100", "25")] + [
        (arms[2], "100")]  # fmt: skip
    for arm in arms:
        mine = [r for r in tried if r["arm"] == arm]
        sizes = ["100"] if arm == arms[2] else ["100", "25"]
        best = min(mine, key=lambda r: sum(r["dev_wer"][size] for size in sizes))
        assert {r["lr"] for r in tested if r["arm"] == arm} == {best["lr"]}
    assert ["better than AdamW" in aim["name"] for aim in found["aims"]] == [True, False]
    assert all(aim["measured"] is None and "void" in aim["why"] for aim in found["aims"]), "they have learned nothing"
    again = toy("ablation", tmp_path, f"arms={'|'.join(arms)}", "lrs=0.01,0.03")
    assert again["rows"] == found["rows"] and again["aims"] == found["aims"]


def test_what_is_compared() -> None:
    """Rows of the same settings, each arm at the rate that suits it best on dev."""
    module = module_of(FOLDER / "supernet.py")

    def row(arm: str, seed: int, lr: float, epochs: int = 2, dev: float = 0.1) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "lr": lr, "epochs": epochs, "size": "100", "batch_seconds": 30.0,
                "dev_wer": dev}  # fmt: skip

    ours = [
        row("supernet", 0, 4e-4, dev=0.2),
        row("supernet", 0, 8e-4),
        row("supernet", 1, 8e-4),
        row("supernet", 1, 4e-4),
    ]
    theirs = [row("alone", 0, 8e-4), row("alone", 1, 8e-4), row("alone", 0, 4e-4, dev=0.05), row("alone", 1, 4e-4)]
    more = [row("supernet", 0, 8e-4, epochs=20), row("supernet", 0, 16e-4, dev=0.01)]
    assert module._pairs(ours + theirs + more) == {"100": (ours[1:3], theirs[2:], [0, 1])}
    assert module._pairs(ours[:2] + theirs[:1]) == {"100": ([ours[1]], [theirs[0]], [0])}
    assert module._pairs(ours) == {}


def test_a_share_of_a_gain() -> None:
    base, whole = [10.0, 20.0, 30.0], [5.0, 10.0, 15.0]
    share_of_gain = module_of(FOLDER / "space.py").share_of_gain
    share, low, (least, most) = share_of_gain(base, [9.0, 18.0, 27.0], whole)
    assert [share, low, least, most] == pytest.approx([0.2] * 4)
    share, low, (least, most) = share_of_gain(base, [5.0, 18.0, 30.0], whole)
    assert share == pytest.approx(7 / 30) and least <= low < share < most
    assert share_of_gain(base, whole, base) == (0.0, 0.0, (0.0, 0.0)), "nothing is no share of nothing"


def test_the_split_of_the_sentences_is_the_committed_one(data: Path) -> None:
    submodels = module_of(FOLDER / "submodels.py")
    corpus = open_corpus(data / "accented-english" / "dev.jsonl")
    speakers, _ = split_speakers(corpus, "speaker", replace(submodels.SPLIT, adapt=max(submodels.SENTENCES)))
    assert split_text(corpus, speakers) == (FOLDER / "splits" / "accented-english.json").read_text(encoding="utf-8")
    few, _ = split_speakers(corpus, "speaker", replace(submodels.SPLIT, adapt=2))
    assert all(a.adapt == b.adapt[:2] and a.test == b.test for a, b in zip(few, speakers, strict=True))


@pytest.mark.slow
def test_speed_of_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    largest, smallest = toy("supernet", tmp_path, "part=speed")["rows"]
    assert largest["torch_times_faster"] == largest["onnx_times_faster"] == 1
    assert smallest["torch_ms"] > 0 and smallest["onnx_ms"] > 0 and smallest["share"] < 0.26


@pytest.mark.slow
def test_mixed(tmp_path: Path) -> None:
    found = toy("mixed", tmp_path, "part=overhead,cliff,cold,memory,soak")
    rows = {kind: [r for r in found["rows"] if r["kind"] == kind] for kind in ("overhead", "cliff", "cold", "memory")}
    assert {row["arm"] for row in rows["overhead"]} == {"4 voices", "one voice", "4 voices by name, with receipts"}
    for row in rows["cliff"]:
        assert row["share_loaded"][0] == 0 < row["share_loaded"][2]
    assert {row["source"] for row in rows["cold"]} == {"page cache", "disk"}
    assert rows["memory"][0]["less_formula"] == 0
    soaked, planted = found["rows"][-2:]
    assert soaked["wrong"] == 0 and soaked["answered"] > 300 and soaked["loads"] > soaked["voices"]
    assert soaked["changes"] > 0 and soaked["furthest_from_expected"] < soaked["tolerance"] < soaked["apart"]
    assert planted["wrong"] > 100
    assert [aim["holds"] for aim in found["aims"][3:]] == [True] * 5


@pytest.mark.slow
def test_space(data: Path, tmp_path: Path) -> None:
    found = toy("space", tmp_path)
    (made,) = [row for row in found["rows"] if row["kind"] == "space"]
    assert made["training_speakers"] == 5 and made["predictor"]["r2"] <= 1
    rows = {(row["arm"], row["sentences"]): row for row in found["rows"] if row["kind"] == "arm"}
    some = {(arm, k) for arm in ("learned", "learned from the mean", "own", "own, gated", "predicted") for k in (1, 2)}
    assert set(rows) == {("base", 0), ("mean", 0), ("refined", 2), *some}
    assert {tuple(row["characters"]) for row in rows.values()} == {tuple(rows["base", 0]["characters"])}
    assert rows["mean", 0]["nats"] != rows["base", 0]["nats"] != rows["learned", 1]["nats"]
    assert [aim["measured"] is None for aim in found["aims"]] == [True, False]


@pytest.mark.slow
def test_submodels(tmp_path: Path) -> None:
    found = toy("submodels", tmp_path, "part=throughput", "methods=adapter")
    rows = {row["arm"]: row for row in found["rows"]}
    assert (
        min(rows["one owner, plain"]["against_one_owner"], rows["one owner, a bank of one"]["against_one_owner"]) == 1
    )
    assert rows["8 single steps"]["seconds"] > 0 and rows["8 owners"]["seconds"] > 0
    assert "8 owners of a bank of 64" in rows
    apart = toy("submodels", tmp_path, "part=segments", "methods=adapter")["rows"][len(found["rows"]) :]
    assert [row["owners"] for row in apart] == [2, 8] and all(row["times_as_long"] > 0 for row in apart)


@pytest.mark.slow
def test_people(tmp_path: Path) -> None:
    """Synthetic people get voices in one job, and some in a job each; then they are enrolled in a space."""
    base = tmp_path / "base"
    tokenizer = train_tokenizer(["abcdefghijklmnopqrstuvwxyz o'clock"], "characters")
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "subsampling_conv_channels": 8}
    model, family = build_model("tiny", settings, vocabulary=len(tokenizer), blank=tokenizer.blank)
    Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model))).save(base)
    options = f"base={base}", "adapt=1,2", "rounds=2"
    found = toy("people", tmp_path / "people", *options)
    rows = found["rows"]
    assert {(r["group"], r["adapt"], r["arm"]) for r in rows} >= {
        ("all", 1, "one job for all"), ("atypical", 2, "one job for all"), ("in a job each", 2, "a job each"),
        ("in a job each", 2, "all weights, a model each"),
    }  # fmt: skip
    together, each = ([r for r in rows if (r["group"], r["arm"]) == ("in a job each", arm)][-1]
                      for arm in ("one job for all", "a job each"))  # fmt: skip
    assert together["nats_per_character_if_all_kept"] == pytest.approx(each["nats_per_character_if_all_kept"], rel=1e-3)
    low, high = together["nats_over_speakers"]
    assert low <= together["nats_per_character_after"] / together["nats_per_character_before"] - 1 <= high
    (same,) = [aim for aim in found["aims"] if "a job each differ" in aim["name"]]
    assert same["measured"] == each["utterances_that_differ"] == 0 and same["holds"]
    toy("people", tmp_path / "people", f"base={base}", "on=choose", "adapt=1", "jobs=0")
    saved = Recogniser.load(base)
    anatomy = saved.family.anatomy(saved.model)
    for name, layers in (("100", [0, 1]), ("50", [0])):
        size = Size(subnet=uniform(anatomy, name, layers, {}), statistics=None, document={})
        write_size(saved, size, {"costs": {"layer_macs": float(len(layers))}, "results": {}})
    with_sizes = toy("people", tmp_path / "people", f"base={base}", "part=sizes", "adapt=2", "rounds=2")["rows"]
    sizes = {(r["size"], r["arm"]): r for r in with_sizes if r["kind"] == "sizes"}
    arms = ("base", "across sizes", "the whole alone", "this size alone")
    assert set(sizes) == {(size, arm) for size in ("100", "50") for arm in arms}
    assert {r["words"] for r in sizes.values()} == {sizes["100", "base"]["words"]}
    assert sizes["100", "the whole alone"]["wer"] == sizes["100", "this size alone"]["wer"]
    people = tmp_path / "people" / "people"
    found = toy("space", tmp_path / "space", f"base={base}", f"people={people}")["rows"]
    assert {row["on"] for row in found if row["kind"] == "arm"} == {"people, report"}


@pytest.mark.slow
def test_start(data: Path, tmp_path: Path) -> None:
    rows = toy("start", tmp_path, "factors=8")["rows"]
    assert {(r["draws"], r["flat_start"]) for r in rows} == {(d, f) for d in ("torch", "0.02") for f in (True, False)}
    assert len({r["nats_a_word"] for r in rows}) > 1
