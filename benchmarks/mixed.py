"""Many voices on one base: what a mixed batch costs, cold voices, working sets, memory; and never the wrong voice.

    manyvoice bench mixed part=overhead                 32 x 4 s, 1 to 32 voices, banks of 128 to 10,000 rows
    manyvoice bench mixed part=cliff                    working sets of 1/2, 1 and 2 times what pool and cache hold
    manyvoice bench mixed part=cold                     from a file to a row that is ready to answer
    manyvoice bench mixed part=memory                   10,000 voices on the device
    manyvoice bench mixed part=soak requests=100000     names replaced, taken away and evicted under requests

Random weights: neither time nor memory depend on them. One thread unless threads=N. Voices are adapters of rank 16. No
cliff means: with twice as many voices as fit, at least half of the requests a second that there are with half as many.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.errors import ManyvoiceError, UsageError, WorkError
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.submodels.bank import Bank, bytes_per_row
from manyvoice.submodels.cache import VoiceCache
from manyvoice.submodels.method import make_method
from manyvoice.submodels.names import name_path, voice_path
from manyvoice.submodels.pool import Loader, Outcome, Room, Voices
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice

SEED = 0
BASE, TOKENIZER, TENANT = "b" * 64, "d" * 64, "default"
RANK = 16
OVERHEAD, NO_CLIFF, READY_MS, MEMORY_GIB, WRONG = 0.10, 0.5, 5.0, 8.0, 0
FRAMES_A_SECOND = 100
# of the soak: few rows, so that voices come and go; float32 in batches of other shapes differs in the last digits
ROWS, BATCH, THREADS, TOLERANCE = 8, 16, 3, 1e-3
FOREVER = 1 << 62
Meant = tuple[int, int, str | None]
# fits a test in seconds; and for the soak, where what is under test is not the model
TOY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
       "subsampling_conv_channels": 8}  # fmt: skip


def run(bench: Bench) -> None:
    """Rows of one part, or of all but the soak, and the aims of all rows there are."""
    torch.set_num_threads(int(bench.option("threads", "1")))
    parts: dict[str, Callable[[Bench], None]] = {
        "overhead": overhead, "cliff": cliff, "cold": cold, "memory": memory, "soak": soak,
    }  # fmt: skip
    asked = bench.option("part", "overhead,cliff,cold,memory").split(",")
    if unknown := sorted(set(asked) - set(parts)):
        raise UsageError(f"part={','.join(unknown)}: must be some of {', '.join(parts)}")
    for part in asked:
        parts[part](bench)
        aims(bench)


def aims(bench: Bench) -> None:
    """Of the newest rows of each part."""
    newest = {(r["kind"], *(r.get(k) for k in ("preset", "arm", "rows", "traffic", "source"))): r for r in bench.rows}

    def of(kind: str, **values: Any) -> list[dict[str, Any]]:
        rows = [r for r in newest.values() if r["kind"] == kind]
        return [r for r in rows if all(r[k] == v for k, v in values.items())]

    costs = of("overhead")
    dearest = max(costs, key=lambda r: float(r["over_base"]), default={})
    kept = of("cliff")
    ready, soaked, planted = of("cold", source="page cache"), of("soak"), of("planted")
    bench.aims = [
        Aim(name="a mixed batch over the base alone: the dearest of all arms", sense="at most", limit=OVERHEAD,
            unit="relative, the median", measured=dearest.get("over_base"),
            why="; ".join(f"{r['preset']}, {r['arm']} of {r['rows']} rows {r['over_base']:+.1%} (quartiles "
                          f"{r['quartiles'][0]:+.1%} and {r['quartiles'][1]:+.1%})" for r in costs)),
        Aim(name="no cliff: requests a second with twice the voices that fit, to those with half as many",
            sense="at least", limit=NO_CLIFF, unit="relative", measured=min((r["kept"] for r in kept), default=None),
            why="; ".join(f"{r['traffic']} {r['kept']:.2f}" for r in kept)),
        Aim(name="a voice that is not on the device is ready, its file in the page cache: median", sense="at most",
            limit=READY_MS, unit="ms", measured=ready[0]["median_ms"] if ready else None,
            why="; ".join(f"{r['source']}: median {r['median_ms']} ms, p95 {r['p95_ms']} ms" for r in of("cold"))),
        Aim(name="10,000 adapter voices of `small`", sense="at most", limit=MEMORY_GIB, unit="GiB",
            measured=of("memory")[0]["gib_for_10000"] if of("memory") else None,
            why=of("memory")[0]["how"] if of("memory") else ""),
        Aim(name="bytes of a bank less rows x sites x (2 D R + 3 D + R) x 4", sense="equal", limit=0, unit="bytes",
            measured=of("memory")[0]["less_formula"] if of("memory") else None),
        Aim(name="answers of the wrong voice", sense="equal", limit=WRONG, unit="requests",
            measured=float(soaked[0]["wrong"]) if soaked else None,
            why=f"of {soaked[0]['answered']} answers; {soaked[0]['refused']} of {soaked[0]['requests']} requests were "
                f"refused, with {soaked[0]['changes']} changes of names" if soaked else ""),
        Aim(name="requests refused although their voice was there", sense="equal", limit=0, unit="requests",
            measured=float(soaked[0]["refused_though_there"]) if soaked else None),
        Aim(name="answers of the wrong voice that the same check finds where rows are off by one", sense="at least",
            limit=1, unit="requests", measured=float(planted[0]["wrong"]) if planted else None),
    ]  # fmt: skip


# --- what all parts need


def model_of(preset: str, *, toy: bool = False) -> PreTrainedModel:
    """Random weights, 256 labels."""
    torch.manual_seed(SEED)
    model, _ = build_model("tiny" if toy else preset, TOY if toy else {}, vocabulary=257, blank=256)
    model.eval().requires_grad_(False)
    return model


def make_voices(
    model: PreTrainedModel, count: int, *, rank: int = RANK, scale: float = 0.05, methods: Sequence[str] = ("adapter",)
) -> Iterator[Voice]:
    """Random weights, no two the same; of several methods in turn."""
    for k in range(count):
        bank = Bank(anatomy_of(model), make_method(methods[k % len(methods)], {"rank": rank}), [f"v{k}"])
        gen = torch.Generator().manual_seed(k)
        tensors = {where: t + scale * torch.randn(t.shape, generator=gen) for where, t in bank.take(1).items()}
        yield Voice(method=bank.method, tensors=tensors, base=BASE, tokenizer=TOKENIZER, card={"number": k})


def new_store(bench: Bench, name: str) -> Store:
    """An empty one, with an index of its own."""
    folder = bench.work / name
    shutil.rmtree(folder, ignore_errors=True)
    return Store(folder / "store", index=folder / "index.sqlite")


def pool_of(model: PreTrainedModel, names: Any, voices: Loader, rows: int) -> Voices:
    """For voices of :func:`make_voices`."""
    return Voices(model, anatomy_of(model), base=BASE, tokenizer=TOKENIZER, names=names, voices=voices,
                  room=Room(rows=rows, bytes=2**33))  # fmt: skip


def clips(count: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Noise, all of one length."""
    frames = round(seconds * FRAMES_A_SECOND)
    gen = torch.Generator().manual_seed(SEED)
    return torch.randn(count, frames, 80, generator=gen), torch.full((count,), frames)


