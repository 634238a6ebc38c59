"""A supernet run: its sizes are saved, load, extract into stock folders, and survive a kill like any run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC
from typer.testing import CliRunner

from manyvoice.cli import app
from manyvoice.cli.console import _state
from manyvoice.cli.subnets import _show_found, _show_table
from manyvoice.config import RunConfig, make_run
from manyvoice.data.manifest import open_corpus
from manyvoice.data.synth import SynthSpec, synthesise
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.distill import DIVERGENCES
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sampling import Alone, Sandwich
from manyvoice.elastic.still import outside
from manyvoice.elastic.subnet import Subnet
from manyvoice.errors import ConfigError, ModelError, UsageError, WorkError
from manyvoice.models.anatomy import parameter_count
from manyvoice.models.load import build_model
from manyvoice.recipes import find
from manyvoice.recipes import sizes as recipe_sizes
from manyvoice.recipes.card import check_model, read_card
from manyvoice.recipes.prepare import build_recogniser, dry_run
from manyvoice.recipes.ready import passes_of
from manyvoice.recipes.sizes import Size, compare_sizes, describe, extract_size, load_size, read_sizes, write_size
from manyvoice.recipes.sizing import Sizer
from manyvoice.recipes.train import claim_folder, train
from manyvoice.recipes.watch import Silent
from manyvoice.train.checkpoint import Keeper, load
from manyvoice.train.distributed import start
from manyvoice.train.flatstart import flat_ctc_of
from manyvoice.train.metrics import read_metrics
from manyvoice.train.sandwich import SupernetPasses

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2}
FIVE = [1.0, 0.75, 0.55, 0.4, 0.25]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[..., Path], tiny_settings: dict[str, int]
) -> Callable[..., RunConfig]:
    corpus = speak_tones(tmp_path_factory.mktemp("speech") / "tones", 12, 0)

    def make(output: Path, **elastic: Any) -> RunConfig:
        return make_run(
            {
                "output": str(output),
                "corpus": {"train": str(corpus), "dev_share": 0.25},
                "tokenizer": {"kind": "words"},
                "model": {"settings": tiny_settings | SHAPE},
                "batch": {"seconds": 2, "bins": 2},
                "train": {"epochs": 2},
                "elastic": {"sizes": [1.0, 0.6, 0.3], **elastic},
            }
        )

    return make


@pytest.fixture(scope="module")
def supernet(made: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(made(tmp_path_factory.mktemp("supernet") / "run"))


def test_every_size_is_saved_measured_and_loads(supernet: Path) -> None:
    recogniser = Recogniser.load(supernet)
    sizes = read_sizes(supernet, recogniser)
    assert [s.subnet.name for s in sizes] == ["100", "60", "30"]
    dev = open_corpus(supernet.parent / "dev.jsonl")
    parameters = []
    for size in sizes:
        alone = load_size(supernet, size.subnet.name)
        parameters.append(parameter_count(alone.model))
        assert parameters[-1] == size.document["costs"]["parameters"]
        found = evaluate(alone, dev).as_dict()
        assert found["word_counts"] == size.document["results"]["dev"]["word_counts"]
        assert found["loss"] == pytest.approx(size.document["results"]["dev"]["loss"], rel=1e-6)
    assert sorted(parameters, reverse=True) == parameters and len(set(parameters)) == 3
    assert all("loss_subnets" in line for line in read_metrics(supernet.parent))


def test_while_a_supernet_grows_its_smallest_size_is_what_dev_scores(
    made: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The loss is that of the small model cut out of that checkpoint; no such checkpoint is ever the best."""
    run = made(tmp_path / "run", grow=0.5)
    model = train(run)
    first, last = (line for line in read_metrics(Path(run.output)) if "dev_loss" in line)
    assert first["dev_size"] == "30" and "dev_size" not in last
    assert _state(first, 2, 60.0).endswith("(size 30 alone so far), 1:00 left")
    kept = Keeper(Path(run.output) / "checkpoints", last=2, best=1).list()
    assert [k.metric for k in kept] == [None, last["dev_wer"]]

    recogniser = Recogniser.load(model)
    size = read_sizes(model, recogniser)[-1]
    recogniser.model.load_state_dict(load(kept[0].path).tensors["model"])
    elastic = Elastic(recogniser.model)
    # what the smallest lacks has not moved: it is as it was born
    torch.manual_seed(run.seed)
    born = build_recogniser(run, open_corpus(Path(run.output) / "train.jsonl")).model.state_dict()
    still = outside(elastic, [size.subnet])
    assert still and all(
        torch.equal(p[still[name]], born[name][still[name]])
        for name, p in recogniser.model.named_parameters()
        if name in still
    )
    small = Recogniser(extract(elastic, size.subnet), recogniser.family, recogniser.tokenizer, recogniser.log_mel)
    found = evaluate(small, open_corpus(Path(run.output) / "dev.jsonl"))
    assert found.loss == pytest.approx(first["dev_loss"], rel=1e-6)


