"""The whole story on one laptop: speak a corpus, train all sizes, measure, give two people voices, transcribe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from manyvoice.config import RunConfig, make_run
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.padding import PaddingMeter, careless_padding
from manyvoice.data.synth import SynthSpec, synthesise, synthesise_splits
from manyvoice.errors import UsageError
from manyvoice.recipes.card import read_card
from manyvoice.recipes.personal_report import Report
from manyvoice.recipes.personalize import Personalisation, personalize
from manyvoice.recipes.sizes import compare_sizes
from manyvoice.recipes.speakers import Split
from manyvoice.recipes.train import train
from manyvoice.recipes.transcribe import transcribe
from manyvoice.recipes.voiced import load_voiced
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.train.metrics import read_metrics
from manyvoice.train.owners import Schedule

# A model of under a million parameters and digit strings: learned in two minutes on one core.
_MODEL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "subsampling_factor": 4,
    "subsampling_conv_channels": 16,
}
_SIZES = [1.0, 0.75, 0.55, 0.4, 0.25]
# Phrases of two speakers, for voices in about a minute.
_PERSONAL = 110
_SPLITS = {"train": 0.86, "dev": 0.06, "test": 0.08}


@final
@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo made, and how long each part took in seconds."""

    folder: Path
    model: Path
    wer: float
    heard: tuple[tuple[str, str, str], ...]
    sizes: list[dict[str, Any]]
    voices: dict[str, Any]
    receipt: dict[str, Any] | None
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        heard = [{"audio": a, "spoken": s, "recognised": r} for a, s, r in self.heard]
        return {
            "folder": str(self.folder),
            "model": str(self.model),
            "wer": self.wer,
            "heard": heard,
            "sizes": self.sizes,
            "voices": self.voices,
            "receipt": self.receipt,
            "seconds": self.seconds,
        }


def demo(
    folder: Path = Path("runs/demo"),
    *,
    utterances: int = 1600,
    epochs: int = 4,
    rounds: int = 160,
    watcher: Watcher | None = None,
) -> Demo:
    """Run it in ``folder``; what an interrupted demo has finished is used again.

    Args: utterances, epochs: of the base.  rounds: steps of each voice.

    Raises: UsageError if the folder is a file or holds something else; SynthesisError without espeak-ng.
    """
    watcher = watcher or Silent()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder with --folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "speech").exists():
        raise UsageError(f"{folder} is there already and no demo's folder; choose another with --folder")
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    watcher.note(f"1 of 6  a corpus of digit strings, spoken by 6 synthetic speakers, in {folder / 'speech'}")
    parts = speak(folder / "speech", utterances, watcher)
    seconds["speak"], started = _lap(started)
    watcher.note("2 of 6  a recogniser of 0.9 million parameters in five sizes, all trained at once from nothing")
    model = train(run_of(folder, parts, epochs), watcher=watcher, command="manyvoice demo")
    seconds["train"], started = _lap(started)
    test = open_corpus(parts["test"])
    waste = PaddingMeter(read_metrics(folder / "run")).total()
    random = careless_padding(open_corpus(parts["train"]).durations_N, waste.utterances / waste.steps)
    watcher.note(
        f"        padding was {waste.frame_padding:.1%} of all frames; batches of as many drawn at random would have "
        f"had {random:.0%}"
    )
    wer = float(read_card(model)["results"]["test"]["wer"])
    watcher.note(f"3 of 6  {wer:.1%} of the words of {len(test)} unheard phrases are wrong")
    watcher.note("4 of 6  what the sizes cost, and how fast they are here")
    sizes = compare_sizes(model, None)
    for row in sizes:
        watcher.note(
            f"        size {row['size']:>3}: {row['parameters'] / 1e6:.2f} M parameters, {row['layer_macs_share']:.0%} "
            f"of the layers' multiply-accumulates, {row['times_real_time']:.0f} times real time, WER {row['wer']:.1%}"
        )
    seconds["sizes"], started = _lap(started)
    watcher.note("5 of 6  voices for two people whose speech is unlike any that the model has heard, trained together")
    report = give_voices(folder, model, rounds, watcher)
    for o in report.outcomes:
        watcher.note(
            f"        {o.speaker}: {o.before.wer:.0%} of the words wrong, {o.after.wer:.0%} with a voice learned from "
            f"{o.adapt_seconds:.0f} s of speech" + ("" if o.kept else f"; not kept: {o.why}")
        )
    seconds["voices"], started = _lap(started)
    watcher.note("6 of 6  three phrases, transcribed")
    heard = listen(model, test)
    receipt = receipt_of(folder, model, report)
    seconds["transcribe"], _ = _lap(started)
    totals = report.as_dict()["totals"]
    return Demo(folder=folder, model=model, wer=wer, heard=heard, sizes=sizes, voices=totals, receipt=receipt,
                seconds=seconds)  # fmt: skip