@torch.no_grad()
def forward(model: PreTrainedModel, x_BTF: Tensor, len_B: Tensor) -> Tensor:
    """Log-probabilities B T V, as the pool computes them."""
    family = family_of(model)
    return family.logits(model, family.encode(model, x_BTF, len_B)).x.log_softmax(-1)


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


# --- overhead


def overhead(bench: Bench) -> None:
    """A row for each preset and arm: base and arm alternate, and the quotient of each pair counts."""
    count, seconds = (4, 0.5) if bench.toy else (32, 4.0)
    sizes = (8,) if bench.toy else (128, 1024, 10_000)
    for preset in ("tiny",) if bench.toy else bench.option("presets", "tiny,small").split(","):
        model = model_of(preset, toy=bench.toy)
        x_BTF, len_B = clips(count, seconds)
        for rows in sizes:
            bank = Bank(anatomy_of(model), make_method("adapter", {"rank": RANK}), list(map(str, range(rows))),
                        empty=True)  # fmt: skip
            owner_B = torch.linspace(1, rows, count).long()
            for row, voice in zip(owner_B.tolist(), make_voices(model, count), strict=True):
                bank.put(row, voice.tensors)
            _compare(bench, preset, f"{count} voices", rows, model, x_BTF, len_B, _on(bank, model, owner_B))
            if rows == sizes[0]:
                _compare(bench, preset, "one voice", rows, model, x_BTF, len_B, _on(bank, model, owner_B * 0 + 1))
            del bank
        store = new_store(bench, "overhead")
        names = [f"v{k}" for k in range(count)]
        store.add_many(zip(names, make_voices(model, count), strict=True))
        pool = pool_of(model, store, VoiceCache(store, host_bytes=1 << 30), sizes[0])
        _compare(bench, preset, f"{count} voices by name, with receipts", sizes[0], model, x_BTF, len_B,
                 partial(_answer, pool, [names]))  # fmt: skip


