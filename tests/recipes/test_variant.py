"""A voice follows its speaker from the whole model to a size and to the folder that the size was extracted into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from manyvoice.data.collate import Collator, LiveFeatures
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.narrow import Elastic
from manyvoice.errors import ModelError, UsageError, VoiceError
from manyvoice.recipes import personalize as recipe
from manyvoice.recipes.export import export
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.sizes import SUBNET, extract_size, find_size
from manyvoice.recipes.speakers import Split
from manyvoice.recipes.variant import Variant, all_variants, load_variant, owned_by
from manyvoice.recipes.voiced import load_voiced, serve_speakers
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice
from manyvoice.train.owners import OwnerTraining, Schedule

WANTED = Personalisation(
    settings={"rank": 4, "scale": 1.0}, split=Split(field="part"), masks=False, worse=1e9, sizes=True,
    schedule=Schedule(rounds=30, utterances=4, every=5, lr=3e-2),
)  # fmt: skip
NARROWED = ("ff1.up", "attention.out", "attention.query")
Speak = Callable[[Path, Mapping[str, tuple[int, tuple[str, str]]]], Path]


@pytest.fixture(scope="module")
def corpus(speak: Speak, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("speech")
    return open_corpus(speak(folder / "speech.jsonl", {"ann": (18, ("hml", "hml")), "bob": (18, ("hlm", "hlm"))}))


@pytest.fixture(scope="module")
def extracted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extracted") / "phone"
    extract_size(base, "40", folder)
    return folder


@pytest.fixture(scope="module")
def store(base: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Voices trained across the sizes."""
    run = tmp_path_factory.mktemp("across") / "run"
    personalize(base, corpus, run, WANTED)
    return run / "voices"


@pytest.fixture(scope="module")
def lora(base: Path) -> Voice:
    """At sites that size 40 narrows, with something to say at each."""
    recogniser = Recogniser.load(base)
    bank = Bank(recogniser.family.anatomy(recogniser.model), make_method("lora", {"roles": NARROWED}), ["x"])
    gen = torch.Generator().manual_seed(0)
    tensors = {where: t + 0.3 * torch.randn(t.shape, generator=gen) for where, t in bank.take(1).items()}
    return Voice(
        method=bank.method, tensors=tensors, base=recogniser.fingerprint(),
        tokenizer=recogniser.tokenizer.fingerprint(), card={"speaker": "x"},
    )  # fmt: skip


def bank_of(variant: Variant, voice: Voice) -> Bank:
    bank = Bank(variant.anatomy, voice.method, ["x"], empty=True)
    bank.put(1, variant.check(voice).tensors)
    return bank


def logp(variant: Variant, voice: Voice) -> torch.Tensor:
    x_BTF = torch.randn(2, 70, 80, generator=torch.Generator().manual_seed(1))
    return variant.logp(bank_of(variant, voice), torch.tensor([1, 0]), x_BTF, torch.tensor([70, 55])).x


def test_a_voice_on_the_extracted_folder_is_the_voice_on_the_narrowed_model(
    base: Path, extracted: Path, lora: Voice
) -> None:
    whole = Recogniser.load(base)
    elastic, size = Elastic(whole.model), find_size(whole, "40")
    x_BTF, len_B = torch.randn(2, 70, 80, generator=torch.Generator().manual_seed(1)), torch.tensor([70, 55])
    bank = bank_of(load_variant(base), lora)
    slices = elastic.plan(size.subnet).slices
    assert any("linear1.weight" in name for name in slices) and elastic.plan(size.subnet).layers == (0, 2)
    with bank.on(whole.model, torch.tensor([1, 0]), slices=slices) as ran, elastic.at(size.subnet):
        narrowed = whole.logp(x_BTF, len_B).x
    with elastic.at(size.subnet):
        bare = whole.logp(x_BTF, len_B)
    frames = int(bare.len_B[1])
    assert {key.partition(".")[0] for key in ran.sites} == {"0", "2"}
    for variant in (load_variant(base, "40"), load_variant(extracted)):
        found = logp(variant, lora)
        assert_close(found, narrowed, rtol=1e-5, atol=1e-5)
        assert_close(found[1, :frames], bare.x[1, :frames], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[0], bare.x[0], atol=1e-3)


