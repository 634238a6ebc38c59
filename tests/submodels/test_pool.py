"""Any voices in one batch answer as each would alone, with receipts; and never one for another."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import uniform
from manyvoice.errors import ManyvoiceError, UsageError, VoiceError
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.submodels import pool
from manyvoice.submodels.bank import Bank, bytes_per_row
from manyvoice.submodels.method import make_method
from manyvoice.submodels.pool import Narrowing, Outcome, Room, Voices
from manyvoice.submodels.voice import Voice
from manyvoice.types import Batch

BASE, TOKENIZER = "b" * 64, "d" * 64


class Shelf:
    """Names and voices of all tenants, and how often each voice was asked for."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str], str] = {}
        self.voices: dict[str, Voice] = {}
        self.asked: Counter[str] = Counter()

    def add(self, name: str, voice: Voice, tenant: str = "default") -> None:
        self.voices[voice.hash] = voice
        self.names[name, tenant] = voice.hash

    def resolve(self, name: str, tenant: str) -> str:
        if (name, tenant) not in self.names:
            raise UsageError(f"no voice {name!r}")
        return self.names[name, tenant]

    def get(self, hash: str, tenant: str) -> Voice:
        self.asked[hash] += 1
        if hash not in self.voices:
            raise VoiceError(f"voice {hash[:12]} is not there")
        return self.voices[hash]


def make_voice(base: PreTrainedModel, seed: int, method: str = "adapter", **settings: Any) -> Voice:
    bank = Bank(anatomy_of(base), make_method(method, settings), ["x"], seed=seed, dtype=torch.float64)
    gen = torch.Generator().manual_seed(seed)
    tensors = {where: t + 0.5 * torch.randn(t.shape, generator=gen, dtype=t.dtype) for where, t in bank.take(1).items()}
    return Voice(method=bank.method, tensors=tensors, base=BASE, tokenizer=TOKENIZER, card={"seed": seed})


@pytest.fixture
def shelf(base: PreTrainedModel) -> Shelf:
    shelf = Shelf()
    for seed, name in enumerate(("ann", "bob", "cem", "dee", "eva")):
        shelf.add(name, make_voice(base, seed, rank=2))
    shelf.add("low", make_voice(base, 7, "lora", rank=2))
    shelf.add("gain", make_voice(base, 8, "scale"))
    return shelf


@pytest.fixture
def voices(base: PreTrainedModel, shelf: Shelf) -> Voices:
    return made(base, shelf)


def made(base: PreTrainedModel, shelf: Shelf, **more: Any) -> Voices:
    return Voices(base, more.pop("anatomy", anatomy_of(base)), base=BASE, tokenizer=TOKENIZER, names=shelf,
                  voices=shelf, **more)  # fmt: skip


@pytest.fixture(scope="module")
def many(ragged: Callable[..., Batch]) -> Batch:
    return ragged([60, 44, 52, 60, 36, 48, 60, 40], [[1]] * 8)


@torch.no_grad()
def reference(base: PreTrainedModel, batch: Batch, b: int, voice: Voice | None) -> Tensor:
    """Alone, without the pool."""
    one = batch.rows(b, b + 1)
    family = family_of(base)

    def logp() -> Tensor:
        return family.logits(base, family.encode(base, one.features_BTF, one.len_B)).x.log_softmax(-1)[0]

    if voice is None:
        return logp()
    bank = Bank(anatomy_of(base), voice.method, ["x"], dtype=torch.float64)
    bank.put(1, voice.tensors)
    with bank.on(base, torch.tensor([1])):
        return logp()


def run(voices: Voices, batch: Batch, names: Sequence[str | None], tenant: str | Sequence[str] = "default") -> Any:
    return [outcome.answer() for outcome in voices.scores(batch.features_BTF, batch.len_B, names, tenant)]


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


MIXED = ["ann", None, "low", "bob", "ann", "gain", "cem", None]


