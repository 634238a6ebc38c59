"""The whole story on one laptop: speak a corpus, train, measure, transcribe, and say where everything is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from manyvoice.config import RunConfig, make_run
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.padding import PaddingMeter, careless_padding
from manyvoice.data.synth import SynthSpec, synthesise_splits
from manyvoice.errors import UsageError
from manyvoice.recipes.card import read_card
from manyvoice.recipes.sizes import compare_sizes
from manyvoice.recipes.train import train
from manyvoice.recipes.transcribe import transcribe
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.train.metrics import read_metrics

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
            "seconds": self.seconds,
        }


def demo(
    folder: Path = Path("runs/demo"), *, utterances: int = 1600, epochs: int = 8, watcher: Watcher | None = None
) -> Demo:
    """Run it in ``folder``; what an interrupted demo has finished is used again.

    Raises: UsageError if the folder holds something else; SynthesisError without espeak-ng.
    """
    watcher = watcher or Silent()
    if folder.exists() and any(folder.iterdir()) and not (folder / "speech").exists():
        raise UsageError(f"{folder} is there already and no demo's folder; choose another with --folder")
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    watcher.note(f"1 of 5  a corpus of digit strings, spoken by 6 synthetic speakers, in {folder / 'speech'}")
    parts = speak(folder / "speech", utterances, watcher)
    seconds["speak"], started = _lap(started)
    watcher.note("2 of 5  a recogniser of 0.9 million parameters in five sizes, all trained at once from nothing")
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
    watcher.note(f"3 of 5  {wer:.1%} of the words of {len(test)} unheard phrases are wrong")
    watcher.note("4 of 5  what the sizes cost, and how fast they are here")
    sizes = compare_sizes(model, None)
    for row in sizes:
        watcher.note(
            f"        size {row['size']:>3}: {row['parameters'] / 1e6:.2f} M parameters, {row['layer_macs_share']:.0%} "
            f"of the layers' multiply-accumulates, {row['times_real_time']:.0f} times real time, WER {row['wer']:.1%}"
        )
    watcher.note("5 of 5  three phrases, transcribed")
    heard = listen(model, test)
    seconds["transcribe"], _ = _lap(started)
    return Demo(folder=folder, model=model, wer=wer, heard=heard, sizes=sizes, seconds=seconds)


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
            "optimizer": {"lr": 6e-4, "warmup": 0.2},
            "elastic": {"sizes": _SIZES},
            # a second thread gains little on a model this small, and costs tenfold where another program runs
            "train": {"epochs": epochs, "threads": 1},
        }
    )


def listen(model: Path, test: Corpus) -> tuple[tuple[str, str, str], ...]:
    """(file, what was said, what was heard) of three test utterances."""
    chosen = [test[i] for i in range(0, len(test), max(1, len(test) // 3))][:3]
    texts = [transcribe(model, u.audio.read(16_000))[0].text for u in chosen]
    return tuple((u.audio.describe(), u.text, text) for u, text in zip(chosen, texts, strict=True))


def _lap(started: float) -> tuple[float, float]:
    now = time.perf_counter()
    return round(now - started, 1), now
