"""A model, or one of its sizes, exported, and what the exported files cost in errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.export.onnx import Exported, export_onnx, onnx_recogniser
from manyvoice.recipes.sizes import load_size
from manyvoice.recipes.watch import Silent, Watcher


def export(
    spec: str | Path,
    folder: Path,
    *,
    size: str | None = None,
    int8: bool = False,
    corpus: Corpus | None = None,
    watcher: Watcher | None = None,
) -> tuple[Exported, dict[str, float]]:
    """Write ONNX, and give the word error rates on a corpus with torch, with the file, and with the int8 file.

    Raises: as ``export_onnx`` and ``load_size`` do.
    """
    watcher = watcher or Silent()
    recogniser = load_size(spec, size)
    watcher.note("exporting; that takes a minute")
    made = export_onnx(recogniser, folder, int8=int8)
    if corpus is None:
        return made, {}
    arms = {"torch": recogniser, "onnx": onnx_recogniser(made.model, recogniser)}
    if made.int8 is not None:
        arms["int8"] = onnx_recogniser(made.int8, recogniser)
    return made, {n: evaluate(arm, corpus, progress=partial(watcher.progress, n)).words.rate for n, arm in arms.items()}