def test_mixed_is_alone_for_methods_voices_and_the_base(
    voices: Voices, shelf: Shelf, base: PreTrainedModel, many: Batch
) -> None:
    answers = run(voices, many, MIXED)
    for b, (name, (logp_TV, receipt)) in enumerate(zip(MIXED, answers, strict=True)):
        voice = None if name is None else shelf.voices[shelf.names[name, "default"]]
        assert_same(logp_TV, reference(base, many, b, voice))
        assert receipt.base == BASE and receipt.voice == name and receipt.size is None and receipt.tenant == "default"
        if voice is None:
            assert receipt.hash is None and receipt.sites_ran == ()
        else:
            assert receipt.hash == voice.hash and receipt.method == voice.method
            assert receipt.sites_ran == tuple(sorted({key for key, _ in voice.tensors}))
            assert receipt.sites_dropped == ()
            assert not torch.allclose(logp_TV, reference(base, many, b, None), atol=1e-3)
    run(voices, many, MIXED)
    assert set(shelf.asked.values()) == {1}, "a voice on the device is not asked for again"


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_more_voices_than_rows_run_in_parts(shelf: Shelf, base: PreTrainedModel, many: Batch, rows: int) -> None:
    names = ["ann", "bob", "low", "cem", "dee", "eva", "ann", None]
    tight, roomy = made(base, shelf, room=Room(rows=rows)), made(base, shelf)
    for _ in range(2):
        for (a, one), (b, two) in zip(run(tight, many, names), run(roomy, many, names), strict=True):
            assert_same(a, b)
            assert one == two