def _on(bank: Bank, model: PreTrainedModel, owner_B: Tensor) -> Callable[[Tensor, Tensor], object]:
    def work(x_BTF: Tensor, len_B: Tensor) -> Tensor:
        with bank.on(model, owner_B):
            return forward(model, x_BTF, len_B)

    return work


def _compare(
    bench: Bench, preset: str, arm: str, rows: int, model: PreTrainedModel, x_BTF: Tensor, len_B: Tensor,
    work: Callable[[Tensor, Tensor], object],
) -> None:  # fmt: skip
    repeats = 2 if bench.toy else int(bench.option("repeats", "9"))
    base_times, times = [], []
    for k in range(repeats + 1):
        base = timed(forward, model, x_BTF, len_B)
        mine = timed(work, x_BTF, len_B)
        if k:  # the first of each warms up
            base_times.append(base)
            times.append(mine)
    over = [mine / base - 1 for mine, base in zip(times, base_times, strict=True)]
    low, middle, high = statistics.quantiles(over, n=4)
    bench.row(
        seed=SEED, kind="overhead", preset=preset, arm=arm, rows=rows, utterances=len(x_BTF),
        seconds_each=x_BTF.shape[1] / FRAMES_A_SECOND, base_seconds=round(statistics.median(base_times), 4),
        seconds=round(statistics.median(times), 4), over_base=round(middle, 4),
        quartiles=[round(low, 4), round(high, 4)], repeats=repeats,
    )  # fmt: skip
    bench.watcher.note(f"{preset}: {arm} in a bank of {rows}: {middle:+.1%}")


# --- cliff


@final
class Counted:
    """A loader that counts what the pool asks it for."""

    def __init__(self, voices: Loader) -> None:
        self.voices, self.count = voices, 0

    def get(self, hash: str, tenant: str) -> Voice:
        """The voice."""
        self.count += 1
        return self.voices.get(hash, tenant)


def cliff(bench: Bench) -> None:
    """A row for each traffic: requests a second at each working set, rounds of the three taking turns."""
    rows, batch, seconds, batches, rounds = (4, 2, 0.5, 4, 2) if bench.toy else (64, 8, 4.0, 12, 5)
    model = model_of(bench.option("preset", "small"), toy=bench.toy)
    store = new_store(bench, "cliff")
    names = [f"v{k}" for k in range(2 * rows)]
    size = 0
    for name, voice in zip(names, make_voices(model, len(names)), strict=True):
        store.add(voice, name)
        size = voice.size
    x_BTF, len_B = clips(batch, seconds)
    for traffic in ("uniform", "Zipf"):
        sets = {share: names[: int(share * rows)] for share in (0.5, 1.0, 2.0)}
        loaders = {share: Counted(VoiceCache(store, host_bytes=rows * size)) for share in sets}
        pools = {share: pool_of(model, store, loaders[share], rows) for share in sets}
        speeds: dict[float, list[float]] = {share: [] for share in sets}
        rng = random.Random(SEED)
        for k in range(rounds + 1):
            for share, chosen in sets.items():
                weights = [1.0 if traffic == "uniform" else 1 / rank for rank in range(1, len(chosen) + 1)]
                asked = [rng.choices(chosen, weights, k=batch) for _ in range(batches)]
                if k == 1:
                    loaders[share].count = 0  # what was loaded to warm up does not count
                took = timed(_answer, pools[share], asked, x_BTF, len_B)
                if k:
                    speeds[share].append(batch * batches / took)
        speed = {share: statistics.median(found) for share, found in speeds.items()}
        bench.row(
            seed=SEED, kind="cliff", preset=bench.option("preset", "small"), traffic=traffic, rows=rows,
            cache_voices=rows, batch=batch, seconds_each=seconds, working_sets=[0.5, 1.0, 2.0],
            requests_a_second=[round(s, 2) for s in speed.values()],
            share_loaded=[round(c.count / (rounds * batches * batch), 4) for c in loaders.values()],
            kept=round(speed[2.0] / speed[0.5], 4),
        )  # fmt: skip
        bench.watcher.note(f"{traffic}: {speed[2.0] / speed[0.5]:.2f} of the requests at twice the voices that fit")


