"""A recogniser as ONNX, in NeMo's convention, so that ONNX Runtime and sherpa-onnx run it without torch.

    audio_signal  float32 B F T   log-mel features, normalised        logprobs  float32 B E V  log-probabilities
    length        int64 B         feature frames of each utterance    lengths   int64 B        encoder frames of each

B, T and with it E are dynamic. Beside ``model.onnx`` lie ``tokens.txt``, a token and its number a line, the blank as
``<blk>``, and ``features.npz``, from which sound becomes features without torch (``LogMel.arrays``). A file is called
done only once ONNX Runtime gives torch's answers on ragged batches.

With voices there is one more input, so that one file serves every voice, several in one batch:

    voice         float32 B P     numbers of each utterance's voice, zeros for the bare base; voices.json says which

    B  utterances   F  mel bins   T  feature frames   E  encoder frames   V  vocabulary   P  numbers of a voice
    K  voices that parity is checked with, the base as zeros first
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from manyvoice.data.tokens import WORD_START
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import ModelError, UsageError, VoiceError, WorkError
from manyvoice.export.flat import VoiceInput, flat, fresh
from manyvoice.submodels.bank import edited
from manyvoice.types import Padded

OPSET = 18
# Float32 sums in another order differ by about 1e-6 in log-probability; a wrong mask or weight by more than 1e-2.
TOLERANCE = 1e-3
# Frames of the utterances that parity is checked with, batch by batch.
_RAGGED = ((40,), (333, 120, 17), (1000, 16, 512, 999, 64))
INT8, VOICES = "model.int8.onnx", "voices.json"
# The rows of voices that an export writes, as voices.json lists them.
_ROW = re.compile(r"voices/[0-9a-f]{12}\.npy")
# What sherpa-onnx wants to know of a model (its offline-nemo-enc-dec-ctc-model.cc).
_NORMALISATION = "per_feature"

# features B F T, lengths B and voices B P to log-probabilities B E V and lengths B
Run = Callable[[np.ndarray, np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported folder.

    Args: parity: largest difference in log-probability from torch, over valid frames.  voices: vectors of the
        voices that it was exported with.
    """

    model: Path
    tokens: Path
    parity: float
    int8: Path | None
    bytes: int
    int8_bytes: int | None
    voices: tuple[Path, ...] = ()


class _Scores(nn.Module):
    """The recogniser's model under the names and shapes of the file."""

    def __init__(self, recogniser: Recogniser, voices: VoiceInput | None = None) -> None:
        super().__init__()
        self.voices, self.layout = voices, () if voices is None else voices.layout
        self.family = recogniser.family
        self.model = copy.deepcopy(recogniser.model).float().cpu().eval()
        # sdpa's output has strides that torch.export cannot follow with symbolic lengths
        self.model.set_attn_implementation("eager")

    def forward(self, audio_signal: Tensor, length: Tensor, voice: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.voices is None or voice is None:
            return self._scores(audio_signal, length)
        voice_BP, method, sites = voice, self.voices.method, self.voices.sites

        def tensors(key: str) -> dict[str, Tensor]:
            here = [place for place in self.layout if place.key in ("", key)]
            return {p.part: voice_BP[:, p.offset : p.stop].unflatten(1, p.shape) for p in here}

        with edited(self.model, method, sites, tensors, layers=self.voices.layers, slices=self.voices.slices):
            return self._scores(audio_signal, length)

    def _scores(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.family.encode(self.model, audio_signal.transpose(1, 2), length)
        out = self.family.logits(self.model, encoded)
        return out.x.log_softmax(-1), out.len_B


def export_onnx(
    recogniser: Recogniser, folder: Path, *, int8: bool = False, voices: VoiceInput | None = None
) -> Exported:
    """Write ``model.onnx``, ``tokens.txt`` and ``features.npz``, and with ``int8`` also ``model.int8.onnx``.

    What an earlier export into that folder wrote and this one does not is removed: it would not fit the new model.
    int8 quantises the weights of matrix products, activations as they come, with one scale for a batch; voices stay as
    they are. It has no parity to hold: measure its error rate with :func:`onnx_recogniser`.

    Args: voices: gives the file its input ``voice``, and the folder ``voices.json`` and ``voices/<hash>.npy``.
    Raises: UsageError without the packages; VoiceError for a voice that does not fit; WorkError if the file cannot be
        written, or does not give torch's answers.
    """
    onnx, _ = _packages()
    if (folder.exists() and not folder.is_dir()) or (folder / "config.json").exists():
        what = "holds a model" if folder.is_dir() else "is a file"
        raise UsageError(f"{folder} {what}; name another folder to export to")
    scores, tried_KP = _Scores(recogniser, voices), None
    if voices is not None:
        told = voices.describe(recogniser.tokenizer.fingerprint())
        for voice in voices.voices:
            voice.check(voices.anatomy, base=voices.base, tokenizer=told["tokenizer"])
        given = [torch.from_numpy(flat(voice, scores.layout)) for voice in voices.voices]
        tried_KP = torch.stack([torch.zeros(told["numbers"]), *fresh(voices), *given])
    model, tokens = folder / "model.onnx", folder / "tokens.txt"
    aside = folder / "model.tmp.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _export(scores, recogniser.log_mel.bins, aside)
        _describe(onnx, aside, recogniser, {} if voices is None else {"voices": json.dumps(told)})
        parity = check_parity(aside, scores, recogniser.log_mel.bins, tried_KP)
        tokens.write_text(tokens_of(recogniser), encoding="utf-8")
        arrays: dict[str, Any] = dict(recogniser.log_mel.arrays())
        np.savez(folder / "features.npz", **arrays)
        _remove_earlier(folder)
        files = () if voices is None else voices.write(folder, told["tokenizer"])
        aside.replace(model)
        quantised = _quantised(model) if int8 else None
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error}); free space or name another folder") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return Exported(
        model=model, tokens=tokens, parity=parity, int8=quantised, bytes=model.stat().st_size,
        int8_bytes=None if quantised is None else quantised.stat().st_size, voices=files,
    )  # fmt: skip