def speak(folder: Path, utterances: int, watcher: Watcher) -> dict[str, Path]:
    """Train, dev and test of the demo's corpus, made if they are not there."""
    if folder.exists():
        return {name: folder / name / "manifest.jsonl" for name in _SPLITS}
    spec = SynthSpec(utterances=utterances, speakers=6, grammar="digits", words=(1, 5), noise=0.3, seed=0)
    return synthesise_splits(
        spec, folder, _SPLITS, jobs=2, progress=lambda done, n: watcher.progress("speaking", done, n)
    )


def run_of(folder: Path, parts: dict[str, Path], epochs: int) -> RunConfig:
    """The demo's run file."""
    return make_run(
        {
            "output": str(folder / "run"),
            "corpus": {name: str(path) for name, path in parts.items()} | {"licence": "synthetic speech, Apache-2.0"},
            "tokenizer": {"kind": "words", "size": 100},
            "model": {"settings": _MODEL},
            # short batches: the plateau at the start is a matter of steps
            "batch": {"seconds": 14},
            "augment": {"freq_masks": 0, "time_masks": 0},
            "optimizer": {"warmup": 0.2},
            "elastic": {"sizes": _SIZES},
            # a second thread gains little on a model this small, and costs tenfold where another program runs
            "train": {"epochs": epochs, "threads": 1},
        }
    )


def give_voices(folder: Path, model: Path, rounds: int, watcher: Watcher) -> Report:
    """Voices for two simulated atypical speakers; ``folder/voices`` is the run's folder."""
    place = folder / "atypical"
    if not place.exists():
        spec = SynthSpec(utterances=_PERSONAL, speakers=2, atypical=2, grammar="digits", words=(1, 5), seed=99)
        synthesise(spec, place, jobs=2, progress=lambda done, n: watcher.progress("speaking", done, n))
    wanted = Personalisation(
        split=Split(choose=0.2, test=0.3),
        schedule=Schedule(rounds=rounds, utterances=8, every=10),
        licence="synthetic speech, Apache-2.0",
    )
    return personalize(model, open_corpus(place / "manifest.jsonl"), folder / "voices", wanted, watcher=watcher)


def receipt_of(folder: Path, model: Path, report: Report) -> dict[str, Any] | None:
    """What a transcript with the first voice says of the weights that made it; None if no voice was kept."""
    kept = [o.speaker for o in report.outcomes if o.kept]
    if not kept:
        return None
    voiced, name = load_voiced(model, voice=kept[0], store=str(folder / "voices" / "voices"))
    theirs = next(u for u in open_corpus(folder / "atypical" / "manifest.jsonl") if u.speaker == kept[0])
    recogniser = voiced.recogniser(name)
    transcribe(recogniser, theirs.audio.read(recogniser.log_mel.rate))
    return voiced.take()[-1].as_dict()


def listen(model: Path, test: Corpus) -> tuple[tuple[str, str, str], ...]:
    """(file, what was said, what was heard) of three test utterances."""
    chosen = [test[i] for i in range(0, len(test), max(1, len(test) // 3))][:3]
    texts = [transcribe(model, u.audio.read(16_000))[0].text for u in chosen]
    return tuple((u.audio.describe(), u.text, text) for u, text in zip(chosen, texts, strict=True))


def _lap(started: float) -> tuple[float, float]:
    now = time.perf_counter()
    return round(now - started, 1), now