def _answer(pool: Voices, batches: Iterable[Sequence[str]], x_BTF: Tensor, len_B: Tensor) -> None:
    for names in batches:
        for outcome in pool.scores(x_BTF, len_B, names):
            outcome.answer()


# --- cold


def cold(bench: Bench) -> None:
    """A row with a voice's files, of its name and itself, in the page cache and one without: resolve to put.

    What lies below the kernel, such as a host's cache of a virtual disk, is not asked to forget.
    """
    count = 5 if bench.toy else int(bench.option("voices", "200"))
    model = model_of("small", toy=bench.toy)
    anatomy, store = anatomy_of(model), new_store(bench, "cold")
    names = [f"v{k}" for k in range(count)]
    method, size = make_method("adapter", {"rank": RANK}), 0
    for name, voice in zip(names, make_voices(model, count), strict=True):
        store.add(voice, name)
        size = len(voice.data)
    bank = Bank(anatomy, method, [str(k) for k in range(16)], empty=True)
    for source in ("page cache", "disk"):
        times, dropped = [], 0
        cache = VoiceCache(store, host_bytes=1 << 30)
        for k, name in enumerate(names):
            for path in (name_path(name, TENANT), voice_path(store.resolve(name, TENANT), TENANT)):
                there = _page(bench.work / "cold" / "store" / path, keep=source == "page cache")
            dropped += not there
            started = time.perf_counter()
            hash = store.resolve(name, TENANT)
            voice = cache.get(hash, TENANT)
            if voice.hash == hash:
                bank.put(1 + k % 16, voice.check(anatomy, base=BASE, tokenizer=TOKENIZER).tensors)
            times.append(1000 * (time.perf_counter() - started))
        times.sort()
        bench.row(
            seed=SEED, kind="cold", source=source, voices=count, not_in_page_cache=dropped, bytes=size,
            median_ms=round(statistics.median(times), 3), p95_ms=round(times[int(0.95 * (count - 1))], 3),
        )  # fmt: skip
        bench.watcher.note(
            f"cold, {source}: median {statistics.median(times):.2f} ms; {dropped} of {count} were not in the page cache"
        )


def _page(path: Path, *, keep: bool) -> bool:
    """Have a file in the page cache, or ask the kernel to drop it (where it can be asked); whether it is there now."""
    with path.open("rb") as file:
        if keep:
            file.read()
        elif hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not hasattr(os, "RWF_NOWAIT"):
            return keep
        try:
            # what would have to wait for the disk is refused
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


# --- memory