def _remove_earlier(folder: Path) -> None:
    """The int8 file and the voices of an earlier export; rows that somebody else put beside them stay."""
    rows: set[str] = set()
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        listed = json.loads((folder / VOICES).read_bytes())["voices"]
        rows = {row for one in listed if _ROW.fullmatch(row := one["file"])}
    for name in (INT8, VOICES, *sorted(rows)):
        (folder / name).unlink(missing_ok=True)
    # not empty: somebody else's files
    with suppress(OSError):
        (folder / "voices").rmdir()


def _export(scores: _Scores, bins: int, path: Path) -> None:
    batch, frames = torch.export.Dim("B", min=1), torch.export.Dim("T", min=16)
    example: tuple[Tensor, ...] = torch.zeros(2, bins, 101), torch.tensor([101, 77])
    shapes = {"audio_signal": {0: batch, 2: frames}, "length": {0: batch}}
    if scores.layout:
        example, shapes = (*example, torch.zeros(2, scores.layout[-1].stop)), shapes | {"voice": {0: batch}}
    with _quiet():
        try:
            program = torch.onnx.export(
                scores, example, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(shapes), output_names=["logprobs", "lengths"], dynamic_shapes=shapes,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise WorkError(
                f"{path.parent}: torch {torch.__version__} cannot export this model ({str(error).splitlines()[0]}); "
                "try another version of torch (constraints.txt names those that were tested)"
            ) from error
        assert program is not None
        program.save(str(path), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations and hints of the exporters say nothing to a user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _describe(onnx: Any, path: Path, recogniser: Recogniser, more: Mapping[str, str]) -> None:
    """Write into the file what a runtime must know to feed it."""
    model = onnx.load(str(path))
    frame = recogniser.log_mel.stock.hop_length / recogniser.log_mel.stock.sampling_rate
    told = {
        "vocab_size": len(recogniser.tokenizer) - 1,  # NeMo does not count the blank
        "normalize_type": _NORMALISATION,
        "subsampling_factor": round(recogniser.shift / frame),
        "model_type": "EncDecCTCModelBPE",
        "model_author": "manyvoice",
        "comment": f"fingerprint {recogniser.fingerprint()}",
        **more,
    }
    onnx.helper.set_model_props(model, {k: str(v) for k, v in told.items()})
    onnx.save(model, str(path))


def tokens_of(recogniser: Recogniser) -> str:
    """``tokens.txt``: a word starts at a token with ``▁`` in front, in word vocabularies at every one."""
    start = WORD_START if recogniser.tokenizer.boundary == "every" else ""
    names = [start + s for s in recogniser.tokenizer.strings]
    names[recogniser.tokenizer.blank] = "<blk>"
    return "".join(f"{name} {i}\n" for i, name in enumerate(names))


def check_parity(path: Path, scores: nn.Module, bins: int, voices_KP: Tensor | None = None) -> float:
    """The largest difference from torch over the valid frames of ragged batches. WorkError above ``TOLERANCE``.

    Args: voices_KP: each speaks at least one utterance, mixed with others and then alone, which must give the same.
    """
    run = _runner(path)
    gen = torch.Generator().manual_seed(0)
    worst, next_voice = 0.0, 0
    batches = list(_RAGGED)
    while voices_KP is not None and sum(map(len, batches)) < len(voices_KP):
        batches.append((90, 40, 61, 77))
    for lengths in batches:
        len_B = torch.tensor(lengths)
        x_BFT = torch.randn(len(lengths), bins, max(lengths), generator=gen)
        x_BFT *= torch.arange(max(lengths)) < len_B[:, None, None]
        voice_BP = None
        if voices_KP is not None:
            voice_BP = voices_KP[(next_voice + torch.arange(len(lengths))) % len(voices_KP)]
            next_voice += len(lengths)
        with torch.no_grad():
            expected, frames_B = scores(x_BFT, len_B, voice_BP)
        worst = max(worst, _difference(run, (x_BFT, len_B, voice_BP), expected, frames_B, path))
        if voice_BP is not None:
            for b, n in enumerate(lengths):
                one = x_BFT[b : b + 1, :, :n], len_B[b : b + 1], voice_BP[b : b + 1]
                alone = expected[b : b + 1, : int(frames_B[b])]
                worst = max(worst, _difference(run, one, alone, frames_B[b : b + 1], path))
    if not worst <= TOLERANCE:
        raise WorkError(
            f"{path.name}: log-probabilities differ from torch by {worst:.2g}, more than {TOLERANCE:g}, so it is not "
            "written; try another version of onnx or onnxruntime (constraints.txt names those that were tested)"
        )
    return worst


def _difference(
    run: Run, inputs: tuple[Tensor, Tensor, Tensor | None], expected: Tensor, frames_B: Tensor, path: Path
) -> float:
    """Over valid frames. WorkError if not even the shapes agree, or numbers cannot be compared."""
    x_BFT, len_B, voice_BP = inputs
    found, found_B = run(x_BFT.contiguous().numpy(), len_B.numpy(), None if voice_BP is None else voice_BP.numpy())
    if found.shape != tuple(expected.shape) or found_B.tolist() != frames_B.tolist():
        raise WorkError(f"{path.name}: ONNX Runtime gives {found.shape}, torch {tuple(expected.shape)}; not written")
    each = [float(np.abs(found[b, :n] - expected[b, :n].numpy()).max()) for b, n in enumerate(frames_B.tolist())]
    # max() passes over NaN, which is no less wrong than a large number
    if not np.isfinite(each).all():
        raise WorkError(
            f"{path.name}: log-probabilities differ from torch by {each}, which must be finite, so it is not written; "
            "look for NaN in the model's weights, or try another version of onnx or onnxruntime"
        )
    return max(each)


def _quantised(model: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = model.with_name(INT8)
    with _quiet():
        quantize_dynamic(str(model), str(path), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    return path


def onnx_recogniser(
    path: Path, recogniser: Recogniser, *, threads: int = 1, voice_P: np.ndarray | None = None
) -> Recogniser:
    """The recogniser with its scores from an ONNX file of it, to measure what the file costs in errors.

    Args: voice_P: with which every utterance is recognised, as ``export.flat.flat`` gives it; None is the bare base.
    """
    run = _runner(path, threads)

    def logp(features_BTF: Tensor, len_B: Tensor) -> Padded:
        x_BFT = features_BTF.transpose(1, 2).contiguous().numpy().astype(np.float32)
        voice_BP = None if voice_P is None else np.tile(voice_P, (len(x_BFT), 1))
        scores, lengths = run(x_BFT, len_B.numpy().astype(np.int64), voice_BP)
        return Padded(x=torch.from_numpy(scores), len_B=torch.from_numpy(lengths))

    return recogniser.scored_by(logp)


def _runner(path: Path, threads: int = 1) -> Run:
    _, runtime = _packages()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own for missing and damaged files
        raise ModelError(f"{path}: no ONNX model that ONNX Runtime reads ({error}); export it again") from error
    numbers = {put.name: put.shape for put in session.get_inputs()}.get("voice", [0, 0])[1]

    def run(x_BFT: np.ndarray, len_B: np.ndarray, voice_BP: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if voice_BP is None:
            voice_BP = np.zeros((len(x_BFT), numbers), np.float32)
        if voice_BP.shape[1] != numbers:
            raise VoiceError(
                f"{path}: takes voices of {numbers} numbers, but this one has {voice_BP.shape[1]}; export the model "
                "with a voice of the same method and settings"
            )
        fed = {"audio_signal": x_BFT, "length": len_B} | ({"voice": voice_BP} if numbers else {})
        scores, lengths = session.run(["logprobs", "lengths"], fed)
        return scores, lengths

    return run


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise UsageError(f"export to ONNX needs {error.name}: pip install 'manyvoice[export]'") from error
    return onnx, onnxruntime
