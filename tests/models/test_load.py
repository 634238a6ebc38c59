"""Models by folder and hub id; what is missing or damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from manyvoice.data.features import LogMel
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.greedy import greedy
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import ModelError, UsageError
from manyvoice.models.load import build_model, fingerprint, load_model, resolve

SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "subsampling_conv_channels": 8,
}


def make(folder: Path) -> Recogniser:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["turn on the light", "what time is it"], "characters")
    model, family = build_model("tiny", SETTINGS, vocabulary=len(tokenizer), blank=tokenizer.blank)
    model.ctc_head.weight.data *= 30  # so that random weights write something
    recogniser = Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model)))
    recogniser.save(folder)
    return recogniser


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def sound() -> torch.Tensor:
    return 0.1 * torch.randn(20_000, generator=torch.Generator().manual_seed(3))


def test_a_saved_model_loads_equal(saved: Path) -> None:
    one, other = Recogniser.load(saved), Recogniser.load(str(saved))
    assert one.fingerprint() == other.fingerprint()
    logp = one.logp_of([sound().numpy()])
    torch.testing.assert_close(logp.x, other.logp_of([sound().numpy()]).x, atol=0, rtol=0)


def test_stock_transformers_gives_the_same_transcript(saved: Path) -> None:
    ours = Recogniser.load(saved)
    logp = ours.logp_of([sound().numpy()])
    text = ours.tokenizer.decode(greedy(logp.x, logp.len_B, ours.tokenizer.blank)[0])
    assert text, "random weights were to write something"
    model, processor = AutoModelForCTC.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    inputs = processor(sound().numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(scores[:, : logp.x.shape[1]], logp.x, atol=1e-5, rtol=1e-5)
    assert processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0].strip() == text
    listen = pipeline("automatic-speech-recognition", model=str(saved))
    assert listen(sound().numpy())["text"].strip() == text


def test_a_hub_id_is_read_from_the_local_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(saved, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert Recogniser.load("somebody/tiny").fingerprint() == Recogniser.load(saved).fingerprint()
    with pytest.raises(ModelError, match="somebody/other: no such folder, and not to be had"):
        resolve("somebody/other")


def test_fingerprint_sees_one_bit_and_the_buffers(saved: Path) -> None:
    model, _ = load_model(saved)
    before = fingerprint(model)
    layer = model.encoder.layers[0]
    layer.conv.norm.running_mean[0] += 1e-3
    buffered = fingerprint(model)
    layer.feed_forward1.linear1.weight.data.view(torch.int32)[0, 0] ^= 1
    assert len({before, buffered, fingerprint(model)}) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json, so it is no model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "bert"})), "'bert' has no anatomy here"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are not loaded"),
        (lambda f: truncate(f / "model.safetensors"), "weights cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda f: truncate(f / "tokenizer.json"), "not a tokenizer that Transformers reads"),
        (lambda f: (f / "processor_config.json").unlink(), "no feature extractor"),
    ],
)
def test_damage_is_named(copy: Path, spoil: object, text: str) -> None:
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(ModelError, match=text):
        Recogniser.load(copy)


def test_the_folder_of_a_run_points_to_its_model(copy: Path) -> None:
    run = copy.parent / "run"
    run.mkdir()
    copy.rename(run / "model")
    with pytest.raises(ModelError, match=f"run holds no config.json.*; give {run / 'model'}, which is one"):
        Recogniser.load(run)


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    train_tokenizer(["other words"], "characters").save(copy)
    with pytest.raises(ModelError, match="they belong to different models"):
        Recogniser.load(copy)


def test_a_file_is_no_model_and_presets_are_listed(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve(saved / "config.json")
    with pytest.raises(UsageError, match="no such preset; known: parakeet-ctc/tiny"):
        build_model("huge", {}, vocabulary=5, blank=4)