def memory(bench: Bench) -> None:
    """One row: resident memory that a bank of 10,000 adds, or what 1,000 say of it where there is too little."""
    model = model_of("small", toy=bench.toy)
    method = make_method("adapter", {"rank": RANK})
    one = bytes_per_row(anatomy_of(model), method, torch.float32)
    needed = 10_001 * one
    rows = 100 if bench.toy else 10_000 if _proc("meminfo", "MemAvailable") > 1.3 * needed else 1000
    before = _proc("self/status", "VmRSS")
    started = time.perf_counter()
    bank = Bank(anatomy_of(model), method, list(map(str, range(rows))), empty=True)
    making = time.perf_counter() - started
    resident = _proc("self/status", "VmRSS") - before
    voice = next(make_voices(model, 1))
    putting = [timed(bank.put, row, voice.tensors) for row in range(1, 1 + min(rows, 64))]
    D = anatomy_of(model).width
    formula = (1 + rows) * len(bank.sites) * (2 * D * RANK + 3 * D + RANK) * 4
    held = sum(p.numel() * p.element_size() for p in bank.parameters())
    measured = resident if resident > 0 else held
    bench.row(
        seed=SEED, kind="memory", rows=rows, resident_bytes=resident, tensor_bytes=held, less_formula=held - formula,
        bytes_a_voice=one, gib_for_10000=round(measured / rows * 10_000 / 2**30, 3),
        how="resident memory, measured" if rows == 10_000 else f"10,000 / {rows} of what {rows} voices take",
        seconds_to_make=round(making, 3), put_ms=round(1000 * statistics.median(putting), 3),
    )  # fmt: skip
    bench.watcher.note(f"{rows} voices: {measured / 2**30:.2f} GiB")


def _proc(file: str, field: str) -> int:
    """Bytes that Linux says; 0 elsewhere."""
    path = Path("/proc") / file
    if not path.exists():
        return 0
    found = [line.split()[1] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(field + ":")]
    return 1024 * int(found[0])


# --- soak


def soak(bench: Bench) -> None:
    """A row for the requests asked for, and one where a mistake is planted: does the same check see it?"""
    requests = 600 if bench.toy else int(bench.option("requests", "100000"))
    for kind, count, mistake in (("soak", requests, nullcontext()), ("planted", min(requests, 600), off_by_one())):
        play = Soak(bench, 24 if bench.toy else 60)
        with mistake:
            seconds = timed(play.play, count)
        bench.row(
            seed=SEED, kind=kind, requests=play.answered + play.refused, answered=play.answered, refused=play.refused,
            refused_though_there=play.though_there, wrong=len(play.wrong), examples=play.wrong[:3],
            changes=play.changes, loads=play.loader.count, voices=len(play.voices), names=len(play.history),
            rows=ROWS, threads_asking=THREADS, seconds=round(seconds, 1), apart=round(play.apart, 4),
            furthest_from_expected=round(play.furthest, 7), tolerance=TOLERANCE,
        )  # fmt: skip
        bench.watcher.note(f"{kind}: {len(play.wrong)} wrong of {play.answered + play.refused}")


@contextmanager
def off_by_one() -> Iterator[None]:
    """Inside, every voice's answer comes from the next row."""
    on = Bank.on

    def wrong(self: Bank, model: PreTrainedModel, owner_B: Tensor, **more: Any) -> Any:
        return on(self, model, torch.where(owner_B > 0, owner_B % (len(self) - 1) + 1, 0), **more)

    with patch.object(Bank, "on", wrong):
        yield