def test_more_methods_than_banks_run_in_parts(
    shelf: Shelf, base: PreTrainedModel, many: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(made(base, shelf), many, MIXED)
    monkeypatch.setattr(pool, "METHODS", 1)
    voices = made(base, shelf)
    for _ in range(2):
        for (a, one), (b, two) in zip(run(voices, many, MIXED), expected, strict=True):
            assert_same(a, b)
            assert one == two


def test_the_device_holds_no_more_than_it_may(
    shelf: Shelf, base: PreTrainedModel, many: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows follow from the bytes; banks make room for each other; a voice too large fails its own request only."""
    anatomy, expected = anatomy_of(base), run(made(base, shelf), many, MIXED)
    row = bytes_per_row(anatomy, shelf.voices[shelf.names["ann", "default"]].method, torch.float64)
    gain = bytes_per_row(anatomy, shelf.voices[shelf.names["gain", "default"]].method, torch.float64)
    most = max(3 * row, 2 * gain)
    tight = made(base, shelf, room=Room(bytes=most))
    for _ in range(2):
        for (a, one), (b, two) in zip(run(tight, many, MIXED), expected, strict=True):
            assert_same(a, b)
            assert one == two
        assert 0 < tight._slots._taken() <= most
    shelf.add("large", make_voice(base, 30, rank=500))
    names = ["ann", "large", None, "low", "ann", "gain", "cem", None]
    found = tight.scores(many.features_BTF, many.len_B, names)
    assert [b for b, o in enumerate(found) if o.error] == [1]
    assert f"more than the {most} that voices may take: allow more" in str(found[1].error)

    def full(*args: Any, **more: Any) -> Bank:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pool, "Bank", full)
    found = made(base, shelf).scores(many.features_BTF, many.len_B, MIXED)
    assert [o.error is None for o in found] == [name is None for name in MIXED]
    assert "no room for 65 rows" in str(found[0].error)
    with pytest.raises(UsageError, match="bytes = 0: must be 1 or more; 2147483648 is usual"):
        Room(bytes=0)


def test_the_voice_wanted_longest_ago_makes_room(shelf: Shelf, base: PreTrainedModel, batch: Batch) -> None:
    voices, one = made(base, shelf, room=Room(rows=2)), batch.rows(0, 1)
    for name in ("ann", "bob", "ann", "cem", "ann", "bob"):
        run(voices, one, [name])
    asked = {name: shelf.asked[shelf.names[name, "default"]] for name in ("ann", "bob", "cem")}
    assert asked == {"ann": 1, "bob": 2, "cem": 1}


def test_a_forgotten_voice_leaves_no_number_on_the_device(shelf: Shelf, base: PreTrainedModel, batch: Batch) -> None:
    voices, one = made(base, shelf, room=Room(rows=2)), batch.rows(0, 1)
    run(voices, one, ["ann"])
    run(voices, one, ["bob"])
    (slots,) = voices._slots._banks.values()
    weights = shelf.voices[shelf.names["ann", "default"]].tensors
    held = [any(torch.equal(p[row], weights[where]) for where, p in slots.tensors.items()) for row in range(3)]
    assert sum(held) == 1, "the look must see what it is to miss later"
    voices.forget(shelf.names["ann", "default"])
    voices.forget("0" * 64)
    assert not any(torch.equal(p[row], weights[where]) for where, p in slots.tensors.items() for row in range(3))
    run(voices, one, ["cem"])
    (again, _), (bobs, _) = run(voices, batch.rows(0, 2), ["ann", "bob"])
    assert_same(again, reference(base, batch, 0, shelf.voices[shelf.names["ann", "default"]]))
    assert_same(bobs, reference(base, batch, 1, shelf.voices[shelf.names["bob", "default"]]))


def test_a_replaced_name_is_the_new_voice(voices: Voices, shelf: Shelf, base: PreTrainedModel, batch: Batch) -> None:
    (before, old), *_ = run(voices, batch, ["ann", "bob", None])
    new = make_voice(base, 99, rank=2)
    shelf.add("ann", new)
    (after, receipt), *_ = run(voices, batch, ["ann", "bob", None])
    assert receipt.hash == new.hash != old.hash
    assert_same(after, reference(base, batch, 0, new))
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_bad_voice_fails_its_own_request_only(
    voices: Voices, shelf: Shelf, base: PreTrainedModel, many: Batch
) -> None:
    foreign = replace(make_voice(base, 20, rank=2), base="c" * 64)
    shelf.add("foreign", foreign)
    shelf.names["gone", "default"] = "f" * 64
    shelf.add("swapped", make_voice(base, 21, rank=2))
    shelf.voices[shelf.names["swapped", "default"]] = make_voice(base, 22, rank=2)
    shelf.add("empty", Voice(method=make_method("scale", {"roles": ()}), tensors={}, base=BASE, tokenizer=TOKENIZER))
    names = ["ann", "foreign", "gone", "nobody", "swapped", "empty", None, "ann"]
    found = voices.scores(many.features_BTF, many.len_B, names)
    texts = {name: str(o.error) for name, o in zip(names, found, strict=True) if o.error}
    assert set(texts) == {"foreign", "gone", "nobody", "swapped", "empty"}
    assert "made for the base cccccccccccc" in texts["foreign"] and "is not there" in texts["gone"]
    assert texts["nobody"] == "no voice 'nobody'" and "in its place" in texts["swapped"]
    assert "finds no site" in texts["empty"]
    for b in (0, 6, 7):
        voice = None if names[b] is None else shelf.voices[shelf.names["ann", "default"]]
        assert_same(found[b].answer()[0], reference(base, many, b, voice))
    with pytest.raises(UsageError, match="no voice 'nobody'"):
        found[3].answer()
    assert all(o.logp_TV is None and o.receipt is None for o in found if o.error)
    assert not base.get_submodule("encoder.layers.0")._forward_hooks


def test_what_is_no_speech_or_no_number_fails_alone(
    voices: Voices, shelf: Shelf, base: PreTrainedModel, many: Batch
) -> None:
    shelf.add("loud", make_voice(base, 23, rank=2))
    run(voices, many.rows(0, 1), ["loud"])
    slot = voices._slots._slots["default", shelf.names["loud", "default"]]
    with torch.no_grad():  # as a half precision overflows on some utterances only
        for p in slot.bank.parameters():
            p[slot.row] = float("nan")
    len_B = many.len_B.clone()
    len_B[1] = 0
    found = voices.scores(many.features_BTF, len_B, ["ann", "ann", "loud", None, "bob", "cem", None, "ann"])
    assert "utterance 1 has 0 feature frames" in str(found[1].error)
    assert "'loud'" in str(found[2].error) and "not a number" in str(found[2].error)
    for b, name in ((0, "ann"), (3, None), (4, "bob")):
        voice = None if name is None else shelf.voices[shelf.names[name, "default"]]
        assert_same(found[b].answer()[0], reference(base, many, b, voice))


def test_another_thread_on_the_model_is_not_edited(base: PreTrainedModel, many: Batch, shelf: Shelf) -> None:
    """Whoever runs the bare model while a batch of voices is inside it gets the bare model."""
    expected = reference(base, many, 0, None)
    bank = Bank(anatomy_of(base), make_method("adapter", {"rank": 2}), ["x"], dtype=torch.float64)
    bank.put(1, shelf.voices[shelf.names["ann", "default"]].tensors)
    found: list[Tensor] = []
    with bank.on(base, torch.tensor([1])) as ran:
        thread = threading.Thread(target=lambda: found.append(reference(base, many, 0, None)))
        thread.start()
        thread.join()
        assert not ran.sites, "a receipt of this batch would name what the other one ran"
        mine = family_of(base).logits(base, family_of(base).encode(base, many.features_BTF[:1], many.len_B[:1]))
    assert_same(found[0], expected)
    assert len(ran.sites) == 3 and not torch.equal(mine.x.log_softmax(-1)[0], expected)


def test_a_voice_taken_away_and_brought_back_meanwhile_answers(
    shelf: Shelf, base: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name means at last what it meant at first: not being there once is no reason to be refused."""
    voice, get = shelf.voices[shelf.names["ann", "default"]], shelf.get
    asked = []

    def flickers(hash: str, tenant: str) -> Voice:
        asked.append(hash)
        if len(asked) == 1:
            raise VoiceError("is not there")
        return get(hash, tenant)

    monkeypatch.setattr(shelf, "get", flickers)
    (outcome,) = made(base, shelf, room=Room(rows=1)).scores(batch.features_BTF[:1], batch.len_B[:1], ["ann"])
    assert_same(outcome.answer()[0], reference(base, batch, 0, voice))
    assert len(asked) == 2


def test_a_name_replaced_before_its_voice_was_loaded_is_the_new_voice(
    shelf: Shelf, base: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store throws away what no name needs, perhaps between the look at the name and the look at the file."""
    old, new = shelf.names["ann", "default"], make_voice(base, 60, rank=2)
    get = shelf.get

    def late(hash: str, tenant: str) -> Voice:
        if hash == old:
            del shelf.voices[hash]
            shelf.add("ann", new)
            monkeypatch.setattr(shelf, "get", get)
        return get(hash, tenant)

    monkeypatch.setattr(shelf, "get", late)
    voices = made(base, shelf, room=Room(rows=1))
    for (logp_TV, receipt), (b, voice) in zip(
        run(voices, batch, ["ann", None, "ann"]), enumerate((new, None, new)), strict=True
    ):
        assert receipt.hash == (voice and voice.hash)
        assert_same(logp_TV, reference(base, batch, b, voice))


def test_tenants_do_not_share(voices: Voices, shelf: Shelf, base: PreTrainedModel, many: Batch) -> None:
    shelf.add("ann", make_voice(base, 50, rank=2), tenant="other")
    shelf.add("same", shelf.voices[shelf.names["bob", "default"]], tenant="other")
    names = ["ann", "ann", "bob", "bob", "same", None, None, None]
    tenants = ["default", "other", "default", "other", "other", "default", "other", "other"]
    found = voices.scores(many.features_BTF, many.len_B, names, tenants)
    assert "no voice 'bob'" in str(found[3].error)
    one, two = found[0].answer()[1], found[1].answer()[1]
    assert (one.tenant, two.tenant) == ("default", "other") and one.hash != two.hash
    assert_same(found[1].answer()[0], reference(base, many, 1, shelf.voices[shelf.names["ann", "other"]]))
    # one content, two tenants: each loads it for itself
    assert shelf.asked[shelf.names["bob", "default"]] == 2
    assert found[6].answer()[1].tenant == "other"


def test_a_size_lists_what_it_dropped(shelf: Shelf, base: PreTrainedModel, many: Batch) -> None:
    elastic = Elastic(base)
    subnet = uniform(elastic.anatomy, "25", [0, 2], {"head": 2, "ff_chunk": 3})
    plan = elastic.plan(subnet)
    inside = Narrowing(size="25", slices=plan.slices, inside=lambda: elastic.at(subnet))
    outside = Narrowing(size="25", slices=plan.slices, layers=plan.layers)
    narrowed = made(base, shelf, narrowing=inside)
    extracted = made(extract(elastic, subnet), shelf, anatomy=elastic.anatomy, narrowing=outside)
    whole = run(made(base, shelf), many, MIXED)
    answers = zip(run(narrowed, many, MIXED), run(extracted, many, MIXED), whole, strict=True)
    for (a, one), (b, two), (c, whole_receipt) in answers:
        assert torch.equal(a, b) and one == two and one.size == "25"
        assert not torch.allclose(a, c, atol=1e-3)
        assert sorted(one.sites_ran + one.sites_dropped) == list(whole_receipt.sites_ran)
        assert {key.split(".")[0] for key in one.sites_dropped} == ({"1"} if one.voice else set())


def test_a_voice_without_a_site_in_this_size_fails_and_the_rest_run(
    shelf: Shelf, base: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that the model does not call at all: dropped as a whole."""
    shelf.add("conv", make_voice(base, 30, "lora", roles=("ff1.up",), rank=2))
    elastic = Elastic(base)
    subnet = uniform(elastic.anatomy, "no ff1", [0, 1, 2], {})
    kept = frozenset(name for name in subnet.kept if ".ff1." not in name)
    subnet = replace(subnet, kept=kept)
    plan = elastic.plan(subnet)
    voices = made(
        base, shelf, narrowing=Narrowing(size="no ff1", slices=plan.slices, inside=lambda: elastic.at(subnet))
    )
    found = voices.scores(batch.features_BTF, batch.len_B, ["ann", "conv", None])
    assert "voice 'conv'" in str(found[1].error) and "edited nothing: size no ff1 has none" in str(found[1].error)
    assert found[0].answer()[1].voice == "ann" and found[2].answer()[1].voice is None
    # an extracted model that lacks the layers altogether
    voices = made(base, shelf, narrowing=Narrowing(size="other layers", layers=[7, 8, 9]))
    found = voices.scores(batch.features_BTF, batch.len_B, ["ann", "low", None])
    assert [type(o.error) for o in found] == [VoiceError, VoiceError, type(None)]


def test_two_sizes_of_one_model_take_turns(shelf: Shelf, base: PreTrainedModel, batch: Batch) -> None:
    """Hooks and slices are the model's, so one size must not run while another does."""
    elastic = Elastic(base)
    subnet = uniform(elastic.anatomy, "25", [0, 2], {"head": 2, "ff_chunk": 3})
    narrowing = Narrowing(size="25", slices=elastic.plan(subnet).slices, inside=lambda: elastic.at(subnet))
    both = made(base, shelf), made(base, shelf, narrowing=narrowing)
    names = ["ann", None, "low"]
    expected = [run(voices, batch, names) for voices in both]
    found: list[list[Any]] = [[], []]

    def work(k: int) -> None:
        found[k] += [run(both[k], batch, names) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in (0, 1):
        assert len(found[k]) == 8
        for answers in found[k]:
            for (a, one), (b, two) in zip(answers, expected[k], strict=True):
                assert torch.equal(a, b) and one == two


def test_wrong_words_are_refused(voices: Voices, shelf: Shelf, base: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(UsageError, match="3 utterances, 3 lengths, 1 voices and 1 tenants"):
        voices.scores(batch.features_BTF, batch.len_B, ["ann"])
    with pytest.raises(UsageError, match="rows = 0: must be 1 or more"):
        made(base, shelf, room=Room(rows=0))
    with pytest.raises(VoiceError, match="neither an answer nor an error"):
        Outcome().answer()
    assert voices.scores(batch.features_BTF[:0], batch.len_B[:0], []) == []


# --- never the wrong voice


class Churn:
    """Requests from several threads while names are given other voices, taken away, and rows are few.

    The history of a name is every hash that it had (None: it was not there), in order; a request may have any that was
    current between its arrival and its answer.
    """

    def __init__(self, base: PreTrainedModel, batch: Batch, contents: int = 24, names: int = 12) -> None:
        self.base, self.batch = base, batch
        self.contents = [make_voice(base, 100 + k, rank=1) for k in range(contents)]
        self.expected = {v.hash: reference(base, batch, 0, v) for v in self.contents}
        self.shelf = Shelf()
        for voice in self.contents:
            self.shelf.voices[voice.hash] = voice
        self.history: dict[str, list[str | None]] = {f"n{k}": [None] for k in range(names)}
        self.rng = random.Random(3)
        self.lock = threading.Lock()
        self.wrong: list[str] = []
        self.answered = self.refused = 0

    def resolve(self, name: str, tenant: str) -> str:
        with self.lock:
            found = self.history[name][-1]
        if found is None:
            raise UsageError(f"no voice {name!r}")
        return found

    def change(self) -> None:
        with self.lock:
            name = self.rng.choice(list(self.history))
            voice = self.rng.choice(self.contents)
            self.history[name].append(None if self.rng.random() < 0.2 else voice.hash)

    def ask(self, voices: Voices, rng: random.Random, size: int) -> None:
        names = [rng.choice(list(self.history)) for _ in range(size)]
        with self.lock:
            arrival = {name: len(self.history[name]) - 1 for name in names}
        probe = self.batch.rows(0, 1)
        x_BTF = probe.features_BTF.expand(size, -1, -1)
        found = voices.scores(x_BTF, probe.len_B.expand(size), names)
        with self.lock:
            current = {name: set(self.history[name][since:]) for name, since in arrival.items()}
            for name, outcome in zip(names, found, strict=True):
                self.judge(name, outcome, current[name])

    def judge(self, name: str, outcome: Outcome, current: set[str | None]) -> None:
        try:
            logp_TV, receipt = outcome.answer()
        except ManyvoiceError as error:
            self.refused += 1
            if None not in current:
                self.wrong.append(f"{name} was refused: {error}")
            return
        self.answered += 1
        if receipt.voice != name or receipt.hash is None or receipt.hash not in current:
            self.wrong.append(f"{name}: {receipt.hash} was not what it meant")
        elif not torch.allclose(logp_TV, self.expected[receipt.hash], rtol=0, atol=1e-9):
            self.wrong.append(f"{name}: not the weights of {receipt.hash}")


def churn(base: PreTrainedModel, batch: Batch, requests: int) -> Churn:
    play = Churn(base, batch)
    for _ in range(40):
        play.change()
    voices = Voices(base, anatomy_of(base), base=BASE, tokenizer=TOKENIZER, names=play, voices=play.shelf,
                    room=Room(rows=4))  # fmt: skip
    size, workers, stop = 5, 3, threading.Event()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(requests // size // workers):
                play.ask(voices, rng, size)
        except BaseException as error:
            failures.append(error)

    def disturb() -> None:
        while not stop.wait(0.002):
            play.change()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(workers)]
    disturber = threading.Thread(target=disturb)
    for thread in (disturber, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    disturber.join()
    assert not failures, failures
    return play


def test_voices_differ_on_the_probe(base: PreTrainedModel, batch: Batch) -> None:
    """Otherwise the next test could not see one voice stand for another."""
    expected = list(Churn(base, batch).expected.values())
    apart = [float((a - b).abs().max()) for k, a in enumerate(expected) for b in expected[:k]]
    assert min(apart) > 1e-3


def test_never_the_wrong_voice(base: PreTrainedModel, batch: Batch) -> None:
    play = churn(base, batch, 300)
    assert play.wrong == []
    assert play.answered + play.refused == 300 and play.answered > 150
    assert max(play.shelf.asked.values()) > 1, "nothing was ever evicted"


def test_a_planted_wrong_row_is_caught(base: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    on = Bank.on

    def off_by_one(self: Bank, model: PreTrainedModel, owner_B: Tensor, **more: Any) -> Any:
        return on(self, model, torch.where(owner_B > 0, owner_B % (len(self) - 1) + 1, 0), **more)

    monkeypatch.setattr(Bank, "on", off_by_one)
    wrong = churn(base, batch, 60).wrong
    assert wrong and all("not the weights of" in line for line in wrong)
