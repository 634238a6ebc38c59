"""A model, one of its sizes, or a voice of it, in the forms that other programs read, and what they cost in errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.narrow import Elastic
from manyvoice.errors import UsageError, WorkError
from manyvoice.export.flat import VoiceInput, flat
from manyvoice.export.merge import merge
from manyvoice.export.onnx import Exported, export_onnx, onnx_recogniser
from manyvoice.export.peft import to_peft
from manyvoice.recipes.card import CARD, measured, read_card, write_derived_card
from manyvoice.recipes.sizes import SUBNET, alone, find_size, load_size, refuse_full
from manyvoice.recipes.variant import load_variant
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.submodels.voice import Voice


def read_voice(path: Path) -> Voice:
    """The voice of a file. VoiceError if it cannot be read."""
    return Voice.read(path)


def export(
    spec: str | Path,
    folder: Path,
    *,
    size: str | None = None,
    voices: Sequence[Voice] = (),
    int8: bool = False,
    corpus: Corpus | None = None,
    watcher: Watcher | None = None,
) -> tuple[Exported, dict[str, float]]:
    """Write ONNX, and give the word error rates on a corpus with torch, with the file, and with the int8 file.

    Args: voices: of one method and one set of settings; the file then takes a voice for each utterance. Error rates
        with each are under ``onnx <hash>`` and ``int8 <hash>``.
    Raises: as ``export_onnx``, ``load_size`` and ``load_variant`` do.
    """
    watcher = watcher or Silent()
    recogniser, put = _with_voices(spec, size, voices) if voices else (load_size(spec, size), None)
    watcher.note("exporting; that takes a minute")
    made = export_onnx(recogniser, folder, int8=int8, voices=put)
    if corpus is None:
        return made, {}
    layout = () if put is None else put.layout
    arms = {"torch": recogniser}
    for name, path in {"onnx": made.model, "int8": made.int8}.items():
        if path is not None:
            arms[name] = onnx_recogniser(path, recogniser)
            for voice in voices:
                vector_P = flat(voice, layout)
                arms[f"{name} {voice.hash[:12]}"] = onnx_recogniser(path, recogniser, voice_P=vector_P)
    return made, {n: evaluate(arm, corpus, progress=partial(watcher.progress, n)).words.rate for n, arm in arms.items()}


def _with_voices(spec: str | Path, size: str | None, voices: Sequence[Voice]) -> tuple[Recogniser, VoiceInput]:
    variant = load_variant(spec, size, base=voices[0].base)
    for voice in voices:
        variant.check(voice)
    put = VoiceInput(
        method=voices[0].method, anatomy=variant.anatomy, base=variant.base, layers=variant.layers,
        slices=variant.slices, voices=tuple(voices),
    )  # fmt: skip
    return variant.recogniser, put


def export_merged(
    spec: str | Path,
    folder: Path,
    voice: Voice,
    *,
    size: str | None = None,
    corpus: Corpus | None = None,
    watcher: Watcher | None = None,
) -> Mapping[str, Any]:
    """Write an ordinary model folder with a voice worked into its weights; returns the results on a corpus.

    Raises: UsageError for a folder that holds something, and for an extracted size; VoiceError as ``merge`` does;
        WorkError if the folder cannot be written.
    """
    watcher = watcher or Silent()
    refuse_full(folder)
    base = _whole(spec)
    made = merge(base, voice)
    if size is not None:
        made = alone(made, Elastic(made.model), find_size(base, size))
    assert base.folder is not None, "loaded from a folder"
    results = measured(made, {"test": corpus}, watcher, "measuring on")
    try:
        made.save(folder)
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error}); free space or name another folder") from error
    if (base.folder / CARD).exists():
        card = read_card(base.folder) | {"voice": {"hash": voice.hash, "method": voice.method.name}}
        words = f"manyvoice export {spec} --to folder --voice {voice.hash[:12]}"
        command = words if size is None else f"{words} --size {size}"
        write_derived_card(folder, made, card, results=results, command=command)
    return results


def export_peft(spec: str | Path, folder: Path, voice: Voice) -> Path:
    """Write a LoRA voice as PEFT reads it, for servers that load the base with PEFT.

    Raises: UsageError for a folder that holds something, and for an extracted size; VoiceError as ``to_peft`` does.
    """
    refuse_full(folder)
    base = _whole(spec)
    voice.check(
        base.family.anatomy(base.model), base=base.fingerprint(), tokenizer=base.tokenizer.fingerprint()
    )  # fmt: skip
    return to_peft(voice, base.model, folder, base_model=str(spec))


def _whole(spec: str | Path) -> Recogniser:
    """The base itself. UsageError for a folder of one extracted size."""
    base = Recogniser.load(spec)
    if base.folder is not None and (base.folder / SUBNET).exists():
        raise UsageError(
            f"{spec} is one extracted size; give the model that it was taken from, and --size for a folder"
        )
    return base