@final
class Soak:
    """Threads that ask, and one that gives names other voices or takes them away, over a store, a cache and few rows.

    ``history`` has for each name what it meant from when until when, in nanoseconds; both ends of a change are
    generous, as nobody knows when within it the name changed. An answer is right if its receipt names a voice that the
    name meant between arrival and answer, and its log-probabilities are those that this voice gave alone.
    """

    def __init__(self, bench: Bench, contents: int) -> None:
        self.model = model_of("tiny", toy=True)
        x_BTF, _ = clips(3, 0.8)
        self.x_BTF, self.len_B = x_BTF, torch.tensor([80, 64, 48])
        self.voices = list(make_voices(self.model, contents, rank=2, scale=0.5, methods=("adapter", "lora")))
        # None is the bare base
        self.expected: dict[str | None, list[Tensor]] = {
            voice and voice.hash: [self._alone(voice, clip) for clip in range(3)] for voice in (None, *self.voices)
        }
        answers = list(self.expected.values())
        self.apart = min(
            float((a[clip] - b[clip]).abs().max())
            for k, a in enumerate(answers)
            for b in answers[:k]
            for clip in range(3)
        )
        if self.apart < 20 * TOLERANCE:
            raise WorkError(f"two voices differ by {self.apart} only, so one could stand for another unseen")
        self.store = new_store(bench, "soak")
        self.loader = Counted(VoiceCache(self.store, host_bytes=contents // 4 * self.voices[0].size))
        self.pool = pool_of(self.model, self.store, self.loader, ROWS)
        self.history: dict[str, list[Meant]] = {f"n{k}": [(0, FOREVER, None)] for k in range(contents * 2 // 3)}
        self.lock, self.watcher, self.rng = threading.Lock(), bench.watcher, random.Random(SEED)
        self.wrong: list[str] = []
        self.answered = self.refused = self.though_there = self.changes = 0
        self.requests, self.furthest = 0, 0.0
        for _ in range(3 * len(self.history)):
            self.change()

    def _alone(self, voice: Voice | None, clip: int) -> Tensor:
        probe = self.model, self.x_BTF[clip : clip + 1, : self.len_B[clip]], self.len_B[clip : clip + 1]
        if voice is None:
            return forward(*probe)[0]
        bank = Bank(anatomy_of(self.model), voice.method, ["x"], empty=True)
        bank.put(1, voice.tensors)
        with bank.on(self.model, torch.tensor([1])):
            return forward(*probe)[0]

    def change(self) -> None:
        """One name; only ever one thread at a time."""
        name = self.rng.choice(list(self.history))
        voice = None if self.rng.random() < 0.2 else self.rng.choice(self.voices)
        if voice is None and self.history[name][-1][2] is None:
            return
        with self.lock:
            self.history[name].append((time.perf_counter_ns(), FOREVER, voice and voice.hash))
        if voice is None:
            self.store.remove(name)
        else:
            self.store.add(voice, name)
        with self.lock:
            start, _, before = self.history[name][-2]
            self.history[name][-2] = start, time.perf_counter_ns(), before
        self.changes += 1

    def play(self, requests: int) -> None:
        """Until so many requests are answered or refused."""
        self.requests, stop = requests, threading.Event()
        failures: list[BaseException] = []

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
                stop.set()

        def disturb() -> None:
            while not stop.wait(0.002):
                self.change()

        def ask(rng: random.Random) -> None:
            while not stop.is_set() and self.answered + self.refused < requests:
                self.ask(rng)

        asking = [threading.Thread(target=guarded, args=(partial(ask, random.Random(k)),)) for k in range(THREADS)]
        disturbing = threading.Thread(target=guarded, args=(disturb,))
        for thread in (disturbing, *asking):
            thread.start()
        for thread in asking:
            thread.join()
        stop.set()
        disturbing.join()
        if failures:
            raise failures[0]

    def ask(self, rng: random.Random) -> None:
        """One batch, and its judgement."""
        names = rng.choices([*self.history, None], k=BATCH)
        places = torch.tensor(rng.choices(range(3), k=BATCH))
        arrival = time.perf_counter_ns()
        found = self.pool.scores(self.x_BTF[places], self.len_B[places], names)
        answer = time.perf_counter_ns()
        with self.lock:
            for name, clip, outcome in zip(names, places.tolist(), found, strict=True):
                self.judge(name, clip, outcome, self._meant(name, arrival, answer))
            self.watcher.progress("requests", self.answered + self.refused, self.requests)

    def _meant(self, name: str | None, arrival: int, answer: int) -> set[str | None]:
        recent = takewhile(lambda one: one[1] >= arrival, reversed(self.history.get(name or "", [])))
        return {hash for start, _, hash in recent if start <= answer}

    def judge(self, name: str | None, clip: int, outcome: Outcome, meant: set[str | None]) -> None:
        """Count an answer or a refusal."""
        try:
            logp_TV, receipt = outcome.answer()
        except ManyvoiceError:
            self.refused += 1
            self.though_there += None not in meant
            return
        self.answered += 1
        allowed = {None} if name is None else meant - {None}
        if receipt.voice != name or receipt.hash not in allowed:
            self.wrong.append(f"{name}: the receipt says {receipt.hash}, which it did not mean")
            return
        far = float((logp_TV - self.expected[receipt.hash][clip]).abs().max())
        self.furthest = max(self.furthest, far)
        if not far < TOLERANCE:
            self.wrong.append(f"{name}: {far:.3f} away from what {receipt.hash or 'the base'} says alone")