def test_narrowed_is_loaded_and_statistics_are_its_own(supernet: Path) -> None:
    recogniser = Recogniser.load(supernet)
    elastic = Elastic(recogniser.model)
    features, lengths = torch.randn(2, 80, 80), torch.tensor([80, 61])
    whole = recogniser.logp(features, lengths).x
    for size in read_sizes(supernet, recogniser)[1:]:
        assert size.statistics
        with elastic.at(size.subnet, statistics=size.statistics):
            narrowed = recogniser.logp(features, lengths).x
        assert torch.equal(load_size(supernet, size.subnet.name).logp(features, lengths).x, narrowed)
        with elastic.at(size.subnet):
            assert not torch.equal(recogniser.logp(features, lengths).x, narrowed)
    assert torch.equal(recogniser.logp(features, lengths).x, whole)


def test_an_extracted_folder_is_a_stock_model_with_a_card(supernet: Path, tmp_path: Path) -> None:
    extract_size(supernet, "30", tmp_path / "phone")
    stock = AutoModelForCTC.from_pretrained(tmp_path / "phone")
    assert type(stock).__name__ == "ParakeetForCTC"
    document = json.loads((tmp_path / "phone" / "subnet.json").read_text())
    assert document["supernet"] == read_card(supernet)["fingerprint"] == read_card(tmp_path / "phone")["made_from"]
    assert len(document["original_layers"]) == len(stock.encoder.layers)
    failed = [c.claim for c in check_model(tmp_path / "phone") if c.holds is False]
    assert failed == ["licence of train data is stated", "licence of dev data is stated"]
    with pytest.raises(UsageError, match="is not empty; name a new folder"):
        extract_size(supernet, "60", tmp_path / "phone")


