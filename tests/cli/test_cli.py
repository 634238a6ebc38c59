"""The command as a user meets it: exit status, standard output, and what errors say."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

import pytest

from manyvoice.cli import main
from manyvoice.errors import WorkError
from manyvoice.recipes.pareto import draw


class Command(Protocol):
    def __call__(self, *words: object, cwd: Path | None = None) -> CompletedProcess[str]: ...


def document(done: CompletedProcess[str]) -> Any:
    """Standard output as the one JSON document that --json promises."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_writes_the_promised_folder(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"run.yaml", "metrics.jsonl", "checkpoints", "model", "cache", "events", "train.jsonl", "dev.jsonl"} <= names
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert "dev_wer" in lines[-1]


def test_as_a_program_of_its_own(trained: Path, test_tones: Path) -> None:
    code = "from manyvoice.cli import main; main()"
    words = ["transcribe", str(trained / "model"), str(test_tones.parent / "0.wav"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert len(document(done)["transcripts"]) == 1
    done = subprocess.run([sys.executable, "-c", code, "transcribe"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Missing argument" in done.stderr


def test_the_same_command_on_a_finished_run_changes_nothing(trained: Path, manyvoice: Command) -> None:
    before = (trained / "model" / "model.safetensors").read_bytes()
    done = manyvoice("train", trained / "run.yaml", "--json")
    assert document(done)["model"] == str(trained / "model")
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(trained: Path, manyvoice: Command) -> None:
    done = manyvoice("train", trained / "run.yaml", "optimizer.lr=0.1", "seed=3")
    assert done.returncode == 2
    assert "optimizer.lr: None there, 0.1 here" in done.stderr
    assert "seed: 0 there, 3 here" in done.stderr
    assert "another output" in done.stderr


def test_dry_run_trains_nothing(tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"output: {tmp_path / 'out'}\ncorpus: {{train: {tones}}}\ntokenizer: {{kind: characters}}\n")
    found = document(manyvoice("train", run, "--dry-run", "--json"))
    assert found["utterances"] + found["dev_utterances"] == 24
    assert not (tmp_path / "out").exists()


def test_every_mistake_of_a_run_file_comes_at_once(tmp_path: Path, manyvoice: Command) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("output: x\ncorpus: {trian: a}\noptimizer: {name: sgd}\ntrain: {epochs: 0}\n")
    done = manyvoice("train", run)
    assert done.returncode == 2
    for text in ("did you mean 'train'?", "corpus.train", "optimizer.name = 'sgd'", "train.epochs = 0", "4 mistakes"):
        assert text in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_evaluate_counts_and_groups(trained: Path, test_tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    texts = tmp_path / "texts.jsonl"
    (tmp_path / "notes.txt").write_text("hello")
    refused = manyvoice("evaluate", trained / "model", test_tones, "--hypotheses", tmp_path / "notes.txt")
    assert refused.returncode == 2 and "holds something else; name another file" in " ".join(refused.stderr.split())
    assert (tmp_path / "notes.txt").read_text() == "hello"
    done = manyvoice("evaluate", trained / "model", test_tones, "--by", "age", "--hypotheses", texts, "--json")
    found = document(done)
    counts = found["word_counts"]
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    assert found["wer"] == pytest.approx(errors / counts["reference"])
    assert {row["group"] for row in found["groups"]} == {"10", "30"}
    assert len(texts.read_text().splitlines()) == 6
    card = json.loads((trained / "model" / "manyvoice.json").read_text())
    assert card["results"]["test"]["wer"] == found["wer"]


def test_a_group_that_no_row_has(trained: Path, test_tones: Path, manyvoice: Command) -> None:
    done = manyvoice("evaluate", trained / "model", test_tones, "--by", "planet")
    assert done.returncode == 2
    assert "--by planet: no row has it" in done.stderr


@pytest.mark.parametrize("form", ["text", "jsonl", "srt", "vtt"])
def test_transcribe_in_every_form(trained: Path, test_tones: Path, form: str, manyvoice: Command) -> None:
    done = manyvoice("transcribe", trained / "model", test_tones.parent / "0.wav", "--format", form)
    assert done.returncode == 0, done.stderr
    if form == "jsonl":
        assert json.loads(done.stdout)["seconds"] > 0.3
    if form == "vtt":
        assert done.stdout.startswith("WEBVTT")
    if form == "text":
        assert done.stdout.count("\t") == 1


def test_transcribing_goes_on_where_it_stopped(
    trained: Path, test_tones: Path, tmp_path: Path, manyvoice: Command
) -> None:
    out = tmp_path / "out.jsonl"
    words = ("transcribe", trained / "model", test_tones, "--format", "jsonl", "--output", out)
    assert manyvoice(*words).returncode == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote the third line
    done = manyvoice(*words)
    assert f"{len(lines) - 2} recordings transcribed" in done.stderr
    assert out.read_text() == whole


def test_unreadable_sound_is_named_and_can_be_left_out(
    trained: Path, test_tones: Path, tmp_path: Path, manyvoice: Command
) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    shutil.copy(test_tones.parent / "0.wav", folder / "a.wav")
    (folder / "b.wav").write_bytes(b"RIFF and nothing else")
    done = manyvoice("transcribe", trained / "model", folder)
    assert done.returncode == 1
    assert "b.wav" in done.stderr and "Traceback" not in done.stderr
    done = manyvoice("transcribe", trained / "model", folder, "--skip-bad")
    assert done.returncode == 1
    assert "1 recordings could not be read and were left out" in done.stderr
    assert "a.wav" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--format", "docx"], 2, "must be one of text, jsonl, srt, vtt"),
        (["--longest", "0"], 2, "must be seconds above 0"),
        (["--hotword", "x=y"], 2, "the bonus after = must be a number"),
        (["--lm", "missing.arpa"], 1, "missing.arpa"),
        (["--beam", "0"], 2, "Invalid value for '--beam'"),
        (["--fromat", "text"], 2, "No such option"),
    ],
)
def test_wrong_words(
    trained: Path, test_tones: Path, words: list[str], status: int, text: str, manyvoice: Command
) -> None:
    done = manyvoice("transcribe", trained / "model", test_tones.parent / "0.wav", *words)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert text in done.stderr


def test_no_such_model_and_no_such_file(test_tones: Path, trained: Path, tmp_path: Path, manyvoice: Command) -> None:
    done = manyvoice("transcribe", tmp_path / "nothing", test_tones)
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    done = manyvoice("transcribe", trained / "model", tmp_path / "nothing.wav")
    assert done.returncode == 2
    assert "no such file or folder" in done.stderr


def test_check_of_no_folder_and_of_a_run(trained: Path, tmp_path: Path, manyvoice: Command) -> None:
    done = manyvoice("check", tmp_path / "nothing")
    assert done.returncode == 1 and "nothing: no such folder" in done.stderr
    done = manyvoice("check", trained)
    assert done.returncode == 1 and f"give {trained / 'model'}, which has one" in done.stderr


def test_subnets_are_not_measured_for_nothing(tmp_path: Path, manyvoice: Command) -> None:
    """No model is there, so whatever is refused is refused before it is looked for."""
    done = manyvoice("subnets", tmp_path / "nothing", "compare", "--plot", tmp_path / "x.foo")
    assert done.returncode == 2 and "no picture ends in .foo; it must be one of" in done.stderr and "png" in done.stderr
    (tmp_path / "file").write_text("")
    done = manyvoice("subnets", tmp_path / "nothing", "compare", "--plot", tmp_path / "file" / "x.png")
    assert done.returncode == 1 and "x.png: cannot be written" in done.stderr
    done = manyvoice("subnets", tmp_path / "nothing", "find", tmp_path / "dev.jsonl", "--search", -3)
    assert done.returncode == 2 and "Invalid value for '--search'" in done.stderr


def test_a_plot_over_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(WorkError, match=r"x\.png: cannot be written"):
        draw({"sizes": [(1.0, 0.1, None)]}, tmp_path / "x.png")


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["manyvoice", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("manyvoice", run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out.startswith("manyvoice ")


def test_check_holds_then_finds_a_changed_weight(trained: Path, tmp_path: Path, manyvoice: Command) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    found = document(manyvoice("check", model, "--json"))
    assert all(c["holds"] for c in found["checks"]), found
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    done = manyvoice("check", model)
    assert done.returncode == 1
    assert "WRONG" in done.stdout and "weights are those" in done.stdout


def test_check_finds_a_claim_that_does_not_reproduce(trained: Path, tmp_path: Path, manyvoice: Command) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    card = json.loads((model / "manyvoice.json").read_text())
    card["results"]["test"]["word_counts"]["substitutions"] += 1
    card["data"][0]["licence"] = None
    (model / "manyvoice.json").write_text(json.dumps(card))
    done = manyvoice("check", model)
    assert done.returncode == 1
    assert "2 of" in done.stderr


def test_check_says_what_it_could_not_try(trained: Path, tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    done = manyvoice("check", model, "--data", f"test={tones}", "--json")
    [test] = [c for c in document(done)["checks"] if c["claim"].startswith("test")]
    assert test["holds"] is None
    assert "is not the corpus that was measured" in test["found"]
    assert manyvoice("check", model, "--data", "test").returncode == 2
    typo = manyvoice("check", model, "--data", f"tset={tones}")
    assert typo.returncode == 2 and "--data tset=" in typo.stderr and "are dev, test" in typo.stderr


def test_corpus_stats_check_split_and_ngram(tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    assert document(manyvoice("corpus", "stats", tones, "--json"))["utterances"] == 24
    assert document(manyvoice("corpus", "check", tones, "--deep", "--json"))["problems"] == []
    parts = document(manyvoice("corpus", "split", tones, tmp_path / "parts", "--shares", "a=0.5,b=0.5", "--json"))
    assert set(parts["manifests"]) == {"a", "b"}
    assert manyvoice("corpus", "split", tones, tmp_path / "parts", "--shares", "a:0.5").returncode == 2
    lm = tmp_path / "lm.arpa"
    assert document(manyvoice("corpus", "ngram", tones, "-o", lm, "--order", "2", "--json"))["lines"] == 24
    assert lm.read_text().startswith("\\data\\")


def test_a_broken_manifest_is_named_by_line(tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    lines = tones.read_text().splitlines()
    lines[2] = lines[2].replace('"duration": ', '"duration": -')
    lines[4] = lines[4].replace(".wav", ".missing")
    broken = tones.parent / "broken.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    done = manyvoice("corpus", "check", broken)
    assert done.returncode == 1
    assert "broken.jsonl:3" in done.stdout and "broken.jsonl:5" in done.stdout
    run = tmp_path / "run.yaml"
    run.write_text(f"output: {tmp_path / 'out'}\ncorpus: {{train: {broken}, dev: {tones}}}\n")
    done = manyvoice("train", run)
    assert done.returncode == 1
    assert "broken.jsonl:3" in done.stderr and "Traceback" not in done.stderr


def test_bad_rows_can_be_skipped(tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    lines = tones.read_text().splitlines()
    lines[2] = lines[2].replace('"duration": ', '"duration": -')
    lines[4] = lines[4].replace(".wav", ".missing")
    lines[6] = "{not json"
    broken = tones.parent / "partly.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    run = tmp_path / "run.yaml"
    run.write_text(f"output: {tmp_path / 'out'}\ncorpus: {{train: {broken}}}\ntokenizer: {{kind: characters}}\n")
    done = manyvoice("train", run, "corpus.skip_bad=true", "--dry-run", "--json")
    found = document(done)
    assert found["utterances"] + found["dev_utterances"] == 24 - 3
    assert "3 errors" in done.stderr


def test_beam_with_language_model_and_hotwords(
    trained: Path, tones: Path, test_tones: Path, tmp_path: Path, manyvoice: Command
) -> None:
    lm = tmp_path / "lm.arpa"
    manyvoice("corpus", "ngram", tones, "-o", lm, "--order", "2")
    words = ("--beam", 8, "--lm", lm, "--lm-weight", 0.3)
    found = document(manyvoice("evaluate", trained / "model", test_tones, *words, "--json"))
    assert found["utterances"] == 6
    done = manyvoice("transcribe", trained / "model", test_tones, *words, "--hotword", "high=50", "--json")
    assert all("high" in t["text"] for t in document(done)["transcripts"])


def test_help_of_every_verb_has_an_example(manyvoice: Command) -> None:
    for verb in ("train", "evaluate", "transcribe", "check", "bench", "demo", "corpus synth", "corpus check"):
        done = manyvoice(*verb.split(), "--help")
        assert done.returncode == 0
        assert "Example: manyvoice" in done.stdout, verb


def test_bench_lists_its_questions_and_refuses_others(manyvoice: Command) -> None:
    names = document(manyvoice("bench", "--json", cwd=Path(__file__).parents[2]))["questions"]
    assert {"digits", "sentences", "speed"} <= set(names)
    done = manyvoice("bench", "nonsense", cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "there are" in done.stderr


def test_profile_of_a_run_file_and_of_a_run(trained: Path, tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    found = document(manyvoice("profile", trained, "--json"))
    assert sum(row["steps"] for row in found["bins"]) >= 1
    assert any("of label columns" in line for line in found["summary"])
    run = tmp_path / "run.yaml"
    run.write_text(f"output: {tmp_path / 'out'}\ncorpus: {{train: {tones}}}\ntokenizer: {{kind: characters}}\n")
    small = "model.settings={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}"
    done = manyvoice("profile", run, small, "--memory", "2GiB")
    assert done.returncode == 0, done.stderr
    assert "bound by" in done.stdout and "updates an epoch" in done.stdout
    assert not (tmp_path / "out").exists()
    refused = manyvoice("profile", run, small, "--memory", "plenty")
    assert refused.returncode == 2
    assert "must be an amount such as 8GiB" in refused.stderr


def test_ctrl_c_is_a_failure_and_not_a_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manyvoice.data.manifest.open_corpus", stopped)
    monkeypatch.setattr("sys.argv", ["manyvoice", "corpus", "stats", "any.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "manyvoice: stopped" in capsys.readouterr().err