def test_what_is_trained_across_sizes_is_what_runs_on_them(
    base: Path, corpus: Corpus, lora: Voice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of a round are half that of the whole model and half that of a size, each with the voice on."""
    made: list[OwnerTraining] = []

    def make(*args: Any, **more: Any) -> OwnerTraining:
        made.append(OwnerTraining(*args, **more))
        return made[0]

    monkeypatch.setattr(recipe, "OwnerTraining", make)
    few = replace(WANTED, method="lora", settings={"roles": NARROWED}, schedule=replace(WANTED.schedule, rounds=1))
    personalize(base, corpus, tmp_path / "run", few)
    recogniser = Recogniser.load(base)
    tokens = [recogniser.tokenizer.encode(t) for t in corpus.texts()]
    batch = Collator(corpus, LiveFeatures(corpus, recogniser.log_mel), tokens)(range(4)).owned(
        torch.tensor([1, 0, 1, 0])
    )
    losses = [loss_B.detach() for loss_B in made[0].losses(bank_of(load_variant(base), lora), batch, 0)]
    variants = all_variants(recogniser)
    assert [v.size for v in variants] == ["100", "40"]
    for variant, loss_B in zip(variants, losses, strict=True):
        found = evaluate(
            variant.recogniser, corpus.subset(range(4)), owned=owned_by(variant, bank_of(variant, lora), [1, 0, 1, 0])
        )
        assert_close(2 * loss_B.double(), torch.tensor(found.nats, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_voice_trained_across_sizes_helps_on_all(base: Path, extracted: Path, corpus: Corpus, store: Path) -> None:
    receipts = []
    for spec, size in ((base, None), (base, "100"), (base, "40%"), (extracted, None)):
        served = serve_speakers(spec, corpus, size=size, voice=None, store=str(store), tenant="default")
        recogniser = served.voiced.variant.recogniser
        found, bare = evaluate(recogniser, corpus, owned=served.owned), evaluate(recogniser, corpus)
        assert found.loss < bare.loss / 2, f"size {size} of {spec.name}"
        receipts.append(served.as_dict()["voices"]["bob"])
    whole, hundred, forty, folder = receipts
    assert forty == folder and whole == hundred | {"size": None} and whole["hash"] == forty["hash"]
    assert (hundred["size"], forty["size"], hundred["sites_dropped"]) == ("100", "40", [])
    assert forty["sites_ran"] == ["0.block", "2.block"] and forty["sites_dropped"] == ["1.block"]


def test_a_voice_of_another_base_is_refused(base: Path, extracted: Path, lora: Voice, tmp_path: Path) -> None:
    other = replace(lora, base="0" * 64)
    for variant in (load_variant(base), load_variant(base, "40"), load_variant(extracted)):
        with pytest.raises(VoiceError, match=r"was made for the base 000000000000, but this model is"):
            variant.check(other)
    with pytest.raises(VoiceError, match="was made for the base 000000000000"):
        load_voiced(extracted, voice=str(other.write(tmp_path / "other.safetensors")))


def test_an_extracted_folder_may_be_a_base_itself(extracted: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Whoever has nothing but the folder makes voices of it, which run on it as those of its supernet do."""
    wanted = replace(WANTED, sizes=False)
    report = personalize(extracted, corpus, tmp_path / "run", wanted)
    kept = [o.speaker for o in report.outcomes if o.kept]
    assert kept
    store = tmp_path / "run" / "voices"
    assert Store(store).get(kept[0]).base == Recogniser.load(extracted).fingerprint()
    served = serve_speakers(extracted, corpus, size=None, voice=None, store=str(store), tenant="default")
    found = evaluate(served.voiced.variant.recogniser, corpus, owned=served.owned)
    assert found.loss < evaluate(served.voiced.variant.recogniser, corpus).loss
    voiced, _ = load_voiced(extracted, voice=kept[0], store=str(store))
    assert voiced.variant.size is None and voiced.variant.layers is None
    exported, _ = export(extracted, tmp_path / "onnx", voices=[Store(store).get(kept[0])])
    assert exported.model.is_file()


@pytest.mark.parametrize("spoil", ["voices", "supernet", "all"])
def test_an_older_folder_is_refused_with_the_way_out(spoil: str, extracted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(extracted, folder)
    said = json.loads((folder / SUBNET).read_text())
    said.pop(spoil, None)
    (folder / SUBNET).write_text("{" if spoil == "all" else json.dumps(said))
    with pytest.raises(ModelError, match=r"subnet.json: does not say how voices .*manyvoice subnets SUPERNET extract"):
        load_variant(folder)


def test_a_size_that_there_is_not(base: Path, extracted: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--size 70: .* has 100, 40"):
        load_variant(base, "70")
    with pytest.raises(UsageError, match="--sizes: .* has no sizes to train across"):
        personalize(extracted, corpus, tmp_path / "run", WANTED)