def test_an_extraction_that_was_killed_is_never_taken_for_a_base(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Recogniser.save

    def killed(self: Recogniser, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recogniser, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_size(supernet, "30", tmp_path / "phone")
    assert (
        json.loads((tmp_path / "phone" / "subnet.json").read_text())["supernet"] == read_card(supernet)["fingerprint"]
    )


def test_a_size_that_cannot_be_written_says_so(supernet: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(supernet, tmp_path / "model"))
    recogniser = Recogniser.load(copied)
    size = next(s for s in read_sizes(copied, recogniser) if s.statistics is not None)
    whole = (copied / "subnets" / f"{size.subnet.name}.safetensors").read_bytes()
    shutil.rmtree(copied / "subnets")
    (copied / "subnets").write_text("a file where the folder should be")
    with pytest.raises(WorkError, match=f"size {size.subnet.name} cannot be written"):
        write_size(recogniser, size, {})
    (copied / "subnets").unlink()
    write_size(recogniser, size, {k: size.document[k] for k in ("costs", "results")})
    assert (copied / "subnets" / f"{size.subnet.name}.safetensors").read_bytes() == whole
    assert [s.subnet for s in read_sizes(copied, recogniser)] == [size.subnet]
    assert not list((copied / "subnets").glob("*.tmp"))
    write_size(recogniser, size, {"costs": size.document["costs"], "results": {}})
    with pytest.raises(UsageError, match="was measured on nothing yet; give a manifest to compare on"):
        compare_sizes(copied, None)


def test_one_run_file_on_speech_of_two_sources_gives_five_folders(
    made: Callable[..., RunConfig], speak_tones: Callable[..., Path], tmp_path: Path
) -> None:
    named = open_corpus(speak_tones(tmp_path / "other", 6, 1))
    open_corpus([replace(u, id=f"other-{u.id}") for u in named]).write(tmp_path / "other.jsonl")
    run = made(tmp_path / "run", sizes=FIVE)
    five_folders(run, [run.model_dump(mode="json")["corpus"]["train"], str(tmp_path / "other.jsonl")], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")
def test_one_run_file_on_real_and_synthetic_speech_gives_five_folders(
    made: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    real = open_corpus(data / "digits" / "test.jsonl")
    real.subset(range(0, len(real), 10)).write(tmp_path / "real.jsonl")
    spec = SynthSpec(utterances=16, speakers=2, grammar="digits", seed=0)
    spoken = synthesise(spec, tmp_path / "spoken")
    five_folders(made(tmp_path / "run", sizes=FIVE), [str(tmp_path / "real.jsonl"), str(spoken)], tmp_path)


def five_folders(run: RunConfig, manifests: list[str], tmp_path: Path) -> None:
    """One run on all of these; each of its sizes is a folder that stock Transformers runs as we do."""
    changed = run.model_dump(mode="json")
    changed["corpus"]["train"] = manifests
    changed["model"]["settings"] |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    changed["train"]["epochs"] = 1
    model = train(make_run(changed))
    (trained_on,) = [entry["manifest"] for entry in read_card(model)["data"] if entry["role"] == "train"]
    assert json.loads(trained_on) == manifests
    whole = Recogniser.load(model)
    features, lengths = torch.randn(1, 80, 80), torch.tensor([80])
    for size in read_sizes(model, whole):
        extract_size(model, size.subnet.name, tmp_path / size.subnet.name)
        stock = AutoModelForCTC.from_pretrained(tmp_path / size.subnet.name).eval()
        assert type(stock).__name__ == "ParakeetForCTC"
        with torch.no_grad():
            logits = stock(features, attention_mask=torch.ones(1, 80, dtype=torch.bool)).logits
        ours = load_size(model, size.subnet.name).logp(features, lengths).x
        torch.testing.assert_close(logits.log_softmax(-1), ours, atol=1e-5, rtol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} >= {"100", "75", "55", "40", "25"}


def test_a_finished_model_is_whole_while_the_same_command_runs_again(
    made: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(tmp_path / "run")
    model = train(config)

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}

    whole, write = files(), recipe_sizes.write_size

    def killed(recogniser: Recogniser, size: Size, more: dict[str, Any]) -> None:
        if size.subnet.name == "60":
            raise KeyboardInterrupt
        write(recogniser, size, more)

    monkeypatch.setattr(recipe_sizes, "write_size", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert files() == whole and not list(model.parent.glob("model.*"))
    monkeypatch.setattr(recipe_sizes, "write_size", write)
    assert train(config) == model
    assert files().keys() == whole.keys() and files()["model.safetensors"] == whole["model.safetensors"]


def test_a_stopped_supernet_goes_on_bit_for_bit(
    made: Callable[..., RunConfig], supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyvoice.recipes import train as recipe

    class Stop(Exception):
        pass

    def stop_after_the_first_epoch(self: Any) -> dict[str, float]:
        if self.place.epoch == 2:
            raise Stop
        return evaluated(self)

    evaluated = recipe.Training._evaluate
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(recipe.Training, "_evaluate", stop_after_the_first_epoch)
        train(made(tmp_path / "run"))
    again = train(made(tmp_path / "run"))
    assert Recogniser.load(again).fingerprint() == Recogniser.load(supernet).fingerprint()
    for path in sorted((supernet / "subnets").iterdir()):
        assert path.read_bytes() == (again / "subnets" / path.name).read_bytes()


def test_a_supernet_stopped_while_it_grows_goes_on_bit_for_bit(
    made: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyvoice.recipes import train as recipe

    class Stop(Exception):
        pass

    def run(name: str) -> RunConfig:
        return make_run(made(tmp_path / name, grow=0.5).model_dump(mode="json"), ["train.checkpoint_every=2"])

    def stop_early(self: Any, metric: float | None, *, passing: bool) -> None:
        saved(self, metric, passing=passing)
        if self.place.step == 2:
            raise Stop

    whole, saved = train(run("whole")), recipe.Training._save
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(recipe.Training, "_save", stop_early)
        train(run("stopped"))
    again = train(run("stopped"))
    lines = read_metrics(again.parent)
    grown = [line["step"] for line in lines if not line["loss_subnets"]]
    assert 2 < max(grown) < len(lines), "it stopped while it grew, and later grew no more"
    assert Recogniser.load(again).fingerprint() == Recogniser.load(whole).fingerprint()
    assert (again / "subnets" / "30.safetensors").read_bytes() == (whole / "subnets" / "30.safetensors").read_bytes()


def test_the_command_line(supernet: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    listed = json.loads(run_cli("subnets", supernet, "ls", "--json").stdout)
    assert [row["size"] for row in listed["sizes"]] == ["100", "60", "30"]
    assert "100" in run_cli("subnets", supernet).stdout
    shown = json.loads(run_cli("subnets", supernet, "show", "60", "--json").stdout)
    assert shown["layers"]
    told = run_cli("subnets", supernet, "show", "60").stdout
    assert told.startswith(f"size 60 of supernet {shown['supernet'][:12]}\n") and "{" not in told
    parameters = shown["costs"]["parameters"] / listed["sizes"][0]["parameters"]
    assert f"M, {parameters:.0%} of size 100's" in told and f"on dev: WER {shown['results']['dev']['wer']:.2%}" in told
    dev = supernet.parent / "dev.jsonl"
    compared = run_cli("subnets", supernet, "compare", dev, "--plot", tmp_path / "sizes.png", "--json")
    rows = json.loads(compared.stdout)["sizes"]
    assert all(row["times_real_time"] > 0 for row in rows) and (tmp_path / "sizes.png").stat().st_size > 1000
    run_cli("subnets", supernet, "extract", "60%", "-o", tmp_path / "laptop")
    one = json.loads(run_cli("evaluate", supernet, dev, "--size", "60", "--json").stdout)
    two = json.loads(run_cli("evaluate", tmp_path / "laptop", dev, "--json").stdout)
    assert one["wer"] == two["wer"] and one["loss"] == two["loss"]


def test_what_a_size_keeps_is_told_by_layer(supernet: Path) -> None:
    recogniser = Recogniser.load(supernet)
    anatomy, (largest, *_) = recogniser.family.anatomy(recogniser.model), read_sizes(supernet, recogniser)
    chunks = sum(c.part == "feed_forward1" for c in anatomy.components if c.layer == 1)
    kept = frozenset({"layers.1", "layers.1.head.1", "layers.1.ff1.0", "layers.1.conv"})
    told = describe(replace(largest, subnet=Subnet(name="odd", kept=kept)), largest, anatomy)
    assert "layers: 1 of 2 kept; dropped: 0\n  layer 0: dropped\n  layer 1: " in told
    assert f"ff1 chunks 1 of {chunks}, heads 1 of 2 (numbers 1), conv kept, ff2 chunks 0 of {chunks}" in told
    assert "conv dropped" in describe(
        replace(largest, subnet=Subnet(name="odd", kept=kept - {"layers.1.conv"})), largest, anatomy
    )


def test_an_extracted_size_says_whose_it_is(supernet: Path, tmp_path: Path) -> None:
    card = extract_size(supernet, "30", tmp_path / "phone")
    with pytest.raises(
        UsageError, match=f"extracted from supernet {card['made_from'][:12]} as size 30; the supernet's"
    ):
        compare_sizes(tmp_path / "phone", None)
    (tmp_path / "phone" / "subnet.json").write_text("{}")
    with pytest.raises(UsageError, match=r"subnet\.json: cannot be read .* extract the size again"):
        compare_sizes(tmp_path / "phone", None)


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    size = {"size": "100", "parameters": 12e6, "layer_macs_share": 1.0, "macs": 12e9, "wer": 1.2, "measured_on": "test",
            "wer_interval": [1.01, 1.32], "times_real_time": 1234.5}  # fmt: skip
    _show_table([size], as_json=False)
    shown = capsys.readouterr().out
    assert "WER on test ┃ 95 % interval" in shown and " 101.0 to 132.0% " in shown and " 1234 " in shown
    row = {"how": "random search", "taken": 34.52, "share": 0.5, "parameters": 5e6, "wer": 1.2, "tried": 50}
    _show_found([row], "latency", as_json=False)
    assert "│ random search │ 34.5 ms       │ 50%            │ 5.00     │ 120.00% │ 50    │" in capsys.readouterr().out
    _show_found([row | {"taken": 0.5}], "macs", as_json=False)
    assert "│ random search │ 50%            │ 5.00     │ 120.00% │" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("extract", "7"), r"--size 7: .* has 100, 60, 30"),
        (("extract",), "name a size, such as extract 55"),
        (("grow",), "must be ls, show, compare, extract"),
    ],
)
def test_wrong_words(supernet: Path, words: tuple[str, ...], message: str, run_cli: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=message):
        run_cli("subnets", supernet, *words)


def test_damaged_and_foreign_sizes_are_refused(supernet: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(supernet, copied)
    statistics = copied / "subnets" / "30.safetensors"
    statistics.write_bytes(statistics.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"30\.safetensors: cannot be read"):
        compare_sizes(copied, None)
    path = copied / "subnets" / "30.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"supernet": "0" * 64}))
    with pytest.raises(ModelError, match="is a subnet of the model 000000000000"):
        compare_sizes(copied, None)
    shutil.rmtree(copied / "subnets")
    with pytest.raises(UsageError, match="has no sizes: it was not trained as a supernet"):
        load_size(copied, "30")


def test_statistics_of_anything_else_are_refused(supernet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(supernet, folder)
    file, words = folder / "subnets" / "30.safetensors", folder / "subnets" / "30.json"
    whole, document = load_file(file), json.loads(words.read_text())
    weight = "encoder.layers.0.feed_forward1.linear1.weight"
    assert weight in Recogniser.load(folder).model.state_dict()
    first = next(iter(whole))
    for wrong in (
        {},
        whole | {weight: torch.zeros(2, 2)},
        whole | {first: whole[first].unsqueeze(0).clone()},
        {n: t * float("nan") for n, t in whole.items()},
        {n: t + 1 for n, t in whole.items()},
    ):
        save_file(wrong, file)
        with pytest.raises(ModelError, match=r"30\.safetensors: does not hold the statistics of size 30; copy"):
            load_size(folder, "30")
    save_file(whole, file)
    load_size(folder, "30")
    words.write_text(json.dumps({k: v for k, v in document.items() if k != "costs"}))
    with pytest.raises(ModelError, match="a size does not say what it costs"):
        load_size(folder, "30")


def test_a_model_without_a_card_is_refused_before_anything_is_written(supernet: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(supernet, bare)
    (bare / "manyvoice.json").unlink()
    with pytest.raises(ModelError, match="nothing says where this model comes from"):
        extract_size(bare, "30", tmp_path / "phone")
    assert not (tmp_path / "phone").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a new folder"):
        extract_size(supernet, "30", tmp_path / "file")


def test_sizes_that_cannot_be_are_refused_before_training(made: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elastic.sizes = \[0.5, 0.25\]: must be 1 and smaller shares"):
        made(tmp_path / "run", sizes=[0.5, 0.25])
    wrong = made(tmp_path / "run", sizes=[1.0, 0.01])
    for begin in (lambda: train(wrong), lambda: dry_run(wrong, Silent(), Sizer(wrong, start("fp32"), Silent()))):
        with pytest.raises(UsageError, match="is below the smallest subnet"):
            begin()
    # before features were computed, and the same folder takes the run once it is put right
    there = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert there <= {"run.yaml", "train.jsonl", "dev.jsonl"}
    claim_folder(made(tmp_path / "run", sizes=[1.0, 0.5]))


def test_sizes_for_new_budgets(supernet: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    copied = tmp_path / "model"
    shutil.copytree(supernet, copied)
    dev = supernet.parent / "dev.jsonl"
    found = json.loads(run_cli("subnets", copied, "find", dev, "--budget", 0.5, "--search", 3, "--json").stdout)[
        "found"
    ]
    assert [row["how"] for row in found] == ["uniform", "random search", "size 30"]
    assert all(row["share"] <= 0.5 for row in found) and found[1]["share"] >= 0.45
    whole = run_cli("subnets", copied, "find", dev, "--budget", 1e9, "--of", "parameters", "--keep")
    assert "nothing kept: size 100, which the model has, is within the budget" in " ".join(whole.stderr.split())
    largest = json.loads(run_cli("subnets", copied, "ls", "--json").stdout)["sizes"][0]["parameters"]
    words = ("subnets", copied, "find", dev, "--budget", largest - 1, "--of", "parameters", "--keep")
    assert "uniform" in run_cli(*words).stdout
    listed = json.loads(run_cli("subnets", copied, "ls", "--json").stdout)["sizes"]
    assert len(listed) == 4 and any(row["size"].endswith("M") for row in listed)
    kept = next(row["size"] for row in listed if row["size"].endswith("M"))
    assert parameter_count(load_size(copied, kept).model) < largest
    with pytest.raises(UsageError, match=r"has a size .*M already; choose another budget"):
        run_cli(*words)
    slow = json.loads(run_cli("subnets", copied, "find", dev, "--budget", 1e6, "--of", "latency", "--json").stdout)
    assert slow["found"][0]["share"] == 1 and slow["found"][0]["taken"] > 0
    with pytest.raises(UsageError, match="is below the smallest subnet"):
        run_cli("subnets", copied, "find", dev, "--budget", 10, "--of", "parameters")
    with pytest.raises(UsageError, match=r"--budget 50: of MACs it is a share"):
        run_cli("subnets", copied, "find", dev, "--budget", 50)
    with pytest.raises(UsageError, match="find --of joules: must be macs, parameters, latency"):
        run_cli("subnets", copied, "find", dev, "--of", "joules")
    with pytest.raises(UsageError, match="find: name a manifest to measure on; for example"):
        run_cli("subnets", copied, "find")


def test_a_run_file_decides_how_a_supernet_trains(made: Callable[..., RunConfig], tmp_path: Path) -> None:
    said = {"distill": "kl", "hard": 0.3, "weight": 0.7, "dropout": False, "others": 1, "named": 0.4, "grow": 0.25}
    run = made(tmp_path / "run", **said)
    model = build_recogniser(run, open_corpus(run.corpus.train)).model
    passes = passes_of(model, run, steps=100)
    assert isinstance(passes, SupernetPasses) and isinstance(passes.sampler, Sandwich)
    sampler = passes.sampler
    assert (passes.divergence, passes.hard, passes.weight, passes.dropout) == (DIVERGENCES["kl"], 0.3, 0.7, False)
    assert (sampler.others, sampler.named, sampler.alone, len(sampler.sizes)) == (1, 0.4, 25, 3)
    assert passes.ctc is flat_ctc_of
    plain = run.model_copy(update={"elastic": run.elastic.model_copy(update={"sandwich": False, "distill": "none"})})
    passes = passes_of(model, plain, steps=100)
    assert isinstance(passes, SupernetPasses) and isinstance(passes.sampler, Alone)
    assert passes.divergence is None and passes.hard == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"sandwich": False, "distill": "none"}, {"distill": "kl"}, {"others": 3}])
def test_the_arms_of_the_ablation_run(made: Callable[..., RunConfig], tmp_path: Path, change: dict[str, Any]) -> None:
    rows = compare_sizes(train(made(tmp_path / "run", **change)), None)
    assert len(rows) == 3


@pytest.fixture
def run_cli() -> Callable[..., Any]:
    """The command in this process; errors are raised."""

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)

    return run


def test_what_is_found_may_be_reported_on_other_speech_than_chose(
    supernet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = open_corpus(supernet.parent / "dev.jsonl")
    heard: list[int] = []

    def spy(model: Recogniser, corpus: Any, **more: Any) -> Any:
        heard.append(len(corpus))
        return evaluate(model, corpus, **more)

    monkeypatch.setattr(find, "evaluate", spy)
    budget = find.Budget(limit=0.5, of="macs")
    rows = find.find_sizes(supernet, dev, budget, tries=2, test=dev.subset([0]))
    assert heard == [len(dev)] * 4 + [1, 1, 1] and [row["tried"] for row in rows] == [1, 2, 1]
    assert rows[2]["how"] == "size 30"


def test_a_budget_of_time_is_kept(supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule only estimates; what it gives is measured, and made smaller until it fits."""
    copied = tmp_path / "model"
    shutil.copytree(supernet, copied)
    recogniser = Recogniser.load(copied)
    costs = Elastic(recogniser.model)

    def slow(_: Recogniser, elastic: Elastic, subnet: Subnet) -> float:
        return 10.0 + 10.0 * len(subnet.kept) / len(costs.anatomy.components)

    # the rule thinks that all is twice as fast as it is
    monkeypatch.setattr(find, "milliseconds", slow)
    monkeypatch.setattr(find, "latency", lambda grid, recogniser: lambda subnet: slow(recogniser, costs, subnet) / 2)
    dev = open_corpus(supernet.parent / "dev.jsonl")
    rows = find.find_sizes(copied, dev, find.Budget(limit=16.0, of="latency"), tries=2, keep=True)
    assert rows[0]["how"] == "uniform" and all(row["taken"] <= 16.0 for row in rows)
    kept = next(size for size in read_sizes(copied, recogniser) if size.subnet.name == "16ms")
    assert kept.document["budget"]["taken"] == slow(recogniser, costs, kept.subnet) <= 16.0


def test_error_rates_of_other_corpora_stand_apart(supernet: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    copied = tmp_path / "model"
    shutil.copytree(supernet, copied)
    assert "WER on dev" in run_cli("subnets", copied, "ls").stdout
    other = open_corpus(supernet.parent / "train.jsonl")
    find.find_sizes(copied, other, find.Budget(limit=0.8, of="macs"), keep=True)
    listed = json.loads(run_cli("subnets", copied, "ls", "--json").stdout)["sizes"]
    on = {row["size"]: row["measured_on"] for row in listed}
    assert on.pop("80") == f"dev ({other.fingerprint[:8]})" and len(set(on.values())) == 1 < len({*on.values(), "80"})
    table = run_cli("subnets", copied, "ls").stdout
    assert "WER on dev" not in table and other.fingerprint[:4] in table


def test_a_fit_without_negative_costs() -> None:
    counts = np.asarray([[1.0, d, d * c, d * h] for d in (1, 3, 6) for c in (1, 4) for h in (1, 4)])
    costs = np.asarray([2.0, 1.0, 0.5, 0.25])
    np.testing.assert_allclose(find._not_negative(counts, counts @ costs), costs, atol=1e-9)
    found = find._not_negative(counts, counts @ np.asarray([2.0, 1.0, 0.5, -0.1]))
    assert found.min() == 0 and np.abs(counts @ found / (counts @ [2.0, 1.0, 0.5, -0.1]) - 1).max() < 0.25


def test_random_depth_of_a_base_does_not_reach_into_a_supernet(
    made: Callable[..., RunConfig], tmp_path: Path, tiny_settings: dict[str, int]
) -> None:
    model, _ = build_model("tiny", tiny_settings | SHAPE, vocabulary=9, blank=8)
    model.encoder.layerdrop = 0.3
    passes = passes_of(model, made(tmp_path / "run"))
    assert isinstance(passes, SupernetPasses) and model.encoder.layerdrop == 0
    assert passes.heaviest() == 0
    passes.sampler = Alone(passes.sampler.sizes, seed=0)
    assert [d.role for d in passes.sampler.draw(0)] == ["other"] and passes.heaviest() > 0
    assert [d.role for d in passes.sampler.draw(passes.heaviest())] == ["largest"]
